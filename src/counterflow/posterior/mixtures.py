"""One flow for each mode of the target, weighted by evidence and judged as one proposal.

    q = sum_k w_k q_k

The first flow starts at the best Gaussian. As long as a known mode has posterior mass and next to no density under q,
another flow starts there. Each is fitted to the whole target, from where it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from counterflow.diagnostics.importance import psis
from counterflow.diagnostics.verdict import MAX_MISSED_MASS
from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.evaluation import LogDensity
from counterflow.posterior.gaussians import Gaussians
from counterflow.posterior.modes import search_modes, uncovered_shares
from counterflow.posterior.stages import FlowFit, Stage, WeightedDraws, draw_and_judge, fit_flow
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.history import OnEpoch, OnStep

DRAWS = 4000  # of each flow, from which the weights of the mixture are estimated
ITERATIONS = 100  # of the weights; flows of separate modes need one
MIN_WEIGHT = 1e-3  # a flow with less takes no part
MIN_LOG_WEIGHT = -1e3  # finite, since draws of a flow without weight may have no density under the others


def fit_modes(
    target: LogDensity,
    gaussians: Gaussians,
    config: PosteriorConfig,
    deadline: float,
    generator: torch.Generator,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> FlowFit:
    """Fit flows to the modes that are found, at most `config.modes`, and judge their mixture.

    Modes are searched from the Gaussians, and around each new q. The fit ends if no known mode is left out, if the time
    is up, or if a flow gets no weight; the verdict has the mass of the modes that are left out.

    Args:
        target: log density.
        gaussians: distinct Gaussians, the best one first.
        config: configuration of the fit.
        deadline: value of time.perf_counter() after which no further stage should end.
        generator: source of the noise of the search, the same in all processes.
        on_stage: called after each stage, on rank 0.
        on_epoch: called as on_epoch(task, epoch) up to ten times per stage, on rank 0.
        on_step: called as on_step(task, done, total) after each step.
        checkpoints: where each stage writes its training state.
    """
    group = Workers.current()
    fits: list[FlowFit] = []
    fitted: FlowFit | None = None
    start: Gaussians | None = gaussians
    missed = 0.0
    while start is not None:
        mode = len(fits) + 1
        fits.append(fit_flow(target, start, config, deadline, mode, on_stage, on_epoch, on_step, checkpoints))
        found = fits[-1] if fitted is None else _mixture_of(target, fits, config, group)
        if found is None:  # the new flow covers nothing that the others do not
            break
        fitted = found
        known = search_modes(target, fitted.flow, gaussians, config.starts, generator)
        shares = uncovered_shares(target, fitted.flow, known, generator)
        missed = group.broadcast_value(shares.sum().item())
        gaussians = known
        late = time.perf_counter() + fits[-1].stages[0].seconds > deadline
        interrupted = fits[-1].stages[-1].stopped == "interrupted"
        done = missed < MAX_MISSED_MASS or mode == config.modes or late or interrupted
        start = None if group.broadcast_value(done) else _from_first_rank(known.pick(shares.argmax()[None]), group)
    stages = tuple(stage for each in fits for stage in each.stages)
    return fitted._replace(stages=stages, verdict=replace(fitted.verdict, missed=missed))  # type: ignore[union-attr]


def _from_first_rank(q: Gaussians, group: Workers) -> Gaussians:
    return Gaussians(*(group.gather(part)[0] for part in q))


def _mixture_of(target: LogDensity, fits: list[FlowFit], config: PosteriorConfig, group: Workers) -> FlowFit | None:
    """Return the mixture of the flows with its draws and its verdict; None if the last flow gets no weight."""
    flows: list[Flow] = [each.flow for each in fits]  # type: ignore[misc]  # fit_flow returns single flows
    weights = evidence_weights(flows, [each.draws for each in fits])
    if weights[-1] < MIN_WEIGHT:
        return None
    used = weights >= MIN_WEIGHT
    members = [flow for flow, is_used in zip(flows, used.tolist(), strict=True) if is_used]
    mixture = FlowMixture(members, (weights[used] / weights[used].sum()).tolist())
    draws, verdict = draw_and_judge(target, mixture, config.verdict_samples, group)
    return FlowFit(mixture, draws, verdict, ())


@torch.no_grad()
def evidence_weights(flows: list[Flow], draws: list[WeightedDraws]) -> Tensor:
    """Weights (K,) of a mixture of K flows that minimise KL(p || q), from weighted draws of all flows.

        w_k <- sum_s v_s w_k q_k(s) / q(s),    v_s proportional to p(s) / sum_k q_k(s),    sum_s v_s = 1

    For flows of separate modes, w_k is the share of the evidence in mode k after one iteration; where flows overlap,
    further iterations share the mass between them.
    """
    theta = torch.cat([each.theta[:DRAWS] for each in draws])
    log_p = torch.cat([each.log_p[:DRAWS] for each in draws])
    log_q = torch.stack([flow().log_prob(theta) for flow in flows])
    v = psis(log_p - torch.logsumexp(log_q, 0)).log_weights.exp()
    log_w = torch.zeros(len(flows), dtype=log_q.dtype)
    for _ in range(ITERATIONS):
        log_w = (v * (log_w[:, None] + log_q).softmax(0)).sum(1).log().clamp_min(MIN_LOG_WEIGHT)
    return log_w.softmax(0)
