"""Matrices at an address, loops over rows, and the product of two matrices."""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]  # missing in its stubs
from numba.core import cgutils
from numba.extending import intrinsic

from counterflow.engine.cpu.compilation import AVX512, VECTOR_BYTES, compiled, named
from counterflow.engine.cpu.tables import ADDRESS, MATRIX_ROWS, STEP

UNITS = 8 if AVX512 else 4  # times 2 vectors of rows: the sums take half of the registers, of which there are 32 or 16


@compiled
def copy(to, row):
    """Copy a row."""
    for r in range(len(to)):
        to[r] = row[r]


@compiled
def add(to, row):
    """Add a row to another."""
    for r in range(len(to)):
        to[r] += row[r]


@compiled
def fill(to, value):
    """Fill a row with one value."""
    for r in range(len(to)):
        to[r] = value


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """Turn an address into a pointer to numbers of the element type of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@intrinsic
def integers(typing: Any, pointer: Any) -> Any:
    """Turn a pointer into one to 64-bit integers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(pointer), codegen


@intrinsic
def take_number(typing: Any, pointer: Any) -> Any:
    """Return the integer at the pointer and increment it, atomically: no two threads get the same one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], ir.IntType(64)(1), "monotonic")

    return types.int64(pointer), codegen


@compiled
def matrix(job, k, like):
    """Return the matrix that row k of the job describes, with the gap between its rows as further columns."""
    return carray(pointer(job[k, ADDRESS], like), (job[k, MATRIX_ROWS], job[k, STEP]))


@compiled
def window(whole, row, column, rows):
    """Return rows of a matrix from a column on, in the layout C; the end of the last row lies beyond."""
    address = np.int64(whole.ctypes.data) + (row * whole.shape[1] + column) * whole.itemsize
    return carray(pointer(address, whole), (rows, whole.shape[1]))


def emit_block(
    context: Any,
    builder: Any,
    dtype: Any,
    size: tuple[int, int],
    out: tuple[Any, Any],
    weight: tuple[Any, Any, Any],
    inputs: tuple[Any, Any],
    K: Any,
) -> None:
    """Emit out += weight @ inputs for a block of fixed size, summed in registers.

    Shapes are (units, vectors of rows) += (units, K) @ (K, vectors of rows). Rows of out and inputs are contiguous.
    Written in LLVM's operations, because LLVM keeps no NumPy array in registers.

    Args:
        context: Numba's context, with its builder.
        builder: LLVM's builder.
        dtype: Numba's type of the numbers.
        size: units and vectors.
        out: pointer to bytes, and the bytes from unit to unit.
        weight: pointer to bytes, the bytes from unit to unit, and from one of the K inputs to the next.
        inputs: pointer to bytes, and the bytes from one of the K inputs to the next.
        K: number of inputs.
    """
    units, vectors = size
    i32, i64 = ir.IntType(32), ir.IntType(64)
    scalar, bits = context.get_value_type(dtype), dtype.bitwidth
    lanes = 8 * VECTOR_BYTES // bits
    vector = ir.VectorType(scalar, lanes)
    kind = ir.FunctionType(vector, [vector] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{lanes}f{bits}")
    (out_at, out_step), (weight_at, unit_step, k_step), (inputs_at, input_step) = out, weight, inputs

    def moved(base: Any, step: Any, times: Any) -> Any:
        return builder.gep(base, [builder.mul(step, times)])

    def row_of_vectors(base: Any) -> list[Any]:
        places = [builder.gep(base, [i64(VECTOR_BYTES * v)]) for v in range(vectors)]
        return [builder.bitcast(place, vector.as_pointer()) for place in places]

    def load(place: Any) -> Any:
        return builder.load(place, align=bits // 8)

    places = [row_of_vectors(moved(out_at, out_step, i64(u))) for u in range(units)]
    sums = [[cgutils.alloca_once_value(builder, load(place)) for place in row] for row in places]
    with cgutils.for_range(builder, K) as loop:
        values = [load(place) for place in row_of_vectors(moved(inputs_at, input_step, loop.index))]
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


def _register_block(units: int, vectors: int) -> Any:
    """Make the function out += weight @ fed for arrays; see `emit_block`. weight may be transposed."""

    @intrinsic
    def block(typing: Any, out: Any, weight: Any, fed: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arrays = [context.make_array(t)(context, builder, a) for t, a in zip(signature.args, args, strict=True)]
            (out_step, _), (unit_step, k_step), (fed_step, _) = (
                cgutils.unpack_tuple(builder, a.strides) for a in arrays
            )
            K = cgutils.unpack_tuple(builder, arrays[1].shape)[1]
            out_at, weight_at, fed_at = (builder.bitcast(a.data, ir.IntType(8).as_pointer()) for a in arrays)
            size, weights = (units, vectors), (weight_at, unit_step, k_step)
            emit_block(context, builder, out.dtype, size, (out_at, out_step), weights, (fed_at, fed_step), K)
            return context.get_dummy_value()

        return types.void(out, weight, fed), codegen

    return block


def strip(units: int) -> Any:
    """Make the same function for any number of vectors of rows, two at a time."""
    pair, single = _register_block(units, 2), _register_block(units, 1)

    def strip(out, weight, fed):
        lanes, r = VECTOR_BYTES // out.itemsize, 0
        while r + 2 * lanes <= out.shape[1]:
            pair(out[:, r:], weight, fed[:, r:])
            r += 2 * lanes
        if r < out.shape[1]:
            single(out[:, r:], weight, fed[:, r:])

    return named(f"strip_of_{units}", strip)


_strip_of_all, _strip_of_4, _strip_of_2, _strip_of_1 = (strip(units) for units in (UNITS, 4, 2, 1))


@compiled
def add_product(out, weight, fed):
    """Add weight @ fed to out: (units, rows) += (units, K) @ (K, rows)."""
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
