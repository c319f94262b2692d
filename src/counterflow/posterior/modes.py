"""Search for modes of the target that a fitted flow leaves out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterflow.flows.flow import Flow
from counterflow.posterior.evaluation import LogDensity, log_density
from counterflow.posterior.gaussians import NEWTON_STEPS, Gaussians, join, newton_paths, refine_and_dedupe

MIN_COVERAGE = 1 / 20  # a point is left out if q has less than this share of the normalised target density there


def missed_mass(target: LogDensity, flow: Flow, known: Gaussians, n: int, generator: torch.Generator) -> float:
    """Search for modes and return the share of the mass found that the flow leaves out, between 0 and 1.

    The modes are those of the known Gaussians, and those that Newton paths find from n points where the target is high
    and the flow low. Neither the starts nor the flow's own surroundings reach every mode: 0 is no proof.
    """
    doubtful = newton_paths(target, undercovered_points(target, flow, n), NEWTON_STEPS, generator)
    return uncovered_share(target, flow, join(known, refine_and_dedupe(target, doubtful, generator)), generator)


@torch.no_grad()
def undercovered_points(target: LogDensity, flow: Flow, n: int, samples: int = 1000) -> Tensor:
    """Find n points (n, D) where the target is high and the flow low: the largest p / q of each n-th of the draws.

    The n * samples draws are made from a base that is widened up to fourfold, so that they also fall around what the
    flow covers.
    """
    width = torch.linspace(1, 4, samples, dtype=torch.float64).repeat(n)[:, None]
    base = flow().base
    eps = width * base.sample((n * samples,))
    theta, log_det = flow.transform(eps)
    log_ratio = log_density(target, theta) - base.log_prob(eps) + log_det
    best = log_ratio.nan_to_num(nan=-math.inf, neginf=-math.inf).reshape(n, samples).argmax(1)
    return theta.reshape(n, samples, -1)[torch.arange(n), best]


@torch.no_grad()
def uncovered_share(
    target: LogDensity, flow: Flow, found: Gaussians, generator: torch.Generator, samples: int = 500
) -> float:
    """Share of the mass, around the Gaussians and under the flow, where the flow's density is far too low.

        sum_s w_s [q(s) < p(s) / (20 Z)] / sum_s w_s,    w_s = p(s) / m(s),    Z = mean_s w_s

    with draws s from the mixture m of the flow q and the K Gaussians, half of the draws from either.
    """
    K, D = found.mean.shape
    eps = torch.randn(K, samples, D, generator=generator, dtype=found.mean.dtype)
    theta = torch.cat([found.rsample_and_log_prob(eps)[0].reshape(-1, D), flow().sample((K * samples,))])
    log_p = log_density(target, theta)
    log_q = flow().log_prob(theta).nan_to_num(nan=-math.inf, neginf=-math.inf)
    log_gaussians = torch.logsumexp(found.log_prob(theta), 0) - math.log(K)
    log_w = log_p - (torch.logaddexp(log_q, log_gaussians) - math.log(2))
    log_z = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    uncovered = (log_p > -math.inf) & (log_q < log_p - log_z + math.log(MIN_COVERAGE))
    return (log_w.softmax(0) * uncovered).sum().item()
