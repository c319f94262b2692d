"""Conversion of flows of nflows 0.14, whose transforms map data to noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from nflows import distributions, flows
from nflows.nn.nets import ResidualNet

from counterflow.flows.flow import Flow
from counterflow.interop.conversion import common, nsf
from counterflow.interop.conversion.common import Layer
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Linear, Permute
from counterflow.univariate.affine import ForeignAffine


def flow(foreign: Any) -> Flow:
    """Convert an nflows Flow, see `counterflow.convert`."""
    if not isinstance(foreign, flows.Flow):
        raise TypeError(
            f"expected an nflows Flow, got {type(foreign).__name__}; wrap a transform as Flow(transform, "
            "StandardNormal([features]))"
        )
    own = [name for name in ("_log_prob", "_sample") if getattr(type(foreign), name) is not getattr(flows.Flow, name)]
    if own:
        raise TypeError(f"expected an nflows Flow, got {type(foreign).__name__}, which has its own {', '.join(own)}")
    with common.converting("the base distribution", foreign._distribution):
        from_normal, D = base(foreign._distribution)
    to_noise = transform(foreign._transform, D, "the transform")
    to_data = common.composed([*from_normal, Inverse(to_noise)])
    with common.converting("the embedding net", foreign._embedding_net):
        to_data = common.with_embedding(to_data, foreign._embedding_net)
    return common.flow_like(to_data, D, foreign)


def transform(t: Any, D: int, place: str) -> Transform:
    """Convert a transform, in its own direction."""
    if common.is_from_library(t, "nflows", "CompositeTransform"):
        return Compose([transform(part, D, f"{place} {k}") for k, part in enumerate(t._transforms)])
    if common.is_from_library(t, "nflows", "InverseTransform"):
        return Inverse(transform(t._transform, D, place))
    with common.converting(place, t):
        if not common.is_from_library(t, "nflows", *TRANSFORMS):
            raise common.unsupported(t, [*TRANSFORMS, "CompositeTransform", "InverseTransform"])
        return TRANSFORMS[type(t).__name__](t, D)


def base(distribution: Any) -> tuple[list[Transform], int]:
    """Return the transforms from standard normal noise to the base distribution, and D."""
    D = math.prod(getattr(distribution, "_shape", ()))
    if type(distribution) is distributions.StandardNormal:
        return [], D
    if type(distribution) is distributions.DiagonalNormal:
        return common.normal_base(distribution.mean_[0], distribution.log_std_[0].exp(), D), D
    if type(distribution) is distributions.ConditionalDiagonalNormal:
        encoder = distribution._context_encoder
        own = getattr(encoder, "__module__", "") == distributions.normal.__name__  # the default, lambda x: x
        return [common.conditional_normal(None if own else encoder, D)], D
    raise TypeError(
        "expected the base StandardNormal, DiagonalNormal or ConditionalDiagonalNormal, "
        f"got {type(distribution).__name__}; train the flow with one of these"
    )


def _affine_autoregressive(t: Any, D: int) -> Transform:
    layers, last, activation = nsf.masked_net(t.autoregressive_net, "activated", "added")
    univariate = ForeignAffine("softplus", t._epsilon)
    rows = torch.arange(2 * D).reshape(D, 2).flip(1)  # nflows has (scale, shift), we have (shift, scale)
    last = last.params(rows, [1.0, 1.0], [0.0, -univariate.softplus_offset])
    return common.autoregressive(range(1, D + 1), layers, last, univariate, activation)


def _spline_autoregressive(t: Any, D: int) -> Transform:
    layers, last, activation = nsf.masked_net(t.autoregressive_net, "activated", "added")
    univariate = nsf.spline(t, t.num_bins)
    last = nsf.spline_params(last, univariate, t.autoregressive_net)
    return common.autoregressive(range(1, D + 1), layers, last, univariate, activation)


def _conditioner(net: Any, kept: int) -> tuple[list[Layer], Layer, str, int]:
    """Return hidden layers, last layer, activation and C of the network of a coupling layer."""
    if common.is_from_library(net, "sbi", "ContextSplineMap"):  # for one feature: receives only the context
        layers, last, activation = common.sequential(net.spline_predictor)
        return layers, last, activation, common.inputs_of(layers, last)
    if type(net) is not ResidualNet:
        raise TypeError(
            f"expected nflows.nn.nets.ResidualNet as the network of a coupling layer, got {type(net).__name__}; what "
            "another network computes cannot be read from its weights"
        )
    return *nsf.residual_net(net), net.context_features or 0


def _affine_coupling(t: Any, D: int) -> Transform:
    kept, moved = t.identity_features.tolist(), t.transform_features.tolist()
    layers, last, activation, C = _conditioner(t.transform_net, len(kept))
    if t.unconditional_transform is not None:
        raise ValueError("expected an affine coupling layer without an unconditional transform, got one with it")
    n = len(moved)
    if type(t).__name__ == "AdditiveCouplingTransform":
        rows = torch.stack([torch.arange(n), torch.full((n,), -1)], 1)
        univariate = common.EXP_SCALE  # with s = 0
    else:
        rows, univariate = torch.arange(2 * n).reshape(2, n).T, ForeignAffine("sigmoid", 1e-3)
    last = last.params(rows)
    return common.coupling(D, moved, C, layers, last, univariate, activation)


def _spline_coupling(t: Any, D: int) -> Transform:
    kept, moved = t.identity_features.tolist(), t.transform_features.tolist()
    layers, last, activation, C = _conditioner(t.transform_net, len(kept))
    univariate = nsf.spline(t, t.num_bins)
    last = nsf.spline_params(last, univariate, t.transform_net)
    coupling = common.coupling(D, moved, C, layers, last, univariate, activation)
    if t.unconditional_transform is None:
        return coupling
    params = nsf.unconditional_spline(t.unconditional_transform, univariate)
    return Compose([coupling, common.unconditional(params, nsf.spline(t.unconditional_transform, t.num_bins), D, kept)])


def _permutation(t: Any, D: int) -> Transform:
    if t._dim != 1:
        raise ValueError(f"expected a permutation of the features, dim=1, got dim={t._dim}")
    return Permute(t._permutation)


def _lu(t: Any, D: int) -> Transform:
    return common.lower_upper(t)


def _dense(t: Any, D: int) -> Transform:
    return Linear(t.bias, t.weight())


def _batch_norm(t: Any, D: int) -> Transform:
    scale = t.weight * (t.running_var + t.eps).rsqrt()
    return common.scale_and_shift(scale, t.bias - t.running_mean * scale, D)


def _act_norm(t: Any, D: int) -> Transform:
    if not t.initialized:
        raise ValueError("expected ActNorm that has seen data, got one that has not; train it first")
    return common.scale_and_shift(t.log_scale.exp(), t.shift, D)


def _pointwise(t: Any, D: int) -> Transform:
    return common.scale_and_shift(t._scale, t._shift, D)


def _identity(t: Any, D: int) -> Transform:
    return Permute(range(D))


TRANSFORMS: dict[str, Callable[[Any, int], Transform]] = {
    "MaskedAffineAutoregressiveTransform": _affine_autoregressive,
    "MaskedPiecewiseRationalQuadraticAutoregressiveTransform": _spline_autoregressive,
    "AffineCouplingTransform": _affine_coupling,
    "AdditiveCouplingTransform": _affine_coupling,
    "PiecewiseRationalQuadraticCouplingTransform": _spline_coupling,
    "Permutation": _permutation,
    "RandomPermutation": _permutation,
    "ReversePermutation": _permutation,
    "LULinear": _lu,
    "NaiveLinear": _dense,
    "QRLinear": _dense,
    "SVDLinear": _dense,
    "BatchNorm": _batch_norm,
    "ActNorm": _act_norm,
    "PointwiseAffineTransform": _pointwise,
    "AffineTransform": _pointwise,
    "IdentityTransform": _identity,
}
