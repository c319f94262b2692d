"""The table that a kernel reads: sizes, codes, and the addresses of matrices.

See `tables` for its layout. A kernel takes one argument, the address of a job, so that any number of weights fits one
compiled function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.engine.contract import Layout
from counterflow.engine.cpu.compilation import VECTOR_BYTES, machine_code
from counterflow.engine.cpu.elementary import ACTIVATION_CODES
from counterflow.engine.cpu.tables import (
    AFFINE,
    CLAMP,
    CLIPPED_SPLINE,
    GATED,
    SIGMOID,
    SINH_ARCSINH,
    SOFTCLIP,
    SOFTPLUS,
    SPLINE,
)
from counterflow.engine.cpu.threads import run_on_threads
from counterflow.univariate.affine import Affine, ForeignAffine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.sinh_arcsinh import SinhArcsinh
from counterflow.univariate.spline import RationalQuadraticSpline

MAP_TYPES: dict[type, int] = {
    Affine: AFFINE,
    Gated: GATED,
    RationalQuadraticSpline: SPLINE,
    SinhArcsinh: SINH_ARCSINH,
    ForeignAffine: SOFTPLUS,
}
SCALE_CODES = {"softplus": SOFTPLUS, "sigmoid": SIGMOID, "softclip": SOFTCLIP, "clamp": CLAMP}  # of ForeignAffine

# Sizes tried at D, H, B = 64, 512, 256 and 784, 1024, 100, float32, one thread of an EPYC 9004 (Zen 4): tiles of 32
# rows are 1.2 to 1.6 times slower than tiles of 128; blocks of 16 units up to 1.1 times slower than 64 or 128.
BLOCK_UNITS = 64  # units of the widest level in one block of degrees
MAX_TILE_ROWS = 128

# Multiply-adds up to which one thread computes. Two threads take 0.85, 0.63 and 0.58 of the time of one at 2^20, 2^23
# and 2^25 on idle cores, and 9.7, 2.9 and 0.9 times as long beside two other busy processes: each call then waits until
# the system lets the second thread run (a chain of four layers, two cores of an EPYC 7003).
ONE_THREAD_WORK = 1 << 25


class _Plan(NamedTuple):
    """The part of a job that depends on the layout and the dtype alone.

    The levels of the network are the features, the hidden layers and the parameters, counted from 0; `top` is the last.
    The tables are:

        below      (levels, G + 2)  how many units of a level have a degree below g
        starts     (1, levels)      first row of each level in a buffer that holds hidden layers, parameters, features
        blocks     (1, blocks + 1)  the degree at which each block of degrees begins, and G + 1
        constants  (1, 7)           of the univariate map
        links      (2, top)         the level that is added to level k before its activation, or 0; and 1 where level k
                                    feeds the next one without its activation
    """

    tables: tuple[Tensor, ...]
    rows: list[tuple[int, int, int, int]]  # the tables as rows of a job
    activation: int  # its code
    univariate: int  # its code
    work: int  # multiply-adds per row of the batch
    sizes: list[int]  # of hidden layers and parameters
    parameters: int  # P

    @property
    def recorded(self) -> int:
        """Units of hidden layers and parameters together."""
        return sum(self.sizes)

    def split(self, record: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Split a record (recorded, N) into params (N, D, P) and the hidden layers, (N, H) each."""
        *hidden, params = record.T.split_with_sizes(self.sizes, 1)
        return params.unflatten(1, (-1, self.parameters)), tuple(hidden)


def degree_ends(layout: Layout) -> Tensor:
    """Return (levels, G + 2): how many features, hidden units and parameters have a degree below g."""
    features, *hidden = (torch.tensor(ends, device="cpu") for ends in layout.ends)
    return F.pad(torch.stack([features, *hidden, features * layout.univariate.parameters]), (1, 0))


def block_starts(below: Tensor) -> Tensor:
    """Return the degree at which each block of degrees begins, and G + 1."""
    degrees = below.shape[1] - 1
    step = max(1, BLOCK_UNITS * degrees // int(below[:, -1].max()))
    return torch.tensor([*range(0, degrees, step), degrees], device="cpu")


@lru_cache(maxsize=256)
def plan_for(layout: Layout, dtype: torch.dtype) -> _Plan:
    """Return the plan of a layout."""
    below = degree_ends(layout)
    hidden = layout.ends[1:]
    sizes = below[:, -1].tolist()
    starts = torch.tensor([sum(sizes[1:]), *(sum(sizes[1:k]) for k in range(1, len(sizes)))], device="cpu")
    blocks = block_starts(below)
    constants = torch.tensor([map_constants(layout.univariate)], dtype=dtype, device="cpu")
    added = [0, *(0 if skip is None else skip + 1 for skip in layout.links.skips)]
    linear = [k in layout.links.linear for k in range(len(hidden))]
    links = torch.tensor([added, [0, *linear]], device="cpu")
    tables = (below, starts[None], blocks[None], constants, links)
    return _Plan(
        tables,
        rows=[_describe(table) for table in tables],
        activation=ACTIVATION_CODES[layout.activation],
        univariate=map_code(layout.univariate),
        work=sum(before * after for before, after in pairwise(sizes)) // 2,
        sizes=sizes[1:],
        parameters=layout.univariate.parameters,
    )


def padded_rows(like: Tensor) -> int:
    """Round N up to an odd number of vectors: buffer rows that are 4 KiB apart would evict each other from cache."""
    lanes = VECTOR_BYTES // like.element_size()
    return lanes * (-(-like.shape[0] // lanes) | 1)


def run(
    kernel: Any, plan: _Plan, weights: Sequence[Tensor], inputs: Sequence[Tensor], results: Sequence[Tensor], N: int
) -> None:
    """Run a kernel over all tiles of N rows, on at most as many threads as torch uses."""
    like = results[0]
    weights = [w.to(like.dtype).contiguous() for w in weights]
    inputs = [_feature_major(t, like) for t in inputs]
    lanes = VECTOR_BYTES // like.element_size()
    vectors = max(1, -(-N // lanes))
    threads = min(torch.get_num_threads(), vectors) if plan.work * N > ONE_THREAD_WORK else 1
    tiles_per_thread = -(-vectors * lanes // (threads * MAX_TILE_ROWS))
    tile_rows = -(-vectors // (threads * tiles_per_thread)) * lanes
    matrices = [*plan.rows, *map(_describe, weights), *map(_describe, inputs), *map(_describe, results)]
    head = [
        (0, 2 + len(matrices), N, tile_rows),
        (len(weights), plan.activation, plan.univariate, plan.parameters),
    ]
    job = np.array(head + matrices)
    run_on_threads(machine_code(kernel, like.dtype), job.ctypes.data, threads)


def map_code(univariate: Univariate) -> int:
    """Return the code of a map."""
    if isinstance(univariate, ForeignAffine):
        return SCALE_CODES[univariate.scale]
    clipped = isinstance(univariate, RationalQuadraticSpline) and univariate.clipped
    return CLIPPED_SPLINE if clipped else MAP_TYPES[type(univariate)]


def map_constants(univariate: Univariate) -> list[float]:
    """Return the constants of a map in the order BOUND, LEAST, ...; 0 where the map has no such constant."""
    least = getattr(univariate, "min_slope", getattr(univariate, "min_scale", 0.0))
    bin_floor = 0.0 if map_code(univariate) == CLIPPED_SPLINE else least
    unit = math.log(math.expm1(1 - least))
    clip = -math.log(least) if least else math.inf
    bound, low, high = (getattr(univariate, name, 0.0) for name in ("bound", "low", "high"))
    return [bound, least, bin_floor, unit, clip, low, high]


def _feature_major(t: Tensor, like: Tensor) -> Tensor:
    """Return (N, units) as (units, N) with contiguous rows that do not overlap, and (units,) as one column."""
    t = t if t.dtype == like.dtype else t.to(like)
    t = t.T if t.dim() == 2 else t[:, None]
    step, one = t.stride()
    return t if (one == 1 or t.shape[1] == 1) and step >= t.shape[1] else t.contiguous()


def _describe(matrix: Tensor) -> tuple[int, int, int, int]:
    """Return the row of a job that describes a matrix."""
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, max(matrix.stride()[0], columns), columns
