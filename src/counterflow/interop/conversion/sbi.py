"""Conversion of density estimators and posteriors of sbi 0.27, which wrap flows of nflows or zuko."""

from __future__ import annotations

from typing import Any

from sbi.inference.posteriors import DirectPosterior
from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow

from counterflow.flows.flow import Flow
from counterflow.interop.conversion import common, nflows, zuko


def flow(foreign: Any) -> Flow:
    """Convert a density estimator with its z-scoring, see `counterflow.convert`.

    Of a DirectPosterior, only the density estimator is converted. sbi draws from it until enough samples lie in the
    support of the prior, and divides the density by the share of those that do; samples of the flow may lie outside.
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
    with common.converting("the embedding net", foreign.embedding_net):
        to_data = common.with_embedding(found.transform, foreign.embedding_net)
    return common.flow_like(to_data, found.features, foreign)
