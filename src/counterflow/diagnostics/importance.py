"""Importance weights: effective sample sizes, resampling and Pareto smoothing.

Log weights are log p(z_s) - log q(z_s) in nats for S draws z_s ~ q, where p may be unnormalised.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SAMPLES = 25  # fewest draws for which k-hat is fitted: their upper fifth is then five draws, the fewest it needs
FLAT_TAIL = 1e-3  # nats; if the largest weights differ by less, the tail is bounded and the differences are rounding
K_HAT_CLOSE = 0.5  # below it the variance of the weights is finite and q is close to p (Yao et al. 2018, section 2)
K_HAT_USABLE = 0.7  # above it the weighted draws should not be used (the same)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Importance effective sample size of log weights (S, ...): (sum w)^2 / sum w^2, between 1 and S.

    Raises:
        ValueError: log weights that contain NaN or +inf, or that are all -inf.

    Source: Kong 1992, "A note on importance sampling using standardized weights".

    Example:
        >>> import torch
        >>> round(effective_sample_size(torch.zeros(100)).item(), 3)
        100.0
    """
    return 1 / normalized_weights(log_weights).square().sum(0)


def effective_sample_size_of_means(draws: Tensor, log_weights: Tensor) -> Tensor:
    """Number of exact draws that would estimate the mean of each feature equally well, (D,) for draws (S, D).

        n_i = sum_s w_s (x_si - m_i)^2 / sum_s w_s^2 (x_si - m_i)^2,    m_i = sum_s w_s x_si,    sum_s w_s = 1

    It is the variance of x_i under p divided by the variance of the weighted mean. It exceeds S if q has more draws
    than p in the places that determine the mean.

    Raises:
        ValueError: draws or weights of a wrong shape; weights that contain NaN or +inf, or that are all -inf.

    Source: Owen 2013, "Monte Carlo theory, methods and examples", chapter 9: the delta method's variance of a
    self-normalised estimate.

    Example:
        >>> import torch
        >>> effective_sample_size_of_means(torch.randn(50, 2), torch.zeros(50)).round().tolist()
        [50.0, 50.0]
    """
    check_draws(draws, log_weights)
    w = normalized_weights(log_weights.double())[:, None]
    squares = (draws - (w * draws).sum(0)).double().square()
    return (w * squares).sum(0) / (w.square() * squares).sum(0)


def resample(draws: Tensor, log_weights: Tensor, n: int) -> Tensor:
    """Pick n of the draws (S, ...) with replacement, in proportion to their weights (S,), in random order.

    Systematic resampling: a draw of normalised weight w is picked either floor(n w) or ceil(n w) times. With equal
    weights every draw is returned once, whereas independent picks would lose a third of them.

    Raises:
        ValueError: weights (S,) of a wrong shape, that contain NaN or +inf, or that are all -inf.

    Source: Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", appendix.

    Example:
        >>> import torch
        >>> resample(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, -torch.inf]), 3).flatten().tolist()
        [1.0, 1.0, 1.0]
        >>> resample(torch.arange(5), torch.zeros(5), 5).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    check_draws(draws, log_weights)
    edges = normalized_weights(log_weights.double()).cumsum(0)
    comb = (torch.arange(n, device=edges.device) + torch.rand((), dtype=edges.dtype, device=edges.device)) / n
    picked = torch.searchsorted(edges, comb * edges[-1], right=True)
    last = log_weights.isfinite().nonzero()[-1, 0]  # rounding may put the last point of the comb past every edge
    return draws[picked.clamp(max=last)[torch.randperm(n, device=edges.device)]]


class SmoothedWeights(NamedTuple):
    """Pareto-smoothed importance weights."""

    log_weights: Tensor  # normalised: their exponentials sum to one, (S,)
    k_hat: float  # shape of the tail of the raw weights


def psis(log_weights: Tensor) -> SmoothedWeights:
    """Pareto-smooth log weights (S,) and estimate k-hat, the shape of their upper tail.

    The M = ceil(min(S / 5, 3 sqrt(S))) largest weights are replaced by the quantiles of a generalized Pareto
    distribution that is fitted to them, and truncated at the largest raw weight. Moments of the weights up to order
    1 / k-hat exist. Weights of zero do not take part in the fit. k-hat is 0 if the M largest weights agree to a
    thousandth, since the tail is then bounded, and infinite if fewer than 25 draws have a positive weight.

    Raises:
        ValueError: not (S,), fewer than 25 draws, a NaN or +inf, or nothing but -inf.

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling"; the fit is that of Zhang and Stephens 2009, "A
    new and efficient estimation method for the generalized Pareto distribution".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> log_weights = torch.distributions.Exponential(2.0).sample((2000,))  # Pareto weights of shape 1 / 2
        >>> smoothed, k_hat = psis(log_weights)
        >>> round(smoothed.exp().sum().item(), 4), 0.2 < k_hat < 0.8
        (1.0, True)
    """
    if log_weights.dim() != 1 or len(log_weights) < MIN_SAMPLES:
        raise ValueError(
            f"expected log weights (S,) of at least {MIN_SAMPLES} draws, got {tuple(log_weights.shape)}; k-hat is "
            "fitted to the largest fifth of them"
        )
    check_log_weights(log_weights)
    raw = log_weights.detach().double().log_softmax(0)
    positive = raw.isfinite()
    smoothed, k = _smoothed_tail(raw[positive])
    if not math.isfinite(k):
        smoothed = raw[positive]
    return SmoothedWeights(raw.masked_scatter(positive, smoothed).log_softmax(0).to(log_weights.dtype), k)


def k_hat(log_weights: Tensor) -> float:
    """Shape of the upper tail of the weights (S,): see `psis`.

    Example:
        >>> import torch
        >>> k_hat(torch.full((100,), -7.0))
        0.0
    """
    return psis(log_weights).k_hat


def k_hat_threshold(samples: int) -> float:
    """Largest k-hat at which means over S weighted draws have a small error: min(1 - 1 / log10(S), 0.7).

    Source: Vehtari et al. 2024, equation 13.

    Example:
        >>> [round(k_hat_threshold(samples), 2) for samples in (100, 1000, 4000)]
        [0.5, 0.67, 0.7]
    """
    return min(1 - 1 / math.log10(samples), K_HAT_USABLE)


def tail_shape(log_values: Tensor) -> float:
    """Estimate the shape k of the upper tail of positive values, given by their logarithms (S,), as `psis` does.

    Values of zero, -inf here, do not take part; it is 0 if there are no others.
    """
    positive = log_values[log_values > -math.inf]
    return _smoothed_tail(positive)[1] if len(positive) else 0.0


def check_log_weights(log_weights: Tensor) -> None:
    """Raise ValueError for log weights (S, ...) that contain NaN or +inf, or that are all -inf over S."""
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bad.any():
        raise ValueError(
            f"expected finite log weights, or -inf for a weight of zero, got {int(bad.sum())} of {bad.numel()} that "
            "are NaN or +inf; at these draws the target or the flow has no density"
        )
    if not (log_weights > -math.inf).any(0).all():
        raise ValueError(
            f"expected at least one draw with a positive weight, got log weights {tuple(log_weights.shape)} that are "
            "all -inf; the target is zero wherever the flow draws"
        )


def normalized_weights(log_weights: Tensor) -> Tensor:
    """Return the weights, normalised to sum to one over the first axis."""
    check_log_weights(log_weights)
    return torch.softmax(log_weights, 0)


def check_draws(draws: Tensor, log_weights: Tensor) -> None:
    """Raise ValueError unless draws are (S, ...) and log weights (S,)."""
    if log_weights.dim() != 1 or draws.shape[:1] != log_weights.shape:
        raise ValueError(
            f"expected draws (S, ...) and log weights (S,), got {tuple(draws.shape)} and {tuple(log_weights.shape)}"
        )


def _smoothed_tail(log_values: Tensor) -> tuple[Tensor, float]:
    """Replace the upper tail of positive values, given by their logarithms (S,), by quantiles of the fitted Pareto.

    Returns:
        The logarithms, up to a constant, and k-hat; only k-hat counts if it is infinite.
    """
    S = len(log_values)
    if S < MIN_SAMPLES:
        return log_values, math.inf
    size = math.ceil(min(S / 5, 3 * S**0.5))
    x = log_values - log_values.max()
    largest = x.topk(size + 1).values
    if largest[0] - largest[-2] < FLAT_TAIL:
        return x, 0.0
    cutoff = largest[-1].clamp_min(math.log(torch.finfo(x.dtype).tiny))
    tail = largest[largest > cutoff].flip(0)  # ascending
    if len(tail) < 5:
        return x, math.inf
    k, sigma = _fit_generalized_pareto(tail.exp() - cutoff.exp())
    if not math.isfinite(k):
        return x, math.inf
    p = torch.arange(0.5, len(tail), dtype=x.dtype, device=x.device) / len(tail)
    excess = -torch.log1p(-p) if abs(k) < torch.finfo(x.dtype).eps else torch.expm1(-k * torch.log1p(-p)) / k
    x[x.topk(len(tail)).indices.flip(0)] = (sigma * excess + cutoff.exp()).log().clamp_max(0.0)
    return x, k


def _fit_generalized_pareto(x: Tensor) -> tuple[float, float]:
    """Fit shape k and scale sigma of a generalized Pareto distribution to ascending x (n,) > 0.

    The shape is shrunk towards 1/2 with the weight of ten observations. Both are NaN if the fit fails.

    Source: Zhang and Stephens 2009; Vehtari et al. 2024, appendix C, for the shrinkage.
    """
    n = len(x)
    candidates = 30 + int(n**0.5)
    grid = torch.arange(1, candidates + 1, dtype=x.dtype, device=x.device) - 0.5
    b = 1 / x[-1] + (1 - (candidates / grid).sqrt()) / (3 * x[int(n / 4 + 0.5) - 1])
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = n * ((-b / k).log() - k - 1)
    weights = log_likelihood.softmax(0)
    weights = torch.where(weights >= 10 * torch.finfo(x.dtype).eps, weights, 0.0)
    b_mean = (b * weights).sum() / weights.sum()
    shape = torch.log1p(-b_mean * x).mean()
    return ((n * shape + 5) / (n + 10)).item(), (-shape / b_mean).item()
