"""Conversion of flows of normflows 1.7, whose layers map noise to data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from normflows import ConditionalNormalizingFlow, NormalizingFlow, distributions, nets
from normflows.nets.resnet import ResidualNet
from torch import Tensor

from counterflow.flows.flow import Flow
from counterflow.interop.conversion import common, nsf
from counterflow.interop.conversion.common import Layer
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute
from counterflow.univariate.affine import ForeignAffine


def flow(foreign: Any) -> Flow:
    """Convert a NormalizingFlow or a ConditionalNormalizingFlow, see `counterflow.convert`."""
    if type(foreign) not in (NormalizingFlow, ConditionalNormalizingFlow):
        raise TypeError(
            f"expected a NormalizingFlow or a ConditionalNormalizingFlow, got {type(foreign).__name__}; build one of "
            "the layers, if they map vectors of one size"
        )
    with common.converting("the base distribution q0", foreign.q0):
        from_normal, D = base(foreign.q0)
    layers = [transform(layer, D, f"layer {k}") for k, layer in enumerate(foreign.flows)]
    to_data = common.composed([*from_normal, *(layers or [Permute(range(D))])])
    return common.flow_like(to_data, D, foreign)


def base(q0: Any) -> tuple[list[Transform], int]:
    """Return the transforms from standard normal noise to the base distribution, and D."""
    D = int(getattr(q0, "d", 0))
    if type(q0) is distributions.DiagGaussian:
        std = q0.log_scale.exp() * (1.0 if q0.temperature is None else q0.temperature)
        return common.normal_base(q0.loc.flatten(), std.flatten(), D), D
    if type(q0) is distributions.base.ConditionalDiagGaussian:
        return [common.conditional_normal(_sequential(q0.context_encoder), D)], D
    raise TypeError(
        f"expected DiagGaussian or ConditionalDiagGaussian as q0, got {type(q0).__name__}; train the flow with one of "
        "them"
    )


def transform(t: Any, D: int, place: str) -> Transform:
    """Convert a layer, in its own direction."""
    if common.is_from_library(t, "normflows", "Reverse"):
        return Inverse(transform(t.flow, D, place))
    if common.is_from_library(t, "normflows", "Composite"):
        return Compose([transform(part, D, f"{place}.{k}") for k, part in enumerate(t._flows)])
    with common.converting(place, t):
        if not common.is_from_library(t, "normflows", *LAYERS):
            raise common.unsupported(t, [*LAYERS, "Reverse", "Composite"])
        return LAYERS[type(t).__name__](t, D)


def _masked(t: Any) -> tuple[list[int], list[Layer], Layer, str]:
    """Return the degrees of the features, and hidden layers, last layer and activation of the masked network."""
    net = t.autoregressive_net
    degrees = net.final_layer.degrees.reshape(t.features if hasattr(t, "features") else -1, t._output_dim_multiplier())
    return degrees[:, 0].tolist(), *nsf.masked_net(net, "added", "gate")


def _affine_autoregressive(t: Any, D: int) -> Transform:
    degrees, layers, last, activation = _masked(t)
    rows = torch.arange(2 * D).reshape(D, 2).flip(1)  # normflows has (scale, shift), we have (shift, scale)
    last = last.params(rows)
    return common.autoregressive(degrees, layers, last, ForeignAffine("sigmoid", 1e-3), activation)


def _spline_autoregressive(t: Any, D: int) -> Transform:
    univariate = nsf.spline(t, t.num_bins)
    degrees, layers, last, activation = _masked(t)
    last = nsf.spline_params(last, univariate, t.autoregressive_net)
    return common.autoregressive(degrees, layers, last, univariate, activation)


def _spline_coupling(t: Any, D: int) -> Transform:
    univariate = nsf.spline(t, t.num_bins)
    if type(t.transform_net) is not ResidualNet:
        raise TypeError(
            f"expected normflows.nets.ResidualNet in a coupling layer, got {type(t.transform_net).__name__}"
        )
    kept, moved = t.identity_features.tolist(), t.transform_features.tolist()
    layers, last, activation = nsf.residual_net(t.transform_net)
    last, C = nsf.spline_params(last, univariate, t.transform_net), t.transform_net.context_features or 0
    coupling = common.coupling(D, moved, C, layers, last, univariate, activation)
    if t.unconditional_transform is None:
        return coupling
    alone = t.unconditional_transform
    own = nsf.spline(alone, t.num_bins)
    return Compose([coupling, common.unconditional(nsf.unconditional_spline(alone, own), own, D, kept)])


def _sequential(net: Any) -> Any:
    """Return the Sequential of normflows' MLP; other modules as they are."""
    return net.net if type(net) is nets.MLP else net


def _affine_coupling_block(t: Any, D: int) -> Transform:
    split, coupling, _ = t.flows
    if split.mode not in ("channel", "channel_inv"):
        raise ValueError(f"expected split_mode='channel' or 'channel_inv', got {split.mode!r}; that one is for images")
    first = list(range(-(-D // 2)))  # as torch.chunk splits
    rest = list(range(len(first), D))
    moved = rest if split.mode == "channel" else first
    layers, last, activation = common.sequential(_sequential(coupling.param_map))
    n = len(moved)
    if not coupling.scale:
        rows, univariate = torch.stack([torch.arange(n), torch.full((n,), -1)], 1), common.EXP_SCALE
    elif coupling.scale_map == "exp":
        rows, univariate = torch.arange(2 * n).reshape(n, 2), common.EXP_SCALE
    elif coupling.scale_map == "sigmoid_inv":
        rows, univariate = torch.arange(2 * n).reshape(n, 2), ForeignAffine("sigmoid", 0.0)
    else:
        raise ValueError(
            f"expected scale_map='exp' or 'sigmoid_inv', got {coupling.scale_map!r}, which divides by a sigmoid; train "
            "with one of these"
        )
    last = last.params(rows)
    return common.coupling(D, moved, 0, layers, last, univariate, activation)


def _masked_affine(t: Any, D: int) -> Transform:
    b = t.b.flatten()
    if not ((b == 0) | (b == 1)).all():
        raise ValueError(f"expected a mask b of zeros and ones, got {b.tolist()}")
    kept, moved = (torch.nonzero(b == v)[:, 0].tolist() for v in (1, 0))
    found = [getattr(t, name) if name in t._modules else None for name in ("t", "s")]
    networks = [common.sequential(_sequential(net)) for net in found if net is not None]
    if not networks:
        return Permute(range(D))
    if len({len(layers) for layers, _, _ in networks}) > 1 or len({activation for *_, activation in networks}) > 1:
        raise ValueError("expected networks t and s of one depth and one activation, got two that differ")
    stacked = [[*layers, last] for layers, last, _ in networks]
    layers = [_side_by_side([network[k] for network in stacked], k == 0) for k in range(len(stacked[0]))]
    layers[0] = Layer(layers[0].weight[:, kept], layers[0].bias, linear=layers[0].linear)
    *hidden, last = layers
    places = [torch.tensor(moved) + D * sum(net is not None for net in found[:k]) for k in range(2)]
    absent = torch.full((len(moved),), -1)
    rows = torch.stack([absent if net is None else place for net, place in zip(found, places, strict=True)], 1)
    last = last.params(rows)
    return common.coupling(D, moved, 0, hidden, last, common.EXP_SCALE, networks[0][2])


def _side_by_side(layers: list[Layer], first: bool) -> Layer:
    """Return one layer that computes those of several networks; the first layers share their input."""
    weights = [layer.weight for layer in layers]
    weight = torch.cat(weights) if first else torch.block_diag(*weights)
    return Layer(weight, torch.cat([layer.bias for layer in layers]), linear=layers[0].linear)


def _permute(t: Any, D: int) -> Transform:
    if t.mode == "shuffle":
        return Permute(t.perm)
    return Permute([*range(D // 2, D), *range(D // 2)])


def _lu_permute(t: Any, D: int) -> Transform:
    linear = common.lower_upper(t.linear)
    return Inverse(Compose([Permute(t.permutation._permutation), linear]))


def _constant_affine(t: Any, D: int) -> Transform:
    if not getattr(t, "data_dep_init_done", torch.ones(())) > 0:
        raise ValueError("expected ActNorm that has seen data, got one that has not; train it first")
    if t.s.numel() != D:
        raise ValueError(f"expected a scale for each of {D} features, got {tuple(t.s.shape)}")
    return common.scale_and_shift(t.s.flatten().exp(), t.t.flatten(), D)


def _invertible_affine(t: Any, D: int) -> Transform:
    W: Tensor = (t._assemble_W() if t.use_lu else t.W).detach()  # z = x W
    return Inverse(common.linear(W.T))


LAYERS: dict[str, Callable[[Any, int], Transform]] = {
    "MaskedAffineAutoregressive": _affine_autoregressive,
    "MaskedPiecewiseRationalQuadraticAutoregressive": _spline_autoregressive,
    "AutoregressiveRationalQuadraticSpline": lambda t, D: Inverse(_spline_autoregressive(t.mprqat, D)),
    "PiecewiseRationalQuadraticCoupling": _spline_coupling,
    "CoupledRationalQuadraticSpline": lambda t, D: Inverse(_spline_coupling(t.prqct, D)),
    "AffineCouplingBlock": _affine_coupling_block,
    "MaskedAffineFlow": _masked_affine,
    "Permute": _permute,
    "LULinearPermute": _lu_permute,
    "ActNorm": _constant_affine,
    "AffineConstFlow": _constant_affine,
    "InvertibleAffine": _invertible_affine,
}
