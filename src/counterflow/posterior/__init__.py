"""Posteriors by variational inference: targets, starting points, stages, modes, MCMC, Posterior."""

from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.posterior import Posterior, Summary, SummaryRow, fit_posterior
from counterflow.posterior.stages import Stage

__all__ = ["Posterior", "PosteriorConfig", "Stage", "Summary", "SummaryRow", "fit_posterior"]
