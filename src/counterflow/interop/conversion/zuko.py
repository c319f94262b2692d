"""Conversion of flows of zuko 1.6, whose transforms map data to noise."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch.distributions import AffineTransform
from torch.distributions.transforms import _InverseTransform
from zuko import transforms as zt
from zuko.distributions import DiagNormal
from zuko.flows import GeneralCouplingTransform, MaskedAutoregressiveTransform
from zuko.flows.gaussianization import ElementWiseTransform
from zuko.lazy import Flow as LazyFlow
from zuko.lazy import LazyComposedTransform, LazyInverse, Unconditional, UnconditionalTransform
from zuko.nn import MaskedLinear, Residual

from counterflow.flows.flow import Flow
from counterflow.interop.conversion import common
from counterflow.interop.conversion.bounded import unbounded
from counterflow.interop.conversion.common import Layer, layer_of
from counterflow.interop.zuko import AdaptedFlow
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute
from counterflow.univariate.affine import ForeignAffine
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline


def flow(foreign: Any) -> Flow:
    """Convert a zuko Flow, see `counterflow.convert`."""
    if isinstance(foreign, AdaptedFlow):
        return foreign.unwrapped()
    if not isinstance(foreign, LazyFlow) or type(foreign).forward is not LazyFlow.forward:
        raise TypeError(
            f"expected a zuko Flow, got {type(foreign).__name__}; wrap transforms as zuko.flows.Flow(transforms, base)"
        )
    with common.converting("the base distribution", foreign.base):
        from_normal = base(foreign.base)
    D = from_normal.event_shape[0]
    mean, std = (getattr(from_normal.base_dist, name) for name in ("loc", "scale"))
    to_noise = transform(foreign.transform, D, "the transform")
    to_data = common.composed([*common.normal_base(mean, std, D), Inverse(to_noise)])
    return common.flow_like(to_data, D, foreign)


def base(lazy: Any) -> DiagNormal:
    """Return the base distribution; TypeError unless it is a normal distribution without context."""
    try:
        distribution = lazy()
    except (TypeError, AttributeError):
        distribution = None  # it needs a context
    if not isinstance(distribution, DiagNormal) or len(distribution.event_shape) != 1 or distribution.batch_shape:
        raise TypeError(
            f"expected UnconditionalDistribution(DiagNormal, ...) as the base, got {lazy}; train the flow with that one"
        )
    return distribution


def transform(t: Any, D: int, place: str) -> Transform:
    """Convert a lazy transform, in its own direction."""
    if type(t) is LazyComposedTransform:
        return Compose([transform(part, D, f"{place} {k}") for k, part in enumerate(t.transforms)])
    if type(t) is LazyInverse:
        return Inverse(transform(t.transform, D, place))
    with common.converting(place, t):
        if type(t) is MaskedAutoregressiveTransform:
            return _autoregressive(t, D)
        if type(t) is GeneralCouplingTransform:
            return _coupling(t, D)
        if type(t) is ElementWiseTransform:
            return _elementwise(t, D)
        if isinstance(t, UnconditionalTransform | Unconditional):
            return _unconditional(t(), D)
        known = (MaskedAutoregressiveTransform, GeneralCouplingTransform, ElementWiseTransform, UnconditionalTransform)
        raise common.unsupported(t, [cls.__name__ for cls in known])


def _univariate(t: Any) -> tuple[Univariate, list[int]]:
    """Return the univariate map, and the index of zuko's param for each of its params, -1 for zero."""
    made = t.univariate
    settings = made.keywords if isinstance(made, partial) and not made.args else {}
    kind = made.func if isinstance(made, partial) and not made.args else made
    shapes = [tuple(shape) for shape in t.shapes]
    found: Univariate
    if kind is zt.MonotonicAffineTransform and set(settings) <= {"slope"} and shapes == [(), ()]:
        return ForeignAffine("softclip", settings.get("slope", 1e-3)), [0, 1]
    if kind is zt.AdditiveTransform and not settings and shapes == [()]:
        return common.EXP_SCALE, [0, -1]  # with s = 0
    if kind is zt.MonotonicRQSTransform and set(settings) <= {"slope", "bound"}:
        bins = prod(shapes[0])
        if shapes == [(bins,), (bins,), (bins - 1,)]:
            bound, least = settings.get("bound", 5.0), settings.get("slope", 1e-3)
            found = RationalQuadraticSpline(bins, float(bound), least, clipped=True)
            return found, list(range(found.parameters))
    raise TypeError(
        "expected MonotonicAffineTransform, MonotonicRQSTransform or AdditiveTransform with no settings but slope and "
        f"bound, got {made} with shapes {shapes}; train the flow with one of these"
    )


def _params(last: Layer, chosen: list[int], total: int) -> Layer:
    """Return the layer of our params, chosen among the `total` params of each feature."""
    each = torch.arange(len(last.bias)).reshape(-1, total)
    rows = torch.stack([each[:, p] if p >= 0 else torch.full_like(each[:, 0], -1) for p in chosen], 1)
    return last.params(rows)


def _autoregressive(t: Any, D: int) -> Transform:
    univariate, chosen = _univariate(t)
    layers: list[Layer] = []
    names: set[str] = set()
    for module in t.hyper:
        if type(module) is MaskedLinear:
            layers.append(layer_of(module, linear=True))
        elif type(module) is Residual:
            inner, activation, outer = module
            names.add(common.activation_name(activation))
            layers += [layer_of(inner), layer_of(outer, linear=True, skip=len(layers) - 1)]
        else:
            names.add(common.activation_name(module))
            layers[-1] = common.activated(layers[-1])
    if len(names) != 1:
        raise ValueError(f"expected one kind of activation in the network, got {sorted(names)}")
    degrees = _degrees(t, layers, D)
    layers[0] = common.split_context(layers[0], D)
    *hidden, last = layers
    return common.autoregressive(degrees, hidden, _params(last, chosen, t.total), univariate, names.pop())


def _degrees(t: Any, layers: list[Layer], D: int) -> list[int]:
    """Return the degrees of the features, from their order or from the adjacency matrix.

    With an adjacency matrix, the degree is one more than the highest degree among the features that it depends on.
    """
    if t.order is not None:
        return (torch.unique(t.order, return_inverse=True)[1] + 1).tolist()
    reached = [layer.mask.cpu().double() for layer in layers]  # type: ignore[union-attr]  # all are masked
    paths = reached[0][:, :D]
    for layer, mask in zip(layers[1:], reached[1:], strict=True):
        paths = ((mask @ paths + (paths if layer.skip is not None else 0)) > 0).double()
    sees = paths.unflatten(0, (D, t.total)).amax(1) > 0
    degrees = torch.ones(D, dtype=torch.long)
    for _ in range(D):
        degrees = 1 + (sees * degrees).amax(1)
    return torch.unique(degrees, return_inverse=True)[1].add(1).tolist()


def _coupling(t: Any, D: int) -> Transform:
    univariate, chosen = _univariate(t)
    layers, last, activation = common.sequential(t.hyper)
    moved = torch.nonzero(~t.mask)[:, 0].tolist()
    C = common.inputs_of(layers, last) - (D - len(moved))
    return common.coupling(D, moved, C, layers, _params(last, chosen, t.total), univariate, activation)


def _elementwise(t: Any, D: int) -> Transform:
    univariate, chosen = _univariate(t)
    if hasattr(t, "hyper"):
        layers, last, activation = common.sequential(t.hyper)
        C = common.inputs_of(layers, last)
        return common.coupling(D, range(D), C, layers, _params(last, chosen, t.total), univariate, activation)
    raw = torch.cat([p.detach().reshape(D, -1) for p in t.phi], -1)
    params = torch.stack([raw[:, p] if p >= 0 else torch.zeros_like(raw[:, 0]) for p in chosen], -1)
    return common.unconditional(params, univariate, D, range(D))


def _unconditional(t: Any, D: int) -> Transform:
    """Convert a transform without a context."""
    if type(t) is _InverseTransform:  # of sbi's z-scoring "transform_to_unconstrained"
        return unbounded(t.inv, D)
    if type(t) is AffineTransform:
        loc, scale = (torch.as_tensor(v) for v in (t.loc, t.scale))
        return common.scale_and_shift(scale, loc, D)
    if type(t) is zt.PermutationTransform and t.order.dim() == 1:
        return Permute(t.order)
    if type(t) is zt.RotationTransform and t.R.dim() == 2:
        return common.linear(t.R)
    if type(t) is zt.LULinearTransform and t.L.dim() == 2:
        return common.linear(t.L @ t.U)
    if type(t) is zt.IdentityTransform:
        return Permute(range(D))
    if type(t) is zt.ComposedTransform:
        return Compose([_unconditional(part, D) for part in t.transforms])
    if isinstance(t, zt.DependentTransform):
        return _unconditional(t.base, D)
    known = ["AffineTransform", "PermutationTransform", "RotationTransform", "LULinearTransform", "IdentityTransform"]
    raise common.unsupported(t, known)
