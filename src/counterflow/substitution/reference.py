"""The definition: G passes forward, and a dense Jacobian back. Plain, slow, any dtype, any device."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from counterflow.substitution import Adjoints, Solution, System


def network(system: System, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One pass through the masked network: params (N, D, P), and each hidden layer before activation."""
    hidden: list[Tensor] = []
    h = x
    for weight, bias in zip(system.weights[:-1], system.biases[:-1], strict=True):
        hidden.append(h @ weight.T + bias)
        h = system.layout.activation.f(hidden[-1])
    params = h @ system.weights[-1].T + system.biases[-1]
    return params.unflatten(-1, (x.shape[-1], system.layout.univariate.parameters)), tuple(hidden)


def forward_substitution(system: System, y: Tensor) -> Solution:
    """One pass for each degree; a pass makes the features of its degree known."""
    ends, univariate = system.layout.ends[0], system.layout.univariate
    x = torch.zeros_like(y)
    for first, last in pairwise(ends):
        params, _ = network(system, x)
        known, _ = univariate.inverse(y[:, first:last], params[:, first:last])
        x = torch.cat([x[:, :first], known, x[:, last:]], 1)
    params, hidden = network(system, x)
    _, log_slope = univariate.inverse(y, params)
    return Solution(x, log_slope.sum(1), params, hidden)


@torch.enable_grad()
def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """The Jacobian by one backward pass for each feature, then a dense solve."""
    x = solution.x.detach().requires_grad_()
    params, hidden = network(system, x)
    y, log_slope = system.layout.univariate.forward(x, params)
    jacobian = torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])], 1)
    (log_det_x,) = torch.autograd.grad((w * log_slope.sum(1)).sum(), x, retain_graph=True, materialize_grads=True)
    u = torch.linalg.solve(jacobian.transpose(1, 2), v - log_det_x)
    inputs = (params, *hidden)
    adjoints = torch.autograd.grad((u * y).sum() + (w * log_slope.sum(1)).sum(), inputs, materialize_grads=True)
    return Adjoints(u, adjoints[0], adjoints[1:])
