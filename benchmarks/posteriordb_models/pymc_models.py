"""The 19 models in PyMC: a function from the data to the model for each, named as what follows the hyphen.

`pm.Flat` and `pm.HalfFlat` are constant in the parameter as it is written: PyMC adds the log-Jacobian of the logarithm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pymc as pm
import pytensor.tensor as pt
from pymc.distributions.transforms import Ordered, ordered

Data = dict[str, Any]


def arK(data: Data) -> pm.Model:
    """Autoregression of order K; the first K values are only conditioned on."""
    y, K = data["y"], data["K"]
    lags = np.column_stack([y[K - k : len(y) - k] for k in range(1, K + 1)])  # (T - K, K)
    with pm.Model() as model:
        alpha = pm.Normal("alpha", 0, 10)
        beta = pm.Normal("beta", 0, 10, shape=K)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("y", alpha + lags @ beta, sigma, observed=y[K:])
    return model


def eight_schools_centered(data: Data) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        theta = pm.Normal("theta", mu, tau, shape=data["J"])
        pm.Normal("y", theta, data["sigma"], observed=data["y"])
    return model


def eight_schools_noncentered(data: Data) -> pm.Model:
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 5)
        tau = pm.HalfCauchy("tau", 5)
        e = pm.Normal("e", 0, 1, shape=data["J"])
        theta = pm.Deterministic("theta", mu + tau * e)
        pm.Normal("y", theta, data["sigma"], observed=data["y"])
    return model


def kidscore_interaction(data: Data) -> pm.Model:
    hs, iq = data["mom_hs"], data["mom_iq"]
    X = np.column_stack([np.ones_like(iq), hs, iq, hs * iq])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=4)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("kid_score", X @ beta, sigma, observed=data["kid_score"])
    return model


def kidscore_momhs(data: Data) -> pm.Model:
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=2)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("kid_score", beta[0] + beta[1] * data["mom_hs"], sigma, observed=data["kid_score"])
    return model


def kidscore_momiq(data: Data) -> pm.Model:
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=2)
        sigma = pm.HalfCauchy("sigma", 2.5)
        pm.Normal("kid_score", beta[0] + beta[1] * data["mom_iq"], sigma, observed=data["kid_score"])
    return model


def earn_height(data: Data) -> pm.Model:
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=2)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("earn", beta[0] + beta[1] * data["height"], sigma, observed=data["earn"])
    return model


def logearn_interaction_z(data: Data) -> pm.Model:
    height, male = data["height"], data["male"]
    z = (height - height.mean()) / height.std(ddof=1)
    X = np.column_stack([np.ones_like(z), z, male, z * male])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=4)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("log_earn", X @ beta, sigma, observed=np.log(data["earn"]))
    return model


def garch11(data: Data) -> pm.Model:
    """GARCH(1, 1). The prior is flat on the triangle alpha1 + beta1 < 1: Beta(1, 2) is its marginal for alpha1."""
    y = data["y"]
    with pm.Model() as model:
        mu = pm.Flat("mu")
        alpha0 = pm.HalfFlat("alpha0")
        alpha1 = pm.Beta("alpha1", 1, 2)
        beta1 = pm.Uniform("beta1", 0, 1 - alpha1)
        driven = alpha0 + alpha1 * (y[:-1] - mu) ** 2  # (T - 1,)
        start = pt.shape_padright(pt.constant(data["sigma1"] ** 2))
        variance = linear_recurrence(pt.concatenate([start, driven]), beta1)  # (T,)
        pm.Normal("y", mu, pt.sqrt(variance), observed=y)
    return model


def linear_recurrence(x: pt.TensorVariable, decay: pt.TensorVariable) -> pt.TensorVariable:
    """s_1 = x_1, s_t = x_t + decay s_{t-1}, in log2(T) operations on whole vectors instead of T on numbers."""
    T, step = x.type.shape[0], 1
    while step < T:
        x = pt.concatenate([x[:step], x[step:] + decay**step * x[:-step]])
        step *= 2
    return x


def gp_regr(data: Data) -> pm.Model:
    """Gaussian-process regression with the function integrated out; sigma is the variance of the noise."""
    x = data["x"]
    distance2 = (x[:, None] - x) ** 2  # (N, N)
    with pm.Model() as model:
        rho = pm.Gamma("rho", 25, 4)
        alpha = pm.HalfNormal("alpha", 2)
        sigma = pm.HalfNormal("sigma", 1)
        cov = alpha**2 * pt.exp(-distance2 / (2 * rho**2)) + sigma * np.eye(len(x))
        pm.MvNormal("y", np.zeros(len(x)), cov, observed=data["y"])
    return model


def low_dim_gauss_mix(data: Data) -> pm.Model:
    """Two normal components; theta is the weight of the one with the smaller mean."""
    with pm.Model() as model:
        mu = pm.Normal("mu", 0, 2, shape=2, transform=ordered, initval=[-1, 1])
        sigma = pm.HalfNormal("sigma", 2, shape=2)
        theta = pm.Beta("theta", 5, 5)
        pm.NormalMixture("y", w=pt.stack([theta, 1 - theta]), mu=mu, sigma=sigma, observed=data["y"])
    return model


SHRUB = ("diam1", "diam2", "canopy_height", "total_height", "density")


def logmesquite(data: Data) -> pm.Model:
    X = np.column_stack([np.ones(data["N"]), *(np.log(data[key]) for key in SHRUB), data["group"]])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=7)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("log_weight", X @ beta, sigma, observed=np.log(data["weight"]))
    return model


def mesquite(data: Data) -> pm.Model:
    X = np.column_stack([np.ones(data["N"]), *(data[key] for key in SHRUB), data["group"]])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=7)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("weight", X @ beta, sigma, observed=data["weight"])
    return model


def nes(data: Data) -> pm.Model:
    """Party identification; age enters as indicators of the categories 2 to 4."""
    age = data["age_discrete"][:, None] == np.array([2, 3, 4])  # (N, 3)
    before = (np.ones(data["N"]), data["real_ideo"], data["race_adj"])
    X = np.column_stack([*before, age, data["educ1"], data["gender"], data["income"]])
    with pm.Model() as model:
        beta = pm.Flat("beta", shape=9)
        sigma = pm.HalfFlat("sigma")
        pm.Normal("partyid7", X @ beta, sigma, observed=data["partyid7"])
    return model


def blr(data: Data) -> pm.Model:
    with pm.Model() as model:
        beta = pm.Normal("beta", 0, 10, shape=data["D"])
        sigma = pm.HalfNormal("sigma", 10)
        pm.Normal("y", data["X"] @ beta, sigma, observed=data["y"])
    return model


def kilpisjarvi(data: Data) -> pm.Model:
    with pm.Model() as model:
        alpha = pm.Normal("alpha", data["pmualpha"], data["psalpha"])
        beta = pm.Normal("beta", data["pmubeta"], data["psbeta"])
        sigma = pm.HalfFlat("sigma")
        pm.Normal("y", alpha + beta * data["x"], sigma, observed=data["y"])
    return model


def hmm_example(data: Data) -> pm.Model:
    """Two hidden states with means 0 < mu[0] < mu[1], summed out; rows theta1, theta2 of the transition matrix."""
    y = data["y"]
    with pm.Model() as model:
        theta1 = pm.Dirichlet("theta1", np.ones(2))
        theta2 = pm.Dirichlet("theta2", np.ones(2))
        mu = pm.Normal("mu", [3, 10], 1, transform=Ordered(positive=True))
        emission = pm.logp(pm.Normal.dist(mu, 1), y[:, None])  # (N, 2)
        transition = pt.log(pt.stack([theta1, theta2]))  # from row to column
        paths = log_matrix_chain(transition + emission[1:, None, :])  # (2, 2)
        pm.Potential("y", pt.logsumexp(emission[0, :, None] + paths))
    return model


def log_matrix_chain(factors: pt.TensorVariable) -> pt.TensorVariable:
    """Log of the product of the matrices exp(factors), (N, K, K) -> (K, K), by neighbours, in log2(N) operations."""
    n = factors.type.shape[0]
    while n > 1:
        left, right, odd = factors[0 : n - 1 : 2], factors[1:n:2], factors[n - n % 2 :]
        pairs = pt.logsumexp(left[:, :, :, None] + right[:, None, :, :], axis=2)
        factors, n = pt.concatenate([pairs, odd]), n - n // 2
    return factors[0]


def diamonds(data: Data) -> pm.Model:
    """Regression on centred predictors, to which the intercept belongs."""
    X = data["X"][:, 1:] - data["X"][:, 1:].mean(0)  # (N, 24): without the column of ones
    with pm.Model() as model:
        b = pm.Normal("b", 0, 1, shape=X.shape[1])
        intercept = pm.StudentT("Intercept", nu=3, mu=8, sigma=10)
        sigma = pm.HalfStudentT("sigma", nu=3, sigma=10)
        pm.Normal("Y", intercept + X @ b, sigma, observed=data["Y"])
    return model
