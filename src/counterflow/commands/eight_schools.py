"""Eight schools: the model that `counterflow posterior` fits by default."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Normal, constraints

from counterflow.posterior.targets.function import from_torch
from counterflow.posterior.targets.target import Target
from counterflow.random import seeded

EFFECTS = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)  # estimated gain of each school, in points
ERRORS = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)  # standard errors of these estimates


def log_density(mu: Tensor, tau: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """Return log p(mu, tau, z, y) (B,) of mu (B,), tau (B,) and z (B, 8); the schools' effects are mu + tau z.

    Source: Rubin 1981, "Estimation in Parallel Randomized Experiments", for the data; Gelman et al., "Bayesian Data
    Analysis", for the model.
    """
    prior = Normal(0, 5).log_prob(mu) + HalfCauchy(5).log_prob(tau) + Normal(0, 1).log_prob(z).sum(-1)
    return prior + log_likelihood(mu, tau, z, y)["y"].sum(-1)


def log_likelihood(mu: Tensor, tau: Tensor, z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return log p(y | mu, tau, z) (B, 8) of each school."""
    return {"y": Normal(school_effects(mu, tau, z)["theta"], ERRORS).log_prob(y)}


def school_effects(mu: Tensor, tau: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Return the effect theta (B, 8) of coaching in each school."""
    return {"theta": mu[:, None] + tau[:, None] * z}


def simulate(seed: int) -> tuple[dict[str, Tensor], Target]:
    """Draw mu, tau and z from the prior and effects y given them; return them and the target of y."""
    with seeded(seed):
        values = {"mu": Normal(0.0, 5.0).sample(), "tau": HalfCauchy(5.0).sample(), "z": torch.randn(8)}
        values = {name: value.double() for name, value in values.items()}
        effects = school_effects(*(value[None] for value in values.values()))["theta"][0]
        return values, eight_schools(effects + ERRORS * torch.randn(8).double())


def eight_schools(y: Tensor = EFFECTS) -> Target:
    """Return the target for the estimated effects y (8,).

    Example:
        >>> eight_schools()
        Target(dim=10, parameters=('mu', 'tau', 'z'))
    """
    return from_torch(
        partial(log_density, y=y),
        shapes={"mu": (), "tau": (), "z": (8,)},
        constraints={"tau": constraints.positive},
        derived=school_effects,
        log_likelihood=partial(log_likelihood, y=y),
        simulate=simulate,
        observed={"y": y.numpy()},
        dims={name: ["school"] for name in ("z", "theta", "y")},
        coords={"school": list("ABCDEFGH")},
    )
