"""Density estimators and posteriors of sbi 0.27: flows of nflows or zuko, with what sbi does around them."""

from __future__ import annotations

from typing import Any

from sbi.inference.posteriors import DirectPosterior
from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow

from counterflow.flows.flow import Flow
from counterflow.interop import common, nflows, zuko


def flow(foreign: Any) -> Flow:
    """A `Flow` with the numbers of a density estimator, its z-scoring included: see `counterflow.convert`.

    Of a DirectPosterior it is the density estimator's: sbi draws from that until enough samples lie in the prior's
    support, and corrects log_prob by the share of those that do. Samples of the flow may lie outside of it.
    """
    if isinstance(foreign, DirectPosterior):
        foreign = foreign.posterior_estimator
    if type(foreign) not in (NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow):
        raise TypeError(
            f"expected a DirectPosterior or its estimator NFlowsFlow or ZukoFlow, got {type(foreign).__name__}; train "
            "with density_estimator='maf', 'nsf', 'maf_rqs', 'zuko_maf', 'zuko_nsf' or 'zuko_nice'"
        )
    if type(foreign) is NFlowsFlow:
        return nflows.flow(foreign.net)
    found = zuko.flow(foreign.net)
    if type(foreign) is ZukoUnconditionalFlow:
        return found
    with common.at("the embedding net", foreign.embedding_net):
        to_data = common.embedded(found.transform, foreign.embedding_net)
    return common.flow_of(to_data, found.features, foreign)
