"""Simulation-based calibration: exact, biased and too narrow posteriors."""

import pytest
import torch
from registry import over
from scipy import stats

from counterflow.diagnostics.calibration import calibration, randomized_ranks, simulation_based_calibration

NOISE = torch.tensor([0.5, 1.0, 2.0]).double()


def simulate():
    theta = torch.randn(3).double()
    return theta, theta + NOISE * torch.randn(3).double()


def fit(shift, scale):
    """Conjugate posterior, shifted by shift posterior standard deviations and widened by scale."""

    def draws(x):
        std = NOISE / (1 + NOISE**2).sqrt()
        return x / (1 + NOISE**2) + std * (shift + scale * torch.randn(200, 3).double())

    return draws


def test_an_exact_posterior_is_calibrated():
    found = simulation_based_calibration(simulate, fit(0, 1), 400)
    assert found.probabilities.shape == (400, 3) and found.bias.shape == found.spread.shape == (3,)
    assert (found.bias > 1e-3).all() and (found.spread > 1e-3).all()
    assert min(stats.kstest(p, "uniform").pvalue for p in found.probabilities.T.numpy()) > 1e-3


def test_a_biased_posterior_is_detected():
    found = simulation_based_calibration(simulate, fit(0.5, 1), 200)
    assert (found.bias < 1e-3).all() and (found.probabilities.mean(0) < 0.45).all()


@over([0.6, 1.6], "scale")
def test_a_posterior_of_wrong_width_is_distinguished_from_a_biased_one(scale):
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
    """Uniformity holds even for five draws of each posterior and twenty replications."""
    found = [
        simulation_based_calibration(lambda: (torch.randn(50), None), lambda _: torch.randn(5, 50), 20)
        for _ in range(20)
    ]
    for name in ("bias", "spread"):
        p = torch.cat([getattr(one, name) for one in found])
        assert stats.kstest(p.numpy(), "uniform").statistic < 0.06  # 1000 values; Wilcoxon's are rounded


def test_a_single_replication_is_refused():
    with pytest.raises(ValueError, match="expected replications of at least 2, got 1"):
        simulation_based_calibration(simulate, fit(0, 1), 1)


def test_truth_and_draws_of_different_size_are_refused():
    message = r"truth \(D,\) from simulate and draws \(L, D\) from fit, got \(3,\) and \(50, 2\)"
    with pytest.raises(ValueError, match=message):
        simulation_based_calibration(simulate, lambda _: torch.randn(50, 2))


def test_the_parts_give_the_same_as_the_whole():
    state = torch.random.get_rng_state()
    whole = simulation_based_calibration(simulate, fit(0, 1), 30)
    torch.random.set_rng_state(state)
    ranks = []
    for _ in range(30):
        theta, data = simulate()
        ranks.append(randomized_ranks(theta, fit(0, 1)(data)))
    parts = calibration(torch.stack(ranks))
    assert all(torch.equal(getattr(parts, name), getattr(whole, name)) for name in ("probabilities", "bias", "spread"))
    with pytest.raises(ValueError, match=r"expected probabilities \(R, D\) of at least 2 replications, got \(1, 3\)"):
        calibration(torch.rand(1, 3))
