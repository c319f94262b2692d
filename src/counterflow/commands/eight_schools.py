"""Eight schools: the model that `counterflow posterior` fits by default."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import HalfCauchy, Normal, constraints

from counterflow.posterior.targets.function import from_torch
from counterflow.posterior.targets.target import Target

EFFECTS = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)  # estimated gain of each school, in points
ERRORS = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)  # standard errors of these estimates


def log_density(mu: Tensor, tau: Tensor, z: Tensor) -> Tensor:
    """Return log p(mu, tau, z, y) (B,) of mu (B,), tau (B,) and z (B, 8); the schools' effects are mu + tau z.

    Source: Rubin 1981, "Estimation in Parallel Randomized Experiments", for the data; Gelman et al., "Bayesian Data
    Analysis", for the model.
    """
    prior = Normal(0, 5).log_prob(mu) + HalfCauchy(5).log_prob(tau) + Normal(0, 1).log_prob(z).sum(-1)
    return prior + Normal(school_effects(mu, tau, z)["theta"], ERRORS).log_prob(EFFECTS).sum(-1)


def school_effects(mu: Tensor, tau: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Return the effect theta (B, 8) of coaching in each school."""
    return {"theta": mu[:, None] + tau[:, None] * z}


def eight_schools() -> Target:
    """Return the target.

    Example:
        >>> eight_schools()
        Target(dim=10, parameters=('mu', 'tau', 'z'))
    """
    return from_torch(
        log_density,
        shapes={"mu": (), "tau": (), "z": (8,)},
        constraints={"tau": constraints.positive},
        derived=school_effects,
        observed={"y": EFFECTS.numpy()},
        dims={name: ["school"] for name in ("z", "theta", "y")},
        coords={"school": list("ABCDEFGH")},
    )
