"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from typing import TYPE_CHECKING, Any

from counterflow import targets
from counterflow.autoregressive import Autoregressive
from counterflow.blackbox import PosteriorConfig
from counterflow.checkpoint import load, save
from counterflow.columns import Column, Columns
from counterflow.fit import Epoch, FitConfig, Record, fit
from counterflow.flow import Base, DiagonalNormal, Flow, FlowDistribution, StandardNormal, StudentT
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
from counterflow.transform import Compose, Inverse, Permute, Standardize, Transform, Triangular
from counterflow.univariate import Affine, Gated, RationalQuadraticSpline, SinhArcsinh, Univariate
from counterflow.vae import VAE

if TYPE_CHECKING:
    from counterflow.density import FlowDensity as FlowDensity

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "VAE",
    "Epoch",
    "Evaluation",
    "FitConfig",
    "Record",
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
    "DiagonalNormal",
    "Flow",
    "FlowDistribution",
    "Gated",
    "Inverse",
    "Permute",
    "Posterior",
    "PosteriorConfig",
    "RationalQuadraticSpline",
    "SinhArcsinh",
    "StandardNormal",
    "Standardize",
    "StudentT",
    "Transform",
    "Triangular",
    "Univariate",
]


def __getattr__(name: str) -> Any:
    """FlowDensity when it is first asked for: its base classes are scikit-learn's, which is optional."""
    if name != "FlowDensity":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from counterflow.density import FlowDensity

    return FlowDensity
