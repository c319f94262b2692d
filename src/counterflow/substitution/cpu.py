"""Incremental substitution compiled with Numba: affine and gated maps on the CPU, in float32 and float64.

Rows of the batch do not see each other. So a tile of rows is solved from the first degree to the last while what the
network holds for it stays in cache, and threads share the tiles. Buffers are feature-major, (units, rows): a weight
meets a vector of rows.

Level 0 of the network is the features, then come the hidden layers, and the last level, `top`, is the params.
weights[k - 1] leads from level k - 1 to level k, and below[k, g] counts the units of level k whose degree is below g:

    a hidden unit of degree g sees the units of level k - 1 up to below[k - 1, g + 1]
    params of degree g see those up to below[k - 1, g]

Degree by degree alone, each product would be a few units thin, and read all that is known for them. So degrees are
taken in blocks: one product brings to all units of a block what is known of degrees below it, and degree by degree only
the triangle within the block is left. Back substitution takes the same blocks from the last to the first: the triangle
first, then one product sends what the block received to all degrees below it. Both read weights row by row.

All that is compiled stands in this file: Numba keeps compiled code until the file of its entry changes, and would
not notice a change elsewhere.
"""

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from itertools import pairwise
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from counterflow.made import ACTIVATIONS
from counterflow.substitution import Adjoints, Layout, Solution, System
from counterflow.univariate import Affine, Gated

AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
VECTOR = 64 if AVX512 else 32  # bytes of a register
UNITS = 8 if AVX512 else 4  # times 2 vectors of rows: the sums take half of the registers there are, 32 or 16
# Tried at D, H, B = 64, 512, 256 and 784, 1024, 100, float32, one thread of an EPYC 9004 (Zen 4): tiles of 32 rows are
# 1.2 to 1.6 times slower than tiles of 128; blocks of 16 units are up to 1.1 times slower than blocks of 64 or 128.
BLOCK = 64  # units of the widest level in a block of degrees
TILE = 128  # rows
ALONE = 1 << 21  # multiply-adds that one thread does (in 0.05 ms) before a second one would have begun


def supports(layout: Layout) -> bool:
    """Whether this body knows the activation and the univariate map."""
    return layout.activation in _codes() and isinstance(layout.univariate, Affine | Gated)


def forward_substitution(system: System, y: Tensor) -> Solution:
    """For a tile of rows, block by block of degrees: see `_forward`."""
    plan, (N, D), padded = _plan(system.layout), y.shape, _padded(y)
    x, record, log_det = y.new_empty(D, padded), y.new_empty(plan.recorded, padded), y.new_empty(1, padded)
    given = [y, *(b if b.dim() == 2 else b[None] for b in system.biases)]
    _run(_forward, plan, system.weights, given, (x, record, log_det), N)
    params, hidden = plan.split(record[:, :N])
    return Solution(x[:, :N].T, log_det[0, :N], params, hidden)


def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """The same, backwards: see `_back`. Both maps have dl_dx = 0, so that w acts through their params alone."""
    plan, (N, D), padded = _plan(system.layout), v.shape, _padded(v)
    u, record = v.new_empty(D, padded), v.new_empty(plan.recorded, padded)
    given = [solution.x, *solution.hidden, solution.params.flatten(1), v, w[:, None]]
    _run(_back, plan, system.weights, given, (u, record), N)
    return Adjoints(u[:, :N].T, *plan.split(record[:, :N]))


class _Plan(NamedTuple):
    """What stays the same from call to call."""

    below: np.ndarray  # (levels, G + 2), see above
    starts: np.ndarray  # (levels,), the first row of a level in a buffer that holds hidden layers, params, features
    blocks: np.ndarray  # the degree where each block begins, and G + 1: degrees are 0..G
    maps: tuple[int, bool, float]  # the activation's code, whether gated, the affine map's bound
    work: int  # multiply-adds for one row
    sizes: list[int]  # of hidden layers and params

    @property
    def recorded(self) -> int:
        """Units of hidden layers and params together."""
        return sum(self.sizes)

    def split(self, record: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(recorded, N) -> params (N, D, P), and the hidden layers (N, H) each."""
        *hidden, params = record.T.split_with_sizes(self.sizes, 1)
        return params.unflatten(1, (-1, 2)), tuple(hidden)


@lru_cache(maxsize=256)
def _plan(layout: Layout) -> _Plan:
    features, *hidden = (np.array(ends, np.int64) for ends in layout.ends)
    below = np.pad([features, *hidden, features * layout.univariate.parameters], ((0, 0), (1, 0)))
    sizes, G = below[:, -1], layout.groups
    return _Plan(
        below,
        starts=np.roll(np.cumsum([0, *sizes[1:]]), 1),
        blocks=np.append(np.arange(0, G + 1, max(1, BLOCK * (G + 1) // sizes.max())), G + 1),
        maps=(
            _codes()[layout.activation],
            isinstance(layout.univariate, Gated),
            layout.univariate.bound if isinstance(layout.univariate, Affine) else 0.0,
        ),
        work=int(sizes[1:] @ sizes[:-1]) // 2,
        sizes=sizes[1:].tolist(),
    )


def _padded(like: Tensor) -> int:
    """N in whole vectors, an odd number of them: units 4 KiB apart would evict each other from the cache."""
    lanes = VECTOR // like.element_size()
    return lanes * (-(-like.shape[0] // lanes) | 1)


def _feature_major(t: Tensor, like: Tensor) -> Tensor:
    """(N, units) -> (units, N) with contiguous rows that do not overlap."""
    t = t.to(like).T
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _table(matrices: Sequence[Tensor]) -> np.ndarray:
    """Address, rows, elements from row to row, columns: compiled code takes any number of matrices in this form."""
    return np.array([(m.data_ptr(), m.size(0), max(m.stride(0), m.size(1)), m.size(1)) for m in matrices])


def _run(
    kernel: Any, plan: _Plan, weights: Sequence[Tensor], given: Sequence[Tensor], results: Sequence[Tensor], N: int
) -> None:
    """Call the kernel for all tiles, on no more threads than torch may take."""
    like = results[0]
    weights, given = [w.to(like).contiguous() for w in weights], [_feature_major(t, like) for t in given]
    lanes = VECTOR // like.element_size()
    vectors = max(1, -(-N // lanes))
    threads = min(torch.get_num_threads(), vectors) if plan.work * N > ALONE else 1
    each = -(-vectors * lanes // (threads * TILE))  # tiles, as few as there can be
    tile = -(-vectors // (threads * each)) * lanes
    tiles = -(-N // tile)
    system = (plan.below, plan.starts, plan.blocks, *plan.maps, _table(weights), _table(given))
    call: Any = partial(kernel, *system, *(t.numpy() for t in results), N, tile)
    shares = [tiles * k // threads for k in range(threads + 1)]
    others = [_pool().submit(call, *share) for share in pairwise(shares[1:])]
    with _notice(kernel, like.dtype):
        try:
            call(*shares[:2])
        finally:  # the tables hold addresses: the matrices must outlive every thread
            for other in others:
                other.result()


@contextmanager
def _notice(kernel: Any, dtype: torch.dtype) -> Iterator[None]:
    """Say so when a first call has been compiling for two seconds."""
    if (kernel, dtype) in _called:
        yield
        return
    text = "compiling substitution for %s; this happens once, the next process finds it on disk"
    timer = Timer(2.0, logging.getLogger("counterflow").warning, (text, dtype))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _called.add((kernel, dtype))


_called: set[tuple[Any, torch.dtype]] = set()


@cache
def _pool() -> ThreadPoolExecutor:
    # Threads that leave the GIL rather than Numba's own: those abort the process when two callers meet.
    return ThreadPoolExecutor(os.cpu_count(), "counterflow")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads

# What follows is compiled at the first call: in float32, 7 s for `_forward` and 4 s for `_back` (one core, EPYC 9004).

compiled = njit(fastmath={"contract"}, error_model="numpy")  # contract: a * b + c is one operation
entry = njit(fastmath={"contract"}, error_model="numpy", nogil=True, cache=True)


@compiled
def _copy(to, row):
    for r in range(len(to)):
        to[r] = row[r]


@compiled
def _fill(to, value):
    for r in range(len(to)):
        to[r] = value


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to numbers such as the array holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@compiled
def _matrix(table, k, like):
    return carray(_pointer(table[k, 0], like), (table[k, 1], table[k, 2]))


def _register_block(units: int, vectors: int) -> Any:
    """out += weight @ fed, (units, vectors of rows) += (units, K) @ (K, vectors of rows), summed in registers.

    Written as LLVM's operations, because LLVM keeps no NumPy array in registers. Rows of out and fed are contiguous;
    weight may be transposed.
    """

    @intrinsic
    def block(typing: Any, out: Any, weight: Any, fed: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            byte, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
            scalar, bits = context.get_value_type(out.dtype), out.dtype.bitwidth
            lanes = 8 * VECTOR // bits
            vector = ir.VectorType(scalar, lanes)
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f{bits}")
            arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args, args, strict=True)]
            (out_step, _), (unit_step, k_step), (fed_step, _) = (
                cgutils.unpack_tuple(builder, a.strides) for a in arrays
            )
            K = cgutils.unpack_tuple(builder, arrays[1].shape)[1]
            out_at, weight_at, fed_at = (builder.bitcast(a.data, byte.as_pointer()) for a in arrays)

            def moved(base: Any, step: Any, times: Any) -> Any:
                return builder.gep(base, [builder.mul(step, times)])

            def row_of_vectors(base: Any) -> list[Any]:
                places = [builder.gep(base, [i64(VECTOR * v)]) for v in range(vectors)]
                return [builder.bitcast(place, vector.as_pointer()) for place in places]

            def load(place: Any) -> Any:
                return builder.load(place, align=bits // 8)

            places = [row_of_vectors(moved(out_at, out_step, i64(u))) for u in range(units)]
            sums = [[cgutils.alloca_once_value(builder, load(place)) for place in row] for row in places]
            with cgutils.for_range(builder, K) as loop:
                values = [load(place) for place in row_of_vectors(moved(fed_at, fed_step, loop.index))]
                column = moved(weight_at, k_step, loop.index)
                for u in range(units):
                    one = load(builder.bitcast(moved(column, unit_step, i64(u)), scalar.as_pointer()))
                    one = builder.insert_element(vector(ir.Undefined), one, i32(0))
                    spread = builder.shuffle_vector(one, vector(ir.Undefined), ir.VectorType(i32, lanes)([0] * lanes))
                    for total, value in zip(sums[u], values, strict=True):
                        builder.store(builder.call(fma, [spread, value, builder.load(total)]), total)
            for row, totals in zip(places, sums, strict=True):
                for place, total in zip(row, totals, strict=True):
                    builder.store(builder.load(total), place, align=bits // 8)
            return context.get_dummy_value()

        return types.void(out, weight, fed), codegen

    return block


def _strip(units: int) -> Any:
    """The same for any number of vectors, two at a time."""
    pair, single = _register_block(units, 2), _register_block(units, 1)

    @compiled
    def strip(out, weight, fed):
        lanes, r = VECTOR // out.itemsize, 0
        while r + 2 * lanes <= out.shape[1]:
            pair(out[:, r:], weight, fed[:, r:])
            r += 2 * lanes
        if r < out.shape[1]:
            single(out[:, r:], weight, fed[:, r:])

    return strip


_strip_of_all, _strip_of_4, _strip_of_2, _strip_of_1 = (_strip(units) for units in (UNITS, 4, 2, 1))


@compiled
def _add_product(out, weight, fed):
    """Out (units, rows) += weight (units, K) @ fed (K, rows)."""
    u, units = 0, out.shape[0] if weight.shape[1] else 0
    while u < units:
        if units - u >= UNITS:
            _strip_of_all(out[u:], weight[u:], fed)
            u += UNITS
        elif units - u >= 4:
            _strip_of_4(out[u:], weight[u:], fed)
            u += 4
        elif units - u >= 2:
            _strip_of_2(out[u:], weight[u:], fed)
            u += 2
        else:
            _strip_of_1(out[u:], weight[u:], fed)
            u += 1


# Elementwise functions. LLVM turns a loop over them into vectors if they have no branch and call no library.
# `real` is the dtype of x: a bare literal would turn float32 into float64.


@intrinsic
def _two_to(typing: Any, k: Any) -> Any:
    """2^k for a whole k, written into the exponent's bits: 0 for the least exponent, infinite for the largest."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, mantissa, bias = (32, 23, 127) if k.bitwidth == 32 else (64, 52, 1023)
        word = ir.IntType(bits)
        # Saturating: the integer that NaN becomes does not matter, but it has to be one.
        kind = ir.FunctionType(word, [args[0].type])
        to_int = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fptosi.sat.i{bits}.f{bits}")
        exponent = builder.add(builder.call(to_int, args), word(bias))
        return builder.bitcast(builder.shl(exponent, word(mantissa)), args[0].type)

    return k(k), codegen


@compiled
def _scale_and_rest(x):
    """(2^k, q) with exp(x) = 2^k (1 + q): |r| = |x - k log 2| <= log(2) / 2, q = r + r^2 / 2! + ... + r^13 / 13!."""
    real, log_2 = type(x), 0.6931471805599453
    top = np.finfo(real).maxexp
    x = min(max(x, real((1 - top) * log_2)), real(top * log_2))  # in this order NaN passes
    k = np.rint(x * real(1 / log_2))
    r = x - k * real(0.693359375) + k * real(2.1219444005469058e-4)  # log 2 in two parts, the first of 10 bits
    q = real(1 / 6227020800)
    for factorial in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1):
        q = q * r + real(1 / factorial)
    return _two_to(k), q * r


@compiled
def _exp(x):
    scale, q = _scale_and_rest(x)
    return scale * (type(x)(1) + q)


@compiled
def _expm1(x):
    """exp(x) - 1 for x <= 0."""
    scale, q = _scale_and_rest(x)
    return scale - type(x)(1) + scale * q


@compiled
def _log1p(x):
    """log(1 + x) for x in 0..1: 2 (z + z^3 / 3 + ... + z^33 / 33), z = x / (2 + x) is at most 1/3."""
    real = type(x)
    z = x / (real(2) + x)
    square, total = z * z, real(1 / 33)
    for odd in (31, 29, 27, 25, 23, 21, 19, 17):  # in two, because LLVM unrolls no longer loop
        total = total * square + real(1 / odd)
    for odd in (15, 13, 11, 9, 7, 5, 3, 1):
        total = total * square + real(1 / odd)
    return real(2) * z * total


@compiled
def _tanh(x):
    real = type(x)
    m = _expm1(real(-2) * abs(x))
    return m / (m + real(2)) * real(-1 if x > 0 else 1)


@compiled
def _sigmoid(x):
    real = type(x)
    return real(1) / (real(1) + _exp(-x))


@compiled
def _softplus(x):
    return max(x, type(x)(0)) + _log1p(_exp(-abs(x)))  # torch returns x from 20 on, 2e-9 less


@compiled
def _df_tanh(x):
    t = _tanh(x)
    return type(x)(1) - t * t


@compiled
def _df_silu(x):
    real, s = type(x), _sigmoid(x)
    return s * (real(1) + x * (real(1) - s))


FUNCTIONS = {  # a name in ACTIVATIONS: the function, and its derivative
    "relu": (lambda x: max(x, type(x)(0)), lambda x: type(x)(x > 0)),
    "leaky_relu": (lambda x: max(x, type(x)(0.01) * x), lambda x: type(x)(1 if x > 0 else 0.01)),
    "elu": (lambda x: max(x, type(x)(0)) + _expm1(min(x, type(x)(0))), lambda x: _exp(min(x, type(x)(0)))),
    "tanh": (lambda x: _tanh(x), lambda x: _df_tanh(x)),
    "sigmoid": (lambda x: _sigmoid(x), lambda x: _sigmoid(x) * _sigmoid(-x)),
    "silu": (lambda x: x * _sigmoid(x), lambda x: _df_silu(x)),
    "softplus": (lambda x: _softplus(x), lambda x: _sigmoid(x)),
}


@cache
def _codes() -> dict[Any, int]:
    return {ACTIVATIONS[name]: code for code, name in enumerate(FUNCTIONS)}


def _by_code(loops: Sequence[Any]) -> Any:
    """A function of (code, *rows) that runs loops[code](*rows): the branches stand outside of the loops."""
    relu, leaky_relu, elu, tanh, sigmoid, silu, softplus = loops

    @compiled
    def choose(code, *rows):
        if code == 0:
            relu(*rows)
        elif code == 1:
            leaky_relu(*rows)
        elif code == 2:
            elu(*rows)
        elif code == 3:
            tanh(*rows)
        elif code == 4:
            sigmoid(*rows)
        elif code == 5:
            silu(*rows)
        else:
            softplus(*rows)

    return choose


def _activation_loop(f: Any) -> Any:
    f = compiled(f)

    @compiled
    def loop(after, before):
        for r in range(len(after)):
            after[r] = f(before[r])

    return loop


def _adjoint_loop(df: Any) -> Any:
    df = compiled(df)

    @compiled
    def loop(adjoint, before, recorded):
        for r in range(len(recorded)):
            adjoint[r] *= df(before[r])
            recorded[r] = adjoint[r]

    return loop


_activate = _by_code([_activation_loop(f) for f, _ in FUNCTIONS.values()])
_take_back = _by_code([_adjoint_loop(df) for _, df in FUNCTIONS.values()])


@compiled
def _invert_affine(x, log_det, m, a, bound):
    """See `Affine`: x holds y at first."""
    for r in range(len(x)):
        s = bound * _tanh(a[r] / bound)
        x[r] = (x[r] - m[r]) * _exp(-s)
        log_det[r] -= s


@compiled
def _invert_gated(x, log_det, m, a):
    """See `Gated`: x holds y at first."""
    real = x.dtype.type
    for r in range(len(x)):
        z = a[r] + real(2)
        e = _exp(-abs(z))
        x[r] = m[r] + (x[r] - m[r]) * (real(1) + e) / (real(1) if z > 0 else e)  # divided by sigmoid(z)
        log_det[r] += _log1p(e) - min(z, real(0))


@compiled
def _solve_affine(u, m_bar, a_bar, returned, v, w, x, a, bound):
    """See `Affine.partials`; `returned` is what the network sent back to the feature."""
    real = u.dtype.type
    for r in range(len(u)):
        t = _tanh(a[r] / bound)
        dy_dx, ds_da = _exp(bound * t), real(1) - t * t
        u[r] = (v[r] - returned[r]) / dy_dx
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * dy_dx + w[r]) * ds_da


@compiled
def _solve_gated(u, m_bar, a_bar, returned, v, w, x, m, a):
    """See `Gated.partials`."""
    real = u.dtype.type
    for r in range(len(u)):
        s, rest = _sigmoid(a[r] + real(2)), _sigmoid(-a[r] - real(2))
        u[r] = (v[r] - returned[r]) / s
        m_bar[r] = u[r] * rest
        a_bar[r] = (u[r] * s * (x[r] - m[r]) + w[r]) * rest


# The two substitutions. A range of degrees stands for the units that have them.


@compiled
def _bring(below, starts, weights, k, new_0, new_1, seen_0, seen_1, record, left, known, width):
    """Level k, degrees new_0..new_1 - 1, gains what it sees of degrees seen_0..seen_1 - 1 of the level before."""
    new_0, new_1, seen_0, seen_1 = below[k, new_0], below[k, new_1], below[k - 1, seen_0], below[k - 1, seen_1]
    _add_product(
        record[starts[k] + new_0 : starts[k] + new_1, left : left + width],
        _matrix(weights, k - 1, known)[new_0:new_1, seen_0:seen_1],
        known[starts[k - 1] + seen_0 : starts[k - 1] + seen_1, :width],
    )


@compiled
def _send(below, starts, weights, k, by_0, by_1, to_0, to_1, adjoint, width):
    """Level k, degrees by_0..by_1 - 1, sends its adjoints to degrees to_0..to_1 - 1 of the level before."""
    by_0, by_1, to_0, to_1 = below[k, by_0], below[k, by_1], below[k - 1, to_0], below[k - 1, to_1]
    _add_product(
        adjoint[starts[k - 1] + to_0 : starts[k - 1] + to_1, :width],
        _matrix(weights, k - 1, adjoint)[by_0:by_1, to_0:to_1].T,
        adjoint[starts[k] + by_0 : starts[k] + by_1, :width],
    )


@entry
def _forward(below, starts, blocks, code, gated, bound, weights, given, x, record, log_det, N, tile, first, last):
    """Tiles first..last - 1; given are y and the bias of each level. Fills x, record (before activation), log_det."""
    top, features, lanes = len(below) - 1, starts[0], VECTOR // x.itemsize
    y, bound = _matrix(given, 0, x), x.dtype.type(bound)
    known = np.empty((features + len(x), tile), x.dtype)  # what is fed to the next level; the features are y, then x
    for left in range(first * tile, min(last * tile, N), tile):
        rows = min(tile, N - left)
        width = -(-rows // lanes) * lanes  # whole vectors: beyond the last row anything is computed, and never read
        right = left + width
        for i in range(len(x)):
            _copy(known[features + i, :rows], y[i, left : left + rows])
        _fill(log_det[0, left:right], 0)
        for k in range(1, top + 1):
            bias, start = _matrix(given, k, x), starts[k]
            for i in range(below[k, -1]):
                if given[k, 3] == 1:  # one column for all rows; with a context there are N
                    _fill(record[start + i, left:right], bias[i, 0])
                else:
                    _copy(record[start + i, left : left + rows], bias[i, left : left + rows])
        for b in range(len(blocks) - 1):
            begin, end = blocks[b], blocks[b + 1]
            for k in range(1, top + 1):
                _bring(below, starts, weights, k, begin, end, 0, begin, record, left, known, width)
            for g in range(begin, end):
                _bring(below, starts, weights, top, g, g + 1, begin, g, record, left, known, width)
                for i in range(below[0, g], below[0, g + 1]):
                    at = starts[top] + 2 * i
                    m, a = record[at, left:right], record[at + 1, left:right]
                    x_i, total = known[features + i, :width], log_det[0, left:right]
                    if gated:
                        _invert_gated(x_i, total, m, a)
                    else:
                        _invert_affine(x_i, total, m, a, bound)
                for k in range(1, top):
                    _bring(below, starts, weights, k, g, g + 1, begin, g + 1, record, left, known, width)
                    for at in range(starts[k] + below[k, g], starts[k] + below[k, g + 1]):
                        _activate(code, known[at, :width], record[at, left:right])
        for i in range(len(x)):
            _copy(x[i, left:right], known[features + i, :width])


@entry
def _back(below, starts, blocks, code, gated, bound, weights, given, u, record, N, tile, first, last):
    """Tiles first..last - 1; given are x, the hidden layers before activation, params, v, w. Fills u and record."""
    top, features, lanes = len(below) - 1, starts[0], VECTOR // u.itemsize
    x, params, bound = _matrix(given, 0, u), _matrix(given, top, u), u.dtype.type(bound)
    v, w = _matrix(given, top + 1, u), _matrix(given, top + 2, u)
    adjoint = np.empty((features + len(u), tile), u.dtype)  # what each level has received so far
    for left in range(first * tile, min(last * tile, N), tile):
        rows = min(tile, N - left)
        width, right = -(-rows // lanes) * lanes, left + rows
        for at in range(len(adjoint)):
            _fill(adjoint[at, :width], 0)
        for b in range(len(blocks) - 2, -1, -1):
            begin, end = blocks[b], blocks[b + 1]
            for g in range(end - 1, begin - 1, -1):
                for k in range(top, 0, -1):
                    _send(below, starts, weights, k, g + 1 if k == top else g, end, g, g + 1, adjoint, width)
                    for i in range(below[k - 1, g], below[k - 1, g + 1] if k > 1 else 0):
                        at, before = starts[k - 1] + i, _matrix(given, k - 1, u)
                        _take_back(code, adjoint[at], before[i, left:right], record[at, left:right])
                for i in range(below[0, g], below[0, g + 1]):
                    at = starts[top] + 2 * i
                    u_i, m_bar, a_bar, returned = u[i, left:right], adjoint[at], adjoint[at + 1], adjoint[features + i]
                    v_i, w_i, x_i = v[i, left:right], w[0, left:right], x[i, left:right]
                    m, a = params[2 * i, left:right], params[2 * i + 1, left:right]
                    if gated:
                        _solve_gated(u_i, m_bar, a_bar, returned, v_i, w_i, x_i, m, a)
                    else:
                        _solve_affine(u_i, m_bar, a_bar, returned, v_i, w_i, x_i, a, bound)
                    _copy(record[at, left:right], m_bar)
                    _copy(record[at + 1, left:right], a_bar)
            for k in range(top, 0, -1):
                _send(below, starts, weights, k, begin, end, 0, begin, adjoint, width)
