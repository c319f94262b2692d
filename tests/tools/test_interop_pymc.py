"""Fits in a PyMC workflow: ArviZ's data with the groups that its users expect."""

import warnings

import numpy as np
import pytest
from log_densities import QUICK

import counterflow as cf
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
        x = pm.Data("x", np.zeros(40), dims="row")
        mu = pm.Normal("mu", 0, 5)
        sd = pm.Deterministic("sd", pm.HalfNormal("tau", 3))
        pm.Normal("y", mu + x, sd, observed=y, dims="row")
        data = fit(config=QUICK, samples=500)
    groups = {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "log_likelihood",
        "observed_data",
        "constant_data",
    }
    assert set(data.groups()) == groups
    assert set(data.posterior) == {"mu", "tau", "sd"} and data.log_likelihood["y"].dims == ("chain", "draw", "row")
    assert data.posterior["mu"].mean().item() == pytest.approx(y.mean(), abs=0.15) and "k-hat" in data.posterior.verdict
    assert data.constant_data["x"].shape == (40,) and set(data.unconstrained_posterior) == {"mu", "log(tau)"}
    loo = az.loo(data, pointwise=True)
    exact = -0.5 * ((y - y.mean()) / y.std()) ** 2 - np.log(y.std() * np.sqrt(2 * np.pi))
    assert loo.elpd_loo == pytest.approx(exact.sum() - 2, abs=1.0) and loo.p_loo < 3
    approximate = cf.fit_posterior(cf.targets.from_pymc(model), QUICK).loo()
    assert approximate.elpd_loo == pytest.approx(loo.elpd_loo, abs=0.2)
    assert set(az.compare({"resampled": loo, "weighted": approximate}).index) == {"resampled", "weighted"}
    ours = data.log_likelihood["y"].values
    del data.log_likelihood
    with model:
        pm.compute_log_likelihood(data, progressbar=False)
        pm.sample_posterior_predictive(data, extend_inferencedata=True, progressbar=False)
    assert data.log_likelihood["y"].values == pytest.approx(ours, abs=1e-9)
    assert data.posterior_predictive["y"].shape == (1, 500, 40)
