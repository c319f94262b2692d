"""Products of packed weights and tiles, for the one-pass direction.

A tile holds units as rows of `pitch` bytes. Weights are packed into panels of UNITS outputs, (inputs, UNITS) each, with
zeros where the degrees forbid: a panel is read once, in order, for each pair of vectors of rows. Outputs come in
ascending order of degree, so panel p reads only the inputs lows[p]..highs[p] - 1.

Every output is written in full panels: the rows of a tile that follow the last unit, up to a multiple of UNITS, are
overwritten and never read.
"""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from counterflow.engine.cpu.arrays import UNITS, emit_block
from counterflow.engine.cpu.compilation import VECTOR_BYTES, compiled


def _block(units: int, vectors: int) -> Any:
    """Make the function out += weight @ inputs for matrices at given addresses; see `emit_block`."""

    @intrinsic
    def block(
        typing: Any,
        like: Any,
        out: Any,
        out_step: Any,
        weight: Any,
        unit_step: Any,
        k_step: Any,
        inputs: Any,
        input_step: Any,
        K: Any,
    ) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, out_at, out_by, weight_at, unit_by, k_by, inputs_at, inputs_by, count = args
            byte = ir.IntType(8).as_pointer()
            out_at, weight_at, inputs_at = (builder.inttoptr(a, byte) for a in (out_at, weight_at, inputs_at))
            size, weights = (units, vectors), (weight_at, unit_by, k_by)
            emit_block(context, builder, like.dtype, size, (out_at, out_by), weights, (inputs_at, inputs_by), count)
            return context.get_dummy_value()

        return types.void(like, out, out_step, weight, unit_step, k_step, inputs, input_step, K), codegen

    return block


_pair, _single = _block(UNITS, 2), _block(UNITS, 1)
_pair_of_one, _single_of_one = _block(1, 2), _block(1, 1)


@intrinsic
def _transpose_square(typing: Any, like: Any, to: Any, to_step: Any, source: Any, source_step: Any) -> Any:
    """Transpose a square of as many rows as a vector has numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32, i64 = ir.IntType(32), ir.IntType(64)
        scalar, bits = context.get_value_type(like.dtype), like.dtype.bitwidth
        lanes = 8 * VECTOR_BYTES // bits
        vector, byte = ir.VectorType(scalar, lanes), ir.IntType(8).as_pointer()
        _, to_at, to_by, from_at, from_by = args
        to_at, from_at = builder.inttoptr(to_at, byte), builder.inttoptr(from_at, byte)

        def place(base: Any, step: Any, k: int) -> Any:
            return builder.bitcast(builder.gep(base, [builder.mul(step, i64(k))]), vector.as_pointer())

        rows = [builder.load(place(from_at, from_by, k), align=bits // 8) for k in range(lanes)]
        distance = 1
        while distance < lanes:
            for k in range(lanes):
                if not k & distance:
                    a, b = rows[k], rows[k + distance]
                    low = [lane + (lanes - distance if lane & distance else 0) for lane in range(lanes)]
                    high = [lane + (lanes if lane & distance else distance) for lane in range(lanes)]
                    rows[k] = builder.shuffle_vector(a, b, ir.VectorType(i32, lanes)(low))
                    rows[k + distance] = builder.shuffle_vector(a, b, ir.VectorType(i32, lanes)(high))
            distance *= 2
        for k, row in enumerate(rows):
            builder.store(row, place(to_at, to_by, k), align=bits // 8)
        return context.get_dummy_value()

    return types.void(like, to, to_step, source, source_step), codegen


@compiled
def product(like, out, pitch, panels, lows, highs, inputs, width):
    """Add packed weights times inputs to out, over `width` rows (full vectors); `like` is an array of the dtype."""
    item = like.itemsize
    lanes, r = VECTOR_BYTES // item, 0
    while r < width:
        two = r + 2 * lanes <= width
        at, to = panels, out + r * item
        for p in range(len(lows)):
            K = highs[p] - lows[p]
            source = inputs + lows[p] * pitch + r * item
            if two:
                _pair(like, to, pitch, at, item, UNITS * item, source, pitch, K)
            else:
                _single(like, to, pitch, at, item, UNITS * item, source, pitch, K)
            at += K * UNITS * item
            to += UNITS * pitch
        r += 2 * lanes if two else lanes


@compiled
def thin_product(like, out, pitch, weight, unit_step, k_step, inputs, units, K, width):
    """Add weights that are not packed times inputs to `units` rows of out, and to no other row. Steps are in bytes."""
    item = like.itemsize
    lanes, r = VECTOR_BYTES // item, 0
    while r < width and K > 0:
        two = r + 2 * lanes <= width
        to, source, at, u = out + r * item, inputs + r * item, weight, 0
        while u < units:
            full = u + UNITS <= units
            if full and two:
                _pair(like, to, pitch, at, unit_step, k_step, source, pitch, K)
            elif full:
                _single(like, to, pitch, at, unit_step, k_step, source, pitch, K)
            elif two:
                _pair_of_one(like, to, pitch, at, unit_step, k_step, source, pitch, K)
            else:
                _single_of_one(like, to, pitch, at, unit_step, k_step, source, pitch, K)
            done = UNITS if full else 1
            at += done * unit_step
            to += done * pitch
            u += done
        r += 2 * lanes if two else lanes


@compiled
def pack(panels, weight, context_weight, reach, lows, highs):
    """Pack the columns of both weights for `product`; reach[u] counts the columns that unit u sees. Return the size."""
    at, C = 0, context_weight.shape[1]
    for p in range(len(lows)):
        for j in range(UNITS):
            u = p * UNITS + j
            seen = reach[u] if u < len(reach) else 0
            for k in range(min(seen, C)):
                panels[at + k * UNITS + j] = context_weight[u, k]
            for k in range(C, seen):
                panels[at + k * UNITS + j] = weight[u, k - C]
            for k in range(seen, highs[p]):
                panels[at + k * UNITS + j] = 0
        at += highs[p] * UNITS
    return at


@compiled
def pack_transposed(panels, weight, context_weight, reach, lows, highs):
    """Pack the transposed weights for `product`. Return the size."""
    at, C = 0, context_weight.shape[1]
    inputs = C + weight.shape[1]
    for p in range(len(lows)):
        for u in range(lows[p], highs[p]):
            seen = min(reach[u], inputs)
            for j in range(UNITS):
                k = p * UNITS + j
                if k >= seen:
                    panels[at + j] = 0
                elif k < C:
                    panels[at + j] = context_weight[u, k]
                else:
                    panels[at + j] = weight[u, k - C]
            at += UNITS
    return at


@compiled
def transpose(like, to, to_step, source, pitch, units, width):
    """Transpose (units, width) to (width, units), in full squares beyond the last unit. Steps are in bytes."""
    item = like.itemsize
    lanes = VECTOR_BYTES // item
    for r in range(0, width, lanes):
        for k in range(0, units, lanes):
            _transpose_square(like, to + r * to_step + k * item, to_step, source + k * pitch + r * item, pitch)


@compiled
def add_outer_product(like, gradient, step, adjoint, pitch, inputs, input_step, reach, rows):
    """Add adjoint (units, rows) @ inputs (rows, 1 + columns) to gradient, in the columns that each panel of units sees.

    Column 0 of the inputs is 1: it sums the adjoints, for the bias.
    """
    item = like.itemsize
    lanes = VECTOR_BYTES // item
    units = len(reach)
    columns, k = 1 + reach[units - 1], 0
    first = 0
    while k < columns:
        two = k + lanes < columns
        while k > reach[min(first + UNITS, units) - 1]:  # panels that see nothing from column k on
            first += UNITS
        for u in range(first, units, UNITS):
            out, by, at = gradient + u * step + k * item, adjoint + u * pitch, inputs + k * item
            if two:
                _pair(like, out, step, by, pitch, item, at, input_step, rows)
            else:
                _single(like, out, step, by, pitch, item, at, input_step, rows)
        k += 2 * lanes if two else lanes
