"""The benchmark's models are the posteriors that they say they are: each is compared with its formula in numpy.

Neither the data nor the reference draws belong to this project: COUNTERFLOW_POSTERIORDB names the folder that holds
them, and without it these tests are skipped.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import log

from counterflow.posterior import targets

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from posteriordb import errors, importance_resampled
from posteriordb_models import NAMES, load_data, load_draws, stack_draws
from shapes import SHAPES

STAN = Path(__file__).parents[2] / "benchmarks" / "posteriordb_models" / "stan"
DATA = Path(os.environ.get("COUNTERFLOW_POSTERIORDB", "posteriordb"))
Values = dict[str, Any]

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="COUNTERFLOW_POSTERIORDB does not name the posteriors' folder"
)


# The log densities in the natural parameters, up to a constant: v holds the parameters, d the data.


def normal(x, mean, sd):
    return np.sum(-0.5 * ((x - mean) / sd) ** 2 - log(sd) + 0 * x)


def cauchy(x, scale):
    return -np.sum(np.log1p((x / scale) ** 2))


def student(x, nu, mean, scale):
    return -(nu + 1) / 2 * np.log1p(((x - mean) / scale) ** 2 / nu)


def columns(*predictors):
    return np.column_stack([np.ones(len(predictors[0])), *predictors])


def arK(v, d):
    y, K = d["y"], d["K"]
    mean = [v["alpha"] + sum(v["beta"][k - 1] * y[t - k] for k in range(1, K + 1)) for t in range(K, d["T"])]
    prior = normal(v["alpha"], 0, 10) + normal(v["beta"], 0, 10) + cauchy(v["sigma"], 2.5)
    return prior + normal(y[K:], np.array(mean), v["sigma"])


def eight_schools_centered(v, d):
    prior = normal(v["mu"], 0, 5) + cauchy(v["tau"], 5) + normal(v["theta"], v["mu"], v["tau"])
    return prior + normal(d["y"], v["theta"], d["sigma"])


def eight_schools_noncentered(v, d):
    prior = normal(v["mu"], 0, 5) + cauchy(v["tau"], 5) + normal(v["e"], 0, 1)
    return prior + normal(d["y"], v["mu"] + v["tau"] * v["e"], d["sigma"])


def kidscore_interaction(v, d):
    X = columns(d["mom_hs"], d["mom_iq"], d["mom_hs"] * d["mom_iq"])
    return cauchy(v["sigma"], 2.5) + normal(d["kid_score"], X @ v["beta"], v["sigma"])


def kidscore_momhs(v, d):
    return cauchy(v["sigma"], 2.5) + normal(d["kid_score"], columns(d["mom_hs"]) @ v["beta"], v["sigma"])


def kidscore_momiq(v, d):
    return cauchy(v["sigma"], 2.5) + normal(d["kid_score"], columns(d["mom_iq"]) @ v["beta"], v["sigma"])


def earn_height(v, d):
    return normal(d["earn"], columns(d["height"]) @ v["beta"], v["sigma"])


def logearn_interaction_z(v, d):
    z = (d["height"] - np.mean(d["height"])) / np.std(d["height"], ddof=1)
    return normal(log(d["earn"]), columns(z, d["male"], z * d["male"]) @ v["beta"], v["sigma"])


def garch11(v, d):
    variance = [d["sigma1"] ** 2]
    for y in d["y"][:-1]:
        variance.append(v["alpha0"] + v["alpha1"] * (y - v["mu"]) ** 2 + v["beta1"] * variance[-1])
    return normal(d["y"], v["mu"], np.sqrt(variance))


def gp_regr(v, d):
    x, y = d["x"], d["y"]
    C = v["alpha"] ** 2 * np.exp(-(np.subtract.outer(x, x) ** 2) / (2 * v["rho"] ** 2)) + v["sigma"] * np.eye(d["N"])
    prior = 24 * log(v["rho"]) - 4 * v["rho"] + normal(v["alpha"], 0, 2) + normal(v["sigma"], 0, 1)
    return prior - 0.5 * (np.linalg.slogdet(C)[1] + y @ np.linalg.solve(C, y))


def low_dim_gauss_mix(v, d):
    mu, sigma, theta, y = v["mu"], v["sigma"], v["theta"], d["y"][:, None]
    prior = normal(mu, 0, 2) + normal(sigma, 0, 2) + 4 * log(theta) + 4 * log(1 - theta)
    parts = np.array([theta, 1 - theta]) * np.exp(-0.5 * ((y - mu) / sigma) ** 2) / sigma
    return prior + log(parts.sum(1)).sum()


def logmesquite(v, d):
    shrub = [log(d[k]) for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return normal(log(d["weight"]), columns(*shrub, d["group"]) @ v["beta"], v["sigma"])


def mesquite(v, d):
    shrub = [d[k] for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return normal(d["weight"], columns(*shrub, d["group"]) @ v["beta"], v["sigma"])


def nes(v, d):
    ages = [d["age_discrete"] == k for k in (2, 3, 4)]
    X = columns(d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"])
    return normal(d["partyid7"], X @ v["beta"], v["sigma"])


def blr(v, d):
    return normal(v["beta"], 0, 10) + normal(v["sigma"], 0, 10) + normal(d["y"], d["X"] @ v["beta"], v["sigma"])


def kilpisjarvi(v, d):
    prior = normal(v["alpha"], d["pmualpha"], d["psalpha"]) + normal(v["beta"], d["pmubeta"], d["psbeta"])
    return prior + normal(d["y"], v["alpha"] + v["beta"] * d["x"], v["sigma"])


def hmm_example(v, d):
    P, mu = np.array([v["theta1"], v["theta2"]]), v["mu"]
    g, log_p = np.ones(2), 0.0
    for t, y in enumerate(d["y"]):
        g = (g if t == 0 else g @ P) * np.exp(-0.5 * (y - mu) ** 2)
        log_p, g = log_p + log(g.sum()), g / g.sum()
    return log_p + normal(mu, np.array([3, 10]), 1)


def diamonds(v, d):
    X = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    prior = normal(v["b"], 0, 1) + student(v["Intercept"], 3, 8, 10) + student(v["sigma"], 3, 0, 10)
    return prior + normal(d["Y"], v["Intercept"] + X @ v["b"], v["sigma"])


def draws(name: str) -> list[Values]:
    """Twenty of the reference draws, each variable in its shape, with the e that stands behind a theta."""
    stacked = stack_draws(load_draws(DATA, name))
    chosen = [{key: value[i] for key, value in stacked.items()} for i in range(0, 10_000, 501)]
    if name.endswith("noncentered"):
        return [v | {"e": (v["theta"] - v["mu"]) / v["tau"]} for v in chosen]
    return chosen


needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="COUNTERFLOW_POSTERIORDB does not name the posteriors' folder"
)
noisy = pytest.mark.filterwarnings("ignore")  # what other people's packages say while they are imported and compile
IN_FOUR_TOOLS = [
    "arK-arK",
    "eight_schools-eight_schools_centered",
    "eight_schools-eight_schools_noncentered",
    "kidiq-kidscore_interaction",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite-logmesquite",
    "sblrc-blr",
]


def is_constant(difference: np.ndarray) -> None:
    np.testing.assert_allclose(difference - difference[0], 0, atol=1e-6)


@noisy
@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_pymc_models_have_the_density_of_their_formula(name):
    pytest.importorskip("pymc")
    from posteriordb_models import pymc_models
    from pymc.model.transform.conditioning import remove_value_transforms

    what, data = name.partition("-")[2], load_data(DATA, name)
    model = getattr(pymc_models, what)(data)
    model.rvs_to_initial_values.update(dict.fromkeys(model.free_RVs))  # remove_value_transforms takes no others
    model = remove_value_transforms(model)
    log_p = model.compile_logp(jacobian=False, mode="FAST_COMPILE")
    formula = globals()[what]
    is_constant(
        np.array([log_p({rv.name: v[rv.name] for rv in model.free_RVs}) - formula(v, data) for v in draws(name)])
    )


@noisy
@needs_data
@pytest.mark.parametrize("tool", ["numpyro", "pyro", pytest.param("stan", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", IN_FOUR_TOOLS)
def test_other_tools_have_the_density_of_pymc_on_unconstrained_space(name, tool):
    pytest.importorskip("pymc")
    pytest.importorskip(tool)
    stacked = {key: np.stack([v[key] for v in draws(name)]) for key in draws(name)[0]}
    log_p = [target(target.unconstrain(stacked)) for target in (in_tool("pymc", name), in_tool(tool, name))]
    is_constant((log_p[0] - log_p[1]).numpy())


def in_tool(tool: str, name: str) -> targets.Target:
    what = name.partition("-")[2]
    if tool == "stan":
        return targets.from_stan(STAN / f"{what}.stan", DATA / f"{name}.data.json")
    model = getattr(importlib.import_module(f"posteriordb_models.{tool}_models"), what)
    data = load_data(DATA, name)
    if tool == "pymc":
        return targets.from_pymc(model(data))
    if tool == "numpyro":
        return targets.from_numpyro(model, data)
    return targets.from_pyro(
        model, {k: torch.tensor(v * 1.0) if isinstance(v, np.ndarray) else v for k, v in data.items()}
    )


@pytest.mark.parametrize("name", SHAPES)
def test_exact_draws_of_the_shapes_follow_their_density(name):
    """E[x_i d log p / dx_i] = -1 for every density that falls off."""
    shape, n = SHAPES[name], 40_000
    x = shape.draw(n).requires_grad_()
    (score,) = torch.autograd.grad(shape.log_density(x).sum(), x)
    products = (x * score).detach()
    assert x.shape == (n, shape.dim)
    off = (products.mean(0) + 1) / (products.std(0) / n**0.5)
    assert off.abs().max() < 5


def test_errors_are_the_worst_of_all_scalars_in_reference_sds():
    reference = {"mu": np.array([-1.0, 1.0]), "beta": np.array([[-3.0, -5.0], [3.0, 5.0]])}
    draws = {"beta": reference["beta"] * [2.0, 1.0] + [0.3, 1.0], "mu": reference["mu"] + 0.1, "extra": np.zeros(2)}
    found = errors(draws, reference)
    assert found == {"mean_error": pytest.approx(0.2), "sd_error": pytest.approx(1.0)}


def test_resampling_by_importance_turns_a_wide_normal_into_a_narrow_one():
    x = np.random.default_rng(0).normal(0, 2, 20_000)
    log_weights = -0.5 * x**2 + 0.5 * (x / 2) ** 2
    log_weights[:100] = np.nan  # draws at which the density is not defined
    picked = importance_resampled({"x": x}, log_weights, seed=0)["x"]
    assert picked.shape == x.shape
    assert not np.isin(x[:100], picked).any()
    assert picked.std() == pytest.approx(1, abs=0.03)
