"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from typing import TYPE_CHECKING

from counterflow.lazy import on_first_use

if TYPE_CHECKING:
    from counterflow import diagnostics as diagnostics
    from counterflow import interop as interop
    from counterflow import objectives as objectives
    from counterflow import transforms as transforms
    from counterflow.density.estimator import FlowDensity as FlowDensity
    from counterflow.distill.config import DistillConfig as DistillConfig
    from counterflow.distill.distill import distill as distill
    from counterflow.flows import bases as bases
    from counterflow.flows.flow import Flow as Flow
    from counterflow.flows.recipes import IAF as IAF
    from counterflow.flows.recipes import MAF as MAF
    from counterflow.flows.recipes import NSF as NSF
    from counterflow.flows.recipes import Coupling as Coupling
    from counterflow.interop import convert as convert
    from counterflow.io import data as data
    from counterflow.io.export import export as export
    from counterflow.io.serialization import load as load
    from counterflow.io.serialization import save as save
    from counterflow.objectives import log_likelihood as log_likelihood
    from counterflow.posterior import targets as targets
    from counterflow.posterior.config import PosteriorConfig as PosteriorConfig
    from counterflow.posterior.fit import fit_posterior as fit_posterior
    from counterflow.posterior.posterior import Posterior as Posterior
    from counterflow.training.checkpoints import Checkpoints as Checkpoints
    from counterflow.training.config import FitConfig as FitConfig
    from counterflow.training.fit import fit as fit
    from counterflow.transforms.autoregressive import Autoregressive as Autoregressive
    from counterflow.transforms.compose import Compose as Compose
    from counterflow.transforms.compose import Inverse as Inverse
    from counterflow.transforms.constant import Permute as Permute
    from counterflow.transforms.constant import Standardize as Standardize
    from counterflow.univariate.affine import Affine as Affine
    from counterflow.univariate.affine import Gated as Gated
    from counterflow.univariate.spline import RationalQuadraticSpline as RationalQuadraticSpline
    from counterflow.vae.vae import VAE as VAE
else:  # import the package `counterflow.distill` now: later, its import would replace the function of that name
    import counterflow.distill

    del counterflow, distill

__version__ = "0.2.0"

_NAMES = {
    # flows
    "IAF": "counterflow.flows.recipes:IAF",
    "MAF": "counterflow.flows.recipes:MAF",
    "NSF": "counterflow.flows.recipes:NSF",
    "Coupling": "counterflow.flows.recipes:Coupling",
    "Flow": "counterflow.flows.flow:Flow",
    # layers
    "Autoregressive": "counterflow.transforms.autoregressive:Autoregressive",
    "Affine": "counterflow.univariate.affine:Affine",
    "Gated": "counterflow.univariate.affine:Gated",
    "RationalQuadraticSpline": "counterflow.univariate.spline:RationalQuadraticSpline",
    "Compose": "counterflow.transforms.compose:Compose",
    "Inverse": "counterflow.transforms.compose:Inverse",
    "Permute": "counterflow.transforms.constant:Permute",
    "Standardize": "counterflow.transforms.constant:Standardize",
    # training
    "fit": "counterflow.training.fit:fit",
    "FitConfig": "counterflow.training.config:FitConfig",
    "Checkpoints": "counterflow.training.checkpoints:Checkpoints",
    "log_likelihood": "counterflow.objectives:log_likelihood",
    # tasks
    "fit_posterior": "counterflow.posterior.fit:fit_posterior",
    "PosteriorConfig": "counterflow.posterior.config:PosteriorConfig",
    "Posterior": "counterflow.posterior.posterior:Posterior",
    "VAE": "counterflow.vae.vae:VAE",
    "FlowDensity": "counterflow.density.estimator:FlowDensity",
    "distill": "counterflow.distill.distill:distill",
    "DistillConfig": "counterflow.distill.config:DistillConfig",
    "convert": "counterflow.interop:convert",
    "save": "counterflow.io.serialization:save",
    "load": "counterflow.io.serialization:load",
    "export": "counterflow.io.export:export",
    # submodules
    "bases": "counterflow.flows.bases:",
    "data": "counterflow.io.data:",
    "diagnostics": "counterflow.diagnostics:",
    "interop": "counterflow.interop:",
    "objectives": "counterflow.objectives:",
    "targets": "counterflow.posterior.targets:",
    "transforms": "counterflow.transforms:",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = on_first_use(__name__, _NAMES)
