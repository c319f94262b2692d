"""Counterflow: autoregressive normalizing flows, both directions at the cost of one pass."""

from counterflow.autoregressive import Autoregressive
from counterflow.checkpoint import load, save
from counterflow.fit import Epoch, FitConfig, Record, fit
from counterflow.flow import Base, DiagonalNormal, Flow, FlowDistribution, StandardNormal
from counterflow.objectives import Evaluation, elbo, evaluate, iw_elbo, log_likelihood, path_elbo, warm_up
from counterflow.recipes import IAF, MAF, NSF, Coupling
from counterflow.transform import Compose, Inverse, Permute, Standardize, Transform
from counterflow.univariate import Affine, Gated, RationalQuadraticSpline, Univariate
from counterflow.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "VAE",
    "Epoch",
    "Evaluation",
    "FitConfig",
    "Record",
    "elbo",
    "evaluate",
    "fit",
    "iw_elbo",
    "load",
    "log_likelihood",
    "path_elbo",
    "save",
    "warm_up",
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
