"""Search for modes that a flow leaves out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from counterflow.flows.flow import Flow
from counterflow.posterior.starts import Gaussians, LogDensity, log_density

TWENTIETH = math.log(20)  # nats: where the flow has so much less than the target, it does not cover it


@torch.no_grad()
def undercovered_points(target: LogDensity, flow: Flow, n: int, draws: int = 1000) -> Tensor:
    """n points (n, D) where the target is high and the flow low: of `draws` each, the one with the largest p / q.

    The draws are made from a base that is stretched up to fourfold, so that they also fall around what q covers.
    """
    wide = torch.linspace(1, 4, draws, dtype=torch.float64).repeat(n)[:, None]
    base = flow().base
    eps = wide * base.sample((n * draws,))
    theta, log_det = flow.transform(eps)
    ratio = log_density(target, theta) - base.log_prob(eps) + log_det
    best = ratio.nan_to_num(nan=-math.inf, neginf=-math.inf).reshape(n, draws).argmax(1)
    return theta.reshape(n, draws, -1)[torch.arange(n), best]


@torch.no_grad()
def missed_mass(
    target: LogDensity, flow: Flow, found: Gaussians, generator: torch.Generator, draws: int = 500
) -> float:
    """The share of the mass that was found where the flow has less than a twentieth of what it should have.

        sum_s w_s [p(s) > 20 Z q(s)] / sum_s w_s,    w_s = p(s) / m(s),    Z = mean_s w_s

    with draws s from m, half of them from the flow q and half from the K Gaussians.
    """
    K, S, D = len(found.mean), draws, found.mean.shape[-1]
    eps = torch.randn(K, S, D, generator=generator, dtype=found.mean.dtype)
    theta = torch.cat([found.rsample_and_log_prob(eps)[0].reshape(-1, D), flow().sample((K * S,))])
    log_p = log_density(target, theta)
    log_q = flow().log_prob(theta).nan_to_num(nan=-math.inf, neginf=-math.inf)
    log_m = torch.logaddexp(log_q, torch.logsumexp(found.log_prob(theta), 0) - math.log(K)) - math.log(2)
    log_w = log_p - log_m
    log_z = torch.logsumexp(log_w, 0) - math.log(len(log_w))
    missed = (log_p > -math.inf) & (log_p > log_z + TWENTIETH + log_q)
    return (log_w.softmax(0) * missed).sum().item()
