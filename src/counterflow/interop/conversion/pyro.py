"""Conversion of flows of Pyro 1.9, whose transforms map noise to data."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import transforms as pt
from pyro.distributions.conditional import (
    ConditionalTransformedDistribution,
    ConstantConditionalDistribution,
    ConstantConditionalTransform,
)
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN, ConditionalDenseNN, DenseNN
from torch import Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import _InverseTransform

from counterflow.flows.flow import Flow
from counterflow.interop.conversion import common
from counterflow.interop.conversion.common import Layer, layer_of
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute, Whiten
from counterflow.univariate.affine import ForeignAffine, Gated
from counterflow.univariate.base import Univariate


def flow(foreign: Any) -> Flow:
    """Convert a TransformedDistribution or a ConditionalTransformedDistribution, see `counterflow.convert`."""
    if not isinstance(foreign, TransformedDistribution | ConditionalTransformedDistribution):
        raise TypeError(
            "expected a TransformedDistribution or a ConditionalTransformedDistribution, got "
            f"{type(foreign).__name__}; give dist.TransformedDistribution(base, transforms)"
        )
    with common.converting("the base distribution", foreign.base_dist):
        mean, std = base(foreign.base_dist)
    D = len(mean)
    layers = [transform(t, D, f"transform {k}") for k, t in enumerate(foreign.transforms)]
    to_data = common.composed([*common.normal_base(mean, std, D), *(layers or [Permute(range(D))])])
    modules = nn.ModuleList(module for t in foreign.transforms for module in _modules(t))
    flow = common.flow_like(to_data, D, modules)
    return flow if list(modules.parameters()) else flow.to(mean.device, mean.dtype)


def _modules(t: Any) -> list[nn.Module]:
    """Return a transform that is a module, or the modules in it."""
    if isinstance(t, nn.Module):
        return [t]
    inner = [t.transform] if isinstance(t, ConstantConditionalTransform) else getattr(t, "parts", [])
    inner = [t._inv] if isinstance(t, _InverseTransform) else inner
    return [module for part in inner for module in _modules(part)]


def base(distribution: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) of the base distribution."""
    if isinstance(distribution, ConstantConditionalDistribution):
        distribution = distribution.base_dist
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, Normal) or distribution.loc.dim() != 1:
        raise TypeError(
            f"expected Normal(loc, scale) of shape (D,) as the base, got {distribution}; train the flow with that one"
        )
    return distribution.loc, distribution.scale


def transform(t: Any, D: int, place: str) -> Transform:
    """Convert a transform, in its own direction."""
    if isinstance(t, ComposeTransform):
        return Compose([transform(part, D, f"{place}.{k}") for k, part in enumerate(t.parts)])
    if isinstance(t, ConstantConditionalTransform):
        return transform(t.transform, D, place)
    if isinstance(t, _InverseTransform):
        return Inverse(transform(t._inv, D, place))
    if type(t).__name__ == "_ConditionalInverseTransformModule":
        return Inverse(transform(t._transform, D, place))
    with common.converting(place, t):
        return _layer(t, D)


def _layer(t: Any, D: int) -> Transform:
    if type(t) in (pt.AffineAutoregressive, pt.ConditionalAffineAutoregressive):
        return _autoregressive(t, D)
    if type(t) in (pt.AffineCoupling, pt.ConditionalAffineCoupling):
        return _coupling(t, D)
    if type(t) is pt.Permute and t.dim == -1:
        return Permute(t.permutation)
    if type(t) is pt.BatchNorm:
        scale = (t.moving_variance + t.epsilon).sqrt() / t.constrained_gamma
        return common.scale_and_shift(scale, t.moving_mean - t.beta * scale, D)
    if type(t) is AffineTransform:
        return common.scale_and_shift(torch.as_tensor(t.scale), torch.as_tensor(t.loc), D)
    if type(t) is pt.LowerCholeskyAffine:
        return Inverse(Whiten(t.loc.detach(), t.scale_tril.detach()))
    if "Spline" in type(t).__name__:
        raise TypeError(
            "expected another transform, got a spline of Pyro: its linear rational maps have no counterpart here, and "
            "its quadratic ones have slopes of 0.999 at both ends and look for a bin with a tolerance of 1e-6; train a "
            "spline of zuko, nflows or normflows"
        )
    known = ["AffineAutoregressive", "AffineCoupling", "BatchNorm", "LowerCholeskyAffine", "Permute", "AffineTransform"]
    raise common.unsupported(t, [*known, "ConditionalAffineAutoregressive", "ConditionalAffineCoupling"])


def _settings(t: Any, names: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a transform, with defaults; a conditional transform has only those that it was given."""
    given = t.kwargs if hasattr(t, "kwargs") else vars(t)
    return {name: given.get(name, default) for name, default in names.items()}


CLIPS = {"log_scale_min_clip": -5.0, "log_scale_max_clip": 3.0}


def _clamped(settings: dict[str, Any]) -> ForeignAffine:
    return ForeignAffine("clamp", low=settings["log_scale_min_clip"], high=settings["log_scale_max_clip"])


def _autoregressive(t: Any, D: int) -> Transform:
    settings = _settings(t, {**CLIPS, "sigmoid_bias": 2.0, "stable": False})
    net = t.arn if hasattr(t, "arn") else t.nn
    if type(net) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN) or list(net.param_dims) != [1, 1]:
        raise TypeError(
            "expected AutoRegressiveNN or ConditionalAutoRegressiveNN with param_dims=[1, 1] as the network, got "
            f"{type(net).__name__}; what another network computes cannot be read from its weights"
        )
    univariate: Univariate = Gated() if settings["stable"] else _clamped(settings)
    plus = [0.0, settings["sigmoid_bias"] - 2.0 if settings["stable"] else 0.0]
    rows = torch.arange(2 * D).reshape(2, D).T
    degrees = (torch.argsort(net.permutation) + 1).tolist()
    layers = [layer_of(layer) for layer in net.layers]
    layers[0] = common.split_context(layers[0], D, net.context_dim)
    *hidden, last = layers
    direct = None
    if net.skip_layer is not None:
        skipping = layer_of(net.skip_layer).params(rows)
        direct = common.split_context(skipping, D, net.context_dim)
    last = last.params(rows, [1.0, 1.0], plus)
    return common.autoregressive(degrees, hidden, last, univariate, common.activation_name(net.f), direct)


def _coupling(t: Any, D: int) -> Transform:
    settings = _settings(t, {**CLIPS, "dim": -1})
    net, kept = t.nn, t.split_dim
    n = D - kept
    if type(net) not in (DenseNN, ConditionalDenseNN) or list(net.param_dims) != [n, n] or settings["dim"] != -1:
        raise TypeError(
            f"expected DenseNN or ConditionalDenseNN with param_dims=[{n}, {n}] as the network, and dim=-1, got "
            f"{type(net).__name__}; what another network computes cannot be read from its weights"
        )
    C = net.context_dim
    *hidden, last = [layer_of(layer) for layer in net.layers]
    first = hidden[0].weight.roll(-C, 1)  # Pyro's network receives [context, features]
    hidden[0] = Layer(first, hidden[0].bias)
    last = last.params(torch.arange(2 * n).reshape(2, n).T)
    return common.coupling(D, range(kept, D), C, hidden, last, _clamped(settings), common.activation_name(net.f))
