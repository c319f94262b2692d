"""Starting points of models of each tool, where uniform points have no density, and the improper posteriors."""

import math

import numpy as np
import pytest
import torch
from log_densities import QUICK

import counterflow as cf
from counterflow.posterior.propriety import check_proper
from counterflow.posterior.starts import starting_points
from counterflow.posterior.targets.numpyro import from_numpyro
from counterflow.posterior.targets.pymc import from_pymc
from counterflow.posterior.targets.pyro import from_pyro
from counterflow.posterior.targets.stan import from_stan

pytestmark = pytest.mark.filterwarnings("ignore:.*is faster on contiguous arrays")

FAR = np.array([49.5, 50.5])  # y ~ Uniform(mu - 1, mu + 1) limits mu to (49.5, 50.5)


def pymc_far():
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 50, 5)
        pm.Uniform("y", mu - 1, mu + 1, observed=FAR)
    return from_pymc(model)


def pyro_far():
    import pyro
    from pyro.distributions import Normal, Uniform

    def model():
        mu = pyro.sample("mu", Normal(50.0, 5.0))
        pyro.sample("y", Uniform(mu - 1, mu + 1), obs=torch.tensor(49.5))
        pyro.sample("x", Uniform(mu - 1, mu + 1), obs=torch.tensor(50.5))

    return from_pyro(model)


def numpyro_far():
    import numpyro
    from numpyro.distributions import Normal, Uniform

    def model():
        mu = numpyro.sample("mu", Normal(50, 5))
        numpyro.sample("y", Uniform(mu - 1, mu + 1).expand([2]).to_event(1), obs=FAR)

    return from_numpyro(model)


@pytest.mark.parametrize("make", [pymc_far, pyro_far, numpyro_far])
def test_data_that_bound_a_variable_far_from_the_origin(make):
    posterior = cf.fit_posterior(make(), QUICK)
    row = posterior.summary().rows["mu"]
    assert posterior.trusted
    assert row.mean == pytest.approx(50.0, abs=0.05) and row.sd == pytest.approx(1 / math.sqrt(12), rel=0.1)


def test_the_initvals_of_pymc_are_a_start():
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 1000, initval=70.0)
        pm.Uniform("y", mu - 1, mu + 1, observed=[69.5])
    points = starting_points(from_pymc(model), 4, 0)
    assert len(points) == 5 and ((points - 69.5).abs() < 1).all()


@pytest.mark.slow
def test_stan_starts_from_inits():
    program = """
    data { vector[2] y; }
    parameters { real mu; real<lower=0> tau; }
    model { mu ~ normal(500, 1000); tau ~ normal(0, 1); y ~ uniform(mu - 1, mu + 1); }
    """
    target = from_stan(program, {"y": FAR})
    with pytest.raises(ValueError, match="or pass starts=, values of variables"):
        starting_points(target, 4, 0)
    points = starting_points(target, 4, 0, {"mu": 50.1, "tau": [0.5, 0.6]})
    assert len(points) == 6 and torch.equal(points[:2, 0], torch.full((2,), 50.1, dtype=torch.float64))


@pytest.mark.slow
def test_a_large_correlation_matrix_of_stan_has_starting_points():
    program = "parameters { cholesky_factor_corr[40] L; } model { L ~ lkj_corr_cholesky(2); }"
    target = from_stan(program)
    points = starting_points(target, 4, 0)
    assert points.shape == (4, 780) and target(points).isfinite().all()


def test_an_improper_numpyro_model_names_its_directions():
    import numpyro
    from numpyro.distributions import ImproperUniform, Normal, constraints

    def model(y, observed):
        mu = numpyro.sample("mu", ImproperUniform(constraints.real, (), ()))
        tau = numpyro.sample("tau", ImproperUniform(constraints.positive, (), ()))
        numpyro.sample("y", Normal(mu, 1), obs=y, obs_mask=observed)
        numpyro.sample("z", Normal(0, tau), obs=y[0])

    directions = r"log\(tau\), mu \+ y_unobserved\[0\] \+ y_unobserved\[1\]"
    with pytest.raises(ValueError, match=f"got one that does not fall along {directions}; give these parameters"):
        cf.fit_posterior(from_numpyro(model, np.array([1.0, 2.0]), np.array([False, False])), QUICK)


def test_flat_variables_of_pymc_are_named():
    import pymc as pm

    with pm.Model() as model:
        pm.Flat("a")
        pm.Normal("b")
        pm.HalfFlat("c")
    with pytest.raises(ValueError, match=r"got one that does not fall along a, log\(c\); give these parameters"):
        cf.fit_posterior(from_pymc(model), QUICK)
    with pm.Model() as model:
        mu = pm.Flat("mu")
        pm.Normal("y", mu, observed=[1.0, 2.0])
    target = from_pymc(model)
    check_proper(target, starting_points(target, 4, 0), target.coordinates, 0)
