"""Monte Carlo estimate of a KL divergence."""

import math

import pytest
import torch
from registry import FLOWS
from torch.distributions import Independent, MultivariateNormal, Normal, Uniform
from torch.distributions import kl_divergence as exact

import counterflow as cf
from counterflow.diagnostics import kl_divergence


def gaussian_flow(mean, std):
    """A flow that is N(mean, std^2)."""
    return cf.Flow(cf.bases.StandardNormal(len(mean)), cf.Inverse(cf.Standardize(mean, std))).double()


def test_flows_and_other_distributions_against_the_closed_form():
    flows = gaussian_flow([1.0, -2.0], [0.5, 2.0]), gaussian_flow([0.0, -1.0], [1.0, 1.5])
    normals = [MultivariateNormal(torch.tensor(m).double(), torch.diag(torch.tensor(s).double() ** 2))
               for m, s in (([1.0, -2.0], [0.5, 2.0]), ([0.0, -1.0], [1.0, 1.5]))]  # fmt: skip
    expected = exact(*normals)
    for q, p in ((flows[0](), flows[1]()), (flows[0](), normals[1]), (normals[0], flows[1]())):
        value, error = kl_divergence(q, p, 20_000)
        assert (value - expected).abs() < 4 * error < 0.05 and value.dtype == torch.float64


def test_a_batch_of_contexts_and_the_same_distribution():
    flow, c = FLOWS["MAF context random"](), torch.randn(5, 2).double()
    value, error = kl_divergence(flow(c), flow(c), 500)
    assert value.shape == error.shape == (5,) and value.abs().max() < 1e-6
    assert (kl_divergence(flow(c), flow(c + 1), 500).value > 0).all()


def test_a_support_that_is_left_is_infinite():
    box = Independent(Uniform(torch.zeros(3), torch.ones(3), validate_args=False), 1)
    assert kl_divergence(FLOWS["IAF"]().float()(), box, 200).value == math.inf


def test_refusals():
    with pytest.raises(ValueError, match="expected samples of at least 2, got 1"):
        kl_divergence(cf.IAF(2)(), cf.IAF(2)(), 1)
    with pytest.raises(ValueError, match="expected distributions of one event shape"):
        kl_divergence(cf.IAF(2)(), cf.IAF(3)())
    with pytest.raises(NotImplementedError, match=r"cf\.diagnostics\.kl_divergence"):
        exact(cf.IAF(2)(), cf.MAF(2)())
    with pytest.raises(NotImplementedError, match="No KL"):
        exact(cf.IAF(2)(), Independent(Normal(torch.zeros(2), 1.0), 1))
