"""Search for modes of the target that a flow, or a mixture of flows, leaves out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterflow.flows.flow import Flow
from counterflow.flows.mixture import FlowMixture
from counterflow.posterior.evaluation import LogDensity, log_density
from counterflow.posterior.gaussians import NEWTON_STEPS, Gaussians, join, newton_paths, refine_and_dedupe

MIN_COVERAGE = 1 / 20  # a point is left out if q has less than this share of the normalised target density there


def search_modes(
    target: LogDensity, flow: Flow | FlowMixture, known: Gaussians, n: int, generator: torch.Generator
) -> Gaussians:
    """Return the known Gaussians, and those that Newton paths find from n points where the target is high, q low.

    Neither the starts nor the surroundings of q reach every mode.
    """
    doubtful = newton_paths(target, undercovered_points(target, flow, n), NEWTON_STEPS, generator)
    return join(known, refine_and_dedupe(target, doubtful, generator))


@torch.no_grad()
def undercovered_points(target: LogDensity, flow: Flow | FlowMixture, n: int, samples: int = 1000) -> Tensor:
    """Find points (K, D), at least n, where the target is high and q low: the largest p / q of each set of draws.

    Each set of draws is made from a base that is widened up to fourfold, so that they also fall around what the flow
    covers. A mixture shares the points among its flows.
    """
    flows: Sequence[Flow] = list(flow.flows) if isinstance(flow, FlowMixture) else [flow]  # type: ignore[arg-type]  # torch types them as modules
    sets = -(-n // len(flows))
    width = torch.linspace(1, 4, samples, dtype=torch.float64).repeat(sets)[:, None]
    points = []
    for member in flows:
        theta, _ = member.transform(width * member().base.sample((sets * samples,)))
        finite = theta.isfinite().all(-1)
        theta = torch.where(finite[:, None], theta, 0.0)
        log_ratio = log_density(target, theta) - flow().log_prob(theta)
        log_ratio = torch.where(finite, log_ratio.nan_to_num(nan=-math.inf, neginf=-math.inf), -math.inf)
        best = log_ratio.reshape(sets, samples).argmax(1)
        points.append(theta.reshape(sets, samples, -1)[torch.arange(sets), best])
    return torch.cat(points)


@torch.no_grad()
def uncovered_shares(
    target: LogDensity, flow: Flow | FlowMixture, found: Gaussians, generator: torch.Generator, samples: int = 500
) -> Tensor:
    """Shares (K,) of the mass, around each of K Gaussians, where the density of q is far too low. Their sum is missed.

        sum_s w_s r_ks [q(s) < p(s) / (20 Z)] / sum_s w_s,    w_s = p(s) / m(s),    Z = mean_s w_s

    with draws s from the mixture m of q and the K Gaussians, half of the draws from either, and the responsibilities
    r_ks of the Gaussians.
    """
    K, D = found.mean.shape
    eps = torch.randn(K, samples, D, generator=generator, dtype=found.mean.dtype)
    theta = torch.cat([found.rsample_and_log_prob(eps)[0].reshape(-1, D), flow().sample((K * samples,))])
    log_p = log_density(target, theta)
    log_q = flow().log_prob(theta).nan_to_num(nan=-math.inf, neginf=-math.inf)
    each = found.log_prob(theta)
    log_gaussians = torch.logsumexp(each, 0) - math.log(K)
    log_w = log_p - (torch.logaddexp(log_q, log_gaussians) - math.log(2))
    log_z = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    uncovered = (log_p > -math.inf) & (log_q < log_p - log_z + math.log(MIN_COVERAGE))
    return (each.softmax(0) * (log_w.softmax(0) * uncovered)).sum(1)
