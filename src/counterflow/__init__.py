"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from typing import TYPE_CHECKING, Any

from counterflow import targets
from counterflow.autoregressive import Autoregressive
from counterflow.blackbox import PosteriorConfig
from counterflow.checkpoint import load, save
from counterflow.columns import Column, Columns
from counterflow.context import StandardizedContext
from counterflow.coupling import CouplingLayer
from counterflow.distill import Agreement, DistillConfig, agreement, distill
from counterflow.export import export
from counterflow.fit import Epoch, FitConfig, Record, fit
from counterflow.flow import Base, DiagonalNormal, Flow, FlowDistribution, KernelMixture, StandardNormal, StudentT
from counterflow.interop import convert
from counterflow.kernels import add_kernels
from counterflow.linear import Linear
from counterflow.made import Wiring
from counterflow.marginals import Marginals
from counterflow.mixture import FlowMixture
from counterflow.objectives import (
    Evaluation,
    dreg_elbo,
    elbo,
    evaluate,
    forward_kl,
    iw_elbo,
    log_likelihood,
    path_elbo,
    renyi_elbo,
    warm_up,
)
from counterflow.posterior import Posterior, fit_posterior
from counterflow.recipes import IAF, MAF, NSF, Coupling
from counterflow.states import States
from counterflow.transform import Compose, Inverse, Permute, Standardize, Transform, Triangular
from counterflow.univariate import Affine, Gated, RationalQuadraticSpline, ScaledAffine, SinhArcsinh, Univariate
from counterflow.vae import VAE

if TYPE_CHECKING:
    from counterflow.density.estimator import FlowDensity as FlowDensity

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "DistillConfig",
    "add_kernels",
    "agreement",
    "distill",
    "export",
    "IAF",
    "VAE",
    "Epoch",
    "Evaluation",
    "FitConfig",
    "Record",
    "convert",
    "States",
    "dreg_elbo",
    "elbo",
    "evaluate",
    "fit",
    "fit_posterior",
    "forward_kl",
    "iw_elbo",
    "load",
    "log_likelihood",
    "path_elbo",
    "renyi_elbo",
    "save",
    "targets",
    "warm_up",
    "MAF",
    "NSF",
    "Affine",
    "Autoregressive",
    "Base",
    "Column",
    "Columns",
    "Compose",
    "Coupling",
    "CouplingLayer",
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "FlowMixture",
    "Gated",
    "Inverse",
    "KernelMixture",
    "Linear",
    "Marginals",
    "Permute",
    "Posterior",
    "PosteriorConfig",
    "RationalQuadraticSpline",
    "ScaledAffine",
    "SinhArcsinh",
    "StandardNormal",
    "Standardize",
    "StandardizedContext",
    "StudentT",
    "Transform",
    "Triangular",
    "Univariate",
    "Wiring",
]


def __getattr__(name: str) -> Any:
    """FlowDensity when it is first asked for: its base classes are scikit-learn's, which is optional."""
    if name != "FlowDensity":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from counterflow.density.estimator import FlowDensity

    return FlowDensity
