"""Both substitutions in torch operations on slices: any device, any univariate map.

Hidden units are sorted by degree, so what is known after degree g is a leading block of every layer. Buffers are
feature-major, (units, N): such a block is contiguous, and one matrix product fills its next rows. Each weight is read
once; masked entries are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterflow.engine.contract import Adjoints, Solution, System


@torch.no_grad()
def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """Go through the degrees in ascending order: params of the features of degree g, the features, the hidden units."""
    layout, weights = system.layout, system.weights
    N, D = y.shape
    P, skips = layout.univariate.parameters, layout.links.skips
    features, *units = layout.ends
    biases = [b.T if b.dim() == 2 else b[:, None] for b in system.biases]
    x, log_det = y.new_empty(D, N), y.new_zeros(N)
    y = y.T
    before = [y.new_empty(ends[-1], N) for ends in units]
    after = [y.new_empty(ends[-1], N) for ends in units]
    params = y.new_empty(D * P, N)

    def advance(g: int) -> None:
        fed, fed_ends = x, features
        for k, ends in enumerate(units):
            new, seen = slice(ends[g - 1] if g else 0, ends[g]), fed_ends[g]
            if new.start < new.stop:
                torch.addmm(biases[k][new], weights[k][new, :seen], fed[:seen], out=before[k][new])
                if (skip := skips[k]) is not None:
                    before[k][new] += before[skip][new]
                after[k][new] = layout.output(k, before[k][new])
            fed, fed_ends = after[k], ends

    advance(0)
    for g in range(1, layout.groups + 1):
        new, seen = slice(features[g - 1], features[g]), units[-1][g - 1]
        rows = slice(new.start * P, new.stop * P)
        torch.addmm(biases[-1][rows], weights[len(units)][rows, :seen], after[-1][:seen], out=params[rows])
        if layout.links.skip_to_output:
            params[rows] += weights[-1][rows, : new.start] @ x[: new.start]
        x[new], log_slope = layout.univariate.inverse(y[new], _by_feature(params[rows], P))
        log_det += log_slope.sum(0)
        if g < layout.groups:
            advance(g)
    return Solution(x.T, log_det, params.T.unflatten(1, (D, P)), tuple(b.T for b in before))


@torch.no_grad()
def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """Go through the degrees in descending order: adjoints of the hidden units of degree g, u, adjoints of params."""
    layout, weights = system.layout, system.weights
    N, D = solution.x.shape
    P = layout.univariate.parameters
    features, *units = layout.ends
    partials = layout.univariate.partials(solution.x.T, solution.params.transpose(0, 1))
    slopes = [layout.slope(k, a.T) for k, a in enumerate(solution.hidden)]
    target = v.T - w * partials.dl_dx
    u = v.new_empty(D, N)
    hidden = [v.new_empty(ends[-1], N) for ends in units]
    params = v.new_empty(D, P, N)
    flat = params.flatten(0, 1)

    def retreat(g: int) -> None:
        for k in reversed(range(len(units))):
            new = slice(units[k][g - 1] if g else 0, units[k][g])
            if new.start < new.stop:
                if k == len(units) - 1:
                    seen_by, received = slice(features[g] * P, None), flat
                else:
                    seen_by, received = slice(units[k + 1][g - 1] if g else 0, None), hidden[k + 1]
                torch.mm(weights[k + 1][seen_by, new].T, received[seen_by], out=hidden[k][new])
                hidden[k][new] *= slopes[k][new]
                for later in layout.links.added_to(k):
                    hidden[k][new] += hidden[later][new]

    for g in range(layout.groups, 0, -1):
        if g < layout.groups:
            retreat(g)
        new, seen_by = slice(features[g - 1], features[g]), slice(units[0][g - 1], None)
        sent_back = weights[0][seen_by, new].T @ hidden[0][seen_by]
        if layout.links.skip_to_output:
            sent_back += weights[-1][new.stop * P :, new].T @ flat[new.stop * P :]
        u[new] = (target[new] - sent_back) / partials.dy_dx[new]
        theta = u[new, :, None] * partials.dy_dparams[new] + w[:, None] * partials.dl_dparams[new]
        params[new] = theta.transpose(1, 2)
    retreat(0)
    return Adjoints(u.T, params.permute(2, 0, 1), tuple(a.T for a in hidden))


def _by_feature(params: Tensor, P: int) -> Tensor:
    """Reshape (features P, N) to (features, N, P)."""
    return params.unflatten(0, (-1, P)).transpose(1, 2)
