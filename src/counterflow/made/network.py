"""MADE: one network that computes the parameters of every feature from the features before it.

Each feature has a degree d in 1..G, each hidden unit a degree e in 0..G-1, and hidden units are sorted by
degree, so that every mask is a staircase:

    first layer    unit e sees feature i      when d_i <= e
    hidden layers  unit e sees unit e'        when e' <= e
    output         params_i sees unit e       when e < d_i

Source: Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation"; the sorting is ours.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from counterflow.checks import positive
from counterflow.made.activations import activation_named
from counterflow.made.architecture import Architecture, Links
from counterflow.made.masked_linear import MaskedLinear


class MADE(nn.Module):
    """A masked network: features x (..., D), sorted by degree, and a context c (..., C) to parameters (..., D, P).

    The context enters the first hidden layer unmasked, or as the architecture says. The output layer starts at 3e-4 of the
    others' size, so that a flow of five layers starts within 1e-2 of what its univariate map does with zero parameters.

    Args:
        degrees: D degrees in ascending order.
        parameters: P, the number of parameters per feature.
        hidden: the sizes of the hidden layers.
        activation: a name from ACTIVATIONS.
        context: C.
        architecture: how the layers are joined; a chain when not given.

    Attributes:
        ends: for the features and for each hidden layer, how many units have a degree of at most g, for
            g = 0..G. This is all that substitution has to know about the masks.
        chain: what it has to know about the architecture.
    """

    def __init__(
        self,
        degrees: Sequence[int],
        parameters: int,
        hidden: Sequence[int],
        activation: str,
        context: int,
        architecture: Architecture | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.parameters_per_feature = parameters
        if isinstance(hidden, int) or not hidden:
            raise ValueError(f"expected the sizes of the hidden layers, such as hidden=(64, 64), got hidden={hidden!r}")
        sizes = [positive(size, f"hidden[{k}]") for k, size in enumerate(hidden)]
        G, architecture = max(degrees), Architecture() if architecture is None else architecture
        # Units of degree 0 see the context alone: without one they would be constants.
        lowest = 0 if context or G == 1 else 1
        levels = [list(degrees), *architecture.degrees(sizes, G, lowest)]
        self.ends = tuple(tuple(bisect_right(level, g) for g in range(G + 1)) for level in levels)
        self.chain = Links(
            tuple(architecture.skips) or (None,) * len(sizes),
            tuple(architecture.linear) or (False,) * len(sizes),
            architecture.direct,
        )

        d = [torch.tensor(level) for level in levels]
        masks = [after[:, None] >= before[None, :] for before, after in pairwise(d)]
        outputs = [(d[0][:, None] > seen[None, :]).repeat_interleave(parameters, dim=0) for seen in (d[-1], d[0])]
        heard = {k: k in architecture.activated_contexts for k in architecture.contexts if context}
        self.layers = nn.ModuleList(
            MaskedLinear(mask, more_inputs=context if k in heard else 0) for k, mask in enumerate(masks)
        )
        self.layers.append(MaskedLinear(outputs[0], gain=3e-4))
        self.direct = MaskedLinear(outputs[1], gain=3e-4) if architecture.direct else None
        self.contexts = nn.ModuleDict({str(k): nn.Linear(context, sizes[k], bias=own) for k, own in heard.items()})
        self.activated_contexts = architecture.activated_contexts
        self.direct_context = (
            nn.Linear(context, len(outputs[0]), bias=False) if architecture.direct and context else None
        )
        if self.direct_context is not None:
            nn.init.zeros_(self.direct_context.weight)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.masked_layers()[0].weight.dtype

    def masked_layers(self) -> list[MaskedLinear]:
        """The layers in order, the last one giving the parameters, and the direct one, if there is one."""
        layers = list(self.layers) if self.direct is None else [*self.layers, self.direct]
        return layers  # type: ignore[return-value]  # that is all that it holds

    def shifts(self, c: Tensor | None) -> dict[int, Tensor]:
        """What the context adds to the hidden layers, and to the parameters under the number after theirs."""
        if c is None:
            return {}
        found = {int(k): layer(c) for k, layer in self.contexts.items()}
        found |= {k: self.activation.f(found[k]) for k in self.activated_contexts}
        return found if self.direct_context is None else found | {len(self.layers) - 1: self.direct_context(c)}

    def run(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Parameters (..., D, P), and what each hidden layer holds before its activation, (..., H) each."""
        before: list[Tensor] = []
        fed, shifts = x, self.shifts(c)
        *layers, last = self.layers  # a slice would build another ModuleList
        for k, (layer, skip) in enumerate(zip(layers, self.chain.skips, strict=True)):
            a = layer(fed)
            if k in shifts:
                a = a + shifts[k]
            if skip is not None:
                a = a + before[skip]
            before.append(a)
            fed = a if self.chain.linear[k] else self.activation.f(a)
        params = last(fed)
        if self.direct is not None:
            params = params + self.direct(x)
        if self.direct_context is not None:
            params = params + shifts[len(layers)]
        return params.reshape(*x.shape, self.parameters_per_feature), tuple(before)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Parameters (..., D, P)."""
        return self.run(x, c)[0]
