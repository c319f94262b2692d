"""Stages that a posterior fit plans, and the gradient estimators that they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from counterflow import objectives
from counterflow.diagnostics.importance import K_HAT_CLOSE, K_HAT_USABLE
from counterflow.posterior.config import Estimator, PosteriorConfig

ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "reparameterised": objectives.elbo,
    "path": objectives.path_elbo,
    "dreg": objectives.dreg_elbo,
    "forward_kl": objectives.forward_kl,
    "renyi": objectives.renyi_elbo,
}


@dataclass(frozen=True)
class StagePlan:
    """Settings of one stage."""

    estimator: Estimator
    samples: int  # S, draws of the flow in each step
    steps: int
    more_layers: bool = False  # put config.layers more layers in front of the flow
    max_k_hat: float = K_HAT_USABLE  # k-hat below which, with a large effective sample size, no further stage follows


def stage_plans(config: PosteriorConfig) -> tuple[StagePlan, ...]:
    """Plan the stages: the first, a longer one, a deeper one, and one by the forward KL, which covers the target."""
    S = config.samples
    n = config.steps
    return (
        StagePlan(config.estimator, S, n, max_k_hat=K_HAT_CLOSE),
        StagePlan(config.estimator, S, 2 * n),
        StagePlan(config.estimator, S, 4 * n, more_layers=True),
        StagePlan("forward_kl", 4 * S, 2 * n),
    )[: config.stages]
