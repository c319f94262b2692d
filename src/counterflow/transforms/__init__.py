"""Invertible maps of D features, with their log-determinants."""

from counterflow.made.architecture import Architecture
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Linear, Permute, Standardize, Whiten
from counterflow.transforms.context import StandardizedContext
from counterflow.transforms.coupling import CouplingLayer
from counterflow.transforms.masked import MaskedAutoregressive
from counterflow.transforms.quantile_spline import QuantileSpline
from counterflow.transforms.table.circular import CircularColumn
from counterflow.transforms.table.continuous import AsinhColumn, LinearColumn, LogColumn, LogitColumn
from counterflow.transforms.table.discrete import GridColumn, OrdinalColumn, SpikedColumn
from counterflow.transforms.table.table import TableTransform
from counterflow.transforms.trained import ActNorm, LULinear
from counterflow.univariate.affine import Affine, ForeignAffine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.sinh_arcsinh import SinhArcsinh
from counterflow.univariate.spline import RationalQuadraticSpline

__all__ = [
    "ActNorm",
    "Affine",
    "Architecture",
    "AsinhColumn",
    "Autoregressive",
    "CircularColumn",
    "Compose",
    "CouplingLayer",
    "ForeignAffine",
    "Gated",
    "GridColumn",
    "Inverse",
    "LULinear",
    "Linear",
    "LinearColumn",
    "LogColumn",
    "LogitColumn",
    "MaskedAutoregressive",
    "OrdinalColumn",
    "Permute",
    "QuantileSpline",
    "RationalQuadraticSpline",
    "SinhArcsinh",
    "SpikedColumn",
    "Standardize",
    "StandardizedContext",
    "TableTransform",
    "Transform",
    "Univariate",
    "Whiten",
]
