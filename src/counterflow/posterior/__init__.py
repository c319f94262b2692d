"""Posteriors by variational inference: targets, starting points, stages, modes, MCMC, Posterior."""

from typing import TYPE_CHECKING

from counterflow.lazy import on_first_use

if TYPE_CHECKING:
    from counterflow.posterior.config import PosteriorConfig as PosteriorConfig
    from counterflow.posterior.posterior import Posterior as Posterior
    from counterflow.posterior.posterior import Summary as Summary
    from counterflow.posterior.posterior import SummaryRow as SummaryRow
    from counterflow.posterior.posterior import fit_posterior as fit_posterior
    from counterflow.posterior.stages import Stage as Stage

_NAMES = {
    "Posterior": "counterflow.posterior.posterior:Posterior",
    "PosteriorConfig": "counterflow.posterior.config:PosteriorConfig",
    "Stage": "counterflow.posterior.stages:Stage",
    "Summary": "counterflow.posterior.posterior:Summary",
    "SummaryRow": "counterflow.posterior.posterior:SummaryRow",
    "fit_posterior": "counterflow.posterior.posterior:fit_posterior",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = on_first_use(__name__, _NAMES)
