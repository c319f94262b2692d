"""Both substitutions as one Triton kernel each.

A program solves a tile of rows from the first block of degrees to the last; rows are independent, so programs never
wait for each other. The values of a row lie side by side, level by level: features, the units of each hidden layer,
params. Products between blocks are tiles of `tl.dot` in full float32; within the diagonal block each degree adds the
columns of the block that it sees. Everything between two barriers is independent.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterflow.engine.contract import Adjoints, Layout, Solution, System
from counterflow.engine.gpu.maps import activate, activation_name, constants_of, inverse, pullback, slope
from counterflow.engine.sliced import block_size

ROWS = 16  # of a tile: the smallest side of a product
UNITS = 32  # outputs of a product at a time
INPUTS = 32  # inputs of a product at a time
SIZES = ("N", "G", "BLOCK", "D", "P")  # a kernel is compiled once for all of them


class Plan(NamedTuple):
    """Sizes and tables of a layout on a device."""

    starts: tuple[int, ...]  # the first column of each level, and the number of columns
    tables: tuple[Tensor, Tensor, Tensor]  # begins, starts and weight starts of the kernels
    options: dict[str, Any]  # constants of the kernels


def supports(layout: Layout) -> bool:
    """Return True for plain networks with a map and an activation that have functions in `maps`."""
    links = layout.links
    plain = not links.linear and not links.skip_to_output and all(skip is None for skip in links.skips)
    return plain and constants_of(layout.univariate) is not None and activation_name(layout.activation) is not None


@lru_cache(maxsize=64)
def _plan(layout: Layout, device: torch.device) -> Plan:
    P = layout.univariate.parameters
    ends = [*layout.ends, tuple(P * end for end in layout.ends[0])]
    starts = tuple(accumulate((level[-1] for level in ends), initial=0))
    options = {
        **constants_of(layout.univariate)._asdict(),  # type: ignore[union-attr]  # the layout is supported
        "ACTIVATION": activation_name(layout.activation),
        "G": layout.groups,
        "BLOCK": block_size(layout),
        "LAYERS": len(layout.ends) - 1,
        "D": layout.ends[0][-1],
        "P": P,
        "ROWS": ROWS,
        "UNITS": UNITS,
        "INPUTS": INPUTS,
    }
    weight_starts = accumulate((before[-1] * after[-1] for before, after in pairwise(ends)), initial=0)
    tables = ([[0, *level] for level in ends], starts, list(weight_starts))
    return Plan(starts, tuple(torch.tensor(table, dtype=torch.int32, device=device) for table in tables), options)  # type: ignore[arg-type]


def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """See `Body`."""
    plan = _plan(system.layout, y.device)
    (N, D), P = y.shape, system.layout.univariate.parameters
    before = torch.cat([y, *(bias.expand(N, -1) for bias in system.biases)], 1)
    after = y.new_empty(N, plan.starts[-2])
    log_slope = y.new_empty(N, D)
    weights = torch.cat([weight.flatten() for weight in system.weights])
    if N:
        _forward[(triton.cdiv(N, ROWS),)](N, before, after, log_slope, weights, *plan.tables, **plan.options)
    _, *hidden, params = before.split([b - a for a, b in pairwise(plan.starts)], 1)
    return Solution(after[:, :D], log_slope.sum(1), params.unflatten(1, (D, P)), tuple(hidden))


def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """See `Body`."""
    plan = _plan(system.layout, v.device)
    (N, D), P = v.shape, system.layout.univariate.parameters
    values = torch.cat([solution.x, *solution.hidden, solution.params.flatten(1)], 1)
    adjoints = torch.zeros_like(values)
    weights = torch.cat([weight.flatten() for weight in system.weights])
    if N:
        grid = (triton.cdiv(N, ROWS),)
        _back[grid](N, values, adjoints, v.contiguous(), w.contiguous(), weights, *plan.tables, **plan.options)
    u, *hidden, params = adjoints.split([b - a for a, b in pairwise(plan.starts)], 1)
    return Adjoints(u, params.unflatten(1, (D, P)), tuple(hidden))


@triton.jit
def _begin(begins, level: tl.constexpr, g, G):
    """Return how many units of a level have a degree below g."""
    return tl.load(begins + level * (G + 2) + g)


@triton.jit
def _add(
    into, fed, weight, into_step, fed_step, first, last, begin, end, ok, other, FINISH: tl.constexpr,
    ACTIVATION: tl.constexpr, UNITS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Add the product of inputs begin..end - 1 and their weights to outputs first..last - 1 of a tile of rows.

    `into`, `fed` and `other` point to the first unit of a level in each row, (ROWS,). With FINISH "activate" the
    outputs go through the activation into `other`; with "slope" they are multiplied by its slope at `other`.
    """
    for o in range(first, last, UNITS):
        out = o + tl.arange(0, UNITS)[None, :]
        stored = ok[:, None] & (out < last)
        total = tl.load(into[:, None] + out, mask=stored, other=0.0)
        for i in range(begin, end, INPUTS):
            row = i + tl.arange(0, INPUTS)[None, :]
            column = i + tl.arange(0, INPUTS)[:, None]
            inputs = tl.load(fed[:, None] + row, mask=ok[:, None] & (row < end), other=0.0)
            w = tl.load(weight + out * into_step + column * fed_step, mask=(out < last) & (column < end), other=0.0)
            total += tl.dot(inputs, w, input_precision="ieee")
        if FINISH == "slope":
            total *= slope(tl.load(other[:, None] + out, mask=stored, other=0.0), ACTIVATION)
        tl.store(into[:, None] + out, total, mask=stored)
        if FINISH == "activate":
            tl.store(other[:, None] + out, activate(total, ACTIVATION), mask=stored)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    N, before, after, log_slope, weights, begins, starts, weight_starts,
    MAP: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr, ACTIVATION: tl.constexpr, LAYERS: tl.constexpr, G, BLOCK, D, P, ROWS: tl.constexpr,
    UNITS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Solve a tile of rows: y in the first level of `before`, x into that of `after`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < N
    before += row * tl.load(starts + LAYERS + 2)
    after += row * tl.load(starts + LAYERS + 1)
    log_slope += row * D
    params = before + tl.load(starts + LAYERS + 1)
    for low in range(0, G + 1, BLOCK):
        high = tl.minimum(low + BLOCK, G + 1)
        for k in tl.static_range(LAYERS + 1):  # the contributions of finished degrees
            _add(
                before + tl.load(starts + k + 1), after + tl.load(starts + k), weights + tl.load(weight_starts + k),
                _begin(begins, k, G + 1, G), 1, _begin(begins, k + 1, low, G), _begin(begins, k + 1, high, G),
                0, _begin(begins, k, low, G), ok, before, "", ACTIVATION, UNITS, INPUTS,
            )  # fmt: skip
        tl.debug_barrier()
        for g in range(low, high):  # the diagonal block
            _add(
                params, after + tl.load(starts + LAYERS), weights + tl.load(weight_starts + LAYERS),
                _begin(begins, LAYERS, G + 1, G), 1, P * _begin(begins, 0, g, G), P * _begin(begins, 0, g + 1, G),
                _begin(begins, LAYERS, low, G), _begin(begins, LAYERS, g, G), ok, before, "", ACTIVATION, UNITS, INPUTS,
            )  # fmt: skip
            tl.debug_barrier()
            for f in range(_begin(begins, 0, g, G), _begin(begins, 0, g + 1, G)):
                y = tl.load(before + f, mask=ok, other=0.0)
                x, log_dx_dy = inverse(y, params + f * P, ok, MAP, BOUND, BINS, K, MIN_SLOPE, OFFSET)
                tl.store(after + f, x, mask=ok)
                tl.store(log_slope + f, log_dx_dy, mask=ok)
            tl.debug_barrier()
            for k in tl.static_range(LAYERS):
                _add(
                    before + tl.load(starts + k + 1), after + tl.load(starts + k), weights + tl.load(weight_starts + k),
                    _begin(begins, k, G + 1, G), 1, _begin(begins, k + 1, g, G), _begin(begins, k + 1, g + 1, G),
                    _begin(begins, k, low, G), _begin(begins, k, g + 1, G), ok, after + tl.load(starts + k + 1),
                    "activate", ACTIVATION, UNITS, INPUTS,
                )  # fmt: skip
                tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES)
def _back(
    N, values, adjoints, v, w, weights, begins, starts, weight_starts,
    MAP: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr, ACTIVATION: tl.constexpr, LAYERS: tl.constexpr, G, BLOCK, D, P, ROWS: tl.constexpr,
    UNITS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Solve the transposed system for a tile of rows; `adjoints` begins with zeros, and its first level ends as u."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = row < N
    width = tl.load(starts + LAYERS + 2)
    values += row * width
    adjoints += row * width
    v += row * D
    params = tl.load(starts + LAYERS + 1)
    w_row = tl.load(w + row, mask=ok, other=0.0)
    for block in range(0, G + 1, BLOCK):
        low = (G // BLOCK) * BLOCK - block
        high = tl.minimum(low + BLOCK, G + 1)
        for k in tl.static_range(LAYERS + 1):  # the contributions of finished degrees
            _add(
                adjoints + tl.load(starts + k), adjoints + tl.load(starts + k + 1),
                weights + tl.load(weight_starts + k), 1, _begin(begins, k, G + 1, G), _begin(begins, k, low, G),
                _begin(begins, k, high, G), _begin(begins, k + 1, high, G), _begin(begins, k + 1, G + 1, G), ok,
                values, "", ACTIVATION, UNITS, INPUTS,
            )  # fmt: skip
        tl.debug_barrier()
        for step in range(low, high):  # the diagonal block
            g = low + high - 1 - step
            for level in tl.static_range(LAYERS, 0, -1):  # the last one from params, which see lower degrees only
                _add(
                    adjoints + tl.load(starts + level), adjoints + tl.load(starts + level + 1),
                    weights + tl.load(weight_starts + level), 1, _begin(begins, level, G + 1, G),
                    _begin(begins, level, g, G), _begin(begins, level, g + 1, G),
                    _begin(begins, level + 1, g + 1 if level == LAYERS else g, G),
                    _begin(begins, level + 1, high, G), ok, values + tl.load(starts + level), "slope", ACTIVATION,
                    UNITS, INPUTS,
                )  # fmt: skip
                tl.debug_barrier()
            _add(
                adjoints, adjoints + tl.load(starts + 1), weights, 1, D, _begin(begins, 0, g, G),
                _begin(begins, 0, g + 1, G), _begin(begins, 1, g, G), _begin(begins, 1, high, G), ok, values, "",
                ACTIVATION, UNITS, INPUTS,
            )  # fmt: skip
            tl.debug_barrier()
            for f in range(_begin(begins, 0, g, G), _begin(begins, 0, g + 1, G)):
                x = tl.load(values + f, mask=ok, other=0.0)
                rest = tl.load(v + f, mask=ok, other=0.0) - tl.load(adjoints + f, mask=ok, other=0.0)
                u = pullback(
                    x, values + params + f * P, ok, rest, w_row, adjoints + params + f * P, True, MAP, BOUND, BINS, K,
                    MIN_SLOPE, OFFSET,
                )  # fmt: skip
                tl.store(adjoints + f, u, mask=ok)
            tl.debug_barrier()
