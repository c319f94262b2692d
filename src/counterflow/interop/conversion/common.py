"""Shared parts of the converters: descriptions of other libraries' networks, and the layers built from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterflow.flows.bases import StandardNormal
from counterflow.flows.flow import Flow
from counterflow.made.architecture import Architecture
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Linear, Permute, Standardize, Whiten
from counterflow.transforms.context import StandardizedContext
from counterflow.transforms.coupling import CouplingLayer
from counterflow.univariate.affine import ForeignAffine
from counterflow.univariate.base import Univariate

FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.elu: "elu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.softplus: "softplus",
}
MODULES: dict[type, tuple[str, dict[str, float]]] = {  # the name, and the settings of our activation of that name
    nn.ReLU: ("relu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.Tanh: ("tanh", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.SiLU: ("silu", {}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
}


EXP_SCALE = ForeignAffine("softclip", 0.0)  # y = exp(s) x + m: with 0, softclip leaves s as it is


def activation_name(activation: Any) -> str:
    """Return our name of an activation, which is a function or a module of torch.

    Raises:
        TypeError: an activation that we do not have, or one with other settings than torch's defaults.
    """
    if isinstance(activation, nn.LeakyReLU) and activation.negative_slope == 0:
        return "relu"
    name, settings = MODULES.get(type(activation), ("", {}))
    if name and all(getattr(activation, key) == value for key, value in settings.items()):
        return name
    if not isinstance(activation, nn.Module) and activation in FUNCTIONS:
        return FUNCTIONS[activation]
    known = ", ".join(sorted({*FUNCTIONS.values()}))
    raise TypeError(f"expected an activation of torch among {known}, with torch's defaults, got {activation!r}")


@contextmanager
def converting(place: str, layer: Any) -> Iterator[None]:
    """Add the place and the class of a layer to errors raised while it is converted."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith("cannot convert"):
            raise
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise type(error)(f"cannot convert {place}, {kind}: {error}") from None


def is_from_library(thing: Any, library: str, *names: str) -> bool:
    """Return True if thing is of one of these classes of the library, and not of another class of that name."""
    return type(thing).__name__ in names and type(thing).__module__.partition(".")[0] == library


def unsupported(layer: Any, known: Sequence[str]) -> TypeError:
    """Return the error for a class that cannot be converted."""
    return TypeError(
        f"expected one of {', '.join(sorted(known))}, got {type(layer).__name__}, whose map has no counterpart here; "
        "train the flow with one of these layers instead, or keep it in its own library"
    )


@dataclass(frozen=True)
class Layer:
    """Description of one layer of another library's network, its units in their original order.

        a = W x + b + V c,    output = f(a), or a for a linear layer

    Args:
        weight: W (H, inputs).
        bias: b (H,).
        mask: (H, inputs), True where a unit depends on an input; None for a dense layer.
        context: V (H, C), or None.
        context_bias: v (H,); if given, f(V c + v) is added instead of V c.
        gate: (V, v), (H, C) and (H,); if given, W x + b is multiplied by sigmoid(V c + v).
        skip: index of an earlier layer whose a is added to this one's.
        linear: True if the next layer receives a instead of f(a).
    """

    weight: Tensor
    bias: Tensor
    mask: Tensor | None = None
    context: Tensor | None = None
    context_bias: Tensor | None = None
    gate: tuple[Tensor, Tensor] | None = None
    skip: int | None = None
    linear: bool = False

    def before_affine(self, scale: Tensor, shift: Tensor) -> Layer:
        """Return the layer that computes scale * a + shift instead of a. The layer must not have a skip or a gate."""
        context = None if self.context is None else self.context * scale[:, None]
        return replace(self, weight=self.weight * scale[:, None], bias=self.bias * scale + shift, context=context)

    def after_affine(self, scale: Tensor, shift: Tensor) -> Layer:
        """Return the layer that receives scale * x + shift instead of x."""
        return replace(self, weight=self.weight * scale, bias=self.bias + self.masked() @ shift)

    def masked(self) -> Tensor:
        """Return the weight with zeros where the mask is False."""
        return self.weight if self.mask is None else self.weight * self.mask

    def params(
        self, rows: Tensor, factors: Sequence[float] | None = None, terms: Sequence[float] | None = None
    ) -> Layer:
        """Return the last layer of our network, whose P outputs per feature are rows of this one.

            params[d, p] = factors[p] * a[rows[d, p]] + terms[p],    or terms[p] where rows is -1

        Args:
            rows: (features, P), indices of units of this layer, or -1.
            factors: P numbers; 1 if not given.
            terms: P numbers; 0 if not given.
        """
        weight, bias = F.pad(self.masked(), (0, 0, 0, 1)), F.pad(self.bias, (0, 1))
        features, P = rows.shape
        factor = weight.new_tensor([1.0] * P if factors is None else factors).repeat(features)
        term = weight.new_tensor([0.0] * P if terms is None else terms).repeat(features)
        chosen = rows.flatten().to(weight.device)
        mask = None if self.mask is None else F.pad(self.mask, (0, 0, 0, 1))[chosen]
        return Layer(weight[chosen] * factor[:, None], bias[chosen] * factor + term, mask)


def layer_of(module: Any, **more: Any) -> Layer:
    """Describe an nn.Linear, or another module with a weight, a bias and optionally a mask."""
    weight = module.weight.detach()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    mask = getattr(module, "mask", None)
    return Layer(weight, bias, None if mask is None else mask.bool(), **more)


def activated(layer: Layer) -> Layer:
    """Return the layer with an activation."""
    return replace(layer, linear=False)


def split_context(layer: Layer, features: int, first: int = 0) -> Layer:
    """Split the inputs of a layer: inputs first to first + features - 1 are features, the others are the context."""
    inputs = torch.arange(layer.weight.shape[1])
    is_feature = (inputs >= first) & (inputs < first + features)
    if is_feature.all():
        return layer
    mask = None if layer.mask is None else layer.mask[:, is_feature]
    return replace(layer, weight=layer.weight[:, is_feature], mask=mask, context=layer.masked()[:, ~is_feature])


def batch_norm(module: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in eval mode.

    Raises:
        ValueError: it has no running statistics.
    """
    if module.running_mean is None or module.running_var is None:
        raise ValueError("expected batch norm with running statistics, got track_running_stats=False; train with them")
    scale = (module.running_var + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.detach()
    shift = -module.running_mean * scale
    return scale, shift if module.bias is None else shift + module.bias.detach()


def autoregressive(
    degrees: Sequence[int],
    layers: Sequence[Layer],
    last: Layer,
    univariate: Univariate,
    activation: str,
    direct: Layer | None = None,
) -> Autoregressive:
    """Build our autoregressive layer from a masked network.

    Args:
        degrees: the degrees of the features.
        layers: the hidden layers. The degree of a unit is the highest among the features that it depends on.
        last: the layer of the params, P rows for each feature, see `Layer.params`.
        univariate: the map of one feature.
        activation: the name of the activation of the hidden layers.
        direct: the layer from features, and context, to the params without a hidden layer; None for none.

    Raises:
        ValueError: gates, which would give each row its own weights, or masks that are not autoregressive.
    """
    if any(layer.gate is not None for layer in layers):
        raise ValueError(
            "expected a context that is added to a masked network, got one that gates its layers (GLU), so that each "
            "row has weights of its own; train coupling layers for a context, or nflows' masked ones, which add it"
        )
    known, before = torch.tensor(degrees), torch.tensor(degrees)
    order = torch.argsort(known, stable=True)
    unit_degrees: list[Tensor] = []  # of each hidden layer
    for layer in layers:
        before = (_mask(layer) * before).amax(1) if layer.weight.shape[1] else before.new_zeros(len(layer.weight))
        before = before if layer.skip is None else torch.maximum(before, unit_degrees[layer.skip])
        unit_degrees.append(before)
    outputs = known.repeat_interleave(univariate.parameters)
    for seen, by in ((before, last), *([(known, direct)] if direct else [])):
        if (_mask(by) & (outputs[:, None] <= seen)).any():
            raise ValueError(
                "expected the params of a feature to depend only on features before it, got masks that are not "
                "autoregressive"
            )
    sorted_units = [torch.argsort(e, stable=True) for e in unit_degrees]
    contexts = [k for k, layer in enumerate(layers) if layer.context is not None]
    C = {layer.context.shape[1] for layer in (*layers, direct) if layer and layer.context is not None}
    activated = tuple(k for k in contexts if layers[k].context_bias is not None)
    architecture = Architecture(
        hidden_degrees=tuple(tuple(e[place].tolist()) for e, place in zip(unit_degrees, sorted_units, strict=True)),
        skips=tuple(layer.skip for layer in layers) if any(layer.skip is not None for layer in layers) else (),
        linear=tuple(k for k, layer in enumerate(layers) if layer.linear),
        contexts=tuple(contexts) if C else (0,),
        activated_contexts=activated,
        skip_to_output=direct is not None,
    )
    t = Autoregressive(
        len(degrees),
        C.pop() if C else 0,
        [len(e) for e in unit_degrees],
        univariate,
        degrees,
        activation,
        architecture=architecture,
    ).to(last.weight)
    made: Any = t.made
    rows = (order[:, None] * univariate.parameters + torch.arange(univariate.parameters)).flatten()
    columns = order
    for ours, theirs, place in zip(made.layers, (*layers, last), (*sorted_units, rows), strict=True):
        _copy(ours, theirs.masked()[place][:, columns], theirs.bias[place])
        columns = place
    for k, layer in enumerate(layers):
        if layer.context is not None:
            bias = None if layer.context_bias is None else layer.context_bias[sorted_units[k]]
            _copy(made.contexts[str(k)], layer.context[sorted_units[k]], bias)
    if direct is not None:
        _copy(made.skip_to_output, direct.masked()[rows][:, order], None)
        if direct.context is not None:
            _copy(made.context_to_output, direct.context[rows], None)
    return t


def _mask(layer: Layer) -> Tensor:
    """Return the mask of a layer, all True for a dense one."""
    return torch.ones(layer.weight.shape, dtype=torch.bool) if layer.mask is None else layer.mask.cpu()


@torch.no_grad()
def _copy(ours: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Copy weight and bias into one of our layers."""
    ours.weight.copy_(weight)
    if bias is not None:
        ours.bias.copy_(bias)


def coupling(
    features: int,
    moved: Sequence[int],
    context: int,
    layers: Sequence[Layer],
    last: Layer,
    univariate: Univariate,
    activation: str,
) -> CouplingLayer:
    """Build our coupling layer from a dense network.

    Args:
        features: D.
        moved: indices of the features that the layer maps; the network receives [the other features, the context].
        context: C.
        layers: the hidden layers.
        last: the layer of the params, P rows for each moved feature.
        univariate: the map of one feature.
        activation: the name of the activation of the hidden layers.
    """
    t = CouplingLayer(
        features,
        moved,
        context,
        [len(layer.bias) for layer in layers],
        univariate,
        activation,
        skips=[layer.skip for layer in layers] if any(layer.skip is not None for layer in layers) else (),
        linear=[k for k, layer in enumerate(layers) if layer.linear],
        gates=[k for k, layer in enumerate(layers) if layer.gate is not None],
    ).to(last.weight)
    for ours, theirs in zip((*t.layers, t.last), (*layers, last), strict=True):
        _copy(ours, theirs.weight, theirs.bias)
    for k, gating in t.gating.items():
        _copy(gating, *layers[int(k)].gate)  # type: ignore[misc]  # gates are those that have one
    return t


def unconditional(params: Tensor, univariate: Univariate, features: int, moved: Sequence[int]) -> CouplingLayer:
    """Build the layer that maps each moved feature with the same params (moved, P) in all rows."""
    t = CouplingLayer(features, moved, 0, (), univariate).to(params)
    if t.constant is None:  # the network receives the other features, which must have no effect
        t.last.weight.data.zero_()  # type: ignore[union-attr]  # one of both is there
        t.last.bias.data.copy_(params.flatten())  # type: ignore[union-attr]
    else:
        t.constant.data.copy_(params.flatten())
    return t


def scale_and_shift(scale: Tensor, shift: Tensor, features: int) -> Transform:
    """Build the map y = scale * x + shift; scale and shift are constants (D,) or ().

    Raises:
        ValueError: a scale is not positive.
    """
    scale, shift = (v.detach().expand(features) if v.dim() == 0 else v.detach().flatten() for v in (scale, shift))
    if not (scale > 0).all():
        raise ValueError("expected positive scales, got a negative one; put the sign into the data")
    return Standardize(-shift / scale, 1 / scale)


def linear(weight: Tensor) -> Transform:
    """Build the map y = W x."""
    return Linear(weight.new_zeros(len(weight)), weight.detach())


def lower_upper(module: Any) -> Transform:
    """Build the map y = L U x + b of an LULinear of Durkan et al. as two triangular maps with positive diagonals."""
    lower, upper = (matrix.detach() for matrix in module._create_lower_upper())
    bias, backwards = module.bias.detach(), range(module.features)[::-1]
    first = Inverse(Whiten(torch.zeros_like(bias), upper.flip(0, 1)))
    return Compose([Permute(backwards), first, Permute(backwards), Inverse(Whiten(bias, lower))])


def flow_like(to_data: Transform, features: int, like: nn.Module) -> Flow:
    """Build the flow of a transform from standard normal noise to data, with the dtype and device of a module."""
    tensors = [t for t in (*like.parameters(), *like.buffers()) if t.is_floating_point()]
    weights = [t for t in tensors if t.dim()] or tensors  # nflows has a scalar in float64 beside the weights
    flow = Flow(StandardNormal(features), to_data)
    return flow.to(weights[0].device, weights[0].dtype) if weights else flow


def composed(layers: Sequence[Transform]) -> Transform:
    """Return the composition of transforms; a single one as it is."""
    return layers[0] if len(layers) == 1 else Compose(layers)


def normal_base(mean: Tensor, std: Tensor, features: int) -> list[Transform]:
    """Return the transforms from standard normal noise to this normal distribution; none if it is standard."""
    if (mean == 0).all() and (std == 1).all():
        return []
    return [Inverse(Standardize(*(v.detach().expand(features).clone() for v in (mean, std))))]


def conditional_normal(encoder: Any, features: int) -> Transform:
    """Build the map x = mean + exp(s) eps, where a network computes (mean, s) from the context.

    Args:
        encoder: the network; None if the context is (mean, s) itself.
        features: D.
    """
    if encoder is None:
        encoder = nn.Linear(2 * features, 2 * features, bias=False)
        nn.init.eye_(encoder.weight)
    layers, last, activation = sequential(encoder)
    rows = torch.arange(2 * features).reshape(2, features).T
    C = inputs_of(layers, last)
    return coupling(features, range(features), C, layers, last.params(rows), EXP_SCALE, activation)


def inputs_of(layers: Sequence[Layer], last: Layer) -> int:
    """Return the number of inputs of a network."""
    return (layers[0] if layers else last).weight.shape[1]


def sequential(net: Any) -> tuple[list[Layer], Layer, str]:
    """Return hidden layers, last layer and activation of an nn.Linear, or of a Sequential of them and activations.

    Batch norm, in eval mode, becomes a part of the linear layer before or after it.

    Raises:
        TypeError: other modules, or more than one kind of activation.
    """
    layers: list[Layer] = []
    names: set[str] = set()
    modules: list[Any] = list(net) if isinstance(net, nn.Sequential) else [net]
    pending: tuple[Tensor, Tensor] | None = None  # scale and shift of the inputs of the next linear layer
    for module in modules:
        if type(module) is nn.Linear or (is_from_library(module, "zuko", "Linear") and module.weight.dim() == 2):
            layer = layer_of(module, linear=True)
            layers.append(layer if pending is None else layer.after_affine(*pending))
            pending = None
        elif type(module) is nn.BatchNorm1d and layers and pending is None:
            if layers[-1].linear:
                layers[-1] = layers[-1].before_affine(*batch_norm(module))
            else:
                pending = batch_norm(module)
        elif isinstance(module, nn.Identity | nn.Dropout):
            continue
        elif layers and layers[-1].linear:
            names.add(activation_name(module))
            layers[-1] = replace(layers[-1], linear=False)
        else:
            raise TypeError(f"expected linear layers, each with at most one activation, got {type(module).__name__}")
    if not layers or not layers[-1].linear or pending is not None or len(names) > 1:
        raise TypeError(f"expected linear layers with one kind of activation between them, got {net}")
    return layers[:-1], layers[-1], names.pop() if names else "relu"  # any name: nothing is activated


def with_embedding(t: Transform, net: Any) -> Transform:
    """Return the transform with the context standardized as by an embedding net.

    Raises:
        TypeError: the net does something else than standardizing.
        ValueError: it standardizes a context of more than one dimension.
    """
    found = [module for module in net.modules() if not isinstance(module, nn.Identity | nn.Sequential)]
    others = [module for module in found if not is_from_library(module, "sbi", "Standardize")]
    if others or len(found) > 1:
        kinds = ", ".join(type(module).__name__ for module in others or found)
        raise TypeError(
            f"expected no embedding of the context, or one that standardizes it, got {kinds}; set it to "
            "torch.nn.Identity() in a copy of the flow, convert that, and call the result with the embedded context"
        )
    if not found or not t.context:
        return t
    mean, std = (v.expand(t.context) if v.dim() == 0 else v for v in (found[0]._mean, found[0]._std))
    if mean.dim() != 1 or std.dim() != 1:
        raise ValueError(
            f"expected a context of one dimension, got one of {tuple(mean.shape)}; flatten it before training"
        )
    return StandardizedContext(t, mean, std.expand(len(mean)))
