"""The definition of both substitutions: G passes forward, a dense Jacobian back. Slow; any dtype, any device."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from counterflow.engine.contract import Adjoints, Layout, Solution, System


def network(system: System, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the masked network once: params (N, D, P), and each hidden layer before its activation."""
    layout = system.layout
    masked = [weight * mask.to(weight.device) for weight, mask in zip(system.weights, _masks(layout), strict=True)]
    hidden, last = layout.links.propagate(lambda k, v: v @ masked[k].T + system.biases[k], x, layout.activation.f)
    params = last @ masked[len(hidden)].T + system.biases[-1]
    if layout.links.skip_to_output:
        params = params + x @ masked[-1].T
    return params.unflatten(-1, (x.shape[-1], layout.univariate.parameters)), hidden


def _masks(layout: Layout) -> Iterator[Tensor]:
    """Yield the mask of each weight; see `made.network`."""
    features, *hidden = (
        [g for g, (a, b) in enumerate(pairwise((0, *ends))) for _ in range(a, b)] for ends in layout.ends
    )
    for before, after in pairwise([features, *hidden]):
        yield torch.tensor(after)[:, None] >= torch.tensor(before)
    params = torch.tensor(features).repeat_interleave(layout.univariate.parameters)
    yield params[:, None] > torch.tensor(hidden[-1])
    if layout.links.skip_to_output:
        yield params[:, None] > torch.tensor(features)


def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """Run the network once for each degree; each run determines the features of that degree."""
    ends = system.layout.ends[0]
    univariate = system.layout.univariate
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
    """Compute the Jacobian by one backward pass for each feature, then solve densely."""
    x = solution.x.detach().requires_grad_()
    params, hidden = network(system, x)
    y, log_slope = system.layout.univariate.forward(x, params)
    jacobian = torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])], 1)
    (log_det_x,) = torch.autograd.grad((w * log_slope.sum(1)).sum(), x, retain_graph=True, materialize_grads=True)
    u = torch.linalg.solve(jacobian.transpose(1, 2), v - log_det_x)
    inputs = (params, *hidden)
    adjoints = torch.autograd.grad((u * y).sum() + (w * log_slope.sum(1)).sum(), inputs, materialize_grads=True)
    return Adjoints(u, adjoints[0], adjoints[1:])
