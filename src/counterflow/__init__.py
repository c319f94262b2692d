"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from counterflow.autoregressive import Autoregressive
from counterflow.flow import Base, DiagonalNormal, Flow, FlowDistribution, StandardNormal
from counterflow.recipes import IAF, MAF, NSF, Coupling
from counterflow.transform import Compose, Inverse, Permute, Standardize, Transform
from counterflow.univariate import Affine, Gated, RationalQuadraticSpline, Univariate

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MAF",
    "NSF",
    "Affine",
    "Autoregressive",
    "Base",
    "Compose",
    "Coupling",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "Gated",
    "Inverse",
    "Permute",
    "RationalQuadraticSpline",
    "StandardNormal",
    "Standardize",
    "Transform",
    "Univariate",
]
