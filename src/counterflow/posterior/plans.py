"""The stages that a posterior fit plans, and the gradient estimators they use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from counterflow import objectives
from counterflow.diagnostics.importance import CLOSE, USABLE
from counterflow.posterior.config import Estimator, PosteriorConfig

ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "reparameterised": objectives.elbo,
    "path": objectives.path_elbo,
    "dreg": objectives.dreg_elbo,
    "forward_kl": objectives.forward_kl,
    "renyi": objectives.renyi_elbo,
}


@dataclass(frozen=True)
class Plan:
    """What a stage will do."""

    estimator: Estimator
    samples: int  # S, draws of the flow in each step
    steps: int
    more_layers: bool = False
    enough: float = USABLE  # the k-hat below which, with a large effective size, no further stage is needed


def plans(config: PosteriorConfig) -> tuple[Plan, ...]:
    """The stages that a fit may go through: longer, then deeper, then over all of the target."""
    S, n = config.samples, config.steps
    return (
        Plan(config.estimator, S, n, enough=CLOSE),
        Plan(config.estimator, S, 2 * n),
        Plan(config.estimator, S, 4 * n, more_layers=True),
        Plan("forward_kl", 4 * S, 2 * n),
    )[: config.stages]
