"""Importance weights: effective sample sizes, Pareto smoothing, the verdict."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from counterflow.diagnostics.chains import import_arviz

LEAST = 25  # draws for k-hat, which is fitted to their upper fifth: five is the least that it takes
FLAT = 1e-3  # nats; a tail in which all weights agree so far is bounded, and what remains is often rounding
CLOSE, USABLE = 0.5, 0.7  # k-hat below which q is close to p, and below which it is useful (Yao et al. 2018, section 2)


# -- importance weights ------------------------------------------------------------------------------


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Importance effective sample size of log weights (S, ...): (sum w)^2 / sum w^2, between 1 and S.

    Raises:
        ValueError: log weights that hold a NaN or +inf, or that are all -inf.

    Source: Kong 1992, "A note on importance sampling using standardized weights".

    Example:
        >>> import torch
        >>> round(effective_sample_size(torch.zeros(100)).item(), 3)
        100.0
    """
    return 1 / _normalized(log_weights).square().sum(0)


def effective_sample_size_of_means(draws: Tensor, log_weights: Tensor) -> Tensor:
    """For each feature of draws (S, D), how many exact draws would know its mean as well: (D,).

        n_i = sum_s w_s (x_si - m_i)^2 / sum_s w_s^2 (x_si - m_i)^2,    m_i = sum_s w_s x_si,    sum_s w_s = 1

    The variance of x_i under p over that of the weighted mean. It may exceed S, where q is wider than p.

    Raises:
        ValueError: draws or weights of a wrong shape; weights that hold a NaN or +inf, or that are all -inf.

    Source: Owen 2013, "Monte Carlo theory, methods and examples", chapter 9: the delta method's variance of a
    self-normalised estimate.

    Example:
        >>> import torch
        >>> effective_sample_size_of_means(torch.randn(50, 2), torch.zeros(50)).round().tolist()
        [50.0, 50.0]
    """
    _check_draws(draws, log_weights)
    w = _normalized(log_weights.double())[:, None]
    squares = (draws - (w * draws).sum(0)).double().square()
    return (w * squares).sum(0) / (w.square() * squares).sum(0)


def resample(draws: Tensor, log_weights: Tensor, n: int) -> Tensor:
    """n of the draws (S, ...), picked with replacement in proportion to their weights (S,), in random order.

    Systematic: a draw of normalised weight w comes either floor(n w) or ceil(n w) times, so equal weights return every
    draw once, where independent picks would lose a third of them.

    Raises:
        ValueError: weights (S,) of a wrong shape, that hold a NaN or +inf, or that are all -inf.

    Source: Kitagawa 1996, "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models", appendix.

    Example:
        >>> import torch
        >>> resample(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, -torch.inf]), 3).flatten().tolist()
        [1.0, 1.0, 1.0]
        >>> resample(torch.arange(5), torch.zeros(5), 5).sort().values.tolist()
        [0, 1, 2, 3, 4]
    """
    _check_draws(draws, log_weights)
    edges = _normalized(log_weights.double()).cumsum(0)
    comb = (torch.arange(n, device=edges.device) + torch.rand((), dtype=edges.dtype, device=edges.device)) / n
    picked = torch.searchsorted(edges, comb * edges[-1], right=True)
    last = log_weights.isfinite().nonzero()[-1, 0]  # rounding may carry the comb's last tooth past every edge
    return draws[picked.clamp(max=last)[torch.randperm(n, device=edges.device)]]


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed log weights (S,), normalised to sum to one, and k-hat, the shape of their tail.

    The M = min(S / 5, 3 sqrt(S)) largest weights are replaced by the quantiles of a generalized Pareto distribution
    that is fitted to them; moments of the weights up to 1 / k-hat exist. Draws of weight zero are left out of the fit.
    The fit is ArviZ's. Two cases are ours: k-hat is 0 where the weights agree to a thousandth throughout the tail,
    which is bounded then, and infinite where fewer than 25 draws have any weight.

    Raises:
        ValueError: not (S,), fewer than 25 draws, a NaN or +inf, or nothing but -inf.
        ImportError: ArviZ is not installed.

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> log_weights = torch.distributions.Exponential(2.0).sample((2000,))  # Pareto weights of shape 1 / 2
        >>> smoothed, k_hat = psis(log_weights)
        >>> round(smoothed.exp().sum().item(), 4), 0.2 < k_hat < 0.8
        (1.0, True)
    """
    if log_weights.dim() != 1 or len(log_weights) < LEAST:
        raise ValueError(
            f"expected log weights (S,) of at least {LEAST} draws, got {tuple(log_weights.shape)}; k-hat is fitted to "
            "the largest fifth of them"
        )
    check_log_weights(log_weights)
    raw = log_weights.detach().double().log_softmax(0)
    some = raw.isfinite()
    fitted = raw[some]
    if len(fitted) < LEAST:
        return raw.to(log_weights.dtype), math.inf
    tail = fitted.topk(math.ceil(min(len(fitted) / 5, 3 * len(fitted) ** 0.5))).values
    if tail[0] - tail[-1] < FLAT:
        return raw.to(log_weights.dtype), 0.0
    values, k = _pareto_smoothed(fitted.cpu().numpy())
    if not math.isfinite(k):
        return raw.to(log_weights.dtype), math.inf
    smoothed = raw.masked_scatter(some, torch.as_tensor(values, dtype=raw.dtype, device=raw.device))
    return smoothed.log_softmax(0).to(log_weights.dtype), k


def k_hat(log_weights: Tensor) -> float:
    """The shape of the tail of the weights (S,): see `psis`.

    Example:
        >>> import torch
        >>> k_hat(torch.full((100,), -7.0))
        0.0
    """
    return psis(log_weights)[1]


def k_hat_threshold(draws: int) -> float:
    """The k-hat below which `draws` of them give means with a small error: min(1 - 1 / log10(S), 0.7).

    Source: Vehtari et al. 2024, equation 13.

    Example:
        >>> [round(k_hat_threshold(draws), 2) for draws in (100, 1000, 4000)]
        [0.5, 0.67, 0.7]
    """
    return min(1 - 1 / math.log10(draws), USABLE)


@dataclass(frozen=True)
class Verdict:
    """What the importance weights say of an approximation q to p. Its `sentence` says it in plain words."""

    draws: int  # S, how many weights were looked at
    k_hat: float  # of the weights' tail
    effective_sample_size: float  # of the smoothed weights
    elbo: float  # mean log weight, nats
    elbo_error: float  # its standard error
    iw_elbo: float  # log of the mean weight, nats: a bound that S draws tighten towards log Z
    of_means: tuple[float, ...] = ()  # `effective_sample_size_of_means`, where the draws were given

    @property
    def threshold(self) -> float:
        """The k-hat that S draws allow: see `k_hat_threshold`."""
        return k_hat_threshold(self.draws)

    @property
    def trusted(self) -> bool:
        """Whether weighted or resampled draws can be used as the posterior's: k-hat below the threshold."""
        return self.k_hat < self.threshold

    @property
    def draws_needed(self) -> float:
        """How many draws a k-hat like this one takes: 10^(1 / (1 - k-hat)) (Vehtari et al. 2024, section 3.2.3)."""
        return 10 ** (1 / (1 - max(self.k_hat, 0))) if self.k_hat < 1 else math.inf

    @property
    def sentence(self) -> str:
        """The verdict in plain words, with the numbers that it rests on.

        Example:
            >>> print(Verdict(4000, 0.21, 3105.2, -12.34, 0.011, -12.21).sentence)
            The approximation is close to the posterior: k-hat 0.21 is below 0.5, 4,000 draws are worth 3,105 exact \
ones, and the ELBO is -12.34 ± 0.011 nats.
        """
        return f"{self._finding()}, and the ELBO is {self.elbo:.2f} ± {self.elbo_error:.2g} nats."

    def _finding(self) -> str:
        worth = f"{self.draws:,} draws are worth {self.effective_sample_size:,.0f} exact ones"
        if self.trusted and self.k_hat < CLOSE:
            return f"The approximation is close to the posterior: k-hat {self.k_hat:.2f} is below {CLOSE}, {worth}"
        if self.trusted:
            return (
                f"The approximation is useful, with its importance weights: k-hat {self.k_hat:.2f} lies between "
                f"{CLOSE} and {self.threshold:.2f}, {worth}"
            )
        if self.k_hat < USABLE:
            return (
                f"{self.draws:,} draws are too few to tell: k-hat {self.k_hat:.2f} takes "
                f"{math.ceil(self.draws_needed):,} or more; draw again"
            )
        why = f"above {self.threshold:.2f}" if self.k_hat < 1 else "above 1, where weights have no mean"
        return (
            f"The approximation cannot be trusted: k-hat {self.k_hat:.2f} is {why}; train for longer, take a larger "
            "flow, or refine the draws by MCMC"
        )


def diagnose(log_weights: Tensor, draws: Tensor | None = None) -> Verdict:
    """Look at the log weights (S,) of draws from q, and at the draws (S, D) themselves if they are given.

    Raises:
        ValueError, ImportError: as `psis` does; draws that are not (S, D).

    Source: the thresholds are those of Vehtari et al. 2024, "Pareto smoothed importance sampling", and Yao et al. 2018,
    "Yes, but did it work?: Evaluating variational inference".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> z = 1.1 * torch.randn(1000, 2)                                     # q is a little wider than p = N(0, I)
        >>> log_weights = -z.square().sum(-1) / 2 + (z / 1.1).square().sum(-1) / 2
        >>> judge(log_weights, z).trusted
        True
    """
    smoothed, k = psis(log_weights)
    raw = log_weights.detach().double()
    error = raw.std().item() / len(raw) ** 0.5
    return Verdict(
        draws=len(raw),
        k_hat=k,
        effective_sample_size=effective_sample_size(smoothed).item(),
        elbo=raw.mean().item(),
        elbo_error=error if math.isfinite(error) else math.inf,
        iw_elbo=torch.logsumexp(raw, 0).item() - math.log(len(raw)),
        of_means=() if draws is None else tuple(effective_sample_size_of_means(draws, smoothed).tolist()),
    )


def _normalized(log_weights: Tensor) -> Tensor:
    """The weights, summing to one over the first axis."""
    check_log_weights(log_weights)
    return torch.softmax(log_weights, 0)


def check_log_weights(log_weights: Tensor) -> None:
    """Raise ValueError for log weights (S, ...) that hold a NaN or +inf, or that are all -inf over S."""
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bad.any():
        raise ValueError(
            f"expected finite log weights, or -inf for a weight of zero, got {int(bad.sum())} of {bad.numel()} that "
            "are NaN or +inf; the target or the flow is not a density where these draws fell"
        )
    if not (log_weights > -math.inf).any(0).all():
        raise ValueError(
            f"expected a draw with a weight above zero, got log weights {tuple(log_weights.shape)} that are all -inf; "
            "the target is zero wherever the flow draws"
        )


def _check_draws(draws: Tensor, log_weights: Tensor) -> None:
    if log_weights.dim() != 1 or draws.shape[:1] != log_weights.shape:
        raise ValueError(
            f"expected draws (S, ...) and log weights (S,), got {tuple(draws.shape)} and {tuple(log_weights.shape)}"
        )


def _pareto_smoothed(log_weights: Any) -> tuple[Any, float]:
    """ArviZ's PSIS of an array (S,), of either of its generations; k is NaN or infinite where the fit fails."""
    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # ties at the edge of the tail divide by zero, and k is NaN
        if hasattr(arviz, "psislw"):
            smoothed, k = arviz.psislw(log_weights)
        else:
            from arviz_stats.base.array import array_stats

            smoothed, k = array_stats.psislw(-log_weights)  # version 1 asks for log likelihoods
    return smoothed, float(k)
