"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from typing import TYPE_CHECKING, Any

from counterflow import diagnostics, interop, objectives, transforms
from counterflow.distill.distill import DistillConfig, distill
from counterflow.flows import bases
from counterflow.flows.flow import Flow
from counterflow.flows.recipes import IAF, MAF, NSF, Coupling
from counterflow.interop import convert
from counterflow.io import data
from counterflow.io.export import export
from counterflow.io.serialization import load, save
from counterflow.objectives import log_likelihood
from counterflow.posterior import targets
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.posterior import Posterior, fit_posterior
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.fit import fit
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute, Standardize
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.spline import RationalQuadraticSpline
from counterflow.vae.vae import VAE

if TYPE_CHECKING:
    from counterflow.density.estimator import FlowDensity as FlowDensity

__version__ = "0.2.0"

__all__ = [
    # flows
    "IAF",
    "MAF",
    "NSF",
    "Coupling",
    "Flow",
    # layers
    "Autoregressive",
    "Affine",
    "Gated",
    "RationalQuadraticSpline",
    "Compose",
    "Inverse",
    "Permute",
    "Standardize",
    # training
    "fit",
    "FitConfig",
    "Checkpoints",
    "log_likelihood",
    # tasks
    "fit_posterior",
    "PosteriorConfig",
    "Posterior",
    "VAE",
    "FlowDensity",
    "distill",
    "DistillConfig",
    "convert",
    "save",
    "load",
    "export",
    # submodules
    "bases",
    "data",
    "diagnostics",
    "interop",
    "objectives",
    "targets",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Import FlowDensity on first access: its base classes come from scikit-learn, which is optional."""
    if name != "FlowDensity":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from counterflow.density.estimator import FlowDensity

    return FlowDensity
