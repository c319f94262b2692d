"""Posteriors with known answers, and the methods of a fitted posterior."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from log_densities import QUICK, banana, gaussian, normal, schools
from registry import close, over
from torch.distributions import constraints

import counterflow as cf
from counterflow.posterior.plans import ESTIMATORS
from counterflow.posterior.targets.function import from_torch


@pytest.fixture(scope="module")
def curved():
    return cf.fit_posterior(banana, cf.PosteriorConfig(stages=2), dim=2)


@pytest.fixture(scope="module")
def curved_quickly():
    return cf.fit_posterior(banana, replace(QUICK, steps=10), dim=2)


@pytest.mark.slow
def test_a_banana(curved):
    assert curved.trusted and curved.k_hat < 0.7 and curved.ess > 9_000
    assert curved.elbo == pytest.approx(math.log(2 * math.pi), abs=0.02)
    rows = curved.summary().rows
    assert rows["theta[0]"].mean == pytest.approx(0, abs=0.05) and rows["theta[0]"].sd == pytest.approx(1, abs=0.05)
    assert rows["theta[1]"].mean == pytest.approx(1, abs=0.08)
    assert rows["theta[1]"].sd == pytest.approx(1.5, rel=0.1)
    assert rows["theta[0]"].high == pytest.approx(1.645, abs=0.1)


def test_scales_far_apart():
    scales = [1e-5, 1e4, 1.0, 1e-2, 300.0]
    target, mean, factor = gaussian(5, scales)
    posterior = cf.fit_posterior(target, replace(QUICK, verdict_samples=5_000), dim=5)
    sd = (factor @ factor.T).diagonal().sqrt()
    assert posterior.trusted and posterior.k_hat < 0.5
    for row, m, s in zip(posterior.summary().rows.values(), mean.tolist(), sd.tolist(), strict=True):
        assert abs(row.mean - m) < 0.1 * s and row.sd == pytest.approx(s, rel=0.1)


@pytest.mark.slow
def test_one_dimension_that_is_skewed():
    """The logarithm of a Gamma(3) variable has mean digamma(3), variance trigamma(3) and evidence Gamma(3)."""
    posterior = cf.fit_posterior(lambda theta: (3 * theta - theta.exp()).sum(-1), replace(QUICK, steps=150), dim=1)
    row = posterior.summary().rows["theta[0]"]
    assert posterior.trusted and posterior.verdict.iw_elbo == pytest.approx(math.log(2), abs=0.02)
    assert row.mean == pytest.approx(0.92278, abs=0.06) and row.sd == pytest.approx(0.62842, rel=0.1)


def test_a_parameter_with_a_heavy_tail_is_flagged():
    """log x ~ N(0, 2), which is easy to fit, but few draws decide the standard deviation of x."""

    def model(x, y):
        return normal(x.log(), 0.0, 2.0) - x.log() + normal(y)

    target = from_torch(model, shapes={"x": (), "y": ()}, constraints={"x": constraints.positive})
    posterior = cf.fit_posterior(target, replace(QUICK, verdict_samples=5_000))
    assert posterior.verdict.usable_weights and posterior.k_hat < 0.7
    assert posterior.verdict.unreliable == ("x",) and not posterior.trusted
    assert posterior.sentence.startswith("The standard deviation of x cannot be trusted: a few draws in a heavy tail")
    assert posterior.summary().rows["x"].k_hat > 0.7 > posterior.summary().rows["y"].k_hat
    assert "resampled by importance weights" in repr(posterior)


@pytest.mark.slow
def test_centered_eight_schools():
    posterior = cf.fit_posterior(schools, dim=10)
    rows = posterior.summary().rows
    assert posterior.trusted and posterior.verdict.iw_elbo == pytest.approx(-13.63, abs=0.05)
    assert rows["theta[8]"].mean == pytest.approx(4.4, abs=0.4)  # mu


@over(ESTIMATORS, quick=["path"])
def test_every_estimator_fits(name):
    posterior = cf.fit_posterior(gaussian(2)[0], replace(QUICK, estimator=name), dim=2)
    assert posterior.stages[0].estimator == name and posterior.ess > 1_000 and posterior.k_hat < 0.7


def test_the_seed_determines_the_result():
    def fitted(seed):
        torch.rand(1)  # the global generator has no effect
        posterior = cf.fit_posterior(banana, replace(QUICK, seed=seed), dim=2)
        return posterior.draws.theta

    state = torch.random.get_rng_state()
    first = fitted(3)
    torch.random.set_rng_state(state)
    assert torch.equal(fitted(3), first) and not torch.equal(fitted(4), first)


@pytest.fixture(scope="module")
def named():
    y = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)

    def model(mu, tau, effects):
        return normal(mu) - tau.square() + normal(effects, mu[:, None], 1.0).sum(-1) + normal(y, effects, 1.0).sum(-1)

    shapes = {"mu": (), "tau": (), "effects": (3,)}
    target = from_torch(
        model,
        shapes=shapes,
        constraints={"tau": constraints.positive},
        log_likelihood=lambda mu, tau, effects: {"y": normal(y, effects, 1.0)},
        observed={"y": y.numpy()},
    )
    return cf.fit_posterior(target, replace(QUICK, layers=4, steps=150, samples=256))


def test_samples_are_named_shaped_and_constrained(named):
    draws = named.sample(500)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "mu": (500,),
        "tau": (500,),
        "effects": (500, 3),
    }
    assert (draws["tau"] > 0).all() and draws["mu"].dtype == torch.float64
    assert named.sample(3_000)["mu"].shape == (3_000,)  # more than the verdict's draws: new ones
    with pytest.raises(ValueError, match="expected n of at least 1, got 0"):
        named.sample(0)


def test_resampling_moves_the_draws_towards_the_posterior(named):
    few = named.sample(len(named.log_weights))["mu"]
    assert few.mean() == pytest.approx(named.summary().rows["mu"].mean, abs=0.05)


def test_the_summary_has_a_row_for_each_element(named):
    summary = named.summary()
    assert list(summary.rows) == ["mu", "tau", "effects[0]", "effects[1]", "effects[2]"]
    assert all(row.low < row.mean < row.high and row.sd > 0 and row.ess > 100 for row in summary.rows.values())
    for row in summary.rows.values():
        assert row.mcse_mean == pytest.approx(row.sd / row.ess**0.5)
        assert 0 < row.mcse_sd < 0.1 * row.sd and row.k_hat < 0.7
    assert str(summary) == str(named.summary()) and summary.verdict == named.sentence
    assert [line.split()[0] for line in str(summary).splitlines()[1:6]] == list(summary.rows)


def test_repr_contains_the_verdict(named):
    assert "5 dimensions: mu, tau, effects; 1 stage" in repr(named)
    assert named.sentence in repr(named) and "resampled by importance weights" in repr(named)


def test_log_prob_is_that_of_the_flow(named):
    close(named.log_prob(named.draws.theta[:9]), named.draws.log_q[:9], 1e-8)


def test_arviz(named):
    data = named.to_arviz(samples=200)
    assert data["posterior"]["effects"].shape == (1, 200, 3) and data["posterior"]["tau"].shape == (1, 200)
    assert data["observed_data"]["y"].shape == (3,) and "log_likelihood" not in data
    assert data["unconstrained_posterior"]["effects"].shape == (1, 200, 3)
    assert data["unconstrained_posterior"]["log(tau)"].values == pytest.approx(np.log(data["posterior"]["tau"].values))
    assert named.to_arviz(50, log_likelihood=True)["log_likelihood"]["y"].shape == (1, 50, 3)
    weight, lp, log_q = (data["sample_stats"][name].values for name in ("log_weight", "lp", "log_q"))
    assert weight == pytest.approx(lp - log_q)
    assert data["posterior"].attrs["trusted"] == 1 and data["posterior"].attrs["verdict"] == named.sentence


def test_leave_one_out(named):
    with pytest.warns(UserWarning, match="k-hat|Pareto"):  # every observation has an effect of its own
        loo = named.loo(samples=1_000)
    assert loo["n_samples"] == 1_000 and loo["n_data_points"] == 3
    for arguments, message in (
        ({"samples": 20}, "expected samples of at least 25, got 20"),
        ({"var_name": "x"}, "expected var_name to be one of y, got x"),
    ):
        with pytest.raises(ValueError, match=message):
            named.loo(**arguments)


def test_leave_one_out_needs_the_log_likelihood_of_each_observation(curved_quickly):
    with pytest.raises(ValueError, match=r"gives the log likelihood of each observation, .* or pass log_likelihood="):
        curved_quickly.loo()


def test_refined_by_metropolis(named):
    refined = named.refine("imh", chains=8, samples=300)
    assert refined.values["effects"].shape == (8, 300, 3) and (refined.values["tau"] > 0).all()
    assert refined.values["mu"].mean() == pytest.approx(named.summary().rows["mu"].mean, abs=0.1)
    assert refined.chains.sentence in repr(refined)
    assert refined.to_arviz()["posterior"]["effects"].shape == (8, 300, 3)
    with pytest.raises(ValueError, match="expected method to be one of nuts, neutra, imh, got 'gibbs'"):
        named.refine("gibbs")


def test_saved_and_loaded(named, tmp_path):
    named.save(tmp_path / "fit")
    files = sorted(path.name for path in (tmp_path / "fit").iterdir())
    assert files == ["draws.safetensors", "model.safetensors", "posterior.json"]
    loaded = cf.Posterior.load(tmp_path / "fit")
    assert repr(loaded) == repr(named) and str(loaded.summary()) == str(named.summary())
    assert loaded.stages == named.stages and loaded.config == named.config and loaded.verdict == named.verdict
    close(loaded.log_prob(named.draws.theta[:5]), named.log_prob(named.draws.theta[:5]), 1e-12)
    torch.manual_seed(0)
    expected = named.sample(50)["effects"]
    torch.manual_seed(0)
    assert torch.equal(loaded.sample(50)["effects"], expected)
    with pytest.raises(ValueError, match="loaded without it, with 2000 draws; sample at most that many"):
        loaded.sample(2_001)
    again = cf.Posterior.load(tmp_path / "fit", named.target)
    assert again.sample(2_001)["effects"].shape == (2_001, 3)


def test_an_incomplete_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"written by Posterior.save, got .* without model.safetensors"):
        cf.Posterior.load(tmp_path)


def test_the_json_file_of_a_saved_posterior(named, tmp_path):
    named.save(tmp_path)
    facts = json.loads((tmp_path / "posterior.json").read_text("utf-8"))
    assert facts["verdict"]["k_hat"] == named.k_hat and facts["variables"] == ["mu", "tau", "effects"]


def test_a_function_needs_its_dimension():
    with pytest.raises(ValueError, match="dim"):
        cf.fit_posterior(banana)
    with pytest.raises(TypeError, match="expected a target or a function"):
        cf.fit_posterior("model.py", dim=2)


CONFIGS = {
    "layers": (0, "expected layers of at least 1, got 0"),
    "starts": (0, "expected starts of at least 1, got 0"),
    "samples": (-1, "expected samples of at least 1, got -1"),
    "steps": (0, "expected steps of at least 1, got 0"),
    "stages": (0, "expected stages of at least 1, got 0"),
    "df": (0.0, "expected df above 0, got 0"),
    "learning_rate": (math.nan, "expected learning_rate above 0, got nan"),
    "seconds": (-1.0, "expected seconds above 0, got -1"),
    "verdict_samples": (10, "expected verdict_samples of at least 1000, got 10; k-hat needs a tail"),
    "estimator": ("score", "expected estimator to be one of reparameterised, path, dreg, .* got 'score'"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(k, *v) for k, v in CONFIGS.items()], ids=CONFIGS)
def test_invalid_configurations(name, value, message):
    with pytest.raises(ValueError, match=message):
        cf.PosteriorConfig(**{name: value})
