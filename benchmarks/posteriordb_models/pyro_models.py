"""Seven of the models in Pyro, each named as what follows the hyphen in its posterior's name."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import OrderedTransform

Data = dict[str, Any]  # the arrays as tensors of floating-point numbers


def arK(data: Data) -> None:
    y, K = data["y"], data["K"]
    lags = torch.stack([y[K - k : len(y) - k] for k in range(1, K + 1)], 1)  # (T - K, K)
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(K), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y[K:])


def eight_schools_centered(data: Data) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand([data["J"]]).to_event(1))
    pyro.sample("y", dist.Normal(theta, data["sigma"]).to_event(1), obs=data["y"])


def eight_schools_noncentered(data: Data) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    e = pyro.sample("e", dist.Normal(torch.zeros(data["J"]), 1.0).to_event(1))
    theta = pyro.deterministic("theta", mu + tau * e)
    pyro.sample("y", dist.Normal(theta, data["sigma"]).to_event(1), obs=data["y"])


def kidscore_interaction(data: Data) -> None:
    hs, iq = data["mom_hs"], data["mom_iq"]
    X = torch.stack([torch.ones_like(iq), hs, iq, hs * iq], 1)
    beta = pyro.sample("beta", flat(X.shape[1]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("kid_score", dist.Normal(X @ beta, sigma).to_event(1), obs=data["kid_score"])


def low_dim_gauss_mix(data: Data) -> None:
    y = data["y"]
    mu = pyro.sample("mu", flat_ordered(2))
    pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(torch.stack([theta, 1 - theta]))
    pyro.sample("y", dist.MixtureSameFamily(weights, dist.Normal(mu, sigma)).expand(y.shape).to_event(1), obs=y)


def logmesquite(data: Data) -> None:
    shrub = (data[k].log() for k in ("diam1", "diam2", "canopy_height", "total_height", "density"))
    X = torch.stack([torch.ones_like(data["weight"]), *shrub, data["group"]], 1)
    beta = pyro.sample("beta", flat(X.shape[1]))
    sigma = pyro.sample("sigma", flat_positive())
    pyro.sample("log_weight", dist.Normal(X @ beta, sigma).to_event(1), obs=data["weight"].log())


def blr(data: Data) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(data["D"]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    pyro.sample("y", dist.Normal(data["X"] @ beta, sigma).to_event(1), obs=data["y"])


def flat(n: int) -> dist.Distribution:
    """Constant density on R^n: what is masked has no density, and the normal is where an inference may start."""
    return dist.Normal(torch.zeros(n), 1.0).to_event(1).mask(False)


def flat_positive() -> dist.Distribution:
    """Constant density on the positive numbers."""
    return dist.HalfNormal(1.0).mask(False)


def flat_ordered(n: int) -> dist.Distribution:
    """Constant density on x_1 < ... < x_n."""
    normal = dist.Normal(torch.zeros(n), 1.0).to_event(1)
    return dist.TransformedDistribution(normal, [OrderedTransform()]).mask(False)
