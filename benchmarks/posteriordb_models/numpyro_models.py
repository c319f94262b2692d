"""Seven of the models in NumPyro, each named as what follows the hyphen in its posterior's name."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

Data = dict[str, Any]


def arK(data: Data) -> None:
    y, K = data["y"], data["K"]
    lags = jnp.column_stack([y[K - k : len(y) - k] for k in range(1, K + 1)])  # (T - K, K)
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[K:])


def eight_schools_centered(data: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", data["J"]):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def eight_schools_noncentered(data: Data) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", data["J"]):
        e = numpyro.sample("e", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * e)
        numpyro.sample("y", dist.Normal(theta, data["sigma"]), obs=data["y"])


def kidscore_interaction(data: Data) -> None:
    hs, iq = data["mom_hs"], data["mom_iq"]
    X = jnp.column_stack([jnp.ones(data["N"]), hs, iq, hs * iq])
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (4,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("kid_score", dist.Normal(X @ beta, sigma), obs=data["kid_score"])


def low_dim_gauss_mix(data: Data) -> None:
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    weights = dist.Categorical(probs=jnp.stack([theta, 1 - theta]))
    numpyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)), obs=data["y"])


def logmesquite(data: Data) -> None:
    shrub = (jnp.log(data[k]) for k in ("diam1", "diam2", "canopy_height", "total_height", "density"))
    X = jnp.column_stack([jnp.ones(data["N"]), *shrub, data["group"]])
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (7,)))
    sigma = numpyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    numpyro.sample("log_weight", dist.Normal(X @ beta, sigma), obs=jnp.log(data["weight"]))


def blr(data: Data) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([data["D"]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(data["X"] @ beta, sigma), obs=data["y"])
