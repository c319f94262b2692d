"""Our flows as zuko's: the checks of zuko's own tests of flows."""

import copy
import pickle

import pytest
import torch
import zuko
from registry import close, over, stir

import counterflow as cf
from counterflow.interop.zuko import to_zuko

FLOWS = {
    "MAF": lambda c: cf.MAF(3, c, layers=2, hidden=(16,)),
    "IAF": lambda c: cf.IAF(3, c, layers=2, hidden=(16,)),
    "NSF": lambda c: cf.NSF(3, c, layers=2, hidden=(16,)),
    "Coupling": lambda c: cf.Coupling(3, c, layers=2, hidden=(16,)),
    "base with context": lambda c: cf.Flow(cf.bases.DiagonalNormal(3, c), cf.MAF(3, c, layers=1).transform),
}


@over(FLOWS)
@pytest.mark.parametrize("context", [0, 5])
def test_zukos_own_checks(name, context, tmp_path):
    ours = stir(FLOWS[name](context))
    flow = to_zuko(ours)
    x = torch.randn(256, 3).double()
    c = torch.randn(context).double() if context else None
    assert isinstance(flow, zuko.lazy.Flow) and repr(flow)

    log_p = flow(c).log_prob(x)
    assert log_p.shape == (256,) and log_p.requires_grad
    close(log_p, ours(c).log_prob(x))
    log_p.mean().backward()
    assert all(p.grad is not None for p in flow.parameters())

    assert flow(c).sample((32,)).shape == (32, 3)
    flow.zero_grad(set_to_none=True)
    flow(c).rsample((32,)).square().sum().backward()
    assert all(p.grad is not None for p in flow.transform.parameters())

    c = torch.randn(256, context).double() if context else None
    t = flow(c).transform
    z, ladj = t.call_and_ladj(x)
    back, inverse_ladj = t.inv.call_and_ladj(z)
    close(back, x, 1e-8)
    close(inverse_ladj, -ladj, 1e-8)
    close(t.inv.inv(x), z)
    samples, log_q = flow(c).rsample_and_log_prob((7,))
    close(flow(c).log_prob(samples), log_q, 1e-8)

    torch.save(flow, tmp_path / "flow.pt")
    for copied in (
        copy.deepcopy(flow),
        pickle.loads(pickle.dumps(flow)),
        torch.load(tmp_path / "flow.pt", weights_only=False),
    ):
        close(copied(c).log_prob(x), flow(c).log_prob(x))


def test_it_is_unwrapped_and_converted_back():
    flow = cf.MAF(3, layers=2, hidden=(16,))
    assert to_zuko(flow).unwrapped().transform is flow.transform
    assert cf.convert(to_zuko(flow)).transform is flow.transform


def test_one_distribution_can_be_differentiated_twice():
    q, x = to_zuko(cf.MAF(3, layers=2, hidden=(16,)))(), torch.randn(4, 3)
    for _ in range(2):
        q.log_prob(x).sum().backward()


def test_zukos_mixture_takes_it():
    flows = [to_zuko(cf.MAF(3, layers=1, hidden=(8,))) for _ in range(2)]
    mixture = zuko.distributions.Mixture(flows[0]().expand((2,)), torch.zeros(2))
    assert mixture.sample((5,)).shape == (5, 3)


def test_something_else_is_refused():
    with pytest.raises(TypeError, match=r"expected a Flow, such as cf.MAF\(features=3\), got Linear"):
        to_zuko(torch.nn.Linear(2, 2))
