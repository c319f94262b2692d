"""How far an approximate posterior can be trusted: importance weights, chains and calibration.

Log weights are log p(z_s) - log q(z_s) in nats for S draws z_s ~ q, where p need not integrate to one. None of this can
see a part of p in which no draw fell: a k-hat of 0.1 says that the draws are right where they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def judge(log_weights: Tensor, draws: Tensor | None = None) -> Verdict:
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


# -- chains ------------------------------------------------------------------------------------------


class Convergence(NamedTuple):
    """How far chains have mixed, for each feature."""

    r_hat: Tensor  # rank-normalised, (D,): 1 where all chains agree; infinite where chains do not move
    ess_bulk: Tensor  # effective draws for the centre, (D,)
    ess_tail: Tensor  # effective draws for the 5 % and 95 % quantiles, (D,)


def convergence(draws: Tensor) -> Convergence:
    """R-hat and effective sample sizes of chains (chains, draws, D), by ArviZ.

    Raises:
        ValueError: not (chains, draws, D) with at least four draws a chain.
        ImportError: ArviZ is not installed.

    Source: Vehtari et al. 2021, "Rank-normalization, folding, and localization: an improved R-hat".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> mixed = convergence(torch.randn(4, 500, 2))
        >>> (mixed.r_hat < 1.05).all().item(), (mixed.ess_bulk > 1000).all().item()
        (True, True)
    """
    if draws.dim() != 3 or draws.shape[1] < 4:
        raise ValueError(f"expected draws (chains, draws, D) with at least 4 a chain, got {tuple(draws.shape)}")
    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more chains than draws are meant; 0 / 0 is where a chain stands still
        data = arviz.convert_to_dataset({"x": draws.detach().double().cpu().numpy()})
        found = (arviz.rhat(data), arviz.ess(data, method="bulk"), arviz.ess(data, method="tail"))
    r_hat, bulk, tail = (torch.as_tensor(part["x"].values).reshape(-1) for part in found)
    return Convergence(torch.where(r_hat.isnan(), math.inf, r_hat), bulk, tail)


def import_arviz() -> Any:
    """ArviZ, imported when it is needed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on import ArviZ 0.23 announces version 1
            import arviz
    except ImportError as error:
        raise ImportError(
            "expected arviz for k-hat, R-hat and effective sizes; pip install 'counterflow[posterior]'"
        ) from error
    return arviz


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


# -- two samples -------------------------------------------------------------------------------------


class TwoSamples(NamedTuple):
    """What `energy_test` found."""

    distance: float  # at least 0
    p_value: float  # the share of random divisions of the pooled sample that lie at least as far apart


def energy_test(x: Tensor, y: Tensor, permutations: int = 999) -> TwoSamples:
    """Were x (N, D) and y (M, D) drawn from one distribution? The energy distance, and its permutation test.

        distance = 2 mean|a - b| - mean|a - a'| - mean|b - b'|,    a_ij = Phi^-1((rank of x_ij - 1/2) / (N + M))

    and b alike from y, where the ranks are those among both samples' values of feature j. These normal scores make it
    free of scale and of outliers, and leave the test exact: the p-value is uniform where both have one distribution,
    and at least 1 / (permutations + 1). Memory and time grow with (N + M)^2. Noise comes from torch's global generator.

    Raises:
        ValueError: not (N, D) and (M, D) with two rows each, a NaN, or permutations below 1.

    Source: Szekely and Rizzo 2004, "Testing for equal distributions in high dimension".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(200, 2), torch.randn(200, 2)
        >>> energy_test(x, y).p_value > 0.01, energy_test(x, y + 0.5).p_value
        (True, 0.001)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"expected samples (N, D) and (M, D) of at least two rows, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"expected permutations of at least 1, got {permutations}")
    pooled = torch.cat([x, y]).detach().double()
    if pooled.isnan().any():
        raise ValueError(f"expected numbers, got {int(pooled.isnan().sum())} NaN of {pooled.numel()}")
    scores = torch.special.ndtri((pooled.argsort(0).argsort(0) + 0.5) / len(pooled))
    apart = torch.cdist(scores, scores)
    side = torch.cat([scores.new_full((len(x),), 1 / len(x)), scores.new_full((len(y),), -1 / len(y))])
    sides = torch.stack([side, *(side[torch.randperm(len(side))] for _ in range(permutations))], 1)
    found = -(sides * (apart @ sides)).sum(0)
    as_far = int((found[1:] >= found[0] - 1e-12).sum())
    return TwoSamples(found[0].item(), (as_far + 1) / (permutations + 1))


# -- calibration -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What simulation-based calibration found; see `simulation_based_calibration`."""

    probabilities: Tensor  # where the truth lies in its approximate posterior, (replications, D), in (0, 1)
    bias: Tensor  # p-values of symmetry about 1/2, (D,): small where the posterior lies to one side of the truth
    spread: Tensor  # p-values of the probabilities' scatter, (D,): small where the posterior is too narrow or too wide


def simulation_based_calibration(
    simulate: Callable[[], tuple[Tensor, Any]], fit: Callable[[Any], Tensor], replications: int = 100
) -> Calibration:
    """Fit data whose truth is known, again and again, and ask where in the posterior the truth lies.

        p_i = (#{draws of theta_i below the truth} + u) / (L + 1),    u ~ U(0, 1)

    is uniform where the posterior is exact. Posteriors to one side of the truth make p lopsided, which Wilcoxon's
    signed-rank test of p - 1/2 shows. Posteriors that are too narrow push p towards 0 and 1, those too wide towards
    1/2, which sum Phi^-1(p)^2 shows, compared with chi-squared of as many degrees of freedom as there are replications.
    The whole costs as many fits as replications; noise comes from torch's global generator.

    Args:
        simulate: draws the truth theta (D,) from the prior and data given theta from the model: () -> (theta, data).
        fit: data -> L draws (L, D) of the approximate posterior.
        replications: how many; under 20 the tests say little.

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
    p = torch.stack([_place(*_replicate(simulate, fit)) for _ in range(replications)])
    return Calibration(p, _symmetry(p), _scatter(p))


def _replicate(simulate: Callable[[], tuple[Tensor, Any]], fit: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    truth, data = simulate()
    draws = fit(data).detach()
    if truth.dim() != 1 or draws.dim() != 2 or draws.shape[1:] != truth.shape or not len(draws):
        raise ValueError(
            f"expected a truth (D,) from simulate and draws (L, D) from fit, got {tuple(truth.shape)} and "
            f"{tuple(draws.shape)}"
        )
    return truth, draws


def _place(truth: Tensor, draws: Tensor) -> Tensor:
    """Randomised ranks: exactly uniform where truth and draws are of one distribution, however few the draws are."""
    return ((draws < truth).sum(0).cpu() + torch.rand(len(truth), dtype=torch.float64)) / (len(draws) + 1)


def _symmetry(p: Tensor) -> Tensor:
    """Two-sided p-values of Wilcoxon's signed-rank test, in its normal approximation."""
    R, away = len(p), p - 0.5
    rank = away.abs().argsort(0).argsort(0) + 1.0
    z = (away.sign() * rank).sum(0) / (R * (R + 1) * (2 * R + 1) / 6) ** 0.5
    return torch.special.erfc(z.abs() / 2**0.5)


def _scatter(p: Tensor) -> Tensor:
    """Two-sided p-values of sum Phi^-1(p)^2 under chi-squared."""
    half = torch.full((p.shape[1],), len(p) / 2, dtype=p.dtype)
    squares = torch.special.ndtri(p).square().sum(0) / 2
    return 2 * torch.minimum(torch.special.gammainc(half, squares), torch.special.gammaincc(half, squares))
