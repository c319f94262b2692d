"""The two kernels: forward and back substitution over tiles of rows.

Level 0 of the network is the features, then come the hidden layers; the last level, `top`, is the parameters.
weights[k - 1] leads from level k - 1 to level k, and below[k, g] counts the units of level k whose degree is below g:

    a hidden unit of degree g sees the units of level k - 1 up to below[k - 1, g + 1]
    parameters of degree g see those up to below[k - 1, g]

Where the features also lead straight to the parameters, the weight from level 0 to level `top` is the last one,
weights[top]. links[0, k] is the level that is added to level k before its activation, or 0; links[1, k] is 1 where
level k feeds the next one without its activation.

Taken one degree at a time, each product would be a few units thin and read everything that is known. So degrees are
taken in blocks: one product adds to all units of a block the contribution of the degrees below the block, and only the
triangle within the block goes degree by degree. Back substitution takes the same blocks from the last to the first: the
triangle first, then one product sends the adjoints of the block to all degrees below it.
"""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
import numpy as np
from numba import carray  # type: ignore[attr-defined]  # missing in its stubs

from counterflow.engine.cpu.affine import (
    invert_affine,
    invert_gated,
    invert_scaled,
    solve_affine,
    solve_gated,
    solve_scaled,
)
from counterflow.engine.cpu.arrays import add, add_product, copy, fill, integers, matrix, take_number, window
from counterflow.engine.cpu.compilation import VECTOR_BYTES, compiled, entry
from counterflow.engine.cpu.elementary import activate, take_back
from counterflow.engine.cpu.sinh_arcsinh import invert_sinh_arcsinh, solve_sinh_arcsinh
from counterflow.engine.cpu.spline import invert_spline, solve_spline
from counterflow.engine.cpu.tables import (
    ACTIVATION,
    AFFINE,
    BELOW,
    BLOCKS,
    BOUND,
    CLIPPED_SPLINE,
    COLUMNS,
    CONSTANTS,
    ENTRIES,
    FIRST_WEIGHT,
    GATED,
    LINKS,
    PARAMETERS,
    ROWS,
    SINH_ARCSINH,
    STARTS,
    TILE_ROWS,
    UNIVARIATE,
    WEIGHTS,
)


@compiled
def receive(below, starts, job, w, top, new_0, new_1, seen_0, seen_1, record, left, known, width):
    """Through weight w, add the contribution of degrees seen_0..seen_1 - 1 to the units of degrees new_0..new_1 - 1."""
    source, level = (w, w + 1) if w < top else (0, top)
    new_0, new_1 = below[level, new_0], below[level, new_1]
    seen_0, seen_1 = below[source, seen_0], below[source, seen_1]
    add_product(
        record[starts[level] + new_0 : starts[level] + new_1, left : left + width],
        matrix(job, FIRST_WEIGHT + w, known)[new_0:new_1, seen_0:seen_1],
        known[starts[source] + seen_0 : starts[source] + seen_1, :width],
    )


@compiled
def send_back(below, starts, job, w, top, by_0, by_1, to_0, to_1, adjoint, width):
    """Through weight w, send the adjoints of degrees by_0..by_1 - 1 back to the units of degrees to_0..to_1 - 1."""
    source, level = (w, w + 1) if w < top else (0, top)
    by_0, by_1, to_0, to_1 = below[level, by_0], below[level, by_1], below[source, to_0], below[source, to_1]
    add_product(
        adjoint[starts[source] + to_0 : starts[source] + to_1, :width],
        matrix(job, FIRST_WEIGHT + w, adjoint)[by_0:by_1, to_0:to_1].T,
        adjoint[starts[level] + by_0 : starts[level] + by_1, :width],
    )


@compiled
def _tables(numbers):
    """Return the job as an array, and its tables below, starts, blocks and links."""
    job = carray(numbers, (numbers[ENTRIES], 4))
    below, links = matrix(job, BELOW, job), matrix(job, LINKS, job)
    return job, below, matrix(job, STARTS, job)[0], matrix(job, BLOCKS, job)[0], links


@compiled
def _work_space(P, tile, like):
    """Return the work space of a univariate map: `spline._find_bin` needs most."""
    return np.empty((2 * ((P + 1) // 3) + 13, tile), like.dtype)


@compiled
def _forward(pointer):
    """Solve tiles of rows until none is left.

    Inputs are y and the bias of each level; results are x, the record and log_det. The record holds every level before
    its activation. If the caller does not keep it, it has no rows, and every tile uses the same work space.
    """
    numbers = integers(pointer)
    job, below, starts, blocks, links = _tables(numbers)
    N, tile, weights = numbers[ROWS], numbers[TILE_ROWS], numbers[WEIGHTS]
    activation, univariate, P = numbers[ACTIVATION], numbers[UNIVARIATE], numbers[PARAMETERS]
    constants = matrix(job, CONSTANTS, pointer)[0]
    inputs = FIRST_WEIGHT + weights
    top = len(starts) - 1
    results = inputs + 1 + top
    y, x = matrix(job, inputs, pointer), matrix(job, results, pointer)
    record, log_det = matrix(job, results + 1, pointer), matrix(job, results + 2, pointer)
    features, lanes, kept = starts[0], VECTOR_BYTES // x.itemsize, len(record) > 0
    if not kept:
        record = np.empty((features, tile), x.dtype)
    known = np.empty((features + len(x), tile), x.dtype)  # inputs of the next level; the features hold y, then x
    knots = _work_space(P, tile, x)
    while True:
        left = take_number(numbers) * tile
        if left >= N:
            break
        rows = min(tile, N - left)
        width = -(-rows // lanes) * lanes  # full vectors: what is computed beyond the last row is never read
        right, start = left + width, left if kept else 0
        stop = start + width
        for i in range(len(x)):
            copy(known[features + i, :rows], y[i, left : left + rows])
        fill(log_det[0, left:right], 0)
        for k in range(1, top + 1):
            bias, at = matrix(job, inputs + k, pointer), starts[k]
            for i in range(below[k, -1]):
                if job[inputs + k, COLUMNS] == 1:  # one column for all rows; with a context there are N
                    fill(record[at + i, start:stop], bias[i, 0])
                else:
                    copy(record[at + i, start : start + rows], bias[i, left : left + rows])
        for b in range(len(blocks) - 1):
            begin, end = blocks[b], blocks[b + 1]
            for k in range(weights):
                receive(below, starts, job, k, top, begin, end, 0, begin, record, start, known, width)
            for g in range(begin, end):
                for k in range(top - 1, weights):
                    receive(below, starts, job, k, top, g, g + 1, begin, g, record, start, known, width)
                for i in range(below[0, g], below[0, g + 1]):
                    params = window(record, starts[top] + P * i, start, P)
                    x_i, total = known[features + i, :width], log_det[0, left:right]
                    if univariate == AFFINE:
                        invert_affine(x_i, total, params[0], params[1], constants[BOUND])
                    elif univariate == GATED:
                        invert_gated(x_i, total, params[0], params[1])
                    elif univariate <= CLIPPED_SPLINE:
                        invert_spline(x_i, total, params, knots, constants, univariate == CLIPPED_SPLINE)
                    elif univariate == SINH_ARCSINH:
                        invert_sinh_arcsinh(x_i, total, params[0], params[1], constants[BOUND])
                    else:
                        invert_scaled(univariate, x_i, total, params[0], params[1], knots, constants)
                for k in range(1, top):
                    receive(below, starts, job, k - 1, top, g, g + 1, begin, g + 1, record, start, known, width)
                    for i in range(below[k, g], below[k, g + 1]):
                        fed, own = known[starts[k] + i, :width], record[starts[k] + i, start:stop]
                        if links[0, k]:
                            add(own, record[starts[links[0, k]] + i, start:stop])
                        if links[1, k]:
                            copy(fed, own)
                        else:
                            activate(activation, fed, own)
        for i in range(len(x)):
            copy(x[i, left:right], known[features + i, :width])


@compiled
def _back(pointer):
    """Solve the transposed system for tiles of rows until none is left.

    Inputs are x, the hidden layers before activation, params, v and w; results are u and the record, which holds the
    adjoints of every level before its activation.
    """
    numbers = integers(pointer)
    job, below, starts, blocks, links = _tables(numbers)
    N, tile, weights = numbers[ROWS], numbers[TILE_ROWS], numbers[WEIGHTS]
    activation, univariate, P = numbers[ACTIVATION], numbers[UNIVARIATE], numbers[PARAMETERS]
    constants = matrix(job, CONSTANTS, pointer)[0]
    inputs = FIRST_WEIGHT + weights
    top = len(starts) - 1
    x, params = matrix(job, inputs, pointer), matrix(job, inputs + top, pointer)
    v, w = matrix(job, inputs + top + 1, pointer), matrix(job, inputs + top + 2, pointer)
    u, record = matrix(job, inputs + top + 3, pointer), matrix(job, inputs + top + 4, pointer)
    features, lanes = starts[0], VECTOR_BYTES // u.itemsize
    adjoint = np.empty((features + len(u), tile), u.dtype)  # the adjoints that each level has received so far
    knots = _work_space(P, tile, u)
    while True:
        left = take_number(numbers) * tile
        if left >= N:
            break
        rows = min(tile, N - left)
        width, right = -(-rows // lanes) * lanes, left + rows
        for at in range(len(adjoint)):
            fill(adjoint[at, :width], 0)
        for b in range(len(blocks) - 2, -1, -1):
            begin, end = blocks[b], blocks[b + 1]
            for g in range(end - 1, begin - 1, -1):
                for k in range(weights - 1, -1, -1):  # from level k + 1 to level k, or by the direct weight to 0
                    send_back(below, starts, job, k, top, g + 1 if k >= top - 1 else g, end, g, g + 1, adjoint, width)
                    for i in range(below[k, g], below[k, g + 1] if 0 < k < top else 0):
                        at, before = starts[k] + i, matrix(job, inputs + k, pointer)
                        if links[1, k]:
                            copy(record[at, left:right], adjoint[at, :rows])
                        else:
                            take_back(activation, adjoint[at], before[i, left:right], record[at, left:right])
                        for later in range(k + 1, top):
                            if links[0, later] == k:
                                add(adjoint[at, :rows], record[starts[later] + i, left:right])
                                copy(record[at, left:right], adjoint[at, :rows])
                for i in range(below[0, g], below[0, g + 1]):
                    at = starts[top] + P * i
                    u_i, returned, x_i = u[i, left:right], adjoint[features + i], x[i, left:right]
                    v_i, w_i, params_i = v[i, left:right], w[0, left:right], window(params, P * i, left, P)
                    bars = adjoint[at : at + P]
                    if univariate == AFFINE:
                        solve_affine(u_i, bars[0], bars[1], returned, v_i, w_i, x_i, params_i[1], constants[BOUND])
                    elif univariate == GATED:
                        solve_gated(u_i, bars[0], bars[1], returned, v_i, w_i, x_i, params_i[0], params_i[1])
                    elif univariate <= CLIPPED_SPLINE:
                        clipped = univariate == CLIPPED_SPLINE
                        solve_spline(u_i, bars, returned, v_i, w_i, x_i, params_i, knots, constants, clipped)
                    elif univariate == SINH_ARCSINH:
                        m, a, bound = params_i[0], params_i[1], constants[BOUND]
                        solve_sinh_arcsinh(u_i, bars[0], bars[1], returned, v_i, w_i, x_i, m, a, bound)
                    else:
                        a = params_i[1]
                        solve_scaled(univariate, u_i, bars[0], bars[1], returned, v_i, w_i, x_i, a, knots, constants)
                    for p in range(P):
                        copy(record[at + p, left:right], bars[p])
            for k in range(weights):
                send_back(below, starts, job, k, top, begin, end, 0, begin, adjoint, width)


forward_kernel, back_kernel = entry("forward_kernel", _forward), entry("back_kernel", _back)
