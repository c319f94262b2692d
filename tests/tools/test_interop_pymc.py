"""Fits in a PyMC workflow: ArviZ's data with the groups that its users expect."""

import warnings

import numpy as np
import pytest
from log_densities import QUICK

from counterflow.interop.pymc import fit

pytestmark = pytest.mark.filterwarnings("ignore:.*is faster on contiguous arrays")


@pytest.mark.slow
def test_the_groups_are_those_of_pymc():
    import pymc as pm

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version on import
        import arviz as az
    y = np.random.default_rng(0).normal(1.0, 2.0, 40)
    with pm.Model(coords={"row": range(40)}) as model:
        mu = pm.Normal("mu", 0, 5)
        sd = pm.Deterministic("sd", pm.HalfNormal("tau", 3))
        pm.Normal("y", mu, sd, observed=y, dims="row")
        data = fit(config=QUICK, samples=500)
    assert set(data.groups()) == {
        "posterior",
        "sample_stats",
        "posterior_predictive",
        "observed_data",
        "log_likelihood",
    }
    assert set(data.posterior) == {"mu", "tau", "sd"} and data.log_likelihood["y"].dims == ("chain", "draw", "row")
    assert data.posterior["mu"].mean().item() == pytest.approx(y.mean(), abs=0.15) and "k-hat" in data.posterior.verdict
    loo = az.loo(data)
    exact = -0.5 * ((y - y.mean()) / y.std()) ** 2 - np.log(y.std() * np.sqrt(2 * np.pi))
    assert loo.elpd_loo == pytest.approx(exact.sum() - 2, abs=1.0) and loo.p_loo < 3
    with model:
        predictive = pm.sample_posterior_predictive(data, progressbar=False)
    assert predictive.posterior_predictive["y"].shape == (1, 500, 40)
