"""Flows under the machinery of torch: low precision, wrappers of distributions, optimizers, modes, checkpointing."""

import numpy as np
import pytest
import torch
from registry import close, over, stir
from torch import distributions as D
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import counterflow as cf

RECIPES = {"IAF": cf.IAF, "MAF": cf.MAF, "NSF": cf.NSF, "Coupling": cf.Coupling}
SMALL = {"layers": 2, "hidden": (8,), "activation": "tanh"}


@over(RECIPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [0, 2])
def test_low_precision_keeps_its_dtype(name, dtype, context):
    exact = stir(RECIPES[name](3, context, **SMALL), gain=0.3).to(dtype).float()
    flow = stir(RECIPES[name](3, context, **SMALL), gain=0.3).to(dtype)
    x = torch.randn(5, 3).to(dtype)
    c = torch.randn(5, context).to(dtype) if context else None
    q, expected = flow(c), exact(None if c is None else c.float())
    close(q.log_prob(x).float(), expected.log_prob(x.float()), 0.1)
    close(flow.transform(x, c)[0].float(), exact.transform(x.float(), None if c is None else c.float())[0], 0.1)
    results = [*q.rsample_and_log_prob((2,)), *flow.transform.push_score(x, torch.ones_like(x), c)]
    results += flow.transform.pull_score(x, torch.ones_like(x), c)
    assert {v.dtype for v in (q.log_prob(x), *results)} == {dtype}
    sum(v.sum() for v in (q.log_prob(x), *results) if v.requires_grad).backward()
    assert all(p.grad.dtype == dtype for p in flow.parameters())


@over(RECIPES)
def test_wrappers_of_torch_distributions(name):
    flow, c = stir(RECIPES[name](3, 2, **SMALL)), torch.randn(4, 2).double()
    q, x = flow(c), torch.randn(7, 4, 3).double()
    close(D.Independent(q, 1).log_prob(x), q.log_prob(x).sum(-1))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixture = D.MixtureSameFamily(D.Categorical(weights), q)
    close(mixture.log_prob(x[:, 0]), (q.log_prob(x[:, :1]) + weights.log()).logsumexp(-1))
    assert mixture.sample((7,)).shape == (7, 3)
    exp = D.TransformedDistribution(q, [D.IndependentTransform(D.ExpTransform(), 1)])
    close(exp.log_prob(x.exp()), q.log_prob(x) - x.sum(-1))


@over(RECIPES)
def test_optimizers_modes_and_checkpointing(name):
    flow, x = RECIPES[name](3, **SMALL).double(), 2 * torch.randn(50, 3).double()
    optimizer = torch.optim.LBFGS(flow.parameters(), line_search_fn="strong_wolfe", max_iter=5)

    def loss():
        optimizer.zero_grad()
        value = -flow().log_prob(x).mean()
        value.backward()
        return value

    assert optimizer.step(loss) > loss()
    expected = flow().log_prob(x)
    with torch.inference_mode():
        close(flow().log_prob(x), expected.detach())
    gradients = torch.autograd.grad(expected.sum(), list(flow.parameters()))
    again = checkpoint(lambda v: flow().log_prob(v).sum(), x, use_reentrant=False)
    for came, wanted in zip(torch.autograd.grad(again, list(flow.parameters())), gradients, strict=True):
        close(came, wanted)
    assert torch.autograd.gradcheck(lambda v: flow().log_prob(v), x[:2].clone().requires_grad_())


@over(RECIPES, quick=["MAF"])
def test_fake_tensors_pass_through_both_directions(name):
    with FakeTensorMode():
        flow = RECIPES[name](3, 2, order="random", **SMALL)
        assert all(isinstance(t, FakeTensor) for t in (*flow.parameters(), *flow.buffers()))
        q, x, c = flow(torch.randn(5, 2)), torch.randn(5, 3), torch.randn(5, 2)
        z, log_q = q.rsample_and_path_log_prob((4,))
        assert isinstance(z, FakeTensor) and (z.shape, log_q.shape) == ((4, 5, 3), (4, 5))
        (q.log_prob(x).sum() + log_q.sum()).backward()
        assert all(p.grad.shape == p.shape for p in flow.parameters())
        for method in (flow.transform.push_score, flow.transform.pull_score):
            assert [v.shape for v in method(x, x, c)] == [(5, 3), (5,), (5, 3)]
    real = stir(RECIPES[name](3, 2, **SMALL))  # no fake tensor is left in a cache
    x, c = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    close(real.transform.inverse(real.transform(x, c)[0], c)[0], x)


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


def test_a_parametrized_weight_is_trained():
    flow = cf.MAF(3, **SMALL)
    layer, x = flow.transform.transform[0].made.layers[1], torch.randn(4, 3)
    before = flow().log_prob(x)
    parametrize.register_parametrization(layer, "weight", Double(), unsafe=True)
    close(flow().log_prob(x), before, 1e-6)
    flow().rsample_and_log_prob((4,))[1].sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_arrays_are_refused_with_the_conversion(dtype):
    for call in (cf.MAF(3, **SMALL)().log_prob, cf.MAF(3, **SMALL).transform):
        with pytest.raises(TypeError, match=r"got ndarray; convert it with torch\.as_tensor\(\.\.\.\)\.float\(\)"):
            call(np.zeros((2, 3), dtype))


@over(RECIPES)
def test_a_flow_is_built_on_the_meta_device_and_filled(name):
    with torch.device("meta"):
        flow = RECIPES[name](5, 2, **SMALL)
        assert {t.device.type for t in (*flow.parameters(), *flow.buffers())} == {"meta"}
        x, c = torch.randn(4, 5), torch.randn(4, 2)
        assert flow(c).log_prob(x).shape == flow(c).sample().shape[:1] == (4,)
    original = RECIPES[name](5, 2, **SMALL)
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flow = flow.to_empty(device="cpu")
    flow.load_state_dict(original.state_dict())
    x, c = torch.randn(4, 5), torch.randn(4, 2)
    close(flow(c).log_prob(x), original(c).log_prob(x))
    close(flow.transform(x, c)[0], original.transform(x, c)[0])


def test_the_default_device_does_not_affect_the_solve():
    t, x = cf.MAF(6, layers=1, hidden=(7,)).transform, torch.randn(2, 6)
    with torch.device("meta"):
        y, _ = t(x)  # its plan is made here
    close(t.inverse(y)[0], x, 1e-5)
