"""Training stages: the gradient estimators, targets that are not finite everywhere, and the plan of the stages."""

import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from log_densities import QUICK, banana, gaussian, normal
from registry import close, over

import counterflow as cf
from counterflow.posterior.gaussians import Gaussians
from counterflow.posterior.plans import ESTIMATORS, StagePlan, stage_plans
from counterflow.posterior.stages import TargetModel, _seconds_per_draw


def on_normal(D=5):
    """Return a model with q = p."""
    flow = cf.Flow(
        cf.bases.StandardNormal(D), cf.Inverse(cf.transforms.Whiten(torch.ones(D), 2 * torch.eye(D)))
    ).double()
    return TargetModel(flow, lambda theta: normal(theta, 1.0, 2.0).sum(-1) - 0.5 * D * math.log(2 * math.pi))


@over(ESTIMATORS)
def test_every_estimator_returns_the_evidence_if_q_is_exact(name):
    terms = ESTIMATORS[name](on_normal(), None, 20)
    close(terms, torch.zeros_like(terms))


def layered(D=4):
    flow = cf.IAF(D, layers=2, hidden=(16, 16), activation="elu", seed=0)
    return flow.double()


@over(["path", "dreg"])
def test_the_path_gradient_is_zero_if_q_is_exact(name):
    """The target is the density of a frozen copy of the flow."""
    flow, copy = layered(), layered().requires_grad_(False)
    ESTIMATORS[name](TargetModel(flow, copy().log_prob), None, 50).mean().backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) < 1e-12
    flow.zero_grad()
    cf.objectives.elbo(TargetModel(flow, copy().log_prob), None, 50).mean().backward()
    assert max(p.grad.abs().max() for p in flow.parameters()) > 1e-4


def test_the_path_gradient_has_the_mean_of_the_elbo_gradient():
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


def test_gradients_are_finite_although_the_target_is_not():
    flow = layered(1)
    terms = cf.objectives.path_elbo(TargetModel(flow, lambda theta: theta.log().sum(-1)), None, 40)
    terms.mean().backward()
    assert terms.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters())


# Values that a model may return outside of its support: here where the first coordinate exceeds 1.
REGIONS = {
    "nan": lambda x: math.nan * x,
    "minus infinity": lambda x: -math.inf * x,
    "plus infinity": lambda x: math.inf * x,
    "nan gradient": lambda x: 0 * (0 * x).sqrt(),
    "infinite gradient": lambda x: (x - x.detach()).sqrt(),
    "overflow": lambda x: (1e160 * x).square(),
}


def broken(region):
    """Return a normal of two features with a region where it, or its gradient, is not finite."""

    def target(theta):
        x = theta[:, 0]
        return normal(theta).sum(-1) + torch.where(x > 1.0, REGIONS[region](x.clamp_min(1.0)), 0.0)

    return target


@over(REGIONS)
@over(ESTIMATORS, "estimator")
def test_a_region_that_is_not_finite_affects_neither_terms_nor_gradients(name, estimator):
    flow = layered(1)
    terms = ESTIMATORS[estimator](TargetModel(flow, broken(name)), None, 64)
    terms.mean().backward()
    assert terms.isfinite().all() and all(p.grad.isfinite().all() for p in flow.parameters())


@over(REGIONS, quick=["nan", "nan gradient"])
def test_a_region_that_is_not_finite_affects_no_weight_of_a_fit(name):
    posterior = cf.fit_posterior(broken(name), replace(QUICK, seed=1), dim=2)
    assert all(p.isfinite().all() for p in posterior.flow.parameters()) and posterior.stages[0].skipped == 0
    draws = posterior.draws
    assert draws.theta.isfinite().all() and draws.log_q.isfinite().all() and not draws.log_p.isnan().any()
    counted = "gradient" in name or draws.theta[:, 0] <= 1.0
    assert ((draws.log_p > -math.inf) == counted).all() and draws.log_p.max() < math.inf
    weights = posterior.log_weights.exp()
    assert weights.isfinite().all() and math.isclose(weights.sum(), 1.0, rel_tol=1e-6)
    assert (weights[draws.log_p == -math.inf] == 0).all()
    samples = posterior.sample(500)["theta"]
    assert samples.isfinite().all() and ("gradient" in name or not posterior.trusted or (samples[:, 0] <= 1.0).all())


def test_further_stages_follow_a_bad_one_within_the_time_limit():
    seen = []
    config = replace(QUICK, steps=5, stages=3)
    posterior = cf.fit_posterior(banana, config, dim=2, on_stage=seen.append)
    assert tuple(seen) == posterior.stages and [stage.steps for stage in seen] == [5, 25, 50]
    assert [stage.layers for stage in seen] == [2, 2, 2]
    hurried = cf.fit_posterior(banana, replace(config, seconds=1e-3), dim=2)
    assert len(hurried.stages) == 1


def test_the_pace_of_a_stage_is_that_of_its_last_epoch():
    history = SimpleNamespace(epochs=[SimpleNamespace(seconds=50.0), SimpleNamespace(seconds=0.5)])
    close(torch.tensor(_seconds_per_draw(history, StagePlan("path", 100, 50, rate=1.0))), torch.tensor(0.5 / 25 / 100))


def test_no_stage_follows_a_good_one():
    posterior = cf.fit_posterior(gaussian(2)[0], replace(QUICK, stages=4), dim=2)
    assert len(posterior.stages) == 1 and posterior.stages[0].good and posterior.seconds > posterior.stages[0].seconds


def test_planned_stages():
    assert stage_plans(cf.PosteriorConfig(stages=3)) == (
        StagePlan("path", 128, 50, rate=1.0, max_k_hat=0.5),
        StagePlan("path", 256, 250, rate=1.0, max_k_hat=0.5),
        StagePlan("path", 256, 500, rate=0.5),
    )
    assert stage_plans(cf.PosteriorConfig(estimator="dreg"))[0].estimator == "dreg"


def test_draws_outside_of_the_support_are_led_back_into_it():
    start = Gaussians(torch.full((1, 2), 3.0).double(), 0.5 * torch.eye(2)[None].double(), torch.zeros(1))
    flow = cf.Flow(cf.bases.StandardNormal(2), cf.IAF(2, layers=1, hidden=(4,)).transform).double()
    model = TargetModel(flow, lambda theta: torch.where(theta[:, 0] > 1e3, 0 * theta[:, 0], -math.inf), start)
    drawn = model.draw(samples=5)
    (gradient,) = torch.autograd.grad(drawn.log_likelihood.sum(), drawn.z)
    close(gradient, -(drawn.z.detach() - 3.0) / 0.25)
