"""Test the solved direction under tracing, torch.func and dispatch modes: right numbers, or a refusal in words."""

import warnings

import pytest
import torch
from registry import over, stir
from torch.fx.experimental.proxy_tensor import make_fx

import counterflow as cf

FLOWS = {
    "maf": lambda: cf.MAF(3, layers=2, hidden=(8,), seed=0),
    "nsf": lambda: cf.NSF(3, layers=2, hidden=(8,), seed=0),
}
X, OTHER = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1)).double()
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at the first jvp


def solved(name, frozen=False):
    """Return a transform whose forward direction is solved, and what it gives on OTHER."""
    t = stir(FLOWS[name]()).transform.requires_grad_(not frozen)
    return t, tuple(v.detach() for v in t(OTHER))


@over(FLOWS)
@over([True, False], "frozen", quick=[False])
def test_a_trace_gives_the_right_numbers_on_other_inputs(name, frozen):
    t, expected = solved(name, frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace warns of every Python branch, and that it is deprecated
        close(torch.jit.trace(t, (X,), check_trace=False)(OTHER), expected)
    close(make_fx(t)(X)(OTHER), expected)


@over(FLOWS)
def test_functionalize_of_frozen_weights(name):
    t, expected = solved(name, frozen=True)
    close(torch.func.functionalize(lambda y: t(y)[0])(OTHER), expected[0])


@over(FLOWS)
def test_vmap_jacobians_and_directional_derivatives(name):
    t, expected = solved(name)
    close(torch.vmap(lambda y: t(y)[0])(OTHER), expected[0])
    rows = torch.stack([torch.autograd.functional.jacobian(lambda v: t(v)[0], row) for row in OTHER])
    close(torch.vmap(torch.func.jacrev(lambda y: t(y)[0]))(OTHER), rows)
    close(torch.func.jvp(lambda y: t(y)[0], (OTHER,), (torch.ones_like(OTHER),))[1], rows.sum(-1))


@over(FLOWS)
def test_gradients_per_sample_are_those_of_a_loop(name):
    t, _ = solved(name)
    weights = {key: value.detach() for key, value in t.named_parameters()}

    def log_det(weights, y):
        return torch.func.functional_call(t, weights, (y,))[1]

    found = torch.vmap(torch.func.grad(log_det), in_dims=(None, 0))(weights, OTHER)
    for k, y in enumerate(OTHER):
        one = torch.autograd.grad(t(y)[1], list(t.parameters()), materialize_grads=True)
        for name, expected in zip(weights, one, strict=True):
            close(found[name][k], expected)


def test_second_derivatives_through_the_solve_by_torch_func():
    t, _ = solved("maf")
    hessian = torch.func.hessian(lambda y: t(y)[1])(OTHER[0])
    step = 1e-5 * torch.eye(3).double()
    gradient = torch.func.grad(lambda y: t(y)[1])
    by_differences = torch.stack([(gradient(OTHER[0] + e) - gradient(OTHER[0] - e)) / 2e-5 for e in step])
    close(hessian, by_differences, atol=1e-6, rtol=1e-6)


def test_batched_cotangents_are_refused_in_words():
    t, _ = solved("maf")
    y = OTHER.clone().requires_grad_()
    out = t(y)[0].sum(0)
    with pytest.raises(
        RuntimeError, match=r"expected one cotangent at a time .* is_grads_batched=True; use torch.func"
    ):
        torch.autograd.grad(out, y, torch.eye(3).double(), is_grads_batched=True)
