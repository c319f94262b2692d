"""Importance weights, chains and calibration: what they are worth, and what is said of them."""

import math
import sys
import warnings

import numpy as np
import pytest
import torch
from registry import close, over

from counterflow.diagnostics.calibration import simulation_based_calibration
from counterflow.diagnostics.chains import convergence
from counterflow.diagnostics.importance import (
    Verdict,
    diagnose,
    effective_sample_size,
    effective_sample_size_of_means,
    k_hat,
    k_hat_threshold,
    psis,
    resample,
)
from counterflow.diagnostics.two_sample import energy_test

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on import ArviZ 0.23 announces version 1
    import arviz

from scipy import stats

SIZES = {
    "equal": ([0.0, 0.0, 0.0, 0.0], 4),
    "one": ([5.0], 1),
    "one of many": ([0.0, -math.inf, -math.inf], 1),
    "two to one": ([math.log(2), 0.0], 9 / 5),
    "far from zero": ([-1e5, -1e5, -1e5 - math.log(2)], 6.25 / 2.25),
    "huge": ([1e5, 1e5], 2),
}


def normal(std, draws=4_000, D=1):
    """z from q = N(0, std^2) and its log weights towards exp(-z^2 / 2), which integrates to (2 pi)^(D / 2)."""
    q = torch.distributions.Normal(torch.zeros(D).double(), std)
    z = q.sample((draws,))
    return z, -z.square().sum(-1) / 2 - q.log_prob(z).sum(-1)


# -- effective sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("log_weights", "expected"), SIZES.values(), ids=SIZES)
def test_effective_sample_size(log_weights, expected):
    assert effective_sample_size(torch.tensor(log_weights, dtype=torch.float64)).item() == pytest.approx(expected)


@over([0.1, 3.0, 300.0], "spread")
def test_effective_sample_size_lies_between_one_and_all(spread):
    ess = effective_sample_size(spread * torch.randn(50, 4, 3))
    assert ess.shape == (4, 3) and (ess >= 1 - 1e-5).all() and (ess <= 50 + 1e-3).all()


def test_more_even_weights_are_worth_more():
    log_weights = torch.randn(100)
    sizes = [effective_sample_size(spread * log_weights).item() for spread in (0, 0.5, 1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)


def test_effective_size_of_a_mean_says_how_far_it_scatters():
    """The variance of the weighted mean over repetitions is that of p over n; q is wider than p where std > 1."""
    runs, draws, std = 2_000, 200, torch.tensor([0.95, 1.1, 1.6]).double()
    z = std * torch.randn(runs, draws, 3).double()
    log_weights = (-z.square() / 2 + (z / std).square() / 2).sum(-1)
    means = (log_weights.softmax(1)[..., None] * z).sum(1)
    sizes = torch.stack([effective_sample_size_of_means(*run) for run in zip(z, log_weights, strict=True)])
    assert ((sizes.mean(0) * means.var(0) - 1).abs() < 0.15).all()
    assert sizes.mean(0)[0] < sizes.mean(0)[1] < draws < sizes.mean(0)[2]


def test_effective_size_of_a_mean_keeps_to_rounding_far_from_zero():
    draws, log_weights = torch.randn(300, 4).double(), torch.randn(300).double()
    expected = effective_sample_size_of_means(draws, log_weights)
    close(effective_sample_size_of_means(1e4 + 3 * draws, 1e3 + log_weights), expected, 1e-8)


# -- resampling --------------------------------------------------------------------------------------


def test_draws_are_picked_in_proportion_to_their_weights():
    draws, p = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]), torch.tensor([0.1, 0.6, 0.0, 0.3])
    n = 20_000
    picked = resample(draws, p.log() - 1e3, n)
    assert picked.shape == (n, 2) and (picked[:, 1] - picked[:, 0] == 1).all()
    share = torch.stack([(picked[:, 0] == first).float().mean() for first in draws[:, 0]])
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@over([1, 7, 30, 100], "n")
def test_a_draw_comes_as_often_as_its_weight_says_to_within_one(n):
    log_weights = torch.randn(30)
    log_weights[[0, 4, 29]] = -math.inf
    counts = resample(torch.arange(30), log_weights, n).bincount(minlength=30)
    assert ((counts - n * log_weights.double().softmax(0)).abs() < 1 + 1e-9).all()
    assert not counts[[0, 4, 29]].any()


def test_picks_have_the_right_mean_over_many_times():
    log_weights = torch.randn(9).double()
    counts = torch.stack([resample(torch.arange(9), log_weights, 4).bincount(minlength=9) for _ in range(8_000)])
    p = log_weights.softmax(0)
    assert ((counts.double().mean(0) / 4 - p).abs() < 5 * (p / 4 / 8_000).sqrt()).all()


def test_picks_come_in_random_order():
    first, second = (resample(torch.arange(50), torch.zeros(50), 50) for _ in range(2))
    assert sorted(first.tolist()) == list(range(50)) and first.tolist() != second.tolist()


# -- Pareto-smoothed weights -------------------------------------------------------------------------


@over([0.2, 0.5, 0.9, 1.5], "k")
def test_k_hat_of_pareto_weights(k):
    """Log weights that are exponential with mean k have a Pareto tail of shape k."""
    found = [k_hat(k * torch.distributions.Exponential(1.0).sample((20_000,)).double()) for _ in range(20)]
    # The prior of the fit draws k towards 1/2 with the weight of 10 of the tail's 424 draws.
    expected = (424 * k + 10 * 0.5) / 434
    assert abs(np.mean(found) - expected) < 5 * np.std(found) / 20**0.5 + 0.01


def test_k_hat_of_a_normal_that_is_too_narrow():
    """Its weights have a tail of shape 1 - std^2 (up to logarithms), those of one that is too wide are bounded."""
    found = {std: k_hat(normal(std, 100_000)[1]) for std in (0.4, 0.6, 0.8, 0.95, 1.3)}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(abs(found[std] - (1 - std**2)) < 0.2 for std in (0.4, 0.6, 0.8, 0.95)) and found[1.3] < 0.1


@over([25, 226, 3_001], "draws")
def test_psis_is_arviz_of_the_weights_that_are_not_zero(draws):
    log_weights = 2 * torch.randn(draws + 3).double()
    log_weights[[0, 7, draws]] = -math.inf
    some = log_weights.isfinite()
    smoothed, k = psis(log_weights - 500)
    expected, expected_k = arviz.psislw(log_weights[some].numpy())
    close(smoothed[some], torch.as_tensor(expected))
    assert k == pytest.approx(expected_k.item(), abs=1e-9)
    assert (smoothed[~some] == -math.inf).all() and smoothed.exp().sum().item() == pytest.approx(1)


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="ArviZ 1 has the one generation alone")
def test_both_generations_of_arviz_are_understood(monkeypatch):
    """They cut the tail one draw apart."""
    pytest.importorskip("arviz_stats")
    log_weights = torch.randn(2_000).double()
    smoothed, k = psis(log_weights)
    monkeypatch.delattr(arviz, "psislw")
    other, other_k = psis(log_weights)
    assert other_k != k and abs(other_k - k) < 0.05
    assert (other - smoothed).abs().max() < 0.2


def test_smoothing_keeps_the_order_and_touches_the_tail_alone():
    log_weights = torch.randn(2_000).double() * 3
    smoothed, _ = psis(log_weights)
    order, tail = log_weights.argsort(), math.ceil(3 * 2_000**0.5)
    assert (smoothed[order].diff() >= 0).all()
    close(smoothed[order][:-tail].diff(), log_weights[order][:-tail].diff())
    assert (smoothed[order][-tail:].diff() - log_weights[order][-tail:].diff()).abs().max() > 0.01


def test_smoothed_weights_estimate_better():
    """The mean of the square under p, from a q that is too narrow, over repetitions."""
    errors = []
    for _ in range(200):
        z, log_weights = normal(0.6, 1_000)
        square = z[:, 0].square()
        errors.append([(w * square).sum() - 1 for w in (log_weights.softmax(0), psis(log_weights)[0].exp())])
    plain, smoothed = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert smoothed < 0.9 * plain


@over([torch.float32, torch.float64], "dtype")
@over([0.0, 3e-5], "noise")
def test_weights_that_are_all_alike_have_no_tail(dtype, noise):
    smoothed, k = psis(torch.full((500,), -123.0, dtype=dtype) + noise * torch.randn(500).sign())
    assert k == 0 and smoothed.dtype == dtype
    assert smoothed.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_weights_of_a_few_draws_alone_cannot_be_trusted():
    log_weights = torch.full((1_000,), -math.inf)
    log_weights[:24] = torch.randn(24)
    smoothed, k = psis(log_weights)
    assert k == math.inf
    close(smoothed.exp(), log_weights.softmax(0), 1e-6)


def test_weights_that_underflow_are_not_lost():
    """All but one are below the smallest float64 when normalised: a fit that misses the target altogether."""
    log_weights = -1e5 * torch.rand(1_000).double()
    assert k_hat(log_weights) > 1
    assert diagnose(log_weights).effective_sample_size < 2


# -- the verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draws", "threshold"), [(25, 0.285), (100, 0.5), (320, 0.601), (1000, 2 / 3), (10_000, 0.7)])
def test_threshold(draws, threshold):
    assert k_hat_threshold(draws) == pytest.approx(threshold, abs=1e-3)


def verdict(k, draws=4_000):
    return Verdict(draws, k, draws / 3, -12.345, 0.0123, -12.1)


FINDINGS = {
    "close": (verdict(-0.1), True, "is close to the posterior: k-hat -0.10 is below 0.5, 4,000 draws are worth 1,333"),
    "useful": (verdict(0.62), True, "is useful, with its importance weights: k-hat 0.62 lies between 0.5 and 0.70"),
    "too few": (verdict(0.62, 300), False, "300 draws are too few to tell: k-hat 0.62 takes 429 or more; draw again"),
    "bad": (verdict(0.7), False, "cannot be trusted: k-hat 0.70 is above 0.70; train for longer, take a larger flow"),
    "very bad": (verdict(1.3), False, "cannot be trusted: k-hat 1.30 is above 1, where weights have no mean"),
    "no weights": (verdict(math.inf), False, "cannot be trusted: k-hat inf is above 1"),
}


@pytest.mark.parametrize(("found", "trusted", "words"), FINDINGS.values(), ids=FINDINGS)
def test_verdict_in_words(found, trusted, words):
    assert found.trusted is trusted
    assert words in found.sentence and found.sentence.endswith(", and the ELBO is -12.35 ± 0.012 nats.")


def test_draws_needed_make_the_verdict_better():
    few = verdict(0.62, 300)
    assert verdict(0.62, math.ceil(few.draws_needed)).trusted
    assert not verdict(0.62, math.floor(few.draws_needed)).trusted
    assert verdict(-1.0).draws_needed == 10 and verdict(1.0).draws_needed == math.inf


def test_judge_of_normals():
    std, D = 0.8, 3
    z, log_weights = normal(std, 20_000, D)
    found = diagnose(log_weights, z)
    log_z, kl = D * math.log(2 * math.pi) / 2, D * (-math.log(std) + std**2 / 2 - 1 / 2)
    assert abs(found.elbo - (log_z - kl)) < 5 * found.elbo_error
    # The variance of log w = (1 / std^2 - 1) z^2 / 2 is D (1 - std^2)^2 / 2.
    assert found.elbo_error == pytest.approx((D / 2) ** 0.5 * (1 - std**2) / 20_000**0.5, rel=0.1)
    assert found.iw_elbo == pytest.approx(log_z, abs=0.05) and found.elbo < found.iw_elbo
    assert found.k_hat == psis(log_weights)[1] and found.draws == 20_000
    assert found.effective_sample_size == pytest.approx(effective_sample_size(log_weights).item(), rel=0.2)
    assert len(found.of_means) == D and all(1 < n < 20_000 for n in found.of_means)


def test_judge_of_an_exact_fit():
    z, log_weights = normal(1.0, 100, 2)
    found = diagnose(log_weights, z)
    assert found.trusted and found.k_hat == 0 and found.elbo_error < 1e-12
    assert found.elbo == pytest.approx(math.log(2 * math.pi)) == found.iw_elbo
    assert (found.effective_sample_size, *found.of_means) == pytest.approx((100, 100, 100))


def test_judge_of_draws_outside_the_support():
    _, log_weights = normal(1.1, 1_000)
    log_weights[3] = -math.inf
    found = diagnose(log_weights)
    assert found.trusted and (found.elbo, found.elbo_error) == (-math.inf, math.inf) and found.of_means == ()


# -- chains ------------------------------------------------------------------------------------------


def test_convergence_is_that_of_arviz_for_each_feature():
    draws = torch.randn(4, 100, 3).double().cumsum(1)
    found = convergence(draws)
    for i in range(3):
        one = draws[..., i].numpy()
        expected = (arviz.rhat(one), arviz.ess(one, method="bulk"), arviz.ess(one, method="tail"))
        assert [part[i].item() for part in found] == pytest.approx(expected)


def test_convergence_sees_chains_apart_and_chains_that_stand():
    draws = torch.randn(4, 200, 4)
    draws[0, :, 1] += 1
    draws[..., 2] = 3.0
    draws[..., 3] = torch.arange(4.0)[:, None]
    r_hat = convergence(draws).r_hat
    assert r_hat[0] < 1.03 and r_hat[1] > 1.1 and (r_hat[2:] == math.inf).all()


@over([(1, 50, 1), (70, 5, 1), (4, 4, 2)], "shape")
def test_convergence_of_few_chains_and_of_many_short_ones(shape):
    assert [part.shape for part in convergence(torch.randn(shape))] == [shape[2:]] * 3


# -- calibration -------------------------------------------------------------------------------------

NOISE = torch.tensor([0.5, 1.0, 2.0]).double()


def simulate():
    theta = torch.randn(3).double()
    return theta, theta + NOISE * torch.randn(3).double()


def fit(shift, scale):
    """The conjugate posterior, moved by shift and widened by scale, in posterior standard deviations."""

    def draws(x):
        std = NOISE / (1 + NOISE**2).sqrt()
        return x / (1 + NOISE**2) + std * (shift + scale * torch.randn(200, 3).double())

    return draws


def test_an_exact_posterior_is_calibrated():
    found = simulation_based_calibration(simulate, fit(0, 1), 400)
    assert found.probabilities.shape == (400, 3) and found.bias.shape == found.spread.shape == (3,)
    assert (found.bias > 1e-3).all() and (found.spread > 1e-3).all()
    assert min(stats.kstest(p, "uniform").pvalue for p in found.probabilities.T.numpy()) > 1e-3


def test_a_biased_posterior_is_told_by_its_side():
    found = simulation_based_calibration(simulate, fit(0.5, 1), 200)
    assert (found.bias < 1e-3).all() and (found.probabilities.mean(0) < 0.45).all()


@over([0.6, 1.6], "scale")
def test_a_posterior_of_wrong_width_is_told_from_a_biased_one(scale):
    found = simulation_based_calibration(simulate, fit(0, scale), 200)
    assert (found.spread < 1e-3).all() and (found.bias > 1e-3).all()
    assert ((found.probabilities - 0.5).abs().mean(0) > 0.25).all() == (scale < 1)


def test_calibration_has_the_p_values_of_scipy():
    found = simulation_based_calibration(simulate, fit(0.1, 0.9), 50)
    for p, bias, spread in zip(found.probabilities.T.numpy(), found.bias, found.spread, strict=True):
        assert bias.item() == pytest.approx(stats.wilcoxon(p - 0.5, method="approx").pvalue)
        below = stats.chi2.cdf((stats.norm.ppf(p) ** 2).sum(), 50)
        assert spread.item() == pytest.approx(2 * min(below, 1 - below))


def test_p_values_of_an_exact_posterior_are_uniform():
    """Even of five draws from each posterior, of twenty replications each."""
    found = [
        simulation_based_calibration(lambda: (torch.randn(50), None), lambda _: torch.randn(5, 50), 20)
        for _ in range(20)
    ]
    for name in ("bias", "spread"):
        p = torch.cat([getattr(one, name) for one in found])
        assert stats.kstest(p.numpy(), "uniform").statistic < 0.06  # 1000 values; Wilcoxon's are rounded


# -- errors ------------------------------------------------------------------------------------------

WEIGHTS, DRAWS = torch.randn(50), torch.randn(50, 2)


def spoilt(value):
    return torch.cat([WEIGHTS[1:], torch.tensor([value])])


REFUSED = {
    "nan": (
        lambda: effective_sample_size(spoilt(math.nan)),
        "expected finite log weights, .* got 1 of 50 that",
    ),
    "infinite": (lambda: psis(spoilt(math.inf)), "got 1 of 50 that are NaN or .inf; the target or the flow is not a"),
    "resample nan": (lambda: resample(DRAWS, spoilt(math.nan), 3), "expected finite log weights"),
    "no weight": (
        lambda: k_hat(torch.full((50,), -math.inf)),
        r"a weight above zero, got .* \(50,\) that are all",
    ),
    "one column": (
        lambda: effective_sample_size(torch.tensor([[0.0, -math.inf]])),
        "expected a draw with a weight above zero",
    ),
    "no draws": (lambda: effective_sample_size(torch.zeros(0)), "expected a draw with a weight above zero"),
    "too few": (lambda: k_hat(WEIGHTS[:24]), r"expected log weights \(S,\) of at least 25 draws, got \(24,\)"),
    "two axes": (lambda: diagnose(torch.randn(50, 2)), r"expected log weights \(S,\) .* got \(50, 2\)"),
    "other draws": (
        lambda: diagnose(WEIGHTS, DRAWS[:9]),
        r"draws \(S, ...\) and log weights \(S,\), got \(9, 2\)",
    ),
    "resample": (
        lambda: resample(DRAWS, DRAWS, 3),
        r"draws \(S, ...\) and log weights \(S,\), got \(50, 2",
    ),
    "chains": (
        lambda: convergence(DRAWS),
        r"draws \(chains, draws, D\) with at least 4 a chain, got \(50",
    ),
    "short": (lambda: convergence(torch.randn(4, 3, 2)), r"at least 4 a chain, got \(4, 3, 2\)"),
    "replications": (
        lambda: simulation_based_calibration(simulate, fit(0, 1), 1),
        "expected replications of at least 2, got 1",
    ),
    "sizes": (
        lambda: simulation_based_calibration(simulate, lambda x: DRAWS),
        r"truth \(D,\) from simulate and draws \(L, D\) from fit, got \(3,\) and \(50, 2\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("call", [lambda: k_hat(WEIGHTS), lambda: convergence(torch.randn(2, 9, 1))], ids=["k", "r"])
def test_without_arviz(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"expected arviz for k-hat.* pip install 'counterflow\[posterior\]'"):
        call()


# -- two samples -------------------------------------------------------------------------------------


def correlated(n, rho):
    x = torch.randn(n, 2)
    return torch.stack([x[:, 0], rho * x[:, 0] + (1 - rho**2) ** 0.5 * x[:, 1]], 1)


def test_the_energy_test_holds_its_level():
    p = torch.tensor([energy_test(torch.randn(40, 2), torch.randn(50, 2), 99).p_value for _ in range(200)])
    assert abs((p <= 0.1).float().mean().item() - 0.1) < 4 * (0.09 / 200) ** 0.5
    assert abs(p.mean().item() - 0.505) < 4 / (12 * 200) ** 0.5


def test_the_energy_test_finds_shifts_scales_and_dependence():
    x = torch.randn(400, 2)
    for other in (x + 0.4, 1.6 * torch.randn(400, 2), correlated(400, 0.8)):
        assert energy_test(x, other).p_value == 0.001
    assert energy_test(x, correlated(400, 0.0)).p_value > 0.01


def test_the_energy_test_sees_ranks_alone():
    x, y = torch.randn(60, 3), torch.randn(50, 3) + 0.2
    plain, stretched = energy_test(x, y), energy_test((3 * x).exp(), (3 * y).exp())
    assert plain.distance == pytest.approx(stretched.distance)
    x[0] = torch.inf  # as of a flow whose draws explode
    assert 0 < energy_test(x, y).distance < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: energy_test(DRAWS, DRAWS[:, :1]),
            r"samples \(N, D\) and \(M, D\) of at least two rows, got \(50, 2\)",
        ),
        (lambda: energy_test(DRAWS, DRAWS[:1]), r"at least two rows, got \(50, 2\) and \(1, 2\)"),
        (lambda: energy_test(DRAWS, DRAWS, 0), "permutations of at least 1, got 0"),
        (lambda: energy_test(DRAWS, DRAWS * torch.nan), "expected numbers, got 100 NaN of 200"),
    ],
    ids=["features", "rows", "permutations", "nan"],
)
def test_what_the_energy_test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
