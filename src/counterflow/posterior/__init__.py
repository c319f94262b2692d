"""Posteriors by variational inference: targets, starting points, stages, modes, MCMC, Posterior."""

from typing import TYPE_CHECKING

from counterflow.lazy import on_first_use

if TYPE_CHECKING:
    from counterflow.diagnostics.verdict import Verdict as Verdict
    from counterflow.posterior.config import PosteriorConfig as PosteriorConfig
    from counterflow.posterior.fit import fit_posterior as fit_posterior
    from counterflow.posterior.mcmc import Chains as Chains
    from counterflow.posterior.posterior import Posterior as Posterior
    from counterflow.posterior.posterior import Refined as Refined
    from counterflow.posterior.stages import Stage as Stage
    from counterflow.posterior.stages import WeightedDraws as WeightedDraws
    from counterflow.posterior.summary import Summary as Summary
    from counterflow.posterior.summary import SummaryRow as SummaryRow

_NAMES = {
    "Chains": "counterflow.posterior.mcmc:Chains",
    "Posterior": "counterflow.posterior.posterior:Posterior",
    "PosteriorConfig": "counterflow.posterior.config:PosteriorConfig",
    "Refined": "counterflow.posterior.posterior:Refined",
    "Stage": "counterflow.posterior.stages:Stage",
    "Summary": "counterflow.posterior.summary:Summary",
    "SummaryRow": "counterflow.posterior.summary:SummaryRow",
    "Verdict": "counterflow.diagnostics.verdict:Verdict",
    "WeightedDraws": "counterflow.posterior.stages:WeightedDraws",
    "fit_posterior": "counterflow.posterior.fit:fit_posterior",
}
__all__ = list(_NAMES)
__getattr__, __dir__ = on_first_use(__name__, _NAMES)
