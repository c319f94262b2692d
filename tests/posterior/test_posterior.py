"""Posteriors: the right answer where it is known, and a plain word where the approximation is not good enough."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from registry import close, over
from torch.distributions import Distribution, Normal, constraints

import counterflow as cf
from counterflow.posterior.plans import ESTIMATORS, Plan, plans
from counterflow.posterior.stages import TargetModel
from counterflow.posterior.starts import (
    Gaussians,
    batch_and_match,
    initial_gaussians,
    log_density_and_score,
    newton_paths,
)
from counterflow.posterior.targets.function import from_torch

QUICK = cf.PosteriorConfig(layers=2, steps=60, samples=64, stages=1, verdict_samples=2_000, starts=4)


def normal(x, mean=0.0, sd=1.0):
    return -0.5 * ((x - mean) / sd) ** 2 - (sd.log() if isinstance(sd, torch.Tensor) else math.log(sd))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(D, scales=None, seed=1):
    """A log density N(mean, L L^T) of D features on the given scales, strongly correlated; and mean and L."""
    g = generator(seed)
    scales = torch.ones(D, dtype=torch.float64) if scales is None else torch.as_tensor(scales, dtype=torch.float64)
    factor = scales[:, None] * (torch.eye(D, dtype=torch.float64) + torch.randn(D, D, generator=g).double().tril(-1))
    mean = 3 * scales * torch.randn(D, generator=g).double()
    inverse = torch.linalg.inv(factor)
    return (lambda theta: -0.5 * ((theta - mean) @ inverse.T).square().sum(-1)), mean, factor


def banana(theta):
    x, y = theta.unbind(-1)
    return normal(x) + normal(y, x.square(), 0.5)


def modes(theta, apart=5.0, share=0.5):
    """Two unit normals at -apart and apart in the first coordinate."""
    left, right = (normal(theta - at * torch.eye(theta.shape[1])[0].double()).sum(-1) for at in (-apart, apart))
    return torch.logaddexp(math.log(share) + left, math.log(1 - share) + right)


def schools(theta):
    """The centered eight schools: the density grows without bound as log tau falls with all effects at mu."""
    y = torch.tensor([28, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
    sd = torch.tensor([15, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
    effects, mu, log_tau = theta[:, :8], theta[:, 8], theta[:, 9]
    tau = log_tau.exp()
    prior = normal(mu, 0.0, 5.0) - torch.log1p((tau / 5).square()) + log_tau
    return prior + normal(effects, mu[:, None], tau[:, None]).sum(-1) + normal(y, effects, sd).sum(-1)


# -- where to start ----------------------------------------------------------------------------------

SCALES = {"alike": None, "from 1e-5 to 1e4": [1e-5, 1e4, 1.0, 1e-2, 300.0]}


@over(SCALES)
def test_climbing_finds_a_gaussian_on_any_scale(name):
    target, mean, factor = gaussian(5, SCALES[name])
    q = newton_paths(target, torch.rand(3, 5, generator=generator()).double(), 40, generator())
    white = torch.linalg.solve_triangular(factor, q.mean.T - mean[:, None], upper=False)
    assert white.abs().max() < 1e-3
    for found in q.factor:
        spread = torch.linalg.solve_triangular(factor, found, upper=False)
        close(spread @ spread.T, torch.eye(5).double(), 1e-3)


def test_the_elbo_of_an_exact_gaussian_is_its_log_normaliser():
    target, mean, factor = gaussian(3)
    q = Gaussians(mean[None], factor[None], torch.zeros(1))
    log_z = factor.diagonal().log().sum() + 1.5 * math.log(2 * math.pi)
    close(batch_and_match(target, q, 0, generator()).elbo, log_z[None])


def test_matching_a_gaussian_is_exact_from_a_wrong_start():
    target, mean, factor = gaussian(4)
    wrong = Gaussians(torch.zeros(1, 4).double(), 0.1 * torch.eye(4).double()[None], torch.zeros(1))
    q = batch_and_match(target, wrong, 30, generator())
    close(q.mean[0], mean, 1e-2)
    close(q.factor[0] @ q.factor[0].T, factor @ factor.T, 1e-2)


def test_draws_and_density_of_gaussians_agree():
    _, mean, factor = gaussian(3)
    q = Gaussians(torch.stack([mean, -mean]), torch.stack([factor, 2 * factor]), torch.zeros(2))
    theta, log_q = q.rsample_and_log_prob(torch.randn(2, 7, 3).double())
    for k in range(2):
        close(q.log_prob(theta[k])[k], log_q[k])
        truth = torch.distributions.MultivariateNormal(q.mean[k], scale_tril=q.factor[k])
        close(truth.log_prob(theta[k]), log_q[k])


def test_a_spike_of_the_density_does_not_catch_the_climb():
    starts = 4 * torch.rand(6, 10, generator=generator()).double() - 2
    q = initial_gaussians(schools, starts, generator())
    assert -2 < q.mean[0, 9] < 3  # log tau
    assert q.elbo[0] > -17  # the log evidence is -13.63


def test_two_modes_are_found_and_copies_are_not():
    q = initial_gaussians(modes, 4 * torch.rand(6, 3, generator=generator()).double() - 2, generator())
    assert sorted(q.mean[:, 0].round().tolist()) == [-5, 5]
    target = gaussian(3)[0]
    assert len(initial_gaussians(target, torch.rand(6, 3, generator=generator()).double(), generator()).mean) == 1


def test_distributions_that_refuse_their_parameters_far_out(monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off for the whole process

    def target(theta):
        scale = (4 * theta[:, 0]).exp()  # 0 or infinite before theta[0] is 200 away
        return Normal(0.0, 3.0).log_prob(theta[:, 0]) + Normal(0.0, scale).log_prob(theta[:, 1])

    far = torch.tensor([[-300.0, 1.0], [300.0, 1.0], [0.5, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        target(far)
    value, score = log_density_and_score(target, far)
    assert value[:2].tolist() == [-math.inf, -math.inf] and value[2].isfinite() and score.isfinite().all()
    assert Distribution._validate_args
    assert initial_gaussians(target, torch.zeros(3, 2).double(), generator()).elbo[0].isfinite()


def test_a_target_that_is_nowhere_finite():
    with pytest.raises(ValueError, match="expected a log density that is finite around one of 3 starting points"):
        initial_gaussians(lambda theta: theta.sum(-1) * math.nan, torch.zeros(3, 2).double(), generator())


# -- the flow and its gradient -----------------------------------------------------------------------


def on_normal(D=5):
    """A flow at q = p."""
    flow = cf.Flow(
        cf.bases.StandardNormal(D), cf.Inverse(cf.transforms.Whiten(torch.ones(D), 2 * torch.eye(D)))
    ).double()
    return TargetModel(flow, lambda theta: normal(theta, 1.0, 2.0).sum(-1) - 0.5 * D * math.log(2 * math.pi))


@over(ESTIMATORS)
def test_every_estimator_knows_the_evidence_where_q_is_exact(name):
    terms = ESTIMATORS[name](on_normal(), None, 20)
    close(terms, torch.zeros_like(terms))


def layered(D=4):
    flow = cf.IAF(D, layers=2, hidden=(16, 16), activation="elu", seed=0)
    return flow.double()


@over(["path", "dreg"])
def test_the_path_gradient_is_exactly_zero_where_q_is_exact(name):
    """The target is the flow's own density: only that its gradient is taken at held weights makes it one."""
    flow, copy = layered(), layered().requires_grad_(False)
    ESTIMATORS[name](TargetModel(flow, copy().log_prob), None, 50).mean().backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) < 1e-12
    flow.zero_grad()
    cf.objectives.elbo(TargetModel(flow, copy().log_prob), None, 50).mean().backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) > 1e-4


def test_the_path_gradient_is_that_of_the_elbo_in_the_mean():
    flow, grads = layered(2), []
    for objective in (cf.objectives.elbo, cf.objectives.path_elbo):
        flow.zero_grad()
        torch.manual_seed(0)
        objective(TargetModel(flow, banana), None, 200_000).mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.03 * grads[0].norm()


@pytest.mark.slow
def test_the_path_gradient_takes_less_than_twice_the_time():
    flow, seconds = cf.IAF(10, layers=4, hidden=(32, 32), activation="elu").double(), {}
    for _ in range(15):
        for objective in (cf.objectives.elbo, cf.objectives.path_elbo):
            begun = time.process_time()
            objective(TargetModel(flow, lambda theta: normal(theta).sum(-1)), None, 256).mean().backward()
            seconds.setdefault(objective, []).append(time.process_time() - begun)
    assert min(seconds[cf.objectives.path_elbo]) < 2 * min(seconds[cf.objectives.elbo])


def test_draws_where_the_target_is_not_finite_leave_finite_gradients():
    flow = layered(1)
    terms = cf.objectives.path_elbo(TargetModel(flow, lambda theta: theta.log().sum(-1)), None, 40)
    terms.mean().backward()
    assert terms.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters())


# In the upper half of the first coordinate, where a normal is centred: what a model may do outside of its support.
REGIONS = {
    "nan": lambda x: math.nan * x,
    "minus infinity": lambda x: -math.inf * x,
    "plus infinity": lambda x: math.inf * x,
    "nan gradient": lambda x: 0 * (0 * x).sqrt(),
    "infinite gradient": lambda x: (x - x.detach()).sqrt(),
    "overflow": lambda x: (1e160 * x).square(),
}


def broken(region):
    """A normal of two features, with a region where it is not finite, or its gradient is not."""

    def target(theta):
        x = theta[:, 0]
        return normal(theta).sum(-1) + torch.where(x > 1.0, REGIONS[region](x.clamp_min(1.0)), 0.0)

    return target


@over(REGIONS)
@over(ESTIMATORS, "estimator")
def test_a_region_without_numbers_reaches_neither_terms_nor_gradients(name, estimator):
    flow = layered(1)
    terms = ESTIMATORS[estimator](TargetModel(flow, broken(name)), None, 64)
    terms.mean().backward()
    assert terms.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters())


@over(REGIONS)
def test_a_region_without_numbers_reaches_no_weight_of_a_fit(name):
    posterior = cf.fit_posterior(broken(name), replace(QUICK, seed=1), dim=2)
    assert all(p.isfinite().all() for p in posterior.flow.parameters()) and posterior.stages[0].skipped == 0
    pool = posterior.pool
    assert pool.theta.isfinite().all() and pool.log_q.isfinite().all() and not pool.log_p.isnan().any()
    counted = "gradient" in name or pool.theta[:, 0] <= 1.0
    assert ((pool.log_p > -math.inf) == counted).all() and pool.log_p.max() < math.inf
    weights = posterior.log_weights.exp()
    assert weights.isfinite().all() and math.isclose(weights.sum(), 1.0, rel_tol=1e-6)
    assert (weights[pool.log_p == -math.inf] == 0).all()
    drawn = posterior.sample(500)["theta"]
    assert drawn.isfinite().all() and ("gradient" in name or not posterior.resampled or (drawn[:, 0] <= 1.0).all())


# -- fits whose answer is known ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def curved():
    return cf.fit_posterior(banana, cf.PosteriorConfig(stages=2), dim=2)


def test_a_banana(curved):
    assert curved.resampled and curved.k_hat < 0.7 and curved.ess > 9_000
    assert curved.elbo == pytest.approx(math.log(2 * math.pi), abs=0.02)
    rows = curved.summary().rows
    assert rows["theta[0]"].mean == pytest.approx(0, abs=0.05) and rows["theta[0]"].sd == pytest.approx(1, abs=0.05)
    assert rows["theta[1]"].mean == pytest.approx(1, abs=0.08)
    assert rows["theta[1]"].sd == pytest.approx(1.5, rel=0.1)
    assert rows["theta[0]"].high == pytest.approx(1.645, abs=0.1)


def test_scales_far_apart():
    scales = SCALES["from 1e-5 to 1e4"]
    target, mean, factor = gaussian(5, scales)
    posterior = cf.fit_posterior(target, replace(QUICK, verdict_samples=5_000), dim=5)
    sd = (factor @ factor.T).diagonal().sqrt()
    assert posterior.resampled and posterior.k_hat < 0.5
    for row, m, s in zip(posterior.summary().rows.values(), mean.tolist(), sd.tolist(), strict=True):
        assert abs(row.mean - m) < 0.1 * s and row.sd == pytest.approx(s, rel=0.1)


def test_one_dimension_that_is_skewed():
    """log of a Gamma(3) variable: mean digamma(3), variance trigamma(3), evidence Gamma(3)."""
    posterior = cf.fit_posterior(lambda theta: (3 * theta - theta.exp()).sum(-1), replace(QUICK, steps=150), dim=1)
    row = posterior.summary().rows["theta[0]"]
    assert posterior.resampled and posterior.verdict.iw_elbo == pytest.approx(math.log(2), abs=0.02)
    assert row.mean == pytest.approx(0.92278, abs=0.06) and row.sd == pytest.approx(0.62842, rel=0.1)


@over([0.5, 0.9], "share")
def test_a_mode_that_is_left_out_is_flagged(share):
    posterior = cf.fit_posterior(lambda theta: modes(theta, 8.0, share), QUICK, dim=2)
    assert posterior.k_hat < 0.7  # which is why k-hat alone is not enough
    assert posterior.missed == pytest.approx(1 - share, abs=0.1)
    assert not posterior.resampled
    assert "The approximation cannot be trusted" in repr(posterior) and "NOT corrected" in repr(posterior)
    assert f"{100 * posterior.missed:.0f} % of the posterior mass" in str(posterior.summary())


@pytest.mark.slow
def test_centered_eight_schools():
    posterior = cf.fit_posterior(schools, dim=10)
    rows = posterior.summary().rows
    assert posterior.resampled and posterior.verdict.iw_elbo == pytest.approx(-13.63, abs=0.05)
    assert rows["theta[8]"].mean == pytest.approx(4.4, abs=0.4)  # mu


def test_a_stage_that_is_not_good_is_followed_by_others_while_there_is_time():
    seen = []
    config = replace(QUICK, steps=5, stages=3)
    posterior = cf.fit_posterior(banana, config, dim=2, on_stage=seen.append)
    assert tuple(seen) == posterior.stages and [stage.steps for stage in seen] == [5, 10, 20]
    assert [stage.layers for stage in seen] == [2, 2, 4]
    hurried = cf.fit_posterior(banana, replace(config, seconds=1e-3), dim=2)
    assert len(hurried.stages) == 1


def test_a_good_stage_is_the_last():
    posterior = cf.fit_posterior(gaussian(2)[0], replace(QUICK, stages=4), dim=2)
    assert len(posterior.stages) == 1 and posterior.stages[0].good and posterior.seconds > posterior.stages[0].seconds


def test_plans_grow():
    assert plans(cf.PosteriorConfig(stages=2)) == (Plan("path", 256, 250, enough=0.5), Plan("path", 256, 500))
    assert plans(cf.PosteriorConfig(estimator="dreg"))[0].estimator == "dreg"


@over(ESTIMATORS)
def test_every_estimator_fits(name):
    posterior = cf.fit_posterior(gaussian(2)[0], replace(QUICK, estimator=name), dim=2)
    assert posterior.stages[0].estimator == name and posterior.ess > 1_000 and posterior.k_hat < 0.7


def test_the_seed_is_all_that_decides():
    def fitted(seed):
        torch.rand(1)  # the global generator is left alone
        posterior = cf.fit_posterior(banana, replace(QUICK, seed=seed), dim=2)
        return posterior.pool.theta

    state = torch.random.get_rng_state()
    first = fitted(3)
    torch.random.set_rng_state(state)
    assert torch.equal(fitted(3), first) and not torch.equal(fitted(4), first)


# -- what a posterior offers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def named():
    y = torch.tensor([0.3, 2.0, 1.1], dtype=torch.float64)

    def model(mu, tau, effects):
        return normal(mu) - tau.square() + normal(effects, mu[:, None], 1.0).sum(-1) + normal(y, effects, 1.0).sum(-1)

    shapes = {"mu": (), "tau": (), "effects": (3,)}
    target = from_torch(model, shapes=shapes, constraints={"tau": constraints.positive}, observed={"y": y.numpy()})
    return cf.fit_posterior(target, replace(QUICK, layers=4, steps=150, samples=256))


def test_samples_are_named_shaped_and_constrained(named):
    draws = named.sample(500)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {
        "mu": (500,),
        "tau": (500,),
        "effects": (500, 3),
    }
    assert (draws["tau"] > 0).all() and draws["mu"].dtype == torch.float64
    assert named.sample(3_000)["mu"].shape == (3_000,)  # more than there are: new ones
    with pytest.raises(ValueError, match="expected n of at least 1, got 0"):
        named.sample(0)


def test_resampling_moves_the_draws_towards_the_posterior(named):
    few = named.sample(len(named.log_weights))["mu"]
    assert few.mean() == pytest.approx(named.summary().rows["mu"].mean, abs=0.05)


def test_the_summary_has_a_row_for_each_number(named):
    summary = named.summary()
    assert list(summary.rows) == ["mu", "tau", "effects[0]", "effects[1]", "effects[2]"]
    assert all(row.low < row.mean < row.high and row.sd > 0 and row.ess > 100 for row in summary.rows.values())
    assert str(summary) == str(named.summary()) and summary.verdict == named.sentence
    assert [line.split()[0] for line in str(summary).splitlines()[1:6]] == list(summary.rows)


def test_repr_says_what_the_draws_are_worth(named):
    assert "5 dimensions: mu, tau, effects; 1 stage" in repr(named)
    assert named.sentence in repr(named) and "resampled by importance weights" in repr(named)


def test_log_prob_is_the_flows(named):
    close(named.log_prob(named.pool.theta[:9]), named.pool.log_q[:9], 1e-8)


def test_arviz(named):
    data = named.to_arviz(draws=200)
    assert data["posterior"]["effects"].shape == (1, 200, 3) and data["posterior"]["tau"].shape == (1, 200)
    assert data["observed_data"]["y"].shape == (3,)
    weight, lp, log_q = (data["sample_stats"][name].values for name in ("log_weight", "lp", "log_q"))
    assert weight == pytest.approx(lp - log_q)
    assert data["posterior"].attrs["resampled"] == 1 and data["posterior"].attrs["verdict"] == named.sentence


def test_refined_by_metropolis(named):
    refined = named.refine("metropolis", chains=8, draws=300)
    assert refined.values["effects"].shape == (8, 300, 3) and (refined.values["tau"] > 0).all()
    assert refined.values["mu"].mean() == pytest.approx(named.summary().rows["mu"].mean, abs=0.1)
    assert refined.chains.sentence in repr(refined)
    assert refined.to_arviz()["posterior"]["effects"].shape == (8, 300, 3)
    with pytest.raises(ValueError, match="expected method as one of metropolis, neutra, got 'gibbs'"):
        named.refine("gibbs")


def test_saved_and_loaded(named, tmp_path):
    named.save(tmp_path / "fit")
    files = sorted(path.name for path in (tmp_path / "fit").iterdir())
    assert files == ["draws.safetensors", "model.safetensors", "posterior.json"]
    alone = cf.Posterior.load(tmp_path / "fit")
    assert repr(alone) == repr(named) and str(alone.summary()) == str(named.summary())
    assert alone.stages == named.stages and alone.config == named.config and alone.verdict == named.verdict
    close(alone.log_prob(named.pool.theta[:5]), named.log_prob(named.pool.theta[:5]), 1e-12)
    torch.manual_seed(0)
    expected = named.sample(50)["effects"]
    torch.manual_seed(0)
    assert torch.equal(alone.sample(50)["effects"], expected)
    with pytest.raises(ValueError, match="loaded without it, with 2000 draws; sample no more than those"):
        alone.sample(2_001)
    again = cf.Posterior.load(tmp_path / "fit", named.target)
    assert again.sample(2_001)["effects"].shape == (2_001, 3)


def test_a_folder_that_is_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"written by Posterior.save, got .* without model.safetensors"):
        cf.Posterior.load(tmp_path)


def test_the_file_holds_plain_numbers(named, tmp_path):
    named.save(tmp_path)
    facts = json.loads((tmp_path / "posterior.json").read_text("utf-8"))
    assert facts["verdict"]["k_hat"] == named.k_hat and facts["variables"] == ["mu", "tau", "effects"]


# -- errors ------------------------------------------------------------------------------------------


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
def test_configurations_that_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        cf.PosteriorConfig(**{name: value})
