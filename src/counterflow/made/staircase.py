"""Linear layers whose zeros form a staircase: a row of the weight sees the first columns, no fewer than the row before.

Where that pays, the weight is cut into steps, blocks of rows, and each product leaves out the columns that no row of a
step sees:

    y[:, rows]           =  b[rows] + x[:, :seen] W[rows, :seen]^T
    x_bar[:, :seen]     +=  y_bar[:, rows] W[rows, :seen]
    W_bar[rows, :seen]   =  y_bar[:, rows]^T x[:, :seen]

Many steps come to half of the dense arithmetic. A finite number has no effect where it is not seen: it is never read,
or masked on its way into a product. The gradient there is exactly 0, so that a 0 stays a 0 whatever the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Without a public name. The public way, rules for vmap, costs 50 us a layer more (one core of an EPYC 9004).
from torch._C import _are_functorch_transforms_active as functions_are_transformed
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__

# In weights that are multiplied in the same time; from benchmarks/results/staircase.md.
STEP = 1 << 13  # for a step: its calls, and what its products lose by being narrow
START = 1 << 15  # not taking the dense product, which is one call
LINE = 16  # numbers; a cache line in float32, where steps begin and end


class Step(NamedTuple):
    """Rows first..last - 1: each sees the columns before `full`, and none sees one from `seen` on."""

    first: int
    last: int
    full: int
    seen: int


@lru_cache(maxsize=256)
def cut(reach: tuple[int, ...], columns: int) -> tuple[Step, ...]:
    """The steps with the least sum of rows * seen + STEP; none where the dense product is as good.

    Args:
        reach: how many of the first columns each row sees, in ascending order.
        columns: of the weight.

    Example:
        >>> cut((0,) * 256 + (512,) * 256, columns=512)
        (Step(first=0, last=256, full=0, seen=0), Step(first=256, last=512, full=512, seen=512))
        >>> cut((1, 2, 3), columns=3)
        ()
    """
    rows, high = len(reach), max(columns // 32, 1)
    # A border pays only near rows that see more than those before them: there are not more such rows than columns.
    near = [row for row in range(0, rows, LINE) if reach[max(row - LINE, 0)] < reach[min(row + LINE, rows) - 1]]
    sudden = [row for row in range(1, rows) if reach[row] - reach[row - 1] >= high]
    borders = sorted({0, *near, *sudden, rows})
    best = [(0, 0)]  # for the rows before each border: the least cost, and at which border the last step begins
    for k, last in enumerate(borders[1:], 1):
        best.append(min((best[j][0] + (last - borders[j]) * reach[last - 1] + STEP, j) for j in range(k)))
    if best[-1][0] + START >= rows * columns:
        return ()
    steps, k = [], len(borders) - 1
    while k:
        first, last, k = borders[best[k][1]], borders[k], best[k][1]
        steps.append(step(reach, columns, first, last))
    return tuple(reversed(steps))


def step(reach: Sequence[int], columns: int, first: int, last: int) -> Step:
    """The step of these rows. What only some of them see, its diagonal, is widened to whole cache lines."""
    full, seen = reach[first], reach[last - 1]
    if full < seen:
        full, seen = full - full % LINE, min(seen + -seen % LINE, columns)
    return Step(first, last, full, seen)


class Staircase(nn.Module):
    """What a weight (out, in) may hold, and how it is cut. Nothing in it is saved or trained.

    Args:
        mask: (out, in), True where the weight may differ from 0: the first columns of each row, ever more of them.
        steps: chosen by `cut` when not given.

    Attributes:
        mask: numbers where the product is dense, since one with booleans takes five times as long (512 x 512, one core
            of an EPYC 9004); where it is cut, booleans for the few who ask.
        diagonals: the masks of all steps' diagonals, flattened and joined.
    """

    mask: Tensor
    diagonals: Tensor

    def __init__(self, mask: Tensor, steps: Sequence[Step] | None = None) -> None:
        super().__init__()
        self.steps = cut(tuple(mask.sum(1).tolist()), mask.shape[1]) if steps is None else tuple(steps)
        numbers = mask.to(torch.get_default_dtype())
        parts = [numbers[first:last, full:seen].flatten() for first, last, full, seen in self.steps]
        self.register_buffer("mask", mask if parts else numbers, persistent=False)
        self.register_buffer("diagonals", torch.cat(parts) if parts else numbers.new_empty(0), persistent=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor, staircase: Staircase) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> y = b + x (W * mask)^T, (..., out).

    In steps on the CPU. Other devices, the compiler, tracers and torch.func get the dense product.
    """
    steps, mask = staircase.steps, staircase.mask
    in_steps = steps and x.device.type == "cpu" and x.shape[-1:] == weight.shape[1:]  # the dense product refuses others
    if not in_steps or is_compiling() or is_tracing() or functions_are_transformed():
        return F.linear(x, weight * mask, bias)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # as for F.linear
        low = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(low), weight.to(low), bias.to(low)
    return _Linear.apply(x, weight, bias, mask, staircase.diagonals.to(x.dtype), steps)


def weight_gradient(staircase: Staircase, y_bar: Tensor, x: Tensor) -> Tensor:
    """The gradient (out, in) of the weight, y_bar^T x * mask, for rows y_bar (N, out) and x (N, in)."""
    if not staircase.steps or y_bar.device.type != "cpu" or is_compiling():
        return (y_bar.T @ x) * staircase.mask
    return _weight_gradient(y_bar, x, staircase.diagonals.to(y_bar.dtype), staircase.steps)


def _is_batched(t: Tensor) -> bool:
    """Whether it stands for many tensors, such as the cotangents of a vectorised Jacobian: then it has no memory."""
    try:
        t.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _rows(t: Tensor) -> Tensor:
    """(..., units) -> (N, units)."""
    return t.reshape(-1, t.shape[-1])


def _split(masks: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """The mask of each step's diagonal, (rows, seen - full)."""
    shapes = [(last - first, seen - full) for first, last, full, seen in steps]
    parts = masks.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _diagonals(weight: Tensor, masks: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """What only some rows of a step see, masked."""
    each = zip(steps, _split(masks, steps), strict=True)
    return [weight[first:last, full:seen] * mask for (first, last, full, seen), mask in each]


def _product(x: Tensor, weight: Tensor, bias: Tensor, steps: Sequence[Step], diagonals: Sequence[Tensor]) -> Tensor:
    y = bias.repeat(len(x), 1)
    for (first, last, full, seen), diagonal in zip(steps, diagonals, strict=True):
        into = y[:, first:last]
        into.addmm_(x[:, :full], weight[first:last, :full].T)
        into.addmm_(x[:, full:seen], diagonal.T)
    return y


def _input_gradient(y_bar: Tensor, weight: Tensor, steps: Sequence[Step], diagonals: Sequence[Tensor]) -> Tensor:
    x_bar = y_bar.new_zeros(len(y_bar), weight.shape[1])
    for (first, last, full, seen), diagonal in zip(steps, diagonals, strict=True):
        sent = y_bar[:, first:last]
        x_bar[:, :full].addmm_(sent, weight[first:last, :full])
        x_bar[:, full:seen].addmm_(sent, diagonal)
    return x_bar


def _weight_gradient(y_bar: Tensor, x: Tensor, masks: Tensor, steps: Sequence[Step]) -> Tensor:
    weight_bar = y_bar.new_empty(y_bar.shape[1], x.shape[1])
    for (first, last, full, seen), mask in zip(steps, _split(masks, steps), strict=True):
        rows = weight_bar[first:last]
        torch.mm(y_bar[:, first:last].T, x[:, :seen], out=rows[:, :seen])
        rows[:, full:seen].mul_(mask)
        rows[:, seen:].zero_()
    return weight_bar


class _Linear(torch.autograd.Function):
    """The product in steps; its second derivatives are those of the dense one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, masks: Tensor, steps: Sequence[Step]
    ) -> Tensor:
        diagonals = _diagonals(weight, masks, steps)
        ctx.steps = steps
        ctx.save_for_backward(x, weight, mask, masks, *diagonals)
        ctx.save_for_forward(x, weight, mask)
        return _product(_rows(x), weight, bias, steps, diagonals).view(*x.shape[:-1], len(bias))

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, masks, *diagonals = ctx.saved_tensors
        rows = _rows(y_bar).contiguous()  # those of a sum are one row, expanded
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or _is_batched(y_bar):
            x_bar, weight_bar = y_bar @ (weight * mask), rows.T @ _rows(x) * mask
        else:
            x_bar = _input_gradient(rows, weight, ctx.steps, diagonals).view(x.shape) if of_x else None
            weight_bar = _weight_gradient(rows, _rows(x), masks, ctx.steps) if of_weight else None
        return x_bar, weight_bar, rows.sum(0) if of_bias else None, None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None, *_: None) -> Tensor:
        x, weight, mask = ctx.saved_tensors
        y_dot = x.new_zeros(*x.shape[:-1], len(weight)) if bias_dot is None else bias_dot
        if x_dot is not None:
            y_dot = y_dot + F.linear(x_dot, weight * mask)
        if weight_dot is not None:
            y_dot = y_dot + F.linear(x, weight_dot * mask)
        return y_dot.expand(*x.shape[:-1], -1)
