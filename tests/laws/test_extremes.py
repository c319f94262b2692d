"""Numbers at the edges of the floats, and faults, in what people call: tables, VAEs, posteriors, fits."""

import copy
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from registry import SPLINE, over
from test_properties import DTYPES, LARGE, LARGEST, MODERATE, dtypes, laws, normal, rows

import counterflow as cf
from counterflow.posterior.plans import ESTIMATORS

SMALLEST = {torch.float32: [1e-45, -1e-45, 1e-39, 1.2e-38], torch.float64: [5e-324, -5e-324, 1e-310, 2.3e-308]}
REPEATED = [0.0, 1.0, 1.0, 1.0, -1.0, -1.0]

# -- flows -------------------------------------------------------------------------------------------

RECIPES = {
    "IAF": lambda: cf.IAF(3, layers=2, hidden=(8,), seed=0),
    "gated IAF": lambda: cf.IAF(3, layers=2, hidden=(8,), univariate=cf.Gated(), seed=0),
    "MAF": lambda: cf.MAF(3, layers=2, hidden=(8,), seed=0),
    "NSF": lambda: cf.NSF(3, layers=2, hidden=(8,), bins=4, seed=0),
    "Coupling": lambda: cf.Coupling(3, layers=2, hidden=(8,), seed=0),
    "IAF of splines": lambda: cf.IAF(3, layers=1, hidden=(8,), univariate=SPLINE, seed=0),
}


@over(RECIPES)
@laws(10)
@given(st.data(), dtypes)
def test_gradients_of_small_and_repeated_numbers_are_finite(name, data, dtype):
    """Gradients of log q for x and all weights: denormal numbers and repeated numbers are no problem."""
    flow = RECIPES[name]().to(dtype)
    x = data.draw(rows((6, 3), dtype, MODERATE[:10] + SMALLEST[dtype] + REPEATED)).requires_grad_()
    log_q = flow().log_prob(x)
    log_q.sum().backward()
    assert log_q.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in flow.parameters())


@over(RECIPES)
@over(DTYPES, "dtype")
def test_denormals_are_next_to_zero(name, dtype):
    """Denormal numbers behave like zero, within rounding."""
    flow = RECIPES[name]().to(dtype)
    x = torch.tensor(SMALLEST[dtype], dtype=dtype)[:, None].expand(-1, 3)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        back = flow.transform.inverse(flow.transform(x)[0])[0]
        assert ((back - x).abs() < 100 * eps).all()
        assert ((flow().log_prob(x) - flow().log_prob(torch.zeros_like(x))).abs() < 100 * eps).all()


CONSTANT = {
    "standardize": lambda size: cf.Standardize([0.5 * size, -size], [size, 2 * size]),
    "inverse of triangular": lambda size: cf.transforms.Whiten(
        [0.5 * size, -size], [[size, 0.0], [2 * size, 3 * size]]
    ),
    "columns": lambda size: cf.transforms.TableTransform(
        [cf.transforms.LinearColumn("a", scale=size), cf.transforms.AsinhColumn("b", size, unit=size, scale=2.0)]
    ),
}


@over(CONSTANT)
@laws(10)
@given(seed=st.integers(0, 2**20), power=st.integers(-30, 30))
def test_constant_maps_of_any_size(name, seed, power):
    t, x = CONSTANT[name](10.0**power).double(), normal(seed, 20, 2)
    y, log_det = t(x * 10.0**power)
    back, log_det_back = t.inverse(y)
    assert ((back / 10.0**power - x).abs() <= 1e-12 * (1 + x.abs())).all()
    assert ((log_det + log_det_back).abs() <= 1e-12 * (1 + log_det.abs())).all()


# -- tables ------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(200, 2)) @ np.array([[1.0, 1.0], [0.0, 1.0]])
TINY = {"layers": 1, "hidden": (8,), "epochs": 2, "members": 1, "random_state": 0}


def first(values):
    """The table with another first column."""
    return np.stack([values, BASE[:, 1]], 1)


TABLES = {
    "1e-30": 1e-30 * BASE,
    "1e30": 1e30 * BASE,
    "1e-30 beside 1e30": np.array([1e-30, 1e30]) * BASE,
    "denormals of float32": 1e-42 * BASE,
    "far tails": RNG.standard_cauchy((200, 2)) ** 3,
    "log-normal": 1e-30 * np.exp(3 * BASE),
    "one of 1e30": first(np.where(np.arange(200) == 7, 1e30, BASE[:, 0])),
    "a spike at 1e30": first(np.where(RNG.random(200) < 0.3, 1e30, BASE[:, 0])),
    "a spike at a denormal": first(np.where(RNG.random(200) < 0.3, 5e-324, BASE[:, 0])),
    "nearly always 0": first(np.where(np.arange(200) < 3, BASE[:, 0], 0.0)),
    "two tiny values": first(np.where(RNG.random(200) < 0.5, 1e-30, 2e-30)),
    "whole numbers of 1e18": first(1e18 * RNG.integers(0, 1000, 200)),
    "ten copies of each row": np.repeat(BASE[:20], 10, 0),
}


@over(TABLES)
def test_tables_of_extreme_numbers(name):
    """Scores and samples are numbers, every step counts, and what lies anywhere has a log density below infinity."""
    x = TABLES[name]
    density = cf.FlowDensity(**TINY).fit(x)
    assert np.isfinite(density.score_samples(x)).all() and np.isfinite(density.sample(50, random_state=0)).all()
    assert all(epoch.skipped == 0 for history in density.histories_ for epoch in history.epochs)
    far = np.array([*MODERATE, *LARGEST, 1e150, -1e300, 1.7e308])
    scores = density.score_samples(np.stack(np.meshgrid(far, far), -1).reshape(-1, 2))
    assert not np.isnan(scores).any() and (scores < math.inf).all()


@over([1e-130, 1e-30, 1e30, 1e130], "unit")
def test_a_table_in_any_unit(unit):
    """The log density moves by the log of the units, and nothing else."""
    scores = [cf.FlowDensity(**TINY).fit(u * BASE).score_samples(u * BASE) for u in (1.0, unit)]
    np.testing.assert_allclose(scores[0] - scores[1], 2 * math.log(unit), atol=1e-3)


@over([1e-300, 1e-320, 1e300], "unit")
def test_units_that_float64_cannot_square(unit):
    with pytest.raises(
        ValueError, match=r"between 1e-140 and 1e\+140 in size, got 'x0' up to .*; give them in another"
    ):
        cf.FlowDensity(**TINY).fit(first(unit * BASE[:, 0]))


# -- faults in trainings -----------------------------------------------------------------------------

ROWS = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
CONFIG = cf.FitConfig(epochs=4, batch_size=10, warm_up_steps=0)


def vae():
    return cf.VAE((3,), 2, "iaf", "gaussian", hidden=(8,), context=4, posterior_layers=1, posterior_hidden=(8,))


MODELS = {
    "IAF": (RECIPES["IAF"], cf.log_likelihood),
    "NSF": (RECIPES["NSF"], cf.log_likelihood),
    "VAE": (vae, cf.objectives.elbo),
    "VAE, path": (vae, cf.objectives.path_elbo),
}


class Overflow(torch.autograd.Function):
    """The same terms; their gradient is beyond all floats."""

    @staticmethod
    def forward(ctx, terms):
        return terms.clone()

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 1e30 * 1e30


FAULTS = {
    "a batch of infinities": lambda objective, model, x: (
        objective(model, x).detach() * 0 + infinite(objective, model, x)
    ),
    "terms that are NaN": lambda objective, model, x: objective(model, x) * math.nan,
    "gradients that overflow": lambda objective, model, x: Overflow.apply(objective(model, x)),
    "numbers that overflow": lambda objective, model, x: objective(model, x * 1e38),
}


def infinite(objective, model, x):
    """The terms of a batch that an objective has made of infinities itself: torch's distributions refuse only NaN."""
    return objective(model, torch.full_like(x, math.inf))


@over(MODELS)
@over(FAULTS, "fault")
@over(["float32", "bf16"], "precision", quick=["float32"])
def test_a_nan_in_every_third_step_reaches_no_weight(name, fault, precision):
    build, objective = MODELS[name]
    model, step = build(), 0
    before, seen = copy.deepcopy(model.state_dict()), []

    def faulty(model, x):
        nonlocal step
        step += model.training
        if model.training and step % 3 == 0:
            return FAULTS[fault](objective, model, x)
        return objective(model, x)

    def on_step(task, done, total):
        seen.append(all(p.isfinite().all() for p in model.parameters()))

    record = cf.fit(model, faulty, ROWS, ROWS[:20], replace(CONFIG, precision=precision), on_step=on_step)
    assert [epoch.skipped for epoch in record.epochs] == [2, 2, 2, 2] and all(seen) and record.stopped == "finished"
    assert all(math.isfinite(epoch.train) and math.isfinite(epoch.validation) for epoch in record.epochs)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@over(["gaussian", "bernoulli", "discretized_logistic"], "likelihood")
@laws(15)
@given(seed=st.integers(0, 2**20), special=st.sampled_from([MODERATE[:7], MODERATE, LARGE[:3]]))
def test_elbo_terms_of_a_vae_are_finite(likelihood, seed, special):
    """Gaussian: numbers of any size that it has been shown. The others: values at the ends of their range."""
    torch.manual_seed(seed)
    model = cf.VAE((3,), 2, "iaf", likelihood, hidden=(8,), context=4, posterior_layers=1, posterior_hidden=(8,))
    x = torch.tensor(special)[torch.randint(len(special), (20, 3))] + torch.randn(20, 3)
    if likelihood == "gaussian":
        model.likelihood.adapt(x)
    else:
        x = (x > 0).float() * (255.0 if likelihood == "discretized_logistic" else 1.0)
    terms = cf.objectives.elbo(model, x)
    terms.mean().backward()
    assert terms.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


# -- posteriors --------------------------------------------------------------------------------------


@over([1.0, 3.0], "edge", quick=[1.0])
@over(ESTIMATORS, "estimator", quick=["path"])
@pytest.mark.filterwarnings("ignore:training ended:RuntimeWarning")
def test_a_target_that_is_nan_in_a_region(estimator, edge):
    """No NaN reaches the flow, and draws that the verdict trusts keep out of the region."""

    def target(theta):
        return torch.where(theta[..., 0] > edge, math.nan, -theta.square().sum(-1) / 2)

    config = cf.PosteriorConfig(layers=1, steps=100, stages=2, verdict_samples=1000, estimator=estimator)
    posterior = cf.fit_posterior(target, config, dim=2)
    assert all(p.isfinite().all() for p in posterior.flow.parameters())
    assert posterior.trusted or edge == 1.0  # where an ELBO, which is -inf, does not tell the way
    assert not posterior.trusted or posterior.sample(500)["theta"][:, 0].max() <= edge
