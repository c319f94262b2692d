"""Simulation-based calibration of a procedure that fits posteriors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Result of `simulation_based_calibration`."""

    probabilities: Tensor  # posterior probability below the truth, (replications, D), in (0, 1)
    bias: Tensor  # p-values of symmetry about 1/2, (D,); small if the posterior tends to lie to one side of the truth
    spread: Tensor  # p-values of the scatter, (D,); small if the posterior is too narrow or too wide


def simulation_based_calibration(
    simulate: Callable[[], tuple[Tensor, Any]], fit: Callable[[Any], Tensor], replications: int = 100
) -> Calibration:
    """Fit simulated data repeatedly and test where in the posterior the true parameters lie.

        p_i = (#{draws of theta_i below the truth} + u) / (L + 1),    u ~ U(0, 1)

    is uniform if the posterior is exact. Wilcoxon's signed-rank test of p - 1/2 detects posteriors that lie to one side
    of the truth. Posteriors that are too narrow push p towards 0 and 1, posteriors that are too wide towards 1/2; the
    sum of Phi^-1(p)^2 detects both, as it is chi-squared with as many degrees of freedom as there are replications.
    The cost is one fit per replication. Noise comes from torch's global generator.

    Args:
        simulate: draws the truth theta (D,) from the prior and data from the model given theta: () -> (theta, data).
        fit: maps data to L draws (L, D) of the approximate posterior.
        replications: number of simulated data sets; with fewer than 20 the tests have little power.

    Raises:
        ValueError: replications below 2, or a truth and draws that are not (D,) and (L, D).

    Source: Yao et al. 2018, "Yes, but did it work?: Evaluating variational inference", section 3, with the signed-rank
    test for symmetry; Cook et al. 2006, "Validation of software for Bayesian models", for the scatter.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> def simulate():
        ...     theta = torch.randn(1)
        ...     return theta, theta + torch.randn(1)
        >>> def fit(x):
        ...     return x / 2 + 0.3 * torch.randn(100, 1)          # the exact posterior is N(x / 2, 1 / 2)
        >>> found = simulation_based_calibration(simulate, fit, 200)
        >>> found.bias.item() > 0.001, found.spread.item() < 0.001
        (True, True)
    """
    if replications < 2:
        raise ValueError(f"expected replications of at least 2, got {replications}")
    return calibration(torch.stack([randomized_ranks(*_replicate(simulate, fit)) for _ in range(replications)]))


def calibration(probabilities: Tensor) -> Calibration:
    """Test the posterior probabilities (R, D) below the truth in R replications: see `simulation_based_calibration`.

    Raises:
        ValueError: not (R, D) with R of at least 2.
    """
    if probabilities.dim() != 2 or len(probabilities) < 2:
        raise ValueError(f"expected probabilities (R, D) of at least 2 replications, got {tuple(probabilities.shape)}")
    return Calibration(probabilities, _symmetry(probabilities), _scatter(probabilities))


def _replicate(simulate: Callable[[], tuple[Tensor, Any]], fit: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    truth, data = simulate()
    draws = fit(data).detach()
    if truth.dim() != 1 or draws.dim() != 2 or draws.shape[1:] != truth.shape or not len(draws):
        raise ValueError(
            f"expected a truth (D,) from simulate and draws (L, D) from fit, got {tuple(truth.shape)} and "
            f"{tuple(draws.shape)}"
        )
    return truth, draws


def randomized_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Ranks (D,) of the truth (D,) among draws (L, D), in (0, 1), with ties broken by torch's global generator.

        p_i = (#{draws of theta_i below the truth} + u) / (L + 1),    u ~ U(0, 1)

    They are exactly uniform for any number of draws if truth and draws have the same distribution.
    """
    return ((draws < truth).sum(0).cpu() + torch.rand(len(truth), dtype=torch.float64)) / (len(draws) + 1)


def _symmetry(p: Tensor) -> Tensor:
    """Two-sided p-values (D,) of Wilcoxon's signed-rank test, by its normal approximation."""
    R = len(p)
    away = p - 0.5
    rank = away.abs().argsort(0).argsort(0) + 1.0
    z = (away.sign() * rank).sum(0) / (R * (R + 1) * (2 * R + 1) / 6) ** 0.5
    return torch.special.erfc(z.abs() / 2**0.5)


def _scatter(p: Tensor) -> Tensor:
    """Two-sided p-values (D,) of sum Phi^-1(p)^2 under its chi-squared distribution."""
    half = torch.full((p.shape[1],), len(p) / 2, dtype=p.dtype)
    squares = torch.special.ndtri(p).square().sum(0) / 2
    return 2 * torch.minimum(torch.special.gammainc(half, squares), torch.special.gammaincc(half, squares))
