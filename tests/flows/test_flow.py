"""Laws that every flow of the registry obeys as a distribution."""

from copy import deepcopy
from itertools import product

import numpy
import pytest
import torch
from registry import FLOWS, case, close, inputs, over, stir
from torch.distributions import Distribution, Normal

import counterflow as cf
from counterflow.flows.scores import log_prob_and_score

ONE_PASS = [name for name in FLOWS if name.startswith(("IAF", "diagonal alone", "permuted")) or name == "diagonal"]


def flow_and_context(name, *batch, features=3):
    flow = FLOWS[name](features)
    c = inputs(flow, *batch)[1]
    return flow, c if c is None else c.requires_grad_()


def leaves(flow, c):
    return [*flow.parameters()] + ([] if c is None else [c])


@over(FLOWS)
def test_the_score_of_the_base_is_the_gradient_of_its_log_density(name):
    flow, c = flow_and_context(name, 4)
    base = flow(c).base
    eps = base.sample((5,))
    log_prob, score = log_prob_and_score(base, eps)
    expected = base.log_prob(eps.requires_grad_())
    close(log_prob, expected)
    close(score, torch.autograd.grad(expected.sum(), eps)[0])


def held(flow, c):
    """The same distribution, through whose parameters and context no gradient flows."""
    return deepcopy(flow).requires_grad_(False)(None if c is None else c.detach())


def again(method, *args):
    """The same random numbers each time."""
    torch.manual_seed(7)
    return method(*args)


@over(FLOWS)
@over([1, 2], "features")
def test_log_prob_integrates_to_one_and_samples_follow_it(name, features):
    flow, c = flow_and_context(name, features=features)
    with torch.no_grad():
        q = flow(c)
        z, _ = q.rsample_and_log_prob((20_000,))
        low, high = z.amin(0) - 3 * z.std(0), z.amax(0) + 3 * z.std(0)
        ends = zip(low.tolist(), high.tolist(), strict=True)
        axes = [torch.linspace(*pair, 10_001 if features == 1 else 501, dtype=z.dtype) for pair in ends]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        density = q.log_prob(grid).exp()

        def integral(values):
            for axis in reversed(axes):
                values = torch.trapezoid(values, axis)
            return values.item()

        assert integral(density) == pytest.approx(1, abs=2e-3)
        normal = torch.randn(features, dtype=z.dtype)
        middle = (z @ normal).median()
        for f in (lambda v: v.sum(-1), lambda v: v.square().sum(-1), lambda v: (v @ normal < middle).double()):
            error = (f(z).std() / len(z) ** 0.5).item()
            assert integral(f(grid) * density) == pytest.approx(f(z).mean().item(), abs=4 * error + 2e-3)


@over(FLOWS)
def test_every_way_to_sample_agrees(name):
    flow, c = flow_and_context(name, 4)
    q = flow(c)
    z, log_q = again(q.rsample_and_log_prob, (5,))
    assert torch.equal(again(q.rsample, (5,)), z) and torch.equal(again(q.sample, (5,)), z)
    close(q.log_prob(z), log_q)
    z_too, path = again(q.rsample_and_path_log_prob, (5,))
    assert torch.equal(z_too, z)
    close(path, log_q)


@over(FLOWS)
def test_a_perfect_fit_has_no_variance_and_no_path_gradient(name):
    """With p = q every term log p - log q is log Z = 0. Only the plain gradient is noise around zero."""
    flow, c = flow_and_context(name, 4)
    p = held(flow, c)
    for kind in ("plain", "path"):
        q = flow(c)
        z, log_q = q.rsample_and_log_prob((8,)) if kind == "plain" else q.rsample_and_path_log_prob((8,))
        terms = p.log_prob(z) - log_q
        close(terms, torch.zeros_like(terms))
        noise = max(grad.abs().max() for grad in torch.autograd.grad(terms.mean(), leaves(flow, c)))
        assert noise > 1e-2 if kind == "plain" else noise < 1e-11


@over(FLOWS)
def test_path_gradient_is_that_of_log_q_with_parameters_held(name):
    flow, c = flow_and_context(name, 4)
    _, path = again(flow(c).rsample_and_path_log_prob, (5,))
    log_q = held(flow, c).log_prob(again(flow(c).rsample, (5,)))
    weights = torch.randn_like(path)
    came, expected = (torch.autograd.grad((weights * v).sum(), leaves(flow, c)) for v in (path, log_q))
    for one, other in zip(came, expected, strict=True):
        close(one, other)


@over(FLOWS)
def test_log_prob_and_sampling_reach_every_parameter_and_the_context(name):
    flow, c = flow_and_context(name, 16)
    q = flow(c)
    z, log_q = q.rsample_and_log_prob((16,))
    for loss in (q.log_prob(3 * torch.randn_like(z)).sum(), z.square().sum(), log_q.sum()):
        for grad in torch.autograd.grad(loss, leaves(flow, c), retain_graph=True):
            assert torch.isfinite(grad).all()


@over(FLOWS)
def test_dtype_and_device_are_kept(name):
    for dtype in (torch.float32, torch.float64):
        with case(dtype=dtype):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            flow = FLOWS[name]().to(device, dtype)
            c = inputs(flow, 4, dtype=dtype)[1]
            q = flow(c if c is None else c.to(device))
            z, log_q = q.rsample_and_log_prob((5,))
            results = z, log_q, q.log_prob(z), *q.rsample_and_path_log_prob((5,))
            assert {(v.dtype, v.device.type) for v in results} == {(dtype, device)}
            close(q.log_prob(z), log_q, 1e-3 if dtype == torch.float32 else 1e-10)


@over(FLOWS, quick=list(FLOWS)[::3])
def test_shapes(name):
    for batch, samples in product([(), (4,), (2, 3), (0,)], [(), (1,), (5, 2), (0,)]):
        with case(batch=batch, samples=samples):
            flow, c = flow_and_context(name, *batch)
            q = flow(c)
            batch = batch if flow.context else ()
            assert (q.batch_shape, q.event_shape) == (batch, (3,))
            z, log_q = q.rsample_and_log_prob(samples)
            assert z.shape == q.sample(samples).shape == samples + batch + (3,)
            assert log_q.shape == q.log_prob(z).shape == samples + batch
            assert [v.shape for v in q.rsample_and_path_log_prob(samples)] == [z.shape, log_q.shape]


@over(FLOWS)
def test_it_is_a_torch_distribution(name, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", True)  # torch.compile turns it off for the whole process
    flow, c = flow_and_context(name, 2)
    q = flow(c)
    assert isinstance(q, Distribution) and q.has_rsample
    assert q.support is torch.distributions.constraints.real_vector
    assert q.rsample((3,)).requires_grad and not q.sample((3,)).requires_grad
    assert "FlowDistribution" in repr(q)
    z = q.sample((3,))
    if flow.context:
        close(q.log_prob(z[0, 0]), q.log_prob(z[0, 0].expand(2, 3)))  # a value broadcasts to the contexts
    for value, message in ((z * torch.nan, "support"), (z[..., :2], r"expected value of shape \(\.\.\., 3\)")):
        with pytest.raises(ValueError, match=message):
            q.log_prob(value)
    trusting = cf.flows.FlowDistribution(q.base, q.transform, q.context, validate_args=False)
    assert trusting.log_prob(z * torch.nan).isnan().all()
    close(trusting.log_prob(z), q.log_prob(z))


@over(FLOWS)
def test_expand(name):
    flow, c = flow_and_context(name, 2)
    q = flow(c)
    wide = q.expand((3, *(q.batch_shape or (2,))))
    assert wide.batch_shape == (3, 2) and wide.event_shape == (3,)
    z, log_q = wide.rsample_and_log_prob((4,))
    assert z.shape == (4, 3, 2, 3) and (z[0, 0] != z[0, 1]).all()
    assert [v.shape for v in wide.rsample_and_path_log_prob((4,))] == [z.shape, log_q.shape]
    close(wide.log_prob(z), log_q)
    close(q.log_prob(z), log_q)


@over(ONE_PASS)
def test_log_prob_by_feature_sums_to_log_prob(name):
    flow, c = flow_and_context(name, 4)
    z, log_q = again(flow(c).rsample_and_log_prob, (5,))
    z_too, by_feature = again(flow(c).rsample_and_log_prob_by_feature, (5,))
    assert torch.equal(z_too, z) and by_feature.shape == z.shape
    close(by_feature.sum(-1), log_q)


def test_log_prob_by_feature_of_a_diagonal_normal_is_each_features_own():
    base, order = stir(cf.bases.DiagonalNormal(4, 2)), [2, 0, 3, 1]
    c = torch.randn(6, 2, dtype=torch.float64)
    z, by_feature = cf.Flow(base, cf.Permute(order))(c).rsample_and_log_prob_by_feature((5,))
    own = base(c).base_dist
    close(by_feature, Normal(own.mean[:, order], own.stddev[:, order]).log_prob(z))


def test_diagonal_normal_is_its_formula():
    for base, c in (
        (stir(cf.bases.DiagonalNormal(3)), None),
        (stir(cf.bases.DiagonalNormal(3, 2)), torch.randn(4, 2).double()),
    ):
        both = base.constant if c is None else c @ base.linear.weight.T + base.linear.bias
        own = base(c).base_dist
        close(own.mean, both[..., :3])
        close(own.stddev, (7 * torch.tanh(both[..., 3:] / 7)).exp())
    fresh = cf.bases.DiagonalNormal(3)().base_dist
    assert (fresh.mean == 0).all() and (fresh.stddev == 1).all()


def test_the_student_base_is_its_formula():
    base = stir(cf.bases.StudentT(3, max_df=12.0))
    x = torch.randn(9, 3, dtype=torch.float64)
    df = 1 / (1 / 12 + (base.a - 4).exp())
    assert (df < 12).all()
    close(base().log_prob(x), torch.distributions.StudentT(df).log_prob(x).sum(-1))
    with pytest.raises(ValueError, match="expected max_df to be a positive number, got 0"):
        cf.bases.StudentT(3, max_df=0)


@over(FLOWS)
def test_a_copy_and_a_loaded_state_give_the_same_numbers(name):
    flow, c = flow_and_context(name, 4)
    z = flow(c).sample((3,))
    loaded = stir(FLOWS[name](), seed=5)
    assert not torch.allclose(loaded(c).log_prob(z), flow(c).log_prob(z))
    loaded.load_state_dict(flow.state_dict())
    for other in (deepcopy(flow), loaded):
        assert torch.equal(other(c).log_prob(z), flow(c).log_prob(z))


def test_repr_names_sizes_and_which_direction_is_solved():
    solved = "forward substitution: solved exactly, about the work of one pass"
    words = {
        "IAF context": ("one pass", solved),
        "MAF": (solved, "one pass"),
        "permuted diagonal": ("one pass", "one pass"),
        "both ways": ("some layers one pass, others forward substitution",) * 2,
    }
    for name, (sample, log_prob) in words.items():
        flow = FLOWS[name]()
        text = repr(flow)
        parameters = sum(p.numel() for p in flow.parameters())
        assert f"Flow(features=3, context={flow.context}, parameters={parameters:,})" in text
        assert f"  sample    {sample}\n  log_prob  {log_prob}\n" in text


@over(["IAF", "IAF context", "kernels"])
def test_a_number_of_samples_is_a_shape(name):
    flow, c = flow_and_context(name, 4)
    q = flow(c)
    assert torch.equal(again(q.sample, 5), again(q.sample, (5,)))
    assert torch.equal(again(q.rsample, 5), again(q.rsample, (5,)))
    for method in (q.rsample_and_log_prob, q.rsample_and_path_log_prob):
        for came, expected in zip(again(method, 5), again(method, (5,)), strict=True):
            assert torch.equal(came, expected)
    assert q.sample(numpy.int64(3)).shape == (3, *q.batch_shape, 3)
    mixture = cf.flows.FlowMixture([flow, flow])(c)
    assert torch.equal(again(mixture.sample, 5), again(mixture.sample, (5,)))


def test_a_number_of_samples_by_feature_is_a_shape():
    q = FLOWS["IAF"]()()
    for came, expected in zip(
        again(q.rsample_and_log_prob_by_feature, 5), again(q.rsample_and_log_prob_by_feature, (5,)), strict=True
    ):
        assert torch.equal(came, expected)


@over(["log_prob", "sample", "rsample", "rsample_and_log_prob"])
def test_methods_of_the_distribution_are_refused_on_the_flow_with_a_hint(name):
    flow = FLOWS["MAF"]()
    for module in (flow, cf.flows.FlowMixture([flow])):
        assert not hasattr(module, name)
        with pytest.raises(AttributeError, match=rf"use flow\(\)\.{name}\(\.\.\.\), or flow\(c\)\.{name}"):
            getattr(module, name)
    with pytest.raises(AttributeError, match="no attribute 'log_probs'"):
        flow.log_probs  # noqa: B018


def test_the_context_has_a_name():
    flow, c = flow_and_context("IAF context", 4)
    assert torch.equal(again(flow(context=c).sample), again(flow(c).sample))
    mixture = cf.flows.FlowMixture([flow])
    assert torch.equal(again(mixture(context=c).sample), again(mixture(c).sample))


def test_arrays_are_refused_with_the_conversion():
    with pytest.raises(
        TypeError, match=r"value to be a floating-point tensor, got ndarray; convert it with torch\.as_"
    ):
        FLOWS["MAF"]()().log_prob(numpy.zeros((4, 3)))


class Named(cf.flows.FlowDistribution):
    """A subclass without a constructor of its own."""


def test_expand_keeps_the_subclass_and_the_validation():
    q = cf.MAF(3, layers=1, hidden=(4,))()
    named = Named(q.base, q.transform, None, validate_args=False).expand((2,))
    assert type(named) is Named and named.batch_shape == (2,) and not named._validate_args
    mixture = cf.flows.FlowMixture([FLOWS["MAF"](), FLOWS["NSF"]()])().expand((2,))
    assert mixture.batch_shape == (2,) and mixture.sample((5,)).shape == (5, 2, 3)


def test_a_weighted_mixture():
    left, right = (cf.Flow(cf.bases.StandardNormal(1), at) for at in (shifted(-4.0), shifted(4.0)))
    mixture = cf.flows.FlowMixture([left, right], [0.25, 0.75])
    x = again(mixture().sample, 4_000)
    assert (x < 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    expected = 0.25 * left().log_prob(x).exp() + 0.75 * right().log_prob(x).exp()
    torch.testing.assert_close(mixture().log_prob(x).exp(), expected)
    assert mixture().sample((0,)).shape == (0, 1) and mixture.config()["weights"] == (0.25, 0.75)
    assert mixture().expand((2,)).weights == (0.25, 0.75)
    for weights in ([0.5], [0.5, 0.6], [1.5, -0.5]):
        with pytest.raises(ValueError, match="expected 2 positive weights that sum to one, got"):
            cf.flows.FlowMixture([left, right], weights)


def shifted(at):
    return cf.Inverse(cf.Standardize(torch.tensor([at]), torch.ones(1)))
