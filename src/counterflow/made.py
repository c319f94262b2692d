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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.staircase import Staircase, linear
from counterflow.transform import positive


class Activation(NamedTuple):
    """An elementwise function and its derivative, both of the value before activation."""

    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]


def _df_relu(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


def _df_leaky_relu(a: Tensor) -> Tensor:
    return torch.where(a > 0, torch.ones_like(a), 0.01)


def _df_elu(a: Tensor) -> Tensor:
    return torch.exp(a.clamp_max(0))


def _df_tanh(a: Tensor) -> Tensor:
    return 1 - torch.tanh(a).square()


def _df_sigmoid(a: Tensor) -> Tensor:
    return torch.sigmoid(a) * torch.sigmoid(-a)


def _df_silu(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _df_softplus(a: Tensor) -> Tensor:
    return torch.where(a > 20, torch.ones_like(a), torch.sigmoid(a))  # torch's softplus is linear above 20


# Named functions, no lambdas: modules that hold them are pickled by whoever starts worker processes.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, _df_relu),
    "leaky_relu": Activation(F.leaky_relu, _df_leaky_relu),
    "elu": Activation(F.elu, _df_elu),
    "tanh": Activation(torch.tanh, _df_tanh),
    "sigmoid": Activation(torch.sigmoid, _df_sigmoid),
    "silu": Activation(F.silu, _df_silu),
    "softplus": Activation(F.softplus, _df_softplus),
}


def activation_named(name: str) -> Activation:
    """The activation of that name, or an error that lists all."""
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation as one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}")
    return ACTIVATIONS[name]


def hidden_degrees(size: int, top: int, lowest: int) -> list[int]:
    """Sorted degrees of `size` hidden units, spread evenly over lowest..top; with few units, both ends are kept.

    Example:
        >>> hidden_degrees(6, top=3, lowest=1), hidden_degrees(2, top=9, lowest=1), hidden_degrees(1, top=9, lowest=0)
        ([1, 1, 2, 2, 3, 3], [1, 9], [9])
    """
    levels = top - lowest + 1
    if size >= levels:
        return [lowest + k * levels // size for k in range(size)]
    return [top - round(k * (levels - 1) / max(size - 1, 1)) for k in reversed(range(size))]


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is masked by a staircase (out, in) at each use; see `counterflow.staircase`.

    The weight starts at 0 where it is forbidden and its gradient is exactly 0 there, so that training keeps it there.
    Whatever else may be written into it, by hand, from a file or by a parametrization, has no effect on the layer.
    """

    def __init__(self, mask: Tensor, gain: float = 1.0, more_inputs: int = 0) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = mask.shape
        self.staircase = Staircase(mask)
        # Uniform with variance gain^2 / (inputs that the row sees), so that early features are not drowned.
        spread = gain * torch.sqrt(3.0 / (mask.sum(1, keepdim=True) + more_inputs).clamp_min(1))
        self.weight = nn.Parameter(torch.empty(mask.shape).uniform_(-1, 1) * spread * mask)
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    @property
    def mask(self) -> Tensor:
        """(out, in), numbers or booleans: where the weight has an effect."""
        return self.staircase.mask

    def masked_weight(self) -> Tensor:
        """The weight with its forbidden entries at exactly 0."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias, self.staircase)


@dataclass(frozen=True)
class Wiring:
    """How the layers of a MADE are joined, where it is more than a chain; what every field allows keeps the degrees.

    With h the hidden layers before their activation f, x the features and c the context:

        h_k = W_k fed_{k-1} + b_k + V_k c + h_{skips[k]}, where fed_{k-1} = f(h_{k-1}), or h_{k-1} if linear[k-1]
        params = W fed_last + b + direct x

    A residual network has skips of two layers: with skips=(None, None, 0, None, 2) and
    linear=(False, False, False, False, True) it has two blocks, and the last sum is not activated.

    Args:
        hidden_degrees: of each hidden layer, in ascending order; spread evenly when not given. A unit of degree e sees
            the features of degree e and below.
        skips: for each hidden layer an earlier one of the same degrees that is added to it, or None.
        linear: for each hidden layer whether what it feeds on is itself, without the activation.
        contexts: the hidden layers that receive the context.
        activated_contexts: those of them to which f(V c + v) is added in place of V c.
        direct: whether the features (and the context) lead straight to the parameters as well.

    Raises:
        ValueError: layers that do not exist, degrees out of order.

    Source: residual networks, He et al. 2016, "Identity Mappings in Deep Residual Networks"; in a MADE, Durkan and Nash
    2019, "Autoregressive Energy Machines".

    Example:
        >>> import counterflow as cf
        >>> wiring = Wiring(skips=(None, None, 0), linear=(False, False, True))
        >>> cf.Autoregressive(3, hidden=(16, 16, 16), wiring=wiring).inverse_cost
        'forward substitution'
    """

    hidden_degrees: Sequence[Sequence[int]] | None = None
    skips: Sequence[int | None] = ()
    linear: Sequence[bool] = ()
    contexts: Sequence[int] = (0,)
    activated_contexts: Sequence[int] = ()
    direct: bool = False

    def __post_init__(self) -> None:
        for name in ("skips", "linear", "contexts", "activated_contexts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.hidden_degrees is not None:
            object.__setattr__(self, "hidden_degrees", tuple(map(tuple, self.hidden_degrees)))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)

    def degrees(self, sizes: Sequence[int], G: int, lowest: int) -> list[list[int]]:
        """The degrees of hidden layers of these sizes; ValueError where the wiring does not fit to them."""
        if self.hidden_degrees is None:
            found = [hidden_degrees(size, G - 1, lowest) for size in sizes]
        else:
            found = [list(level) for level in self.hidden_degrees]
        layers = range(len(sizes))
        if [len(level) for level in found] != list(sizes) or any(
            level != sorted(level) or not 0 <= level[0] <= level[-1] < G for level in found
        ):
            raise ValueError(
                f"expected hidden_degrees in ascending order from 0..{G - 1} for hidden layers of {tuple(sizes)} "
                f"units, got {self.hidden_degrees!r}"
            )
        if any(field and len(field) != len(sizes) for field in (self.skips, self.linear)) or not (
            set(self.activated_contexts) <= set(self.contexts) <= set(layers)
        ):
            raise ValueError(f"expected a wiring of {len(sizes)} hidden layers, got {self!r}")
        for k, source in enumerate(self.skips):
            if source is not None and not (source in range(k) and found[source] == found[k]):
                raise ValueError(
                    f"expected skips[{k}] as an earlier hidden layer of the same degrees, got {source}; a sum of units "
                    "of other degrees would break the order of the features"
                )
        return found


class Chain(NamedTuple):
    """What substitution has to know of a wiring, which says what these are; the tuples have every hidden layer."""

    skips: tuple[int | None, ...]
    linear: tuple[bool, ...]
    direct: bool

    def added_to(self, k: int) -> list[int]:
        """The hidden layers to which layer k is added."""
        return [later for later, source in enumerate(self.skips) if source == k]


class MADE(nn.Module):
    """A masked network: features x (..., D), sorted by degree, and a context c (..., C) to parameters (..., D, P).

    The context enters the first hidden layer unmasked, or as the wiring says. The output layer starts at 3e-4 of the
    others' size, so that a flow of five layers starts within 1e-2 of what its univariate map does with zero parameters.

    Args:
        degrees: D degrees in ascending order.
        parameters: P, the number of parameters per feature.
        hidden: the sizes of the hidden layers.
        activation: a name from ACTIVATIONS.
        context: C.
        wiring: how the layers are joined; a chain when not given.

    Attributes:
        ends: for the features and for each hidden layer, how many units have a degree of at most g, for
            g = 0..G. This is all that substitution has to know about the masks.
        chain: what it has to know about the wiring.
    """

    def __init__(
        self,
        degrees: Sequence[int],
        parameters: int,
        hidden: Sequence[int],
        activation: str,
        context: int,
        wiring: Wiring | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.parameters_per_feature = parameters
        if isinstance(hidden, int) or not hidden:
            raise ValueError(f"expected the sizes of the hidden layers, such as hidden=(64, 64), got hidden={hidden!r}")
        sizes = [positive(size, f"hidden[{k}]") for k, size in enumerate(hidden)]
        G, wiring = max(degrees), Wiring() if wiring is None else wiring
        # Units of degree 0 see the context alone: without one they would be constants.
        lowest = 0 if context or G == 1 else 1
        levels = [list(degrees), *wiring.degrees(sizes, G, lowest)]
        self.ends = tuple(tuple(bisect_right(level, g) for g in range(G + 1)) for level in levels)
        self.chain = Chain(
            tuple(wiring.skips) or (None,) * len(sizes), tuple(wiring.linear) or (False,) * len(sizes), wiring.direct
        )

        d = [torch.tensor(level) for level in levels]
        masks = [after[:, None] >= before[None, :] for before, after in pairwise(d)]
        outputs = [(d[0][:, None] > seen[None, :]).repeat_interleave(parameters, dim=0) for seen in (d[-1], d[0])]
        heard = {k: k in wiring.activated_contexts for k in wiring.contexts if context}
        self.layers = nn.ModuleList(
            MaskedLinear(mask, more_inputs=context if k in heard else 0) for k, mask in enumerate(masks)
        )
        self.layers.append(MaskedLinear(outputs[0], gain=3e-4))
        self.direct = MaskedLinear(outputs[1], gain=3e-4) if wiring.direct else None
        self.contexts = nn.ModuleDict({str(k): nn.Linear(context, sizes[k], bias=own) for k, own in heard.items()})
        self.activated_contexts = wiring.activated_contexts
        self.direct_context = nn.Linear(context, len(outputs[0]), bias=False) if wiring.direct and context else None
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
