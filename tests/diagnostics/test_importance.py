"""Importance weights: effective sample sizes, resampling, Pareto smoothing."""

import math
import warnings

import numpy as np
import pytest
import torch
from registry import close, over

from counterflow.diagnostics.importance import (
    effective_sample_size,
    effective_sample_size_of_means,
    k_hat,
    k_hat_threshold,
    psis,
    resample,
)
from counterflow.diagnostics.verdict import diagnose

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


@pytest.mark.parametrize(("log_weights", "expected"), SIZES.values(), ids=SIZES)
def test_effective_sample_size(log_weights, expected):
    assert effective_sample_size(torch.tensor(log_weights, dtype=torch.float64)).item() == pytest.approx(expected)


@over([0.1, 3.0, 300.0], "spread")
def test_effective_sample_size_lies_between_one_and_the_number_of_draws(spread):
    ess = effective_sample_size(spread * torch.randn(50, 4, 3))
    assert ess.shape == (4, 3) and (ess >= 1 - 1e-5).all() and (ess <= 50 + 1e-3).all()


def test_effective_sample_size_decreases_with_the_spread_of_the_weights():
    log_weights = torch.randn(100)
    sizes = [effective_sample_size(spread * log_weights).item() for spread in (0, 0.5, 1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)


def test_effective_size_of_a_mean_is_the_ratio_of_variances():
    """Over repetitions, the weighted mean has the variance of p divided by n; q is wider than p if std > 1."""
    runs, draws, std = 2_000, 200, torch.tensor([0.95, 1.1, 1.6]).double()
    z = std * torch.randn(runs, draws, 3).double()
    log_weights = (-z.square() / 2 + (z / std).square() / 2).sum(-1)
    means = (log_weights.softmax(1)[..., None] * z).sum(1)
    sizes = torch.stack([effective_sample_size_of_means(*run) for run in zip(z, log_weights, strict=True)])
    assert ((sizes.mean(0) * means.var(0) - 1).abs() < 0.15).all()
    assert sizes.mean(0)[0] < sizes.mean(0)[1] < draws < sizes.mean(0)[2]


def test_effective_size_of_a_mean_is_precise_far_from_zero():
    draws, log_weights = torch.randn(300, 4).double(), torch.randn(300).double()
    expected = effective_sample_size_of_means(draws, log_weights)
    close(effective_sample_size_of_means(1e4 + 3 * draws, 1e3 + log_weights), expected, 1e-8)


def test_draws_are_picked_in_proportion_to_their_weights():
    draws, p = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]), torch.tensor([0.1, 0.6, 0.0, 0.3])
    n = 20_000
    picked = resample(draws, p.log() - 1e3, n)
    assert picked.shape == (n, 2) and (picked[:, 1] - picked[:, 0] == 1).all()
    share = torch.stack([(picked[:, 0] == first).float().mean() for first in draws[:, 0]])
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@over([1, 7, 30, 100], "n")
def test_the_count_of_a_draw_is_within_one_of_its_expectation(n):
    log_weights = torch.randn(30)
    log_weights[[0, 4, 29]] = -math.inf
    counts = resample(torch.arange(30), log_weights, n).bincount(minlength=30)
    assert ((counts - n * log_weights.double().softmax(0)).abs() < 1 + 1e-9).all()
    assert not counts[[0, 4, 29]].any()


def test_counts_have_the_right_mean():
    log_weights = torch.randn(9).double()
    counts = torch.stack([resample(torch.arange(9), log_weights, 4).bincount(minlength=9) for _ in range(8_000)])
    p = log_weights.softmax(0)
    assert ((counts.double().mean(0) / 4 - p).abs() < 5 * (p / 4 / 8_000).sqrt()).all()


def test_picked_draws_are_in_random_order():
    first, second = (resample(torch.arange(50), torch.zeros(50), 50) for _ in range(2))
    assert sorted(first.tolist()) == list(range(50)) and first.tolist() != second.tolist()


@over([0.2, 0.5, 0.9, 1.5], "k")
def test_k_hat_of_pareto_weights(k):
    """Log weights that are exponential with mean k have a Pareto tail of shape k."""
    found = [k_hat(k * torch.distributions.Exponential(1.0).sample((20_000,)).double()) for _ in range(20)]
    # The fit shrinks k towards 1/2 with the weight of 10 draws; the tail has 424.
    expected = (424 * k + 10 * 0.5) / 434
    assert abs(np.mean(found) - expected) < 5 * np.std(found) / 20**0.5 + 0.01


def test_k_hat_of_a_normal_that_is_too_narrow():
    """Compare with theory: a tail of shape 1 - std^2, up to logarithms; of a normal that is too wide, bounded."""
    found = {std: k_hat(normal(std, 100_000)[1]) for std in (0.4, 0.6, 0.8, 0.95, 1.3)}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(abs(found[std] - (1 - std**2)) < 0.2 for std in (0.4, 0.6, 0.8, 0.95)) and found[1.3] < 0.1


@over([25, 226, 3_001], "samples")
def test_psis_equals_arviz_0_on_the_positive_weights(samples):
    """ArviZ 1 fits a tail that is one draw shorter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        arviz = pytest.importorskip("arviz")
    if int(arviz.__version__.partition(".")[0]) > 0:
        pytest.skip("ArviZ 1 is installed")
    log_weights = 2 * torch.randn(samples + 3).double()
    log_weights[[0, 7, samples]] = -math.inf
    positive = log_weights.isfinite()
    smoothed, k = psis(log_weights - 500)
    expected, expected_k = arviz.psislw(log_weights[positive].numpy())
    close(smoothed[positive], torch.as_tensor(expected))
    assert k == pytest.approx(expected_k.item(), abs=1e-9)
    assert (smoothed[~positive] == -math.inf).all() and smoothed.exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("scale", "k", "largest", "sum_of_squares"),
    [
        (0.3, 0.1373624474, -6.493933102, 0.0005476463472),
        (1.0, 0.3630143217, -4.437095784, 0.001354106039),
        (2.0, 0.6806213007, -2.453875411, 0.01362495167),
    ],
)
def test_psis_gives_the_reference_numbers(scale, k, largest, sum_of_squares):
    """The reference numbers come from ArviZ 0.23.4."""
    log_weights = scale * torch.from_numpy(np.random.RandomState(1).standard_normal(2_000))
    smoothed, found = psis(log_weights)
    assert found == pytest.approx(k, rel=1e-8)
    assert smoothed.max().item() == pytest.approx(largest, rel=1e-8)
    assert smoothed.exp().square().sum().item() == pytest.approx(sum_of_squares, rel=1e-8)


def test_smoothing_keeps_the_order_and_changes_only_the_tail():
    log_weights = torch.randn(2_000).double() * 3
    smoothed, _ = psis(log_weights)
    order, tail = log_weights.argsort(), math.ceil(3 * 2_000**0.5)
    assert (smoothed[order].diff() >= 0).all()
    close(smoothed[order][:-tail].diff(), log_weights[order][:-tail].diff())
    assert (smoothed[order][-tail:].diff() - log_weights[order][-tail:].diff()).abs().max() > 0.01


def test_smoothed_weights_estimate_better():
    """Estimate the mean square under p with a q that is too narrow, repeatedly."""
    errors = []
    for _ in range(200):
        z, log_weights = normal(0.6, 1_000)
        square = z[:, 0].square()
        errors.append([(w * square).sum() - 1 for w in (log_weights.softmax(0), psis(log_weights)[0].exp())])
    plain, smoothed = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert smoothed < 0.9 * plain


@over([torch.float32, torch.float64], "dtype")
@over([0.0, 3e-5], "noise")
def test_equal_weights_have_no_tail(dtype, noise):
    smoothed, k = psis(torch.full((500,), -123.0, dtype=dtype) + noise * torch.randn(500).sign())
    assert k == 0 and smoothed.dtype == dtype
    assert smoothed.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_k_hat_of_fewer_than_25_positive_weights_is_infinite():
    log_weights = torch.full((1_000,), -math.inf)
    log_weights[:24] = torch.randn(24)
    smoothed, k = psis(log_weights)
    assert k == math.inf
    close(smoothed.exp(), log_weights.softmax(0), 1e-6)


def test_k_hat_of_weights_that_underflow():
    """All but one are below the smallest float64 when normalised, as if q misses the target altogether."""
    log_weights = -1e5 * torch.rand(1_000).double()
    assert k_hat(log_weights) > 1
    assert diagnose(log_weights).ess < 2


@pytest.mark.parametrize(
    ("samples", "threshold"), [(25, 0.285), (100, 0.5), (320, 0.601), (1000, 2 / 3), (10_000, 0.7)]
)
def test_threshold(samples, threshold):
    assert k_hat_threshold(samples) == pytest.approx(threshold, abs=1e-3)


WEIGHTS = torch.randn(50)
DRAWS = torch.randn(50, 2)


def with_last(value):
    return torch.cat([WEIGHTS[1:], torch.tensor([value])])


REFUSED = {
    "nan": (lambda: effective_sample_size(with_last(math.nan)), "expected finite log weights, .* got 1 of 50 that"),
    "infinite": (lambda: psis(with_last(math.inf)), "got 1 of 50 that are NaN or .inf; at these draws the target or"),
    "resample nan": (lambda: resample(DRAWS, with_last(math.nan), 3), "expected finite log weights"),
    "no weight": (
        lambda: k_hat(torch.full((50,), -math.inf)),
        r"at least one draw with a positive weight, got .* \(50,\) that are all -inf",
    ),
    "one column": (
        lambda: effective_sample_size(torch.tensor([[0.0, -math.inf]])),
        "expected at least one draw with a positive weight",
    ),
    "no draws": (lambda: effective_sample_size(torch.zeros(0)), "expected at least one draw with a positive weight"),
    "too few": (lambda: k_hat(WEIGHTS[:24]), r"expected log weights \(S,\) of at least 25 draws, got \(24,\)"),
    "two axes": (lambda: psis(torch.randn(50, 2)), r"expected log weights \(S,\) .* got \(50, 2\)"),
    "resample": (lambda: resample(DRAWS, DRAWS, 3), r"draws \(S, ...\) and log weights \(S,\), got \(50, 2"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
