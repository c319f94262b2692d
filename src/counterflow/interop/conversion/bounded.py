"""Conversion of torch's bijections onto the support of a prior, `biject_to(support)`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
)

from counterflow.transforms.table.column import Column
from counterflow.transforms.table.continuous import LinearColumn, LogColumn, LogitColumn
from counterflow.transforms.table.table import TableTransform


def unbounded(bijection: Any, D: int) -> TableTransform:
    """Return the inverse of a bijection from unconstrained numbers onto the support of a prior, feature by feature.

    Outside of the support, where torch's inverse maps to a number at its end, the density of a flow is 0.

    Raises:
        TypeError: another bijection than the identity, sigmoid, exp, each followed by a shift and a positive scale, and
            concatenations of these.
    """
    return TableTransform(_columns(bijection, D))


def _columns(bijection: Any, D: int) -> list[Column]:
    if type(bijection) is IndependentTransform:
        return _columns(bijection.base_transform, D)
    if type(bijection) is CatTransform and bijection.dim == -1:
        joined = zip(bijection.transforms, bijection.lengths, strict=True)
        return [column for part, length in joined for column in _columns(part, length)]
    parts: list[Any] = list(bijection.parts) if type(bijection) is ComposeTransform else [bijection]
    affine = parts.pop() if parts and type(parts[-1]) is AffineTransform else AffineTransform(0.0, 1.0)
    low, scale = (torch.as_tensor(v).double().expand(D).tolist() for v in (affine.loc, affine.scale))
    if all(v > 0 for v in scale):
        match parts:
            case []:
                return [LinearColumn("", center=low[i], scale=scale[i]) for i in range(D)]
            case [SigmoidTransform()]:
                return [LogitColumn("", low[i], low[i] + scale[i]) for i in range(D)]
            case [ExpTransform()]:
                return [LogColumn("", low[i], center=math.log(scale[i])) for i in range(D)]
    raise TypeError(
        "expected the identity, a sigmoid or exp, each with a shift and a positive scale, as the map onto the support "
        f"of the prior, got {bijection}; train with another z-scoring"
    )
