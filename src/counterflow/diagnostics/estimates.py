"""Weighted estimates of means and standard deviations, with their Monte Carlo standard errors and reliability."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.diagnostics.importance import K_HAT_USABLE, check_draws, normalized_weights, tail_shape

COLUMNS = 256  # features at once, which bounds the memory
MAX_SD_ERROR = 0.05  # relative Monte Carlo error of a standard deviation that is reliable with any tail


class Estimates(NamedTuple):
    """Estimates for each of D features."""

    mean: Tensor  # sum_s w_s x_s, (D,)
    mcse_mean: Tensor  # its Monte Carlo standard error, (D,)
    sd: Tensor  # square root of v = sum_s w_s (x_s - mean)^2, (D,)
    mcse_sd: Tensor  # its Monte Carlo standard error, (D,)
    low: Tensor  # 5 % quantile, (D,)
    high: Tensor  # 95 % quantile, (D,)
    ess: Tensor  # number of exact draws that would estimate the mean equally well, (D,)
    k_hat: Tensor  # tail shape of the terms w_s (x_s - mean)^2 of the variance, (D,)


def weighted_estimates(draws: Tensor, log_weights: Tensor) -> Estimates:
    """Estimate mean, standard deviation and quantiles of each feature of draws (S, D) with log weights (S,).

        mcse_mean^2 = sum_s w_s^2 (x_s - mean)^2,    mcse_sd^2 = sum_s w_s^2 ((x_s - mean)^2 - v)^2 / (4 v)

    with weights w that sum to one. Both are too small if the terms have heavy tails, which the k-hat of the terms
    w_s (x_s - mean)^2 detects: above 0.5 their variance is infinite, and above 0.7 a few draws decide the standard
    deviation, however good the weights are.

    Raises:
        ValueError: draws or weights of a wrong shape; weights that contain NaN or +inf, or that are all -inf.

    Source: Owen 2013, "Monte Carlo theory, methods and examples", chapter 9, for the delta method's variances; Vehtari
    et al. 2024, "Pareto smoothed importance sampling", section 2.4, for k-hat of a specific expectation.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> found = weighted_estimates(3 + 2 * torch.randn(10_000, 1), torch.zeros(10_000))
        >>> [round(part.item(), 2) for part in (found.mean, found.mcse_mean, found.sd, found.mcse_sd)]
        [2.98, 0.02, 2.0, 0.01]
    """
    check_draws(draws, log_weights)
    w = normalized_weights(log_weights.double())
    parts = [_estimates(columns.double(), w) for columns in draws.detach().split(COLUMNS, 1)]
    return Estimates(*(torch.cat(part) for part in zip(*parts, strict=True)))


def unreliable_features(draws: Tensor, log_weights: Tensor) -> list[int]:
    """Find the features of draws (S, D) whose standard deviation is decided by a few draws in a heavy tail.

    These have a k-hat above 0.7, and a Monte Carlo error above 5 % of the standard deviation and above three times the
    error for a normal variable, which is 1 / sqrt(2 S) of it.

    Raises:
        ValueError: as `weighted_estimates` does.
    """
    check_draws(draws, log_weights)
    w = normalized_weights(log_weights.double())
    max_error = max(MAX_SD_ERROR, 3 / (2 * len(draws)) ** 0.5)
    found: list[int] = []
    for first in range(0, draws.shape[1], COLUMNS):
        _, terms, sd, sd_error = _moments(draws[:, first : first + COLUMNS].detach().double(), w)
        for column in (sd_error > max_error * sd).nonzero().flatten().tolist():
            if tail_shape(terms[:, column].log()) >= K_HAT_USABLE:
                found.append(first + column)
    return found


def _moments(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (D,), terms w_s (x_s - mean)^2 of the variance (S, D), standard deviation and its error (D,)."""
    mean = (w[:, None] * x).sum(0)
    terms = w[:, None] * (x - mean).square()
    variance = terms.sum(0)
    sd = variance.sqrt()
    sd_error = (terms - w[:, None] * variance).square().sum(0).sqrt() / (2 * sd)
    return mean, terms, sd, torch.where(sd > 0, sd_error, 0.0)


def _estimates(x: Tensor, w: Tensor) -> Estimates:
    mean, terms, sd, sd_error = _moments(x, w)
    mean_error = (w[:, None] * terms).sum(0).sqrt()
    order = x.argsort(0)
    cumulative = w[order].cumsum(0)
    low, high = (
        x.gather(0, order.gather(0, (cumulative < level).sum(0, keepdim=True).clamp_max(len(x) - 1)))[0]
        for level in (0.05, 0.95)
    )
    k_hat = torch.tensor([tail_shape(column.log()) for column in terms.T], dtype=x.dtype)
    return Estimates(mean, mean_error, sd, sd_error, low, high, (sd / mean_error).square(), k_hat)
