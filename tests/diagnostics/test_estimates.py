"""Weighted means and standard deviations, their Monte Carlo errors, and heavy tails."""

import math

import pytest
import torch
from registry import close, over
from torch.distributions import Cauchy, HalfCauchy, LogNormal, Normal, Poisson, StudentT

from counterflow.diagnostics.estimates import unreliable_features, weighted_estimates
from counterflow.diagnostics.importance import effective_sample_size_of_means


def test_estimates_with_equal_weights_are_the_usual_ones():
    draws = torch.randn(4_000, 3).double() * torch.tensor([1.0, 2.0, 300.0]) + 5
    found = weighted_estimates(draws, torch.zeros(4_000))
    sd = draws.std(0, correction=0)
    close(found.mean, draws.mean(0))
    close(found.sd, sd)
    close(found.mcse_mean, sd / 4_000**0.5)
    assert (found.mcse_sd / (sd / 8_000**0.5) - 1).abs().max() < 0.1  # sd / sqrt(2 S) for normals
    close(found.ess, torch.full((3,), 4_000.0).double(), 1e-6)
    close(found.low, draws.quantile(0.05, 0), 0.02 * 300)
    close(found.high, draws.quantile(0.95, 0), 0.02 * 300)
    assert (found.k_hat < 0.3).all()


def test_errors_are_the_scatter_over_repetitions():
    """The draws come from a q that is wider than p = N(0, 1)."""
    runs = []
    for _ in range(400):
        z = 1.4 * torch.randn(500, 1).double()
        runs.append(weighted_estimates(z, (-z.square() / 2 + (z / 1.4).square() / 2)[:, 0]))
    for value, error in (("mean", "mcse_mean"), ("sd", "mcse_sd")):
        scatter = torch.stack([getattr(run, value) for run in runs]).std()
        claimed = torch.stack([getattr(run, error) for run in runs]).mean()
        assert (claimed / scatter - 1).abs() < 0.15


def test_effective_sample_size_is_that_of_the_mean():
    draws, log_weights = torch.randn(300, 4).double(), torch.randn(300).double()
    close(weighted_estimates(draws, log_weights).ess, effective_sample_size_of_means(draws, log_weights), 1e-8)


def test_many_features_are_estimated_in_parts():
    draws, log_weights = torch.randn(60, 600).double(), torch.randn(60).double()
    whole = weighted_estimates(draws, log_weights)
    alone = weighted_estimates(draws[:, 517:518], log_weights)
    for many, one in zip(whole, alone, strict=True):
        close(many[517:518], one)


HEAVY = {"cauchy": Cauchy(0.0, 1.0), "root of a half-cauchy": HalfCauchy(1.0), "funnel": LogNormal(0.0, 3.0)}
LIGHT = {
    "normal": Normal(0.0, 1.0),
    "lognormal": LogNormal(0.0, 0.7),
    "student t, 4 df": StudentT(4.0),
    "poisson": Poisson(3.0),
}


@over(HEAVY)
def test_a_heavy_tail_is_detected(name):
    x = HEAVY[name].sample((10_000, 5)).double()
    x[:, 1] = Normal(0.0, 1.0).sample((10_000,))
    x = x.abs().sqrt() * x.sign() if "root" in name else x
    assert unreliable_features(x, torch.zeros(10_000)) == [0, 2, 3, 4]
    assert (weighted_estimates(x, torch.zeros(10_000)).k_hat[[0, 2, 3, 4]] > 0.7).all()


@over(LIGHT)
def test_a_light_tail_is_reliable(name):
    assert unreliable_features(LIGHT[name].sample((10_000, 20)).double(), torch.zeros(10_000)) == []


@pytest.mark.parametrize("share", [0.5, 0.001])
def test_a_bounded_feature_is_reliable(share):
    x = (torch.rand(10_000, 3) < share).double()
    assert unreliable_features(x, torch.zeros(10_000)) == []
    assert (weighted_estimates(x, torch.zeros(10_000)).k_hat < 0.5).all()


def test_a_constant_feature_has_no_error():
    found = weighted_estimates(torch.full((100, 1), 3.0), torch.zeros(100))
    assert (found.mean, found.sd, found.mcse_mean, found.mcse_sd, found.k_hat) == (3, 0, 0, 0, 0)
    assert unreliable_features(torch.full((100, 1), 3.0), torch.zeros(100)) == []


def test_draws_of_another_number_than_the_weights():
    for function in (weighted_estimates, unreliable_features):
        with pytest.raises(ValueError, match=r"draws \(S, ...\) and log weights \(S,\), got \(9, 2\)"):
            function(torch.randn(9, 2), torch.zeros(50))


def test_infinite_weights_are_refused():
    with pytest.raises(ValueError, match="expected finite log weights"):
        weighted_estimates(torch.randn(2, 1), torch.tensor([0.0, math.nan]))
