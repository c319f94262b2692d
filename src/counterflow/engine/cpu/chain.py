"""Jobs of a chain: what the kernels of `passes` need to know, built once for each chain and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from counterflow.engine.chain import Pass, Permutation, Stage
from counterflow.engine.cpu import fields as f
from counterflow.engine.cpu.arrays import UNITS
from counterflow.engine.cpu.background import Kernels, chain_kernels, ready
from counterflow.engine.cpu.compilation import VECTOR_BYTES, address_of, machine_code
from counterflow.engine.cpu.jobs import (
    MAX_TILE_ROWS,
    ONE_THREAD_WORK,
    block_starts,
    degree_ends,
    map_code,
    map_constants,
)
from counterflow.engine.cpu.maps import activation_kernels, map_kernels
from counterflow.engine.cpu.passes import chain_back, chain_forward, chain_push
from counterflow.engine.cpu.threads import run_on_threads
from counterflow.made.activations import ACTIVATIONS

OPERATIONS = ("forward", "back", "push")
NAMES = {activation: name for name, activation in ACTIVATIONS.items()}


def _round_up(size: int, to: int) -> int:
    return -(-size // to) * to


class _Plan:
    """Everything about a chain that is the same in every call.

    Attributes:
        job: a job without sizes and addresses of tensors.
        addresses: positions in the job of the tensors' addresses, in order.
        gradients: positions in the job of the addresses of their gradients; 0 where a tensor has none.
        work: multiply-adds per row.
    """

    def __init__(self, stages: tuple[Stage, ...], dtype: torch.dtype, by_feature: bool) -> None:
        self.dtype = dtype
        self.lanes = VECTOR_BYTES // (4 if dtype == torch.float32 else 8)
        self.kernels: dict[str, Any] = {}  # by operation, as far as they were called
        self.tables: list[np.ndarray[Any, Any]] = []  # kept alive: the job holds their addresses
        self.addresses: list[int] = []
        self.gradients: list[int] = []
        self.work = 0
        active = [stage for stage in stages if not isinstance(stage, Permutation)]
        levels = sum(len(stage.layout.ends) for stage in active if isinstance(stage, Pass))
        self.levels_at = f.CHAIN_FIELDS + f.STAGE_FIELDS * len(active)
        self.job = np.zeros(self.levels_at + f.LEVEL_FIELDS * levels, np.int64)
        first = stages[0]
        D = first.features if hasattr(first, "features") else len(first.order)
        self.rows = 0  # of the tape so far
        self.levels = 0  # so far
        self.panels = 0
        self.back_panels = 0
        self.gradient_size = 0
        self.columns = 1
        self.activations: list[tuple[int, str]] = []  # position of a level, and the name of its activation
        self.codes: list[tuple[int, int]] = []  # position of a stage, and the code of its map
        order = list(range(D))  # the value so far is what the last stage wrote, in this order
        terms = list(range(D))  # the term of log_det that belongs to each feature of the value so far
        orders = []
        stage_at = f.CHAIN_FIELDS
        starts = []
        for stage in stages:
            if isinstance(stage, Permutation):
                order = [order[i] for i in stage.order]
                terms = [terms[i] for i in stage.order]
                continue
            features = list(stage.order) if isinstance(stage, Pass) else list(range(D))
            wanted = [order[i] for i in features]  # row i of the stage is number wanted[i] of what was written before
            orders.append(wanted)
            starts.append(self._add_stage(stage, stage_at, D))
            self.job[stage_at + f.STAGE_TERMS] = self._table([terms[i] if by_feature else 0 for i in features])
            order = list(np.argsort(features))
            stage_at += f.STAGE_FIELDS
        final = self.rows
        self.rows += _round_up(D, UNITS)
        rows = [np.argsort(wanted) + start for wanted, start in zip(orders, starts, strict=True)]
        rows.append(np.arange(D) + final)
        for k in range(len(active)):
            self.job[f.CHAIN_FIELDS + k * f.STAGE_FIELDS + f.OUT_INDEX] = self._table(rows[k + 1])
        self.input_rows = rows[0]
        self.terms = terms if by_feature else [0]
        head = {
            f.TERMS: len(self.terms),
            f.TERM_INDEX: self._table(self.terms),
            f.STAGES: len(active),
            f.FEATURES: D,
            f.CONTEXT: max((stage.context for stage in active if isinstance(stage, Pass)), default=0),
            f.TAPE_ROWS: self.rows,
            f.INPUT_INDEX: self._table(rows[0]),
            f.OUTPUT_INDEX: self._table(np.array(order) + final),
            f.LEVELS: self.levels_at,
            f.PANELS: self.panels,
            f.BACK_PANELS: self.back_panels,
            f.GRADIENT_SIZE: self.gradient_size,
            f.COLUMNS: self.lanes * (_round_up(self.columns + self.lanes, self.lanes) // self.lanes | 1),
        }
        for position, value in head.items():
            self.job[position] = value
        self.job[f.WORK_ROWS] = self.work_rows = max((self._work_rows(s) for s in active), default=1)

    @staticmethod
    def _work_rows(stage: Stage) -> int:
        return 2 * ((stage.layout.univariate.parameters + 1) // 3) + 13 if isinstance(stage, Pass) else 1

    def _table(self, values: Any, dtype: Any = np.int64) -> int:
        """Keep a table and return its address."""
        self.tables.append(np.ascontiguousarray(values, dtype))
        return self.tables[-1].ctypes.data

    def _take_rows(self, count: int) -> int:
        first = self.rows
        self.rows += _round_up(count, UNITS)
        return first

    def _add_stage(self, stage: Stage, at: int, D: int) -> int:
        """Write a stage and its levels, and return the row of its first feature."""
        job = self.job
        if not isinstance(stage, Pass):
            job[at + f.KIND] = f.DIAGONAL
            job[at + f.IN] = self._take_rows(D)
            self.addresses.append(at + f.SCALE)
            self.gradients.append(0)
            return int(job[at + f.IN])
        layout, C = stage.layout, stage.context
        P = layout.univariate.parameters
        number_type = np.float32 if self.dtype == torch.float32 else np.float64
        job[at + f.KIND] = f.PASS
        job[at + f.IN] = self._take_rows(C + D) + C
        job[at + f.FIRST_LEVEL] = self.levels
        job[at + f.LEVEL_COUNT] = len(layout.ends)
        job[at + f.PARAMETERS] = P
        job[at + f.CONSTANTS] = self._table(map_constants(layout.univariate), number_type)
        self.codes.append((at, map_code(layout.univariate)))
        below = degree_ends(layout)
        blocks = block_starts(below)
        job[at + f.GROUPS] = below.shape[1] - 1
        job[at + f.BELOW] = self._table(below)
        job[at + f.BLOCKS] = self._table(blocks)
        job[at + f.BLOCK_COUNT] = len(blocks) - 1
        source = int(job[at + f.IN]) - C
        degrees = [[g for g, (a, b) in enumerate(pairwise((0, *ends))) for _ in range(a, b)] for ends in layout.ends]
        top = len(layout.ends) - 1
        for k in range(top + 1):
            level = self.levels_at + self.levels * f.LEVEL_FIELDS
            self.levels += 1
            context = C if k == 0 else 0
            ends = layout.ends[k]
            if k < top:
                reach = np.array([ends[g] for g in degrees[k + 1]]) + context
            else:
                reach = np.repeat(np.array([ends[g - 1] for g in degrees[0]]), P) + context
            name = NAMES[layout.activation] if k < top else None
            after = self._take_rows(len(reach))
            before = self._take_rows(len(reach)) if name == "silu" else after
            if name is not None:
                self.activations.append((level, name))
            self._add_level(level, reach, ends[-1] + context, context)
            self.work += int(reach.sum())
            for position, value in {
                f.INPUT: source,
                f.BEFORE: before,
                f.AFTER: after,
                f.SLOPE_OF: before,
            }.items():
                job[level + position] = value
            if context:
                self.addresses.append(level + f.CONTEXT_WEIGHT)
                self.gradients.append(level + f.CONTEXT_WEIGHT_BAR)
            self.addresses += [level + f.WEIGHT, level + f.BIAS]
            self.gradients += [level + f.WEIGHT_BAR, level + f.BIAS_BAR]
            source = after
        job[at + f.PARAMS] = source
        return int(job[at + f.IN])

    def _add_level(self, level: int, reach: np.ndarray[Any, Any], inputs: int, context: int) -> None:
        """Write the sizes and panels of a level."""
        units = len(reach)
        highs = reach[np.minimum(np.arange(0, units, UNITS) + UNITS, units) - 1]
        lows = np.zeros_like(highs)
        back_lows = np.searchsorted(reach, np.arange(0, inputs, UNITS), side="right")
        back_highs = np.full_like(back_lows, units)
        step = _round_up(1 + inputs, self.lanes)
        values = {
            f.UNITS_COUNT: units,
            f.INPUTS: inputs,
            f.CONTEXT_INPUTS: context,
            f.REACH: self._table(reach),
            f.PANEL_AT: self.panels,
            f.PANEL_COUNT: len(highs),
            f.LOWS: self._table(lows),
            f.HIGHS: self._table(highs),
            f.BACK_PANEL_AT: self.back_panels,
            f.BACK_PANEL_COUNT: len(back_highs),
            f.BACK_LOWS: self._table(back_lows),
            f.BACK_HIGHS: self._table(back_highs),
            f.GRADIENT: self.gradient_size,
            f.GRADIENT_STEP: step,
        }
        for position, value in values.items():
            self.job[level + position] = value
        self.panels += int(highs.sum()) * UNITS
        self.back_panels += int((back_highs - back_lows).sum()) * UNITS
        self.gradient_size += step * _round_up(units, UNITS)
        self.columns = max(self.columns, 1 + inputs)

    def kernel(self, operation: str) -> Any:
        """Return the compiled kernel of an operation, and write the addresses of the maps that it calls to the job."""
        if operation not in self.kernels:
            self.kernels[operation] = self._compile(OPERATIONS.index(operation))
        return self.kernels[operation]

    def _compile(self, k: int) -> Any:
        for at, code in self.codes:
            self.job[at + (f.EVALUATE, f.PULL, f.PUSH)[k]] = address_of(map_kernels(code)[k], self.dtype)
        for level, name in self.activations:
            kernel = activation_kernels(name)[min(k, 1)]
            self.job[level + (f.MULTIPLY_SLOPE if k else f.ACTIVATE)] = address_of(kernel, self.dtype)
        return machine_code((chain_forward, chain_back, chain_push)[k], self.dtype)

    def new_job(self, N: int) -> tuple[np.ndarray[Any, Any], int, int]:
        """Return a job for N rows, the number of its tiles and the number of threads."""
        job = self.job.copy()
        vectors = -(-N // self.lanes)
        threads = min(torch.get_num_threads(), max(vectors, 1)) if self.work * N > ONE_THREAD_WORK else 1
        per_thread = max(1, -(-vectors * self.lanes // (threads * MAX_TILE_ROWS)))
        tile_rows = max(1, -(-vectors // (threads * per_thread))) * self.lanes
        tiles = -(-N // tile_rows)
        job[f.N] = N
        job[f.TILE_ROWS] = tile_rows
        job[f.STEP] = self.lanes * (tile_rows // self.lanes | 1)
        job[f.TILES] = tiles
        job[f.CHUNKS] = threads
        return job, tiles, threads


@lru_cache(maxsize=256)
def _kernels_of(stages: tuple[Stage, ...]) -> Kernels:
    layouts = [stage.layout for stage in stages if isinstance(stage, Pass)]
    return chain_kernels({map_code(of.univariate) for of in layouts}, {NAMES[of.activation] for of in layouts})


def is_ready(stages: tuple[Stage, ...], dtype: torch.dtype) -> bool:
    """Return True if the chain can run at once; False while another process compiles it."""
    return ready(_kernels_of(stages), dtype)


@lru_cache(maxsize=256)
def _plan_for(stages: tuple[Stage, ...], dtype: torch.dtype, by_feature: bool) -> _Plan:
    return _Plan(stages, dtype, by_feature)


class _Call(NamedTuple):
    """A call of a kernel, to which outputs are added before it runs."""

    plan: _Plan
    kernel: Any
    job: np.ndarray[Any, Any]
    tiles: int
    threads: int
    alive: list[Tensor]  # the tensors at the addresses in the job

    def run(self) -> None:
        run_on_threads(self.kernel, self.job.ctypes.data, self.threads)


def _prepare(
    operation: str, stages: tuple[Stage, ...], tensors: Sequence[Tensor], x: Tensor, by_feature: bool = False
) -> _Call:
    """Return the call of "forward", "back" or "push" for as many rows as x has, with the addresses of the tensors."""
    plan = _plan_for(stages, x.dtype, by_feature)
    kernel = plan.kernel(operation)  # before the job is copied: the maps' addresses belong to it
    job, tiles, threads = plan.new_job(len(x))
    alive = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    job[plan.addresses] = [t.data_ptr() for t in alive]
    return _Call(plan, kernel, job, tiles, threads, alive)


def _write_matrix(job: np.ndarray[Any, Any], at: int, matrix: Tensor | None) -> None:
    """Write address, row step and column step of a matrix."""
    if matrix is not None:
        job[at] = matrix.data_ptr()
        job[at + 1], job[at + 2] = matrix.stride()


def forward(
    stages: tuple[Stage, ...], tensors: Sequence[Tensor], x: Tensor, c: Tensor | None, *, keep: bool, by_feature: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return y, log_det (N,) or its terms by feature (N, D), and, with keep, the tape that `back` and `push` read."""
    call = _prepare("forward", stages, tensors, x, by_feature)
    plan, job = call.plan, call.job
    _write_matrix(job, f.X, x)
    _write_matrix(job, f.C, c)
    y = x.new_empty(x.shape)
    log_det = x.new_empty(x.shape if by_feature else x.shape[:1])
    job[f.Y] = y.data_ptr()
    job[f.LOG_DET] = log_det.data_ptr()
    tape = None
    if keep:
        # `transpose` reads full squares, beyond the last row of the last tile.
        tape = x.new_empty((call.tiles * plan.rows + plan.lanes) * int(job[f.STEP]))
        job[f.TAPE] = tape.data_ptr()
    call.run()
    return y, log_det, tape


def back(
    stages: tuple[Stage, ...],
    tensors: Sequence[Tensor],
    needed: Sequence[bool],
    x: Tensor,
    c: Tensor | None,
    tape: Tensor,
    y_bar: Tensor,
    log_det_bar: Tensor,
) -> list[Tensor | None]:
    """Return the gradients of x, c and the tensors from the cotangents of y and log_det; None where not needed."""
    by_feature = log_det_bar.dim() == 2
    call = _prepare("back", stages, tensors, x, by_feature)
    plan, job = call.plan, call.job
    job[f.TAPE] = tape.data_ptr()
    _write_matrix(job, f.Y_BAR, y_bar)
    _write_matrix(job, f.LOG_DET_BAR, log_det_bar if by_feature else log_det_bar[:, None])
    gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted and position else None
        for t, wanted, position in zip(tensors, needed[2:], plan.gradients, strict=True)
    ]
    job[plan.gradients] = [0 if g is None else g.data_ptr() for g in gradients]
    x_bar = x.new_empty(x.shape) if needed[0] else None
    c_bar = None if c is None or not needed[1] else c.new_empty(c.shape)
    job[f.X_BAR] = 0 if x_bar is None else x_bar.data_ptr()
    job[f.C_BAR] = 0 if c_bar is None else c_bar.data_ptr()
    sums = x.new_empty(call.threads * plan.gradient_size)
    job[f.GRADIENTS] = sums.data_ptr()
    call.run()
    return [x_bar, c_bar, *gradients]


def push(stages: tuple[Stage, ...], tensors: Sequence[Tensor], tape: Tensor, score: Tensor) -> Tensor:
    """Return the score at y, (N, D), from the score at x, (N, D), and the tape of a forward call."""
    call = _prepare("push", stages, tensors, score)
    job = call.job
    job[f.TAPE] = tape.data_ptr()
    _write_matrix(job, f.X, score)
    result = score.new_empty(score.shape)
    job[f.Y] = result.data_ptr()
    call.run()
    return result
