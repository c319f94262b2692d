"""MADE: one network that computes the parameters of every feature from the features before it.

Each feature has a degree d in 1..G, each hidden unit a degree e in 0..G-1, and hidden units are sorted by
degree, so that every mask is a staircase:

    first layer    unit e sees feature i      when d_i <= e
    hidden layers  unit e sees unit e'        when e' <= e
    output         params_i sees unit e       when e < d_i

Source: Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation"; the sorting is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

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


class MADE(nn.Module):
    """A masked network: features x (..., D), sorted by degree, and a context c (..., C) to parameters (..., D, P).

    The context enters the first hidden layer unmasked. The output layer starts at 3e-4 of the
    others' size, so that a flow of five layers starts within 1e-2 of what its univariate map does with zero parameters.

    Args:
        degrees: D degrees in ascending order.
        parameters: P, the number of parameters per feature.
        hidden: the sizes of the hidden layers.
        activation: a name from ACTIVATIONS.
        context: C.

    Attributes:
        ends: for the features and for each hidden layer, how many units have a degree of at most g, for
            g = 0..G. This is all that substitution has to know about the masks.
    """

    def __init__(
        self, degrees: Sequence[int], parameters: int, hidden: Sequence[int], activation: str, context: int
    ) -> None:
        super().__init__()
        self.activation = activation_named(activation)
        self.parameters_per_feature = parameters
        if isinstance(hidden, int) or not hidden:
            raise ValueError(f"expected the sizes of the hidden layers, such as hidden=(64, 64), got hidden={hidden!r}")
        sizes = [positive(size, f"hidden[{k}]") for k, size in enumerate(hidden)]
        G = max(degrees)
        # Units of degree 0 see the context alone: without one they would be constants.
        lowest = 0 if context or G == 1 else 1
        levels = [list(degrees), *(hidden_degrees(size, G - 1, lowest) for size in sizes)]
        self.ends = tuple(tuple(sum(d <= g for d in level) for g in range(G + 1)) for level in levels)

        d = [torch.tensor(level) for level in levels]
        masks = [after[:, None] >= before[None, :] for before, after in pairwise(d)]
        outputs = (d[0][:, None] > d[-1][None, :]).repeat_interleave(parameters, dim=0)
        self.layers = nn.ModuleList(MaskedLinear(mask, more_inputs=0 if k else context) for k, mask in enumerate(masks))
        self.layers.append(MaskedLinear(outputs, gain=3e-4))
        self.context = nn.Linear(context, sizes[0], bias=False) if context else None

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.masked_layers()[0].weight.dtype

    def masked_layers(self) -> list[MaskedLinear]:
        """The layers in order, the last one giving the parameters."""
        return list(self.layers)  # type: ignore[arg-type]  # that is all that it holds

    def run(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Parameters (..., D, P), and what each hidden layer holds before its activation, (..., H) each."""
        before: list[Tensor] = []
        h = x
        *layers, last = self.layers  # a slice would build another ModuleList
        for k, layer in enumerate(layers):
            a = layer(h)
            if k == 0 and self.context is not None:
                a = a + self.context(c)
            before.append(a)
            h = self.activation.f(a)
        return last(h).reshape(*x.shape, self.parameters_per_feature), tuple(before)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Parameters (..., D, P)."""
        return self.run(x, c)[0]
