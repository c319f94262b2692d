"""The kernels of a chain: its value and log_det, the pullback of their cotangents, and the push of a score.

A tile of rows goes through all stages while its values stay in cache. Its buffer, the tape, holds for each stage the
context and the features that it is given, the hidden layers after their activation (and before it where the slope is a
function of that), and the parameters; the result of a stage is written to the rows where the next one reads it. Rows of
the buffer of adjoints are those of the tape.
"""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]  # missing in its stubs
from numba.extending import intrinsic

from counterflow.engine.cpu import fields as f
from counterflow.engine.cpu.arrays import add, copy, fill, integers, pointer, take_number
from counterflow.engine.cpu.compilation import VECTOR_BYTES, compiled, entry
from counterflow.engine.cpu.maps import rows_at
from counterflow.engine.cpu.panels import (
    add_outer_product,
    pack,
    pack_transposed,
    product,
    thin_product,
    transpose,
)


@intrinsic
def _call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call the C function at an address with the address of its arguments."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
        builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], byte)])
        return context.get_dummy_value()

    return types.void(function, arguments), codegen


@intrinsic
def _finish_chunk(typing: Any, counter: Any) -> Any:
    """Increment a counter after everything that this thread has written, and return its value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.gep(args[0], [ir.IntType(64)(f.DONE)])
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")

    return types.int64(counter), codegen


@compiled
def _address(array):
    return np.int64(array.ctypes.data)


@compiled
def _table(address, size, numbers):
    return carray(pointer(address, numbers), size)


@compiled
def _load(row, address, step, left, rows, like):
    """Copy a column of a matrix, rows from `left` on, to a row of a tile."""
    column = carray(pointer(address, like), (left + rows) * step + 1)
    for r in range(rows):
        row[r] = column[(left + r) * step]


@compiled
def _store(matrix, left, rows, source, index):
    """Copy rows of a tile to columns of a contiguous matrix."""
    for i in range(len(index)):
        row = source[index[i]]
        for r in range(rows):
            matrix[left + r, i] = row[r]


@compiled
def _weights(numbers, level, like):
    """Return the weight, the context's weight, the reach and the panels of a level."""
    units, contexts = numbers[level + f.UNITS_COUNT], numbers[level + f.CONTEXT_INPUTS]
    inputs = numbers[level + f.INPUTS]
    weight = rows_at(numbers[level + f.WEIGHT], units, inputs - contexts, like)
    context_weight = rows_at(numbers[level + f.CONTEXT_WEIGHT], units, contexts, like)
    return weight, context_weight, _table(numbers[level + f.REACH], units, numbers)


@compiled
def _panels(numbers, level):
    count = numbers[level + f.PANEL_COUNT]
    return _table(numbers[level + f.LOWS], count, numbers), _table(numbers[level + f.HIGHS], count, numbers)


@compiled
def _back_panels(numbers, level):
    count = numbers[level + f.BACK_PANEL_COUNT]
    return _table(numbers[level + f.BACK_LOWS], count, numbers), _table(numbers[level + f.BACK_HIGHS], count, numbers)


@compiled
def _stage_and_levels(numbers, s):
    stage = f.CHAIN_FIELDS + s * f.STAGE_FIELDS
    first = numbers[f.LEVELS] + numbers[stage + f.FIRST_LEVEL] * f.LEVEL_FIELDS
    return stage, first, first + numbers[stage + f.LEVEL_COUNT] * f.LEVEL_FIELDS


@compiled
def _pass_forward(numbers, stage, level, last, tile, panels, total, arguments, work, left, rows, width, like):
    """Run a network and its univariate map on a tile."""
    item = panels.itemsize
    pitch, base = tile.shape[1] * item, _address(tile)
    first = numbers[level + f.INPUT]
    for k in range(numbers[level + f.CONTEXT_INPUTS]):
        at = numbers[f.C] + k * numbers[f.C_COLUMN] * item
        _load(tile[first + k], at, numbers[f.C_ROW], left, rows, like)
    while level < last:
        units, before = numbers[level + f.UNITS_COUNT], numbers[level + f.BEFORE]
        bias = carray(pointer(numbers[level + f.BIAS], like), units)
        for u in range(units):
            fill(tile[before + u, :width], bias[u])
        lows, highs = _panels(numbers, level)
        packed = _address(panels) + numbers[level + f.PANEL_AT] * item
        source = base + numbers[level + f.INPUT] * pitch
        product(panels, base + before * pitch, pitch, packed, lows, highs, source, width)
        after = numbers[level + f.AFTER]
        if numbers[level + f.ACTIVATE]:
            if after != before:
                for u in range(units):
                    copy(tile[after + u, :width], tile[before + u, :width])
            arguments[f.ACT_ROWS] = units
            arguments[f.ACT_WIDTH] = width
            arguments[f.ACT_STEP] = tile.shape[1]
            arguments[f.ACT_AT] = base + after * pitch
            _call(numbers[level + f.ACTIVATE], _address(arguments))
        level += f.LEVEL_FIELDS
    _fill_arguments(numbers, stage, tile, work, width, arguments)
    arguments[f.MAP_LOG_DET] = _address(total)
    arguments[f.MAP_BASE] = base
    _call(numbers[stage + f.EVALUATE], _address(arguments))


@compiled
def _fill_arguments(numbers, stage, tile, work, width, arguments):
    pitch, base = tile.shape[1] * tile.itemsize, _address(tile)
    arguments[f.MAP_FEATURES] = numbers[f.FEATURES]
    arguments[f.MAP_PARAMETERS] = numbers[stage + f.PARAMETERS]
    arguments[f.MAP_WIDTH] = width
    arguments[f.MAP_STEP] = tile.shape[1]
    arguments[f.MAP_X] = base + numbers[stage + f.IN] * pitch
    arguments[f.MAP_PARAMS] = base + numbers[stage + f.PARAMS] * pitch
    arguments[f.MAP_CONSTANTS] = numbers[stage + f.CONSTANTS]
    arguments[f.MAP_INDEX] = numbers[stage + f.OUT_INDEX]
    arguments[f.MAP_TERMS] = numbers[stage + f.STAGE_TERMS]
    arguments[f.MAP_WORK] = _address(work)


@compiled
def _scale_forward(numbers, stage, tile, total, width, like):
    """Shift and scale the features of a tile."""
    D = numbers[f.FEATURES]
    constants = carray(pointer(numbers[stage + f.SCALE], like), 4 * D)
    index, terms = _table(numbers[stage + f.OUT_INDEX], D, numbers), _table(numbers[stage + f.STAGE_TERMS], D, numbers)
    for i in range(D):
        x, y, log_det = tile[numbers[stage + f.IN] + i], tile[index[i]], total[terms[i]]
        scale, before, after, log_scale = constants[i], constants[D + i], constants[2 * D + i], constants[3 * D + i]
        for r in range(width):
            y[r] = (x[r] - before) * scale + after
            log_det[r] += log_scale


@compiled
def _forward(like):
    """Compute tiles until none is left."""
    numbers = integers(like)
    D, step, tape_rows = numbers[f.FEATURES], numbers[f.STEP], numbers[f.TAPE_ROWS]
    kept = numbers[f.TAPE] != 0
    panels = np.empty(numbers[f.PANELS], rows_at(numbers[f.Y], 1, D, like).dtype)
    item = panels.itemsize
    lanes = VECTOR_BYTES // item
    for s in range(numbers[f.STAGES]):
        stage, level, last = _stage_and_levels(numbers, s)
        while level < last:
            weight, context_weight, reach = _weights(numbers, level, like)
            lows, highs = _panels(numbers, level)
            pack(panels[numbers[level + f.PANEL_AT] :], weight, context_weight, reach, lows, highs)
            level += f.LEVEL_FIELDS
    own = np.empty((1 if kept else tape_rows, step), panels.dtype)
    work = np.empty((numbers[f.WORK_ROWS], step), panels.dtype)
    terms = numbers[f.TERMS]
    total = np.empty((terms, step), panels.dtype)
    arguments = np.empty(f.MAP_ARGUMENTS, np.int64)
    y, log_det = rows_at(numbers[f.Y], numbers[f.N], D, like), rows_at(numbers[f.LOG_DET], numbers[f.N], terms, like)
    term_index = _table(numbers[f.TERM_INDEX], terms, numbers)
    input_index, output_index = _table(numbers[f.INPUT_INDEX], D, numbers), _table(numbers[f.OUTPUT_INDEX], D, numbers)
    while True:
        t = take_number(numbers)
        if t >= numbers[f.TILES]:
            break
        left = t * numbers[f.TILE_ROWS]
        rows = min(numbers[f.TILE_ROWS], numbers[f.N] - left)
        width = -(-rows // lanes) * lanes
        tile = rows_at(numbers[f.TAPE] + t * tape_rows * step * item, tape_rows, step, like) if kept else own
        for k in range(terms):
            fill(total[k, :width], 0)
        for i in range(D):
            _load(
                tile[input_index[i]], numbers[f.X] + i * numbers[f.X_COLUMN] * item, numbers[f.X_ROW], left, rows, like
            )
        for s in range(numbers[f.STAGES]):
            stage, level, last = _stage_and_levels(numbers, s)
            if numbers[stage + f.KIND] == f.PASS:
                _pass_forward(
                    numbers, stage, level, last, tile, panels, total, arguments, work, left, rows, width, like
                )
            else:
                _scale_forward(numbers, stage, tile, total, width, like)
        _store(y, left, rows, tile, output_index)
        _store(log_det, left, rows, total, term_index)


@compiled
def _pass_back(
    numbers, stage, level, last, tile, bars, panels, w, arguments, work, turned, gradient, rows, width, like
):
    """Pull cotangents back through a map and its network, and add the gradients of the weights."""
    item = panels.itemsize
    pitch, base = tile.shape[1] * item, _address(bars)
    _fill_arguments(numbers, stage, tile, work, width, arguments)
    arguments[f.MAP_LOG_DET] = _address(w)
    arguments[f.MAP_BASE] = base
    arguments[f.MAP_X_BAR] = base + numbers[stage + f.IN] * pitch
    arguments[f.MAP_PARAMS_BAR] = base + numbers[stage + f.PARAMS] * pitch
    _call(numbers[stage + f.PULL], _address(arguments))
    first, level = level, last - f.LEVEL_FIELDS
    while level >= first:
        units, after = numbers[level + f.UNITS_COUNT], numbers[level + f.AFTER]
        source, inputs = numbers[level + f.INPUT], numbers[level + f.INPUTS]
        if numbers[level + f.MULTIPLY_SLOPE]:
            arguments[f.ACT_ROWS] = units
            arguments[f.ACT_WIDTH] = width
            arguments[f.ACT_STEP] = tile.shape[1]
            arguments[f.ACT_AT] = base + after * pitch
            arguments[f.ACT_VALUES] = _address(tile) + numbers[level + f.SLOPE_OF] * pitch
            _call(numbers[level + f.MULTIPLY_SLOPE], _address(arguments))
        if numbers[level + f.WEIGHT_BAR] or numbers[level + f.CONTEXT_WEIGHT_BAR] or numbers[level + f.BIAS_BAR]:
            transpose(
                panels,
                _address(turned) + item,
                turned.shape[1] * item,
                _address(tile) + source * pitch,
                pitch,
                inputs,
                width,
            )
            add_outer_product(
                panels,
                gradient + numbers[level + f.GRADIENT] * item,
                numbers[level + f.GRADIENT_STEP] * item,
                base + after * pitch,
                pitch,
                _address(turned),
                turned.shape[1] * item,
                _table(numbers[level + f.REACH], units, numbers),
                rows,
            )
        filled = inputs if level > first else numbers[level + f.CONTEXT_INPUTS]  # the features hold their direct part
        for k in range(filled):
            fill(bars[source + k, :width], 0)
        lows, highs = _back_panels(numbers, level)
        packed = _address(panels) + numbers[level + f.BACK_PANEL_AT] * item
        # The units that a panel reads begin with the first one that sees it.
        product(panels, base + source * pitch, pitch, packed, lows, highs, base + after * pitch, width)
        level -= f.LEVEL_FIELDS


@compiled
def _back(like):
    """Pull cotangents back for chunks of tiles until none is left, and sum the gradients of the weights."""
    numbers = integers(like)
    D, step, tape_rows, contexts = numbers[f.FEATURES], numbers[f.STEP], numbers[f.TAPE_ROWS], numbers[f.CONTEXT]
    panels = np.empty(numbers[f.BACK_PANELS], rows_at(numbers[f.TAPE], 1, step, like).dtype)
    item = panels.itemsize
    lanes = VECTOR_BYTES // item
    for s in range(numbers[f.STAGES]):
        stage, level, last = _stage_and_levels(numbers, s)
        while level < last:
            weight, context_weight, reach = _weights(numbers, level, like)
            lows, highs = _back_panels(numbers, level)
            pack_transposed(panels[numbers[level + f.BACK_PANEL_AT] :], weight, context_weight, reach, lows, highs)
            level += f.LEVEL_FIELDS
    bars = np.empty((tape_rows, step), panels.dtype)
    work = np.empty((numbers[f.WORK_ROWS], step), panels.dtype)
    turned = np.empty((numbers[f.TILE_ROWS], numbers[f.COLUMNS]), panels.dtype)
    turned[:, 0] = 1
    w = np.empty((numbers[f.TERMS], step), panels.dtype)
    term_index = _table(numbers[f.TERM_INDEX], numbers[f.TERMS], numbers)
    c_sum = np.empty((max(contexts, 1), step), panels.dtype)
    arguments = np.empty(f.MAP_ARGUMENTS, np.int64)
    identity = np.arange(max(D, contexts))
    input_index, output_index = _table(numbers[f.INPUT_INDEX], D, numbers), _table(numbers[f.OUTPUT_INDEX], D, numbers)
    while True:
        chunk = take_number(numbers)
        if chunk >= numbers[f.CHUNKS]:
            break
        gradient = numbers[f.GRADIENTS] + chunk * numbers[f.GRADIENT_SIZE] * item
        fill(carray(pointer(gradient, like), numbers[f.GRADIENT_SIZE]), 0)
        begin, end = chunk * numbers[f.TILES] // numbers[f.CHUNKS], (chunk + 1) * numbers[f.TILES] // numbers[f.CHUNKS]
        for t in range(begin, end):
            left = t * numbers[f.TILE_ROWS]
            rows = min(numbers[f.TILE_ROWS], numbers[f.N] - left)
            width = -(-rows // lanes) * lanes
            tile = rows_at(numbers[f.TAPE] + t * tape_rows * step * item, tape_rows, step, like)
            for i in range(D):
                at = numbers[f.Y_BAR] + i * numbers[f.Y_BAR_COLUMN] * item
                _load(bars[output_index[i]], at, numbers[f.Y_BAR_ROW], left, rows, like)
            for k in range(numbers[f.TERMS]):
                at = numbers[f.LOG_DET_BAR] + k * numbers[f.LOG_DET_BAR_COLUMN] * item
                _load(w[term_index[k]], at, numbers[f.LOG_DET_BAR_ROW], left, rows, like)
            c_sum[:] = 0
            for s in range(numbers[f.STAGES] - 1, -1, -1):
                stage, level, last = _stage_and_levels(numbers, s)
                if numbers[stage + f.KIND] == f.PASS:
                    _pass_back(
                        numbers,
                        stage,
                        level,
                        last,
                        tile,
                        bars,
                        panels,
                        w,
                        arguments,
                        work,
                        turned,
                        gradient,
                        rows,
                        width,
                        like,
                    )
                    for k in range(numbers[level + f.CONTEXT_INPUTS]):
                        add(c_sum[k, :width], bars[numbers[level + f.INPUT] + k, :width])
                else:
                    scale, index = carray(pointer(numbers[stage + f.SCALE], like), D), numbers[stage + f.OUT_INDEX]
                    for i in range(D):
                        x_bar = bars[numbers[stage + f.IN] + i]
                        y_bar = bars[_table(index, D, numbers)[i]]
                        for r in range(width):
                            x_bar[r] = y_bar[r] * scale[i]
            if numbers[f.X_BAR]:
                _store(rows_at(numbers[f.X_BAR], numbers[f.N], D, like), left, rows, bars, input_index)
            if numbers[f.C_BAR]:
                _store(rows_at(numbers[f.C_BAR], numbers[f.N], contexts, like), left, rows, c_sum, identity[:contexts])
        if _finish_chunk(numbers) == numbers[f.CHUNKS] - 1:
            for s in range(numbers[f.STAGES]):
                stage, level, last = _stage_and_levels(numbers, s)
                while level < last:
                    _sum_chunks(numbers, level, like)
                    level += f.LEVEL_FIELDS


@compiled
def _pass_push(numbers, stage, level, tile, bars, v, w, arguments, work, width, like):
    """Solve the transposed system of a layer, block by block of degrees from the last to the first.

    bars receives the adjoints of the network, and the score of the result in the rows where the next stage reads it.
    """
    item = tile.itemsize
    pitch, base = tile.shape[1] * item, _address(bars)
    D, P, start = numbers[f.FEATURES], numbers[stage + f.PARAMETERS], numbers[stage + f.IN]
    top, groups = numbers[stage + f.LEVEL_COUNT], numbers[stage + f.GROUPS]
    below = carray(pointer(numbers[stage + f.BELOW], numbers), (top + 1, groups + 1))
    blocks = _table(numbers[stage + f.BLOCKS], numbers[stage + f.BLOCK_COUNT] + 1, numbers)
    index, terms = numbers[stage + f.OUT_INDEX], numbers[stage + f.STAGE_TERMS]
    for i in range(D):
        copy(v[i, :width], bars[start + i, :width])
        fill(bars[start + i, :width], 0)
    for k in range(top):
        at = level + k * f.LEVEL_FIELDS
        for u in range(numbers[at + f.UNITS_COUNT]):
            fill(bars[numbers[at + f.AFTER] + u, :width], 0)
    for b in range(len(blocks) - 2, -1, -1):
        begin, end = blocks[b], blocks[b + 1]
        for g in range(end - 1, begin - 2, -1):  # the last round sends everything to the degrees before the block
            rest = g < begin
            for k in range(top - 1, -1, -1):
                at = level + k * f.LEVEL_FIELDS
                contexts = numbers[at + f.CONTEXT_INPUTS]
                by = below[k + 1, begin if rest else (g + 1 if k == top - 1 else g)]
                to = 0 if rest else below[k, g]
                units = below[k, g + 1] - to
                row = (numbers[at + f.INPUTS] - contexts) * item
                thin_product(
                    tile,
                    base + (numbers[at + f.INPUT] + contexts + to) * pitch,
                    pitch,
                    numbers[at + f.WEIGHT] + by * row + to * item,
                    item,
                    row,
                    base + (numbers[at + f.AFTER] + by) * pitch,
                    units,
                    below[k + 1, end] - by,
                    width,
                )
                if k > 0 and not rest:
                    before = at - f.LEVEL_FIELDS
                    arguments[f.ACT_ROWS] = units
                    arguments[f.ACT_WIDTH] = width
                    arguments[f.ACT_STEP] = tile.shape[1]
                    arguments[f.ACT_AT] = base + (numbers[before + f.AFTER] + to) * pitch
                    arguments[f.ACT_VALUES] = _address(tile) + (numbers[before + f.SLOPE_OF] + to) * pitch
                    _call(numbers[before + f.MULTIPLY_SLOPE], _address(arguments))
            if not rest and below[0, g + 1] > below[0, g]:
                i = below[0, g]
                _fill_arguments(numbers, stage, tile, work, width, arguments)
                arguments[f.MAP_FEATURES] = below[0, g + 1] - i
                arguments[f.MAP_X] += i * pitch
                arguments[f.MAP_PARAMS] += i * P * pitch
                arguments[f.MAP_INDEX] = index + i * 8
                arguments[f.MAP_TERMS] = terms + i * 8
                arguments[f.MAP_LOG_DET] = _address(w)
                arguments[f.MAP_BASE] = base
                arguments[f.MAP_X_BAR] = base + (start + i) * pitch
                arguments[f.MAP_PARAMS_BAR] = base + (numbers[stage + f.PARAMS] + i * P) * pitch
                arguments[f.MAP_SCORE] = _address(v) + i * pitch
                _call(numbers[stage + f.PUSH], _address(arguments))


@compiled
def _push(like):
    """Carry scores through all stages for tiles of rows until none is left."""
    numbers = integers(like)
    D, step, tape_rows = numbers[f.FEATURES], numbers[f.STEP], numbers[f.TAPE_ROWS]
    bars = np.empty((tape_rows, step), rows_at(numbers[f.TAPE], 1, step, like).dtype)
    item = bars.itemsize
    lanes = VECTOR_BYTES // item
    v = np.empty((D, step), bars.dtype)
    w = np.ones((1, step), bars.dtype)
    work = np.empty((numbers[f.WORK_ROWS], step), bars.dtype)
    arguments = np.empty(f.MAP_ARGUMENTS, np.int64)
    input_index, output_index = _table(numbers[f.INPUT_INDEX], D, numbers), _table(numbers[f.OUTPUT_INDEX], D, numbers)
    result = rows_at(numbers[f.Y], numbers[f.N], D, like)
    while True:
        t = take_number(numbers)
        if t >= numbers[f.TILES]:
            break
        left = t * numbers[f.TILE_ROWS]
        rows = min(numbers[f.TILE_ROWS], numbers[f.N] - left)
        width = -(-rows // lanes) * lanes
        tile = rows_at(numbers[f.TAPE] + t * tape_rows * step * item, tape_rows, step, like)
        for i in range(D):
            at = numbers[f.X] + i * numbers[f.X_COLUMN] * item
            _load(bars[input_index[i]], at, numbers[f.X_ROW], left, rows, like)
        for s in range(numbers[f.STAGES]):
            stage, level, _ = _stage_and_levels(numbers, s)
            if numbers[stage + f.KIND] == f.PASS:
                _pass_push(numbers, stage, level, tile, bars, v, w, arguments, work, width, like)
            else:
                scale, index = carray(pointer(numbers[stage + f.SCALE], like), D), numbers[stage + f.OUT_INDEX]
                for i in range(D):
                    u, given = bars[_table(index, D, numbers)[i]], bars[numbers[stage + f.IN] + i]
                    for r in range(width):
                        u[r] = given[r] / scale[i]
        _store(result, left, rows, bars, output_index)


@compiled
def _sum_chunks(numbers, level, like):
    """Write the gradients of a level's weights, 0 where the degrees forbid."""
    units, contexts = numbers[level + f.UNITS_COUNT], numbers[level + f.CONTEXT_INPUTS]
    inputs, step, size = numbers[level + f.INPUTS], numbers[level + f.GRADIENT_STEP], numbers[f.GRADIENT_SIZE]
    chunks = rows_at(numbers[f.GRADIENTS], numbers[f.CHUNKS], size, like)
    reach = _table(numbers[level + f.REACH], units, numbers)
    for u in range(units):
        at = numbers[level + f.GRADIENT] + u * step
        for chunk in range(1, numbers[f.CHUNKS]):
            add(chunks[0, at : at + 1 + reach[u]], chunks[chunk, at : at + 1 + reach[u]])
        row = chunks[0, at : at + 1 + inputs]
        fill(row[1 + reach[u] :], 0)
        if numbers[level + f.BIAS_BAR]:
            carray(pointer(numbers[level + f.BIAS_BAR], like), units)[u] = row[0]
        if numbers[level + f.CONTEXT_WEIGHT_BAR]:
            copy(rows_at(numbers[level + f.CONTEXT_WEIGHT_BAR], units, contexts, like)[u], row[1 : 1 + contexts])
        if numbers[level + f.WEIGHT_BAR]:
            copy(rows_at(numbers[level + f.WEIGHT_BAR], units, inputs - contexts, like)[u], row[1 + contexts :])


chain_forward, chain_back, chain_push = (
    entry(name, function)
    for name, function in (("chain_forward", _forward), ("chain_back", _back), ("chain_push", _push))
)
