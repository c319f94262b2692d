"""MADE: a network that computes the parameters of every feature from the features before it.

Each feature has a degree d in 1..G and each hidden unit a degree e in 0..G-1. Hidden units are sorted by degree, so
that every mask is a staircase:

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
from counterflow.made.architecture import Architecture
from counterflow.made.derived import with_values
from counterflow.made.graph import Set, Subsets, degree, unit_sets
from counterflow.made.masked_linear import MaskedLinear


class MADE(nn.Module):
    """Masked network: features x (..., D), sorted by degree, and a context c (..., C) to parameters (..., D, P).

    By default the context enters the first hidden layer, unmasked. The weights of the output layer start 3e-4 times as
    large as those of the others, so that a flow of five layers starts within 1e-2 of its univariate map with zero
    parameters.

    Args:
        degrees: D degrees in ascending order.
        parameters: P, the number of parameters per feature.
        hidden: sizes of the hidden layers.
        activation: a name in ACTIVATIONS.
        context: C.
        architecture: connections between the layers; a plain sequence of layers when not given.
        parents: for each feature, the features that it sees, of lower degree; all of lower degree when not given.

    Attributes:
        ends: for the features and for each hidden layer, the number of units of degree g or less, for g = 0..G. This
            is all that substitution needs to know about the masks.
        links: connections between the hidden layers.

    Raises:
        ValueError: no hidden layers, a size below 1, an unknown activation, or an architecture that does not fit the
            sizes or the parents.
    """

    def __init__(
        self,
        degrees: Sequence[int],
        parameters: int,
        hidden: Sequence[int],
        activation: str,
        context: int,
        architecture: Architecture | None = None,
        parents: Sequence[Set] | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.parameters_per_feature = parameters
        if isinstance(hidden, int) or not hidden:
            raise ValueError(f"expected the sizes of the hidden layers, such as hidden=(64, 64), got hidden={hidden!r}")
        sizes = [positive(size, f"hidden[{k}]") for k, size in enumerate(hidden)]
        if architecture is None:
            architecture = Architecture()
        G = max(degrees)
        # Units of degree 0 see only the context: without a context they would be constants.
        lowest = 0 if context or G == 1 else 1
        if parents is None:
            hidden_levels = architecture.degrees(sizes, G, lowest)
        elif architecture.hidden_degrees is not None:
            raise ValueError("expected adjacency or an architecture with hidden_degrees, got both; leave one out")
        else:
            sets = [unit_sets(parents, size, context) for size in sizes]
            hidden_levels = [[degree(each, degrees) for each in layer] for layer in sets]
        self.links = architecture.links(hidden_levels)
        levels = [list(degrees), *hidden_levels]
        self.ends = tuple(tuple(bisect_right(level, g) for g in range(G + 1)) for level in levels)

        with with_values():
            d = [torch.tensor(level, device="cpu") for level in levels]
            masks = [after[:, None] >= before[None, :] for before, after in pairwise(d)]
            outputs = [(d[0][:, None] > seen[None, :]).repeat_interleave(parameters, dim=0) for seen in (d[-1], d[0])]
        graphs: list[Subsets | None] = [None] * (len(masks) + 2)  # of the hidden layers and of the outputs
        if parents is not None:
            D = len(degrees)
            seen: list[list[Set]] = [
                [(i,) for i in range(D)],
                *sets,
                [each for each in parents for _ in range(parameters)],
            ]
            graphs = [Subsets(after, before, D) for before, after in (*pairwise(seen), (seen[0], seen[-1]))]
        contexts = architecture.contexts if context else ()
        self.layers = nn.ModuleList(
            MaskedLinear(mask, more_inputs=context if k in contexts else 0, graph=graphs[k])
            for k, mask in enumerate(masks)
        )
        self.layers.append(MaskedLinear(outputs[0], gain=3e-4, graph=graphs[-2]))
        self.skip_to_output: MaskedLinear | None = None
        if self.links.skip_to_output:
            self.skip_to_output = MaskedLinear(outputs[1], gain=3e-4, graph=graphs[-1])
        self.activated_contexts = architecture.activated_contexts
        # The bias of the hidden layer serves as v in V c + v, unless f(V c + v) is what is added.
        self.contexts = nn.ModuleDict(
            {str(k): nn.Linear(context, sizes[k], bias=k in self.activated_contexts) for k in contexts}
        )
        self.context_to_output: nn.Linear | None = None
        if self.links.skip_to_output and context:
            self.context_to_output = nn.Linear(context, len(outputs[0]), bias=False)
            nn.init.zeros_(self.context_to_output.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.masked_layers()[0].weight.dtype

    def masked_layers(self) -> list[MaskedLinear]:
        """Return the layers in order, the output layer last, followed by `skip_to_output` if there is one."""
        layers = list(self.layers) if self.skip_to_output is None else [*self.layers, self.skip_to_output]
        return layers  # type: ignore[return-value]  # a ModuleList does not state the type of its entries

    def shifts(self, c: Tensor | None) -> dict[int, Tensor]:
        """Return the terms that the context adds to the layers, {index of the layer: (..., units)}."""
        if c is None:
            return {}
        terms = {int(k): layer(c) for k, layer in self.contexts.items()}
        for k in self.activated_contexts:
            terms[k] = self.activation.f(terms[k])
        if self.context_to_output is not None:
            terms[len(self.layers) - 1] = self.context_to_output(c)
        return terms

    def run(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the parameters (..., D, P) and the hidden layers before their activation, (..., H) each."""
        shifts = self.shifts(c)

        def affine(k: int, v: Tensor) -> Tensor:
            out: Tensor = self.layers[k](v)
            return out + shifts[k] if k in shifts else out

        hidden, last = self.links.propagate(affine, x, self.activation.f)
        params = self.layers[len(hidden)](last)
        if self.skip_to_output is not None:
            params = params + self.skip_to_output(x)
        if self.context_to_output is not None:
            params = params + shifts[len(hidden)]
        return params.reshape(*x.shape, self.parameters_per_feature), hidden

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Return the parameters (..., D, P)."""
        return self.run(x, c)[0]
