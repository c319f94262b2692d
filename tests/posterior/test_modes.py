"""Modes: flows for each of them, their weights, and those that are left out."""

import math
from dataclasses import replace

import pytest
import torch
from log_densities import QUICK, modes
from registry import over

import counterflow as cf
from counterflow.posterior.gaussians import Gaussians
from counterflow.posterior.mixtures import evidence_weights
from counterflow.posterior.modes import uncovered_shares
from counterflow.posterior.stages import WeightedDraws, draw_with_densities


def normal_flow(at, D=2):
    """Return a flow that is N(at, I)."""
    shift = torch.full((D,), float(at), dtype=torch.float64)
    return cf.Flow(cf.bases.StandardNormal(D), cf.Inverse(cf.Standardize(shift, torch.ones_like(shift)))).double()


def two_normals(theta):
    """Evaluate 3 [0.3 N(-5, I) + 0.7 N(5, I)], up to the constants of the normals."""
    left, right = (-(theta - at).square().sum(-1) / 2 for at in (-5.0, 5.0))
    return math.log(3) + torch.logaddexp(math.log(0.3) + left, math.log(0.7) + right)


def weighted(flow, n=2_000):
    return WeightedDraws(*draw_with_densities(two_normals, flow, n), torch.zeros(n))


def test_the_weights_of_separate_modes_are_their_shares_of_the_evidence():
    torch.manual_seed(0)
    flows = [normal_flow(5), normal_flow(-5)]
    weights = evidence_weights(flows, [weighted(flow) for flow in flows])
    assert weights.tolist() == pytest.approx([0.7, 0.3], abs=0.03) and weights.sum() == pytest.approx(1)


def test_a_flow_that_covers_nothing_gets_no_weight():
    torch.manual_seed(0)
    flows = [normal_flow(5), normal_flow(-5), normal_flow(40)]
    assert evidence_weights(flows, [weighted(flow) for flow in flows])[2] < 1e-6


def test_flows_of_one_mode_share_its_mass():
    torch.manual_seed(0)
    flows = [normal_flow(5), normal_flow(5.5), normal_flow(-5)]
    weights = evidence_weights(flows, [weighted(flow) for flow in flows])
    assert weights[:2].sum() == pytest.approx(0.7, abs=0.03) and weights[1] < 0.1


def test_the_share_of_each_gaussian_that_a_flow_leaves_out():
    torch.manual_seed(0)
    mean = torch.tensor([[5.0, 5.0], [-5.0, -5.0]], dtype=torch.float64)
    found = Gaussians(mean, torch.eye(2, dtype=torch.float64).repeat(2, 1, 1), torch.zeros(2).double())
    generator = torch.Generator().manual_seed(0)
    shares = uncovered_shares(two_normals, normal_flow(5), found, generator)
    assert shares.tolist() == pytest.approx([0.0, 0.3], abs=0.03)
    both = cf.flows.FlowMixture([normal_flow(5), normal_flow(-5)], [0.7, 0.3])
    assert uncovered_shares(two_normals, both, found, generator).sum() < 0.01


@over([0.5, 0.9], "share")
def test_a_mode_that_gets_no_flow_is_flagged(share):
    posterior = cf.fit_posterior(lambda theta: modes(theta, 8.0, share), QUICK, dim=2)
    assert posterior.k_hat < 0.7  # so k-hat alone is not enough
    assert posterior.missed == pytest.approx(1 - share, abs=0.1)
    assert not posterior.trusted and posterior.mode_weights == (1.0,)
    assert "The approximation cannot be trusted" in repr(posterior) and "NOT corrected" in repr(posterior)
    assert f"{100 * posterior.missed:.0f} % of the posterior mass" in str(posterior.summary())


@pytest.fixture(scope="module")
def bimodal():
    return cf.fit_posterior(lambda theta: modes(theta, 5.0, 0.3), replace(QUICK, modes=8), dim=2)


def test_two_modes_are_fitted_and_weighted(bimodal):
    assert bimodal.trusted and bimodal.k_hat < 0.7 and bimodal.missed < 0.01
    assert sorted(bimodal.mode_weights) == pytest.approx([0.3, 0.7], abs=0.03)
    assert [stage.mode for stage in bimodal.stages] == [1, 2]
    x = bimodal.sample(2_000)["theta"][:, 0]
    assert (x < 0).double().mean() == pytest.approx(0.3, abs=0.03)
    assert x[x > 0].mean() == pytest.approx(5, abs=0.15) and x[x < 0].mean() == pytest.approx(-5, abs=0.15)
    assert bimodal.verdict.iw_elbo == pytest.approx(math.log(2 * math.pi), abs=0.05)
    assert "2 modes of weights" in repr(bimodal)


def test_the_mixture_is_the_density_of_the_draws(bimodal):
    torch.testing.assert_close(bimodal.log_prob(bimodal.draws.theta[:50]), bimodal.draws.log_q[:50])
    grid = torch.cartesian_prod(torch.linspace(-14, 14, 71), torch.linspace(-9, 9, 46)).double()
    assert bimodal.log_prob(grid).exp().sum() * (28 / 70) * (18 / 45) == pytest.approx(1, abs=0.02)


def test_a_posterior_of_two_modes_is_saved_refined_and_converted(bimodal, tmp_path):
    bimodal.save(tmp_path)
    loaded = cf.Posterior.load(tmp_path, bimodal.target)
    assert loaded.mode_weights == bimodal.mode_weights and repr(loaded) == repr(bimodal)
    assert loaded.sample(3_000)["theta"].shape == (3_000, 2)  # more than the verdict's draws
    refined = bimodal.refine("imh", chains=8, samples=100)
    assert (refined.values["theta"][..., 0] < 0).double().mean() == pytest.approx(0.3, abs=0.08)
    with pytest.raises(ValueError, match="expected method imh for a posterior with flows for 2 modes, got nuts"):
        bimodal.refine("nuts")
    assert bimodal.to_arviz(100)["posterior"]["theta"].shape == (1, 100, 2)


@pytest.mark.slow
def test_both_labellings_of_a_mixture_without_ordering():
    """y ~ w N(a, 1) + (1 - w) N(b, 1): (a, b, w) and (b, a, 1 - w) are equally probable."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.randn(60, generator=generator) - 2, torch.randn(40, generator=generator) + 2]).double()

    def model(a, b, w):
        each = torch.stack(
            [w.log()[:, None] - (y - a[:, None]).square() / 2, (1 - w).log()[:, None] - (y - b[:, None]).square() / 2]
        )
        return torch.logsumexp(each, 0).sum(-1) - (a.square() + b.square()) / 50

    target = cf.targets.from_torch(
        model, shapes={"a": (), "b": (), "w": ()}, constraints={"w": torch.distributions.constraints.unit_interval}
    )
    posterior = cf.fit_posterior(target)
    draws = posterior.sample(4_000)
    first = draws["a"] < draws["b"]
    assert posterior.trusted and posterior.mode_weights == pytest.approx((0.5, 0.5), abs=0.05)
    assert first.double().mean() == pytest.approx(0.5, abs=0.05)
    for chosen, low, high, share in ((first, "a", "b", draws["w"]), (~first, "b", "a", 1 - draws["w"])):
        assert draws[low][chosen].mean() == pytest.approx(-2, abs=0.3)
        assert draws[high][chosen].mean() == pytest.approx(2, abs=0.4)
        assert share[chosen].mean() == pytest.approx(0.6, abs=0.1)
