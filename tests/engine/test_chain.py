"""Tests that compiled chains return the numbers of torch operations, values and all gradients."""

import copy

import pytest
import torch
from registry import FOREIGN, UNIVARIATES, close, inputs, over, stir
from test_engine import poisoned  # noqa: F401  # a fixture

import counterflow as cf
from counterflow.engine import chain
from counterflow.engine.cpu import chain as cpu_chain
from counterflow.made.activations import ACTIVATIONS

MAPS = UNIVARIATES | FOREIGN
# D, context, hidden sizes, degrees
SHAPES = [
    (3, 0, (7, 5), None),
    (5, 2, (13,), (2, 1, 3, 3, 1)),
    (17, 3, (29, 23, 11), None),
    (1, 2, (4,), None),
    (17, 0, (3, 5), None),
    (40, 1, (33,), None),
]


def several(univariate, activation, D, context, hidden, degrees):
    """Return two layers with permutations, a constant scale in either direction, and an inverse of an inverse."""
    generator = torch.Generator().manual_seed(2)
    layers = [cf.Autoregressive(D, context, hidden, univariate, degrees, activation) for _ in range(2)]
    std = torch.rand(D, generator=generator) + 0.5
    standardize = cf.Standardize(torch.randn(D, generator=generator), std)
    permute = cf.Permute(torch.randperm(D, generator=generator))
    parts = [permute, layers[0], standardize, cf.Inverse(permute), cf.Inverse(cf.Inverse(layers[1]))]
    return stir(cf.Compose([*parts, cf.Inverse(standardize), cf.Permute(range(D)[::-1])]))


def results(t, solver, x, c):
    """Return values, log_det and scores, and the gradients with respect to x, c and all parameters."""
    for layer in t.modules():
        if isinstance(layer, cf.Autoregressive):
            layer.solver = solver
    leaves = [v.detach().clone().requires_grad_() for v in (x, c) if v is not None]
    y, log_det = t(*leaves)
    generator = torch.Generator().manual_seed(3)
    total, score = (torch.randn(y.shape, generator=generator).to(y) for _ in range(2))
    y_too, terms = t.forward_by_feature(leaves[0], total, *leaves[1:])
    y_again, log_det_again, score_y = t.push_score(leaves[0], score, *leaves[1:])
    if solver == "cpu":
        assert torch.equal(y, y_too) and torch.equal(y, y_again) and torch.equal(log_det, log_det_again)
    assert not score_y.requires_grad
    values = y, log_det, terms, log_det_again
    bars = [torch.randn(v.shape, generator=generator).to(v) for v in values]
    return *values, score_y, *torch.autograd.grad(values, [*leaves, *t.parameters()], bars)


def compare(t, x, c, tolerance=1e-10):
    for came, expected in zip(results(t, "cpu", x, c), results(t, "sliced", x, c), strict=True):
        close(came, expected, tolerance)


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of compiled chains."""
    made = []
    run = chain.run
    monkeypatch.setattr(chain, "run", lambda *args, **options: made.append(args) or run(*args, **options))
    return made


def test_a_plan_that_was_evicted_from_the_cache_is_built_again():
    t = several(cf.Affine(), "tanh", *SHAPES[1])
    x, c = inputs(t, 6)
    before = results(t, "cpu", x, c)
    cpu_chain._plan_for.cache_clear()
    assert all(torch.equal(came, expected) for came, expected in zip(results(t, "cpu", x, c), before, strict=True))


def test_flows_of_one_shape_share_a_plan():
    cpu_chain._plan_for.cache_clear()
    for seed in range(3):
        flow = cf.MAF(4, layers=2, hidden=(6,), seed=seed)
        copy.deepcopy(flow).transform.inverse(torch.zeros(2, 4))
        flow().log_prob(torch.zeros(2, 4)).sum().backward()
    assert cpu_chain._plan_for.cache_info().currsize == 1


@over(MAPS, "univariate")
@over(range(len(SHAPES)), "shape")
def test_a_compiled_chain_equals_its_torch_operations(univariate, shape, poisoned, calls):  # noqa: F811
    D, context, hidden, degrees = SHAPES[shape]
    activation = list(ACTIVATIONS)[(shape + list(MAPS).index(univariate)) % len(ACTIVATIONS)]
    t = several(MAPS[univariate], activation, D, context, hidden, degrees)
    for rows in (1, 6, 131):
        x, c = inputs(t, rows)
        x[::3] *= 3  # beyond the bound of a spline
        poisoned.clear()
        compare(t, x, c)
    assert len(calls) == 9
    assert poisoned, "no buffer of this body held NaN: poison the function that it allocates with"


@over(ACTIVATIONS, "activation")
def test_every_activation(activation):
    t = several(cf.Gated(), activation, 5, 2, (9, 8), None)
    compare(t, *inputs(t, 7))


@over([(), (0,), (3, 0), (2, 3), (1, 2, 2)], "batch")
@over([0, 2], "context")
def test_batch_shapes(batch, context):
    t = several(cf.Affine(), "tanh", 4, context, (9,), None)
    x, c = inputs(t, *batch)
    compare(t, x, c if c is None else c[..., :1, :] if len(batch) > 1 else c)


def test_views_and_expanded_inputs():
    t = several(cf.Affine(), "tanh", 4, 2, (9,), None)
    wide = torch.randn(12, 9, dtype=torch.float64)
    compare(t, wide[::2, ::2][:, :4], wide[0, :2].expand(6, 2))
    compare(t, wide.T[:4, 3:8].T, wide[4:9, 5:7])


@over(["affine", "spline"], "univariate")
def test_float32_is_near_float64(univariate):
    t = several(MAPS[univariate], "tanh", 5, 2, (13, 9), None)
    x, c = inputs(t, 50)
    exact = results(t, "sliced", x, c)
    for came, expected in zip(results(t.float(), "cpu", x.float(), c.float()), exact, strict=True):
        close(came, expected.float(), 5e-4)


@over([1, 2, 3], "threads")
def test_the_same_input_gives_the_same_bits(threads):
    torch.set_num_threads(threads)
    t = several(cf.Affine(), "relu", 32, 0, (70, 65), None)
    x, _ = inputs(t, 1111)
    first, second = (results(t, "cpu", x, None) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    compare(t, x, None)


def test_only_tensors_that_require_a_gradient_get_one():
    t = several(cf.Affine(), "relu", 3, 2, (5,), None)
    x, c = inputs(t, 4)
    everything = torch.autograd.grad(t(x, c)[0].sum(), list(t.parameters()))
    t.requires_grad_(False)
    assert not t(x, c)[0].requires_grad
    for parameter, expected in zip(t.parameters(), everything, strict=True):
        parameter.requires_grad_()
        (came,) = torch.autograd.grad(t(x, c)[0].sum(), parameter)
        parameter.requires_grad_(False)
        close(came, expected)


def test_forbidden_weights_have_no_effect_and_no_gradient():
    t = several(cf.Affine(), "tanh", 5, 0, (9, 8), None)
    with torch.no_grad():
        for layer in t.modules():
            if isinstance(layer, cf.Autoregressive):
                for linear in layer.made.masked_layers():
                    linear.weight += 7.0 * (linear.mask == 0)
    compare(t, *inputs(t, 6))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # caused by torch
def test_second_derivatives_and_vectorised_jacobians(calls):
    t = several(cf.Gated(), "tanh", 3, 2, (7,), None)
    x, c = inputs(t, 4)
    assert torch.autograd.gradgradcheck(lambda x, c: t(x, c), (x.requires_grad_(), c.requires_grad_()))
    assert calls
    jacobians = [torch.autograd.functional.jacobian(lambda x: t(x, c)[0], x, vectorize=v) for v in (False, True)]
    close(jacobians[1], jacobians[0])
    close(torch.func.jacrev(lambda x: t(x, c)[0])(x), jacobians[0])
    close(torch.func.jacfwd(lambda x: t(x, c)[0])(x), jacobians[0])


def test_hooks_and_autocast_take_torch(calls):
    t = several(cf.Affine(), "tanh", 3, 0, (7,), None).float()
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        t(x)
    seen = []
    handle = t[1].made.layers[0].register_forward_hook(lambda *_: seen.append(1))
    t[1](x)
    assert seen and not calls
    handle.remove()
    t[1](x)
    assert len(calls) == 1


def test_parametrized_weights_are_those_that_run(calls):
    t = several(cf.Affine(), "tanh", 3, 0, (7,), None)
    x, _ = inputs(t, 4)
    before = t(x)[0]
    for layer in t[1].made.masked_layers():
        torch.nn.utils.parametrizations.weight_norm(layer)
    compare(t, x, None)
    close(t(x)[0], before)
    assert calls
