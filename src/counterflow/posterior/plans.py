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
    rate: float  # initial learning rate, as a multiple of config.learning_rate
    more_layers: bool = False  # put config.layers more layers in front of the flow
    max_k_hat: float = K_HAT_USABLE  # k-hat below which, with a large effective sample size, no further stage follows


def stage_plans(config: PosteriorConfig) -> tuple[StagePlan, ...]:
    """Plan the stages: short ones, longer ones, a deeper one, and one by the forward KL, which covers the target.

    The first is enough for a posterior that is almost normal.
    """
    S = config.samples
    n = config.steps
    return (
        StagePlan(config.estimator, S, n, rate=1.0, max_k_hat=K_HAT_CLOSE),
        StagePlan(config.estimator, 2 * S, 5 * n, rate=1.0, max_k_hat=K_HAT_CLOSE),
        StagePlan(config.estimator, 2 * S, 10 * n, rate=0.5),
        StagePlan(config.estimator, 2 * S, 20 * n, rate=0.5, more_layers=True),
        StagePlan("forward_kl", 8 * S, 10 * n, rate=0.5),
    )[: config.stages]
