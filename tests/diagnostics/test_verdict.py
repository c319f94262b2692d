"""Verdict on an approximation, from the importance weights of its draws."""

import math
from dataclasses import replace

import pytest
import torch

from counterflow.diagnostics.importance import effective_sample_size, psis
from counterflow.diagnostics.verdict import Verdict, diagnose


def normal(std, draws=4_000, D=1):
    """z from q = N(0, std^2) and its log weights towards exp(-z^2 / 2), which integrates to (2 pi)^(D / 2)."""
    q = torch.distributions.Normal(torch.zeros(D).double(), std)
    z = q.sample((draws,))
    return z, -z.square().sum(-1) / 2 - q.log_prob(z).sum(-1)


def verdict(k, samples=4_000):
    return Verdict(samples, k, samples / 3, -12.345, 0.0123, -12.1)


FINDINGS = {
    "close": (verdict(-0.1), True, "is close to the posterior: k-hat -0.10 is below 0.5, 4,000 draws are worth 1,333"),
    "useful": (verdict(0.62), True, "is useful, with its importance weights: k-hat 0.62 lies between 0.5 and 0.70"),
    "too few": (
        verdict(0.62, 300),
        False,
        "300 draws are too few to judge: k-hat 0.62 requires 429 or more; draw",
    ),
    "bad": (verdict(0.7), False, "cannot be trusted: k-hat 0.70 is above 0.70; train for longer, take a larger flow"),
    "very bad": (verdict(1.3), False, "cannot be trusted: k-hat 1.30 is above 1, where weights have no mean"),
    "no weights": (verdict(math.inf), False, "cannot be trusted: k-hat inf is above 1"),
}


@pytest.mark.parametrize(("found", "trusted", "words"), FINDINGS.values(), ids=FINDINGS)
def test_verdict_in_words(found, trusted, words):
    assert found.trusted is trusted
    assert words in found.sentence and found.sentence.endswith(", and the ELBO is -12.35 ± 0.012 nats.")


def test_an_elbo_of_minus_infinity_is_explained():
    found = replace(verdict(0.1), elbo=-math.inf, elbo_error=math.nan)
    assert found.sentence.endswith("ELBO is minus infinity, because some draws lie where the density is zero.")


def test_missed_mass_overrides_a_good_k_hat():
    found = replace(verdict(0.1), missed=0.3)
    assert not found.trusted and replace(found, missed=0.019).trusted
    assert "cannot be trusted: 30 % of the posterior mass that was found lies where it has" in found.sentence
    assert "(k-hat 0.10 describes only the part that is covered)" in found.sentence


def test_a_heavy_tail_makes_the_verdict_bad_although_the_weights_are_good():
    z = torch.distributions.Cauchy(0.0, 1.0).sample((5_000, 2)).double()
    z[:, 0] = torch.randn(5_000)
    found = diagnose(torch.zeros(5_000), z, names=["mu", "tau"])
    assert found.unreliable == ("tau",) and found.usable_weights and not found.trusted
    assert found.sentence == (
        "The standard deviation of tau cannot be trusted: a few draws in a heavy tail decide it. The weighted draws "
        "are good (k-hat 0.00 is below 0.70), so report medians and intervals, or choose a prior with lighter tails."
    )
    assert diagnose(torch.zeros(5_000), z).unreliable == ("[1]",)
    assert "where it has" in replace(found, missed=0.5).sentence


def test_samples_needed_make_the_verdict_good():
    few = verdict(0.62, 300)
    assert verdict(0.62, math.ceil(few.samples_needed)).trusted
    assert not verdict(0.62, math.floor(few.samples_needed)).trusted
    assert verdict(-1.0).samples_needed == 10 and verdict(1.0).samples_needed == math.inf


def test_diagnose_normals():
    std, D = 0.8, 3
    z, log_weights = normal(std, 20_000, D)
    found = diagnose(log_weights, z)
    log_z, kl = D * math.log(2 * math.pi) / 2, D * (-math.log(std) + std**2 / 2 - 1 / 2)
    assert abs(found.elbo - (log_z - kl)) < 5 * found.elbo_error
    # The variance of log w = (1 / std^2 - 1) z^2 / 2 is D (1 - std^2)^2 / 2.
    assert found.elbo_error == pytest.approx((D / 2) ** 0.5 * (1 - std**2) / 20_000**0.5, rel=0.1)
    assert found.iw_elbo == pytest.approx(log_z, abs=0.05) and found.elbo < found.iw_elbo
    assert found.k_hat == psis(log_weights).k_hat and found.samples == 20_000
    assert found.ess == pytest.approx(effective_sample_size(log_weights).item(), rel=0.2)
    assert found.unreliable == ()


def test_diagnose_an_exact_fit():
    z, log_weights = normal(1.0, 100, 2)
    found = diagnose(log_weights, z)
    assert found.trusted and found.k_hat == 0 and found.elbo_error < 1e-12
    assert found.elbo == pytest.approx(math.log(2 * math.pi)) == found.iw_elbo
    assert found.ess == pytest.approx(100)


def test_diagnose_draws_outside_the_support():
    _, log_weights = normal(1.1, 1_000)
    log_weights[3] = -math.inf
    found = diagnose(log_weights)
    assert found.trusted and (found.elbo, found.elbo_error) == (-math.inf, math.inf) and found.unreliable == ()


def test_draws_of_another_number_than_the_weights():
    with pytest.raises(ValueError, match=r"draws \(S, ...\) and log weights \(S,\), got \(9, 2\)"):
        diagnose(torch.randn(50), torch.randn(9, 2))
