"""Transforms inside torch.distributions: round trip, Jacobian, cache, compositions."""

import pytest
import torch
from registry import stir
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import ComposeTransform

import counterflow as cf

FLOWS = {
    "iaf": lambda: cf.IAF(3, 2, layers=2, hidden=(8,), seed=0),
    "maf": lambda: cf.MAF(3, 2, layers=2, hidden=(8,), seed=0),
    "nsf": lambda: cf.NSF(3, 2, layers=1, hidden=(8,), seed=0),
    "coupling": lambda: cf.Coupling(3, 2, layers=2, hidden=(8,), seed=0),
}


@pytest.fixture(params=FLOWS)
def flow(request):
    return stir(FLOWS[request.param]())


def test_round_trip_and_jacobian(flow):
    x, c = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    t = flow.transform.as_torch(c)
    y = t(x)
    assert torch.allclose(t.inv(y), x, atol=1e-9)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, row=row: flow.transform(v, c[row])[0], x[row])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert torch.allclose(t.log_abs_det_jacobian(x, y)[row], expected, atol=1e-9)
        assert torch.allclose(t.inv.log_abs_det_jacobian(y, x)[row], -expected, atol=1e-9)


def test_the_last_pair_is_kept_and_no_other(flow):
    c = torch.randn(4, 2).double()
    t, calls = flow.transform.as_torch(c), []
    flow.transform.register_forward_hook(lambda *_: calls.append("forward"))
    x = torch.randn(4, 3).double()
    y = t(x)
    t.log_abs_det_jacobian(x, y)
    assert t.inv(y) is x and calls == ["forward"]
    t.log_abs_det_jacobian(x.clone(), y)
    assert calls == ["forward"] * 2
    plain = t.with_cache(0)
    plain.log_abs_det_jacobian(x, plain(x))
    assert calls == ["forward"] * 4


def test_a_transformed_distribution_equals_the_flow(flow):
    c = torch.randn(4, 2).double()
    base = Independent(Normal(torch.zeros(4, 3).double(), 1.0), 1)
    q = TransformedDistribution(base, [flow.transform.as_torch(c)])
    x = q.rsample((5,))
    assert x.shape == (5, 4, 3)
    assert torch.allclose(q.log_prob(x), flow(c).log_prob(x), atol=1e-9)


def test_it_composes_with_transforms_of_torch(flow):
    c = torch.randn(4, 2).double()
    exp = torch.distributions.transforms.IndependentTransform(torch.distributions.transforms.ExpTransform(), 1)
    t = ComposeTransform([flow.transform.as_torch(c), exp])
    x = torch.randn(4, 3).double()
    y, log_det = flow.transform(x, c)
    assert torch.allclose(t(x), y.exp()) and torch.allclose(t.log_abs_det_jacobian(x, t(x)), log_det + y.sum(-1))
