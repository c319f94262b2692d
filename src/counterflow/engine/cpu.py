"""Incremental substitution compiled with Numba: every map of the library on the CPU, in float32 and float64.

Rows of the batch do not see each other. So a tile of rows is solved from the first degree to the last while what the
network holds for it stays in cache, and threads share the tiles. Buffers are feature-major, (units, rows): a weight
meets a vector of rows.

Level 0 of the network is the features, then come the hidden layers, and the last level, `top`, is the params.
weights[k - 1] leads from level k - 1 to level k, and below[k, g] counts the units of level k whose degree is below g:

    a hidden unit of degree g sees the units of level k - 1 up to below[k - 1, g + 1]
    params of degree g see those up to below[k - 1, g]

links[0, k] is the level that is added to level k before the activation, or 0, and links[1, k] whether level k feeds the
next one without the activation. Where the features lead straight to the params as well, the weight from level 0 to
level `top` is the last one, weights[top].

Degree by degree alone, each product would be a few units thin, and read all that is known for them. So degrees are
taken in blocks: one product brings to all units of a block what is known of degrees below it, and degree by degree only
the triangle within the block is left. Back substitution takes the same blocks from the last to the first: the triangle
first, then one product sends what the block received to all degrees below it. Both read weights row by row.

All that is compiled stands in this file: Numba keeps compiled code until the file of its entry changes, and would
not notice a change elsewhere.
"""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
import ctypes
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from counterflow.engine.contract import Adjoints, Layout, Solution, System
from counterflow.made.activations import ACTIVATIONS
from counterflow.univariate.affine import Affine, ForeignAffine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline

AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
VECTOR = 64 if AVX512 else 32  # bytes of a register
UNITS = 8 if AVX512 else 4  # times 2 vectors of rows: the sums take half of the registers there are, 32 or 16
# Tried at D, H, B = 64, 512, 256 and 784, 1024, 100, float32, one thread of an EPYC 9004 (Zen 4): tiles of 32 rows are
# 1.2 to 1.6 times slower than tiles of 128; blocks of 16 units are up to 1.1 times slower than blocks of 64 or 128.
BLOCK = 64  # units of the widest level in a block of degrees
TILE = 128  # rows
ALONE = 1 << 18  # multiply-adds that one thread does before a second one would have begun
WEIGHTS = 7
AFFINE, GATED, SPLINE, CLIPPED_SPLINE, SOFTPLUS, SIGMOID, SOFTCLIP, CLAMP = range(8)
MAPS: dict[type, int] = {Affine: AFFINE, Gated: GATED, RationalQuadraticSpline: SPLINE, ForeignAffine: SOFTPLUS}
SCALES = {"softplus": SOFTPLUS, "sigmoid": SIGMOID, "softclip": SOFTCLIP, "clamp": CLAMP}  # of ForeignAffine
BOUND, LEAST, FLOOR, UNIT, MOST, LOW, HIGH = range(7)  # what a univariate map may need; see `_constants`


def supports(layout: Layout) -> bool:
    """Whether this body knows the activation and the univariate map."""
    return layout.activation in _codes() and type(layout.univariate) in MAPS


def _map_code(univariate: Univariate) -> int:
    """Which of the compiled maps it is."""
    if isinstance(univariate, ForeignAffine):
        return SCALES[univariate.scale]
    clipped = isinstance(univariate, RationalQuadraticSpline) and univariate.clipped
    return CLIPPED_SPLINE if clipped else MAPS[type(univariate)]


def _constants(univariate: Univariate) -> list[float]:
    """By BOUND, LEAST, ...: FLOOR is the least share of a bin, and LEAST + softplus(UNIT) = 1, LEAST = exp(-MOST)."""
    least = getattr(univariate, "min_slope", getattr(univariate, "min_scale", 0.0))
    floor = 0.0 if _map_code(univariate) == CLIPPED_SPLINE else least
    unit, most = math.log(math.expm1(1 - least)), -math.log(least) if least else math.inf
    bound, low, high = (getattr(univariate, name, 0.0) for name in ("bound", "low", "high"))
    return [bound, least, floor, unit, most, low, high]


def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """For a tile of rows, block by block of degrees: see `_forward`."""
    plan, (N, D), padded = _plan(system.layout, y.dtype), y.shape, _padded(y)
    x, log_det = y.new_empty(D, padded), y.new_empty(1, padded)
    record = y.new_empty(plan.recorded if keep else 0, padded)
    _run(_forward, plan, system.weights, (y, *system.biases), (x, record, log_det), N)
    params, hidden = plan.split(record[:, :N]) if keep else (record, ())
    return Solution(x[:, :N].T, log_det[0, :N], params, hidden)


def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """The same, backwards: see `_back`."""
    plan, (N, D), padded = _plan(system.layout, v.dtype), v.shape, _padded(v)
    u, record = v.new_empty(D, padded), v.new_empty(plan.recorded, padded)
    given = (solution.x, *solution.hidden, solution.params.flatten(1), v, w[:, None])
    _run(_back, plan, system.weights, given, (u, record), N)
    return Adjoints(u[:, :N].T, *plan.split(record[:, :N]))


class _Plan(NamedTuple):
    """What stays the same from call to call."""

    tables: tuple[Tensor, ...]  # below, starts, blocks, constants, links
    rows: list[tuple[int, int, int, int]]  # of the tables in a job
    activation: int  # its code
    univariate: int  # its code
    work: int  # multiply-adds for one row
    sizes: list[int]  # of hidden layers and params
    parameters: int  # P

    @property
    def recorded(self) -> int:
        """Units of hidden layers and params together."""
        return sum(self.sizes)

    def split(self, record: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(recorded, N) -> params (N, D, P), and the hidden layers (N, H) each."""
        *hidden, params = record.T.split_with_sizes(self.sizes, 1)
        return params.unflatten(1, (-1, self.parameters)), tuple(hidden)


@lru_cache(maxsize=256)
def _plan(layout: Layout, dtype: torch.dtype) -> _Plan:
    P, G = layout.univariate.parameters, layout.groups
    features, *hidden = (torch.tensor(ends) for ends in layout.ends)
    below = F.pad(torch.stack([features, *hidden, features * P]), (1, 0))  # (levels, G + 2)
    sizes = below[:, -1].tolist()
    # The first row of each level in a buffer that holds hidden layers, params, features.
    starts = torch.tensor([sum(sizes[1:]), *(sum(sizes[1:k]) for k in range(1, len(sizes)))])
    # The degree where each block begins, and G + 1: degrees are 0..G.
    blocks = torch.tensor([*range(0, G + 1, max(1, BLOCK * (G + 1) // max(sizes))), G + 1])
    constants = torch.tensor([_constants(layout.univariate)], dtype=dtype)
    added = [0, *(0 if skip is None else skip + 1 for skip in layout.links.skips)]
    linear = [k in layout.links.linear for k in range(len(hidden))]
    links = torch.tensor([added, [0, *linear]])
    tables = (below, starts[None], blocks[None], constants, links)
    return _Plan(
        tables,
        rows=[_row(table) for table in tables],
        activation=_codes()[layout.activation],
        univariate=_map_code(layout.univariate),
        work=sum(before * after for before, after in pairwise(sizes)) // 2,
        sizes=sizes[1:],
        parameters=P,
    )


def _padded(like: Tensor) -> int:
    """N in whole vectors, an odd number of them: units 4 KiB apart would evict each other from the cache."""
    lanes = VECTOR // like.element_size()
    return lanes * (-(-like.shape[0] // lanes) | 1)


def _feature_major(t: Tensor, like: Tensor) -> Tensor:
    """(N, units) -> (units, N) with contiguous rows that do not overlap; (units,) as one column."""
    t = t if t.dtype == like.dtype else t.to(like)
    t = t.T if t.dim() == 2 else t[:, None]
    step, one = t.stride()
    return t if (one == 1 or t.shape[1] == 1) and step >= t.shape[1] else t.contiguous()


def _row(matrix: Tensor) -> tuple[int, int, int, int]:
    """How a job describes a matrix: its address, rows, elements from row to row, columns."""
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, max(matrix.stride()[0], columns), columns


def _run(
    kernel: Any, plan: _Plan, weights: Sequence[Tensor], given: Sequence[Tensor], results: Sequence[Tensor], N: int
) -> None:
    """Have the kernel do all tiles, on no more threads than torch may take.

    A job is a table of four whole numbers a row, so that compiled code takes any number of matrices: the next tile,
    the table's rows, N and the rows of a tile; the number of weights, activation, univariate map, P; then the
    matrices, the weights from row WEIGHTS on.
    """
    like = results[0]
    weights, given = [w.to(like.dtype).contiguous() for w in weights], [_feature_major(t, like) for t in given]
    lanes = VECTOR // like.element_size()
    vectors = max(1, -(-N // lanes))
    threads = min(torch.get_num_threads(), vectors) if plan.work * N > ALONE else 1
    each = -(-vectors * lanes // (threads * TILE))  # tiles, as few as there can be
    tile = -(-vectors // (threads * each)) * lanes
    matrices = [*plan.rows, *map(_row, weights), *map(_row, given), *map(_row, results)]
    head = [(0, 2 + len(matrices), N, tile), (len(weights), plan.activation, plan.univariate, plan.parameters)]
    job = np.array(head + matrices)
    _together(_entry(kernel, like.dtype), job.ctypes.data, threads)


def _together(entry: Callable[[int], None], job: int, threads: int) -> None:
    """Call entry(job) on each of the threads, and return when all have."""
    team = _team()
    if threads == 1:
        entry(job)
    elif team is not None:
        team(entry, ctypes.c_void_p(job), threads, 0)
    else:
        # Threads that leave the GIL rather than Numba's own: those abort the process when two callers meet.
        for done in [_pool().submit(entry, job) for _ in range(threads)]:
            done.result()


@cache
def _team() -> Any:
    """The OpenMP runtime's own way to run a function on its threads, where torch has one; else None.

    torch's threads wait for their next work in a loop that keeps their cores busy: threads of ours would share these
    cores with them. At D, H, B = 64, 512, 1024, on two threads, a pool of ours takes 1.8 times as long.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
            if parallel is not None:
                parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                parallel.restype = None
                return parallel
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "counterflow")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


@cache
def _entry(kernel: Callable[[Any], None], dtype: torch.dtype) -> Callable[[int], None]:
    """The kernel for that dtype as a C function of the address of its job."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_machine_code(kernel, dtype).address)


@cache  # which also keeps the code alive
def _machine_code(kernel: Callable[[Any], None], dtype: torch.dtype) -> Any:
    """The kernel compiled, or found on disk."""
    signature = types.void(types.CPointer(types.float32 if dtype == torch.float32 else types.float64))
    with _notice(dtype):
        return cfunc(signature, cache=True, fastmath={"contract"}, error_model="numpy")(kernel)


@contextmanager
def _notice(dtype: torch.dtype) -> Iterator[None]:
    """Say so when compiling has taken two seconds."""
    text = "compiling substitution for %s; this happens once, the next process finds it on disk"
    timer = Timer(2.0, logging.getLogger("counterflow").warning, (text, dtype))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# What follows is compiled at the first call: in float32, 7 s for `_forward` and 4 s for `_back` (one core, EPYC 9004).

compiled = njit(fastmath={"contract"}, error_model="numpy")  # contract: a * b + c is one operation


def _named(name: str, function: Any) -> Any:
    """A function that is made more than once, compiled under a name of its own.

    By their names functions are linked, also those that come from disk and were compiled by different processes: two of
    one name and type would be mixed up.
    """
    function.__name__ = function.__qualname__ = name
    return compiled(function)


@compiled
def _copy(to, row):
    for r in range(len(to)):
        to[r] = row[r]


@compiled
def _add(to, row):
    for r in range(len(to)):
        to[r] += row[r]


@compiled
def _fill(to, value):
    for r in range(len(to)):
        to[r] = value


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to numbers such as the array, or another pointer, holds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@intrinsic
def _whole_numbers(typing: Any, pointer: Any) -> Any:
    """The pointer as one to 64-bit whole numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(pointer), codegen


@intrinsic
def _next(typing: Any, pointer: Any) -> Any:
    """The number that stands there, which becomes one more: no two threads get the same."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(pointer), codegen


@compiled
def _matrix(job, k, like):
    """Entry k of the table as a matrix. Its last columns may lie beyond its width."""
    return carray(_pointer(job[k, 0], like), (job[k, 1], job[k, 2]))


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

    def strip(out, weight, fed):
        lanes, r = VECTOR // out.itemsize, 0
        while r + 2 * lanes <= out.shape[1]:
            pair(out[:, r:], weight, fed[:, r:])
            r += 2 * lanes
        if r < out.shape[1]:
            single(out[:, r:], weight, fed[:, r:])

    return _named(f"strip_of_{units}", strip)


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


def _by_code(purpose: str, loops: Sequence[Any]) -> Any:
    """A function of (code, *rows) that runs loops[code](*rows): the branches stand outside of the loops."""
    relu, leaky_relu, elu, tanh, sigmoid, silu, softplus = loops

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

    return _named(purpose, choose)


def _activation_loop(name: str, f: Any) -> Any:
    f = _named(name, f)

    def loop(after, before):
        for r in range(len(after)):
            after[r] = f(before[r])

    return _named(f"{name}_loop", loop)


def _adjoint_loop(name: str, df: Any) -> Any:
    df = _named(f"df_{name}", df)

    def loop(adjoint, before, recorded):
        for r in range(len(recorded)):
            adjoint[r] *= df(before[r])
            recorded[r] = adjoint[r]

    return _named(f"df_{name}_loop", loop)


_activate = _by_code("activate", [_activation_loop(name, f) for name, (f, _) in FUNCTIONS.items()])
_take_back = _by_code("take_back", [_adjoint_loop(name, df) for name, (_, df) in FUNCTIONS.items()])


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


@compiled
def _scales(code, scale, log_scale, a, constants):
    """See `ForeignAffine`: fills scale and log_scale."""
    real, least, unit, most = a.dtype.type, constants[LEAST], constants[UNIT], constants[MOST]
    if code in (SOFTPLUS, SIGMOID):
        for r in range(len(a)):
            scale[r] = least + (_softplus(a[r] + unit) if code == SOFTPLUS else _sigmoid(a[r] + real(2)))
        for r in range(len(a)):  # alone: the library's logarithm takes one number at a time
            log_scale[r] = math.log(scale[r])
    else:
        low, high = constants[LOW], constants[HIGH]
        for r in range(len(a)):
            clipped = a[r] / (real(1) + abs(a[r]) / most) if code == SOFTCLIP else min(max(a[r], low), high)
            log_scale[r] = clipped
            scale[r] = _exp(clipped)


@compiled
def _invert_scaled(code, x, log_det, m, a, work, constants):
    """See `ForeignAffine.inverse`: x holds y at first."""
    scale, log_scale = work[0, : len(x)], work[1, : len(x)]
    _scales(code, scale, log_scale, a, constants)
    for r in range(len(x)):
        x[r] = (x[r] - m[r]) / scale[r]
        log_det[r] -= log_scale[r]


@compiled
def _solve_scaled(code, u, m_bar, a_bar, returned, v, w, x, a, work, constants):
    """See `ForeignAffine.partials`; `returned` is what the network sent back to the feature."""
    real, unit, most = a.dtype.type, constants[UNIT], constants[MOST]
    low, high = constants[LOW], constants[HIGH]
    scale, slope = work[0, : len(u)], work[1, : len(u)]
    _scales(code, scale, slope, a, constants)
    for r in range(len(u)):
        if code == SOFTPLUS:
            slope[r] = _sigmoid(a[r] + unit) / scale[r]
        elif code == SIGMOID:
            slope[r] = _sigmoid(a[r] + real(2)) * _sigmoid(-a[r] - real(2)) / scale[r]
        elif code == SOFTCLIP:
            rest = real(1) + abs(a[r]) / most
            slope[r] = real(1) / (rest * rest)
        else:
            slope[r] = real(a[r] >= low and a[r] <= high)
    for r in range(len(u)):
        u[r] = (v[r] - returned[r]) / scale[r]
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * scale[r] + w[r]) * slope[r]


# Rational-quadratic splines: see `RationalQuadraticSpline`, whose letters stand here too. `knots` holds for a vector of
# rows the edges of the bins, xs and ys, (bins + 1, rows) each, and then the rows that these numbers name, for the bin
# that was found: its ends, its raw slopes and its slopes, its number, and two more.
X0, X1, Y0, Y1, D0, D1, S0, S1, PLACE, MEAN_X, MEAN_Y = range(11)


@compiled
def _edges(edges, highest, total, raw, constants, clipped):
    """Edges (bins + 1, rows) from raw shares (bins, rows); the two rows between are for work."""
    bins, real, bound, floor = len(raw), edges.dtype.type, constants[BOUND], constants[FLOOR]
    for k in range(bins):
        if clipped:
            _clip(edges[k + 1], raw[k], constants[MOST] / real(2))
        else:
            _copy(edges[k + 1], raw[k])
    _copy(highest, edges[1])
    for k in range(2, bins + 1):
        for r in range(len(total)):
            highest[r] = max(highest[r], edges[k, r])
    _fill(total, 0)
    for k in range(1, bins + 1):
        for r in range(len(total)):
            edges[k, r] = _exp(edges[k, r] - highest[r])
            total[r] += edges[k, r]
    share, rest = highest, real(1) - floor * real(bins)
    _fill(share, 0)
    for k in range(1, bins):
        for r in range(len(total)):
            share[r] += floor + rest * edges[k, r] / total[r]
            edges[k, r] = bound * (real(2) * share[r] - real(1))
    _fill(edges[0], -bound)
    _fill(edges[bins], bound)


@compiled
def _clip(to, row, bound):
    for r in range(len(to)):
        to[r] = row[r] / (type(bound)(1) + abs(row[r]) / bound)


@compiled
def _slopes(found, constants, clipped):
    """Rows S0 and S1 from D0 and D1."""
    least, unit = constants[LEAST], constants[UNIT]
    for k in range(2):
        if clipped:
            _clip(found[S0 + k], found[D0 + k], constants[MOST])
        for r in range(found.shape[1]):
            found[S0 + k, r] = _exp(found[S0 + k, r]) if clipped else least + _softplus(found[D0 + k, r] + unit)


@compiled
def _slopes_by_raw(found, constants, clipped):
    """The derivatives of rows S0 and S1 by what D0 and D1 hold, in place of D0 and D1."""
    unit, most = constants[UNIT], constants[MOST]
    for k in range(2):
        for r in range(found.shape[1]):
            rest = type(most)(1) + abs(found[D0 + k, r]) / most
            found[D0 + k, r] = found[S0 + k, r] / (rest * rest) if clipped else _sigmoid(found[D0 + k, r] + unit)


@compiled
def _find_bin(value, along_x, params, knots, constants, clipped):
    """The bin in which the value lies: fills knots, and returns its rows for the bin."""
    bins, width = (len(params) + 1) // 3, len(value)
    xs, ys, found = knots[: bins + 1, :width], knots[bins + 1 : 2 * bins + 2, :width], knots[2 * bins + 2 :, :width]
    _edges(xs, found[D0], found[D1], params[:bins], constants, clipped)
    _edges(ys, found[D0], found[D1], params[bins : 2 * bins], constants, clipped)
    edges, slopes = xs if along_x else ys, params[2 * bins :]
    for at, row in ((X0, xs[0]), (X1, xs[1]), (Y0, ys[0]), (Y1, ys[1]), (D1, slopes[0])):
        _copy(found[at], row)
    _fill(found[D0], 0)  # what gives a slope of 1, as at both ends
    _fill(found[PLACE], 0)
    for k in range(1, bins):
        last = k == bins - 1
        for r in range(width):
            beyond = value[r] >= edges[k, r]
            found[X0, r] = xs[k, r] if beyond else found[X0, r]
            found[X1, r] = xs[k + 1, r] if beyond else found[X1, r]
            found[Y0, r] = ys[k, r] if beyond else found[Y0, r]
            found[Y1, r] = ys[k + 1, r] if beyond else found[Y1, r]
            found[D0, r] = slopes[k - 1, r] if beyond else found[D0, r]
            found[PLACE, r] += found.dtype.type(beyond)
            if last:
                found[D1, r] = found.dtype.type(0) if beyond else found[D1, r]
            else:
                found[D1, r] = slopes[k, r] if beyond else found[D1, r]
    _slopes(found, constants, clipped)
    return found


@compiled
def _invert_spline(x, log_det, params, knots, constants, clipped):
    """See `RationalQuadraticSpline.inverse`: x holds y at first."""
    real, found, bound = x.dtype.type, _find_bin(x, False, params, knots, constants, clipped), constants[BOUND]
    slope = found[MEAN_X]
    for r in range(len(x)):
        width, height = found[X1, r] - found[X0, r], found[Y1, r] - found[Y0, r]
        d0, d1 = found[S0, r], found[S1, r]
        s, up, inside = height / width, x[r] - found[Y0, r], abs(x[r]) < bound
        bend = d0 + d1 - real(2) * s
        a, b, c = height * (s - d0) + up * bend, height * d0 - up * bend, -s * up
        root, forth = np.sqrt(max(b * b - real(4) * a * c, real(0))), b >= real(0)
        t = (real(2) * c if forth else root - b) / (-b - root if forth else real(2) * a)
        t = min(max(t, real(0)), real(1))
        below = s + bend * t * (real(1) - t)
        above = d1 * t * t + real(2) * s * t * (real(1) - t) + d0 * (real(1) - t) * (real(1) - t)
        off = height * (s * t * t + d0 * t * (real(1) - t)) - up * below
        t = min(max(t - off * below / (height * s * above), real(0)), real(1))
        below = s + bend * t * (real(1) - t)
        above = d1 * t * t + real(2) * s * t * (real(1) - t) + d0 * (real(1) - t) * (real(1) - t)
        x[r] = found[X0, r] + t * width if inside else x[r]
        slope[r] = s * s * above / (below * below) if inside else real(1)
    for r in range(len(x)):  # alone: the library's logarithm takes one number at a time
        log_det[r] -= math.log(slope[r])


@compiled
def _solve_spline(u, bars, returned, v, w, x, params, knots, constants, clipped):
    """The derivatives of `RationalQuadraticSpline.forward`: u, and bars (P, rows) from cotangents u of y and w of l."""
    bins, real, bound = (len(params) + 1) // 3, u.dtype.type, constants[BOUND]
    found = _find_bin(x, True, params, knots, constants, clipped)
    xs, ys = knots[: bins + 1], knots[bins + 1 : 2 * bins + 2]
    _slopes_by_raw(found, constants, clipped)
    # An edge is bound (2 share - 1), share = spread / (2 bound) * (sum of the softmax before it) + FLOOR * its number.
    rest = real(1) - constants[FLOOR] * real(bins)
    spread, floor = real(2) * rest * bound, constants[FLOOR] / rest
    for r in range(len(u)):
        x0, y0, place = found[X0, r], found[Y0, r], found[PLACE, r]
        width, height = found[X1, r] - x0, found[Y1, r] - y0
        d0, d1 = found[S0, r], found[S1, r]
        s, t, inside = height / width, (x[r] - x0) / width, abs(x[r]) < bound
        rest, bend = real(1) - t, d0 + d1 - real(2) * s
        p = t * rest
        over, below = s * t * t + d0 * p, s + bend * p  # y = y0 + height over / below
        above = d1 * t * t + real(2) * s * p + d0 * rest * rest  # l = 2 log s + log above - 2 log below
        dabove_dt = real(2) * (d1 * t + s * (rest - t) - d0 * rest)
        dbelow_dt = bend * (rest - t)
        dl_dx = (dabove_dt / above - real(2) * dbelow_dt / below) / width
        given = v[r] - returned[r]
        u[r] = (given - w[r] * dl_dx) * below * below / (s * s * above) if inside else given
        to_y, to_l = u[r] if inside else real(0), w[r] if inside else real(0)

        to_over, to_above = to_y * height / below, to_l / above
        to_below = -(to_over * over + real(2) * to_l) / below
        to_bend = to_below * p
        to_s = real(2) * to_l / s + to_above * real(2) * p + to_over * t * t + to_below - real(2) * to_bend
        to_t = to_over * (real(2) * s * t + d0 * (rest - t)) + to_below * dbelow_dt + to_above * dabove_dt
        to_height = to_y * over / below + to_s / width
        to_width = -(to_s * s + to_t * t) / width
        to_d0 = to_above * rest * rest + to_over * p + to_bend
        to_d1 = to_above * t * t + to_bend
        last = place == real(bins - 1)
        found[X0, r] = spread * (-to_t / width - to_width)
        found[X1, r] = real(0) if last else spread * to_width
        found[Y0, r] = spread * (to_y - to_height)
        found[Y1, r] = real(0) if last else spread * to_height
        found[D0, r] *= to_d0
        found[D1, r] *= to_d1
        found[MEAN_X, r] = found[X0, r] * ((x0 + bound) / spread - floor * place)
        found[MEAN_X, r] += found[X1, r] * ((x0 + width + bound) / spread - floor * (place + real(1)))
        found[MEAN_Y, r] = found[Y0, r] * ((y0 + bound) / spread - floor * place)
        found[MEAN_Y, r] += found[Y1, r] * ((y0 + height + bound) / spread - floor * (place + real(1)))
    for k in range(bins):
        for r in range(len(u)):
            before, within = real(k < found[PLACE, r]), real(k <= found[PLACE, r])
            to_x = before * found[X0, r] + within * found[X1, r] - found[MEAN_X, r]
            to_y = before * found[Y0, r] + within * found[Y1, r] - found[MEAN_Y, r]
            bars[k, r] = to_x * ((xs[k + 1, r] - xs[k, r]) / spread - floor)
            bars[bins + k, r] = to_y * ((ys[k + 1, r] - ys[k, r]) / spread - floor)
    for k in range(2 * bins if clipped else 0):
        for r in range(len(u)):
            flat = real(1) + abs(params[k, r]) / (constants[MOST] / real(2))
            bars[k, r] /= flat * flat
    for k in range(bins - 1):
        for r in range(len(u)):
            left, right = real(k + 1 == found[PLACE, r]), real(k == found[PLACE, r])
            bars[2 * bins + k, r] = left * found[D0, r] + right * found[D1, r]


# The two substitutions. A range of degrees stands for the units that have them.


@compiled
def _bring(below, starts, job, w, top, new_0, new_1, seen_0, seen_1, record, left, known, width):
    """By weight w a level, degrees new_0..new_1 - 1, gains what it sees of degrees seen_0..seen_1 - 1 of another."""
    source, level = (w, w + 1) if w < top else (0, top)
    new_0, new_1 = below[level, new_0], below[level, new_1]
    seen_0, seen_1 = below[source, seen_0], below[source, seen_1]
    _add_product(
        record[starts[level] + new_0 : starts[level] + new_1, left : left + width],
        _matrix(job, WEIGHTS + w, known)[new_0:new_1, seen_0:seen_1],
        known[starts[source] + seen_0 : starts[source] + seen_1, :width],
    )


@compiled
def _send(below, starts, job, w, top, by_0, by_1, to_0, to_1, adjoint, width):
    """By weight w a level, degrees by_0..by_1 - 1, sends its adjoints to degrees to_0..to_1 - 1 of another."""
    source, level = (w, w + 1) if w < top else (0, top)
    by_0, by_1, to_0, to_1 = below[level, by_0], below[level, by_1], below[source, to_0], below[source, to_1]
    _add_product(
        adjoint[starts[source] + to_0 : starts[source] + to_1, :width],
        _matrix(job, WEIGHTS + w, adjoint)[by_0:by_1, to_0:to_1].T,
        adjoint[starts[level] + by_0 : starts[level] + by_1, :width],
    )


@compiled
def _job(numbers):
    """The table that `_run` wrote, and from it below, starts, blocks, links."""
    job = carray(numbers, (numbers[1], 4))
    return job, _matrix(job, 2, job), _matrix(job, 3, job)[0], _matrix(job, 4, job)[0], _matrix(job, 6, job)


@compiled
def _work_rows(P, tile, like):
    """The work space of `_find_bin`, of which `_scales` needs less."""
    return np.empty((2 * ((P + 1) // 3) + 13, tile), like.dtype)


def _forward(pointer):
    """Solve tiles of rows until none is left. Given are y and the bias of each level; results are x, record, log_det.

    The record holds every level before activation. Where nobody wants it, it has no rows, and each tile overwrites what
    the one before has left.
    """
    numbers = _whole_numbers(pointer)
    job, below, starts, blocks, links = _job(numbers)
    N, tile, weights, activation, univariate, P = job[0, 2], job[0, 3], job[1, 0], job[1, 1], job[1, 2], job[1, 3]
    constants, given, top = _matrix(job, 5, pointer)[0], WEIGHTS + weights, len(starts) - 1
    results = given + 1 + top
    y, x = _matrix(job, given, pointer), _matrix(job, results, pointer)
    record, log_det = _matrix(job, results + 1, pointer), _matrix(job, results + 2, pointer)
    features, lanes, kept = starts[0], VECTOR // x.itemsize, len(record) > 0
    if not kept:
        record = np.empty((features, tile), x.dtype)
    known = np.empty((features + len(x), tile), x.dtype)  # what is fed to the next level; the features are y, then x
    knots = _work_rows(P, tile, x)
    while True:
        left = _next(numbers) * tile
        if left >= N:
            break
        rows = min(tile, N - left)
        width = -(-rows // lanes) * lanes  # whole vectors: beyond the last row anything is computed, and never read
        right, start = left + width, left if kept else 0
        stop = start + width
        for i in range(len(x)):
            _copy(known[features + i, :rows], y[i, left : left + rows])
        _fill(log_det[0, left:right], 0)
        for k in range(1, top + 1):
            bias, at = _matrix(job, given + k, pointer), starts[k]
            for i in range(below[k, -1]):
                if job[given + k, 3] == 1:  # one column for all rows; with a context there are N
                    _fill(record[at + i, start:stop], bias[i, 0])
                else:
                    _copy(record[at + i, start : start + rows], bias[i, left : left + rows])
        for b in range(len(blocks) - 1):
            begin, end = blocks[b], blocks[b + 1]
            for k in range(weights):
                _bring(below, starts, job, k, top, begin, end, 0, begin, record, start, known, width)
            for g in range(begin, end):
                for k in range(top - 1, weights):
                    _bring(below, starts, job, k, top, g, g + 1, begin, g, record, start, known, width)
                for i in range(below[0, g], below[0, g + 1]):
                    params = record[starts[top] + P * i : starts[top] + P * (i + 1), start:stop]
                    x_i, total = known[features + i, :width], log_det[0, left:right]
                    if univariate == AFFINE:
                        _invert_affine(x_i, total, params[0], params[1], constants[BOUND])
                    elif univariate == GATED:
                        _invert_gated(x_i, total, params[0], params[1])
                    elif univariate <= CLIPPED_SPLINE:
                        _invert_spline(x_i, total, params, knots, constants, univariate == CLIPPED_SPLINE)
                    else:
                        _invert_scaled(univariate, x_i, total, params[0], params[1], knots, constants)
                for k in range(1, top):
                    _bring(below, starts, job, k - 1, top, g, g + 1, begin, g + 1, record, start, known, width)
                    for i in range(below[k, g], below[k, g + 1]):
                        fed, own = known[starts[k] + i, :width], record[starts[k] + i, start:stop]
                        if links[0, k]:
                            _add(own, record[starts[links[0, k]] + i, start:stop])
                        if links[1, k]:
                            _copy(fed, own)
                        else:
                            _activate(activation, fed, own)
        for i in range(len(x)):
            _copy(x[i, left:right], known[features + i, :width])


def _back(pointer):
    """The same, backwards. Given are x, the hidden layers before activation, params, v, w; results are u, record.

    The record holds the adjoints of every level before activation.
    """
    numbers = _whole_numbers(pointer)
    job, below, starts, blocks, links = _job(numbers)
    N, tile, weights, activation, univariate, P = job[0, 2], job[0, 3], job[1, 0], job[1, 1], job[1, 2], job[1, 3]
    constants, given, top = _matrix(job, 5, pointer)[0], WEIGHTS + weights, len(starts) - 1
    x, params = _matrix(job, given, pointer), _matrix(job, given + top, pointer)
    v, w = _matrix(job, given + top + 1, pointer), _matrix(job, given + top + 2, pointer)
    u, record = _matrix(job, given + top + 3, pointer), _matrix(job, given + top + 4, pointer)
    features, lanes = starts[0], VECTOR // u.itemsize
    adjoint = np.empty((features + len(u), tile), u.dtype)  # what each level has received so far
    knots = _work_rows(P, tile, u)
    while True:
        left = _next(numbers) * tile
        if left >= N:
            break
        rows = min(tile, N - left)
        width, right = -(-rows // lanes) * lanes, left + rows
        for at in range(len(adjoint)):
            _fill(adjoint[at, :width], 0)
        for b in range(len(blocks) - 2, -1, -1):
            begin, end = blocks[b], blocks[b + 1]
            for g in range(end - 1, begin - 1, -1):
                for k in range(weights - 1, -1, -1):  # from level k + 1, or by the direct weight, to level k or 0
                    _send(below, starts, job, k, top, g + 1 if k >= top - 1 else g, end, g, g + 1, adjoint, width)
                    for i in range(below[k, g], below[k, g + 1] if 0 < k < top else 0):
                        at, before = starts[k] + i, _matrix(job, given + k, pointer)
                        if links[1, k]:
                            _copy(record[at, left:right], adjoint[at, :rows])
                        else:
                            _take_back(activation, adjoint[at], before[i, left:right], record[at, left:right])
                        for later in range(k + 1, top):
                            if links[0, later] == k:
                                _add(adjoint[at, :rows], record[starts[later] + i, left:right])
                                _copy(record[at, left:right], adjoint[at, :rows])
                for i in range(below[0, g], below[0, g + 1]):
                    at = starts[top] + P * i
                    u_i, returned, x_i = u[i, left:right], adjoint[features + i], x[i, left:right]
                    v_i, w_i, params_i = v[i, left:right], w[0, left:right], params[P * i : P * (i + 1), left:right]
                    bars = adjoint[at : at + P]
                    if univariate == AFFINE:
                        _solve_affine(u_i, bars[0], bars[1], returned, v_i, w_i, x_i, params_i[1], constants[BOUND])
                    elif univariate == GATED:
                        _solve_gated(u_i, bars[0], bars[1], returned, v_i, w_i, x_i, params_i[0], params_i[1])
                    elif univariate <= CLIPPED_SPLINE:
                        clipped = univariate == CLIPPED_SPLINE
                        _solve_spline(u_i, bars, returned, v_i, w_i, x_i, params_i, knots, constants, clipped)
                    else:
                        a = params_i[1]
                        _solve_scaled(univariate, u_i, bars[0], bars[1], returned, v_i, w_i, x_i, a, knots, constants)
                    for p in range(P):
                        _copy(record[at + p, left:right], bars[p])
            for k in range(weights):
                _send(below, starts, job, k, top, begin, end, 0, begin, adjoint, width)
