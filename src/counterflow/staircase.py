"""Linear layers whose zeros form a staircase: a row of the weight sees the first columns, no fewer than the row before.

Where that pays, the weight is cut into steps, blocks of rows, and each product leaves out the columns that no row of a
step sees:

    y[:, rows]           =  b[rows] + x[:, :seen] W[rows, :seen]^T
    x_bar[:, :seen]     +=  y_bar[:, rows] W[rows, :seen]
    W_bar[rows, :seen]   =  y_bar[:, rows]^T x[:, :seen]

Many steps come to half of the dense arithmetic. What the weight holds where it is not seen does not matter: it is masked
on its way into a product, or never read. Its gradient there is exactly 0, so that a 0 stays a 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# In weights that are multiplied in the same time; from benchmarks/results/staircase.md.
STEP = 1 << 13  # a step's calls, and what its products lose by being narrow
START = 1 << 14  # not taking the dense product
LINE = 16  # numbers; a cache line in float32, where steps begin and end


class Step(NamedTuple):
    """Rows first..last - 1: each sees the columns before `full`, and none sees one from `seen` on."""

    first: int
    last: int
    full: int
    seen: int

    @property
    def diagonal(self) -> tuple[int, int]:
        """The shape of the part that only some of its rows see."""
        return self.last - self.first, self.seen - self.full


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
    borders = [row for row in range(rows) if row % LINE == 0 or reach[row] - reach[row - 1] >= high] + [rows]
    best = [(0, 0)]  # for the rows before each border: the least cost, and at which border the last step begins
    for k, last in enumerate(borders[1:], 1):
        best.append(min((best[j][0] + (last - borders[j]) * reach[last - 1] + STEP, j) for j in range(k)))
    if best[-1][0] + START >= rows * columns:
        return ()
    steps, k = [], len(borders) - 1
    while k:
        first, last, k = borders[best[k][1]], borders[k], best[k][1]
        steps.append(Step(first, last, *_lines(reach[first], reach[last - 1], columns)))
    return tuple(reversed(steps))


def _lines(full: int, seen: int, columns: int) -> tuple[int, int]:
    """The diagonal's columns, widened to whole cache lines."""
    return (full - full % LINE, min(seen + -seen % LINE, columns)) if full < seen else (full, seen)


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
        parts = [numbers[step.first : step.last, step.full : step.seen].flatten() for step in self.steps]
        self.register_buffer("mask", mask if parts else numbers, persistent=False)
        self.register_buffer("diagonals", torch.cat(parts) if parts else numbers[:0, 0], persistent=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor, staircase: Staircase) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> y = b + x (W * mask)^T, (..., out).

    In steps on the CPU. The dense product is what other devices and the compiler get.
    """
    steps = staircase.steps
    if not steps or x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _dense(x, weight, bias, staircase.mask)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # as for F.linear
        x = x.to(torch.get_autocast_dtype("cpu"))
    return _Linear.apply(x, weight, bias, staircase.mask, staircase.diagonals, steps)


def weight_gradient(staircase: Staircase, y_bar: Tensor, x: Tensor) -> Tensor:
    """The gradient (out, in) of the weight, y_bar^T x * mask, for rows y_bar (N, out) and x (N, in)."""
    if not staircase.steps or y_bar.device.type != "cpu" or torch.compiler.is_compiling():
        return (y_bar.T @ x) * staircase.mask
    return _weight_gradient(y_bar, x, staircase.diagonals, staircase.steps)


def _dense(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, weight * mask, bias)


def _dense_gradients(y_bar: Tensor, x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and of the weight, by operations that can be differentiated and mapped."""
    return y_bar @ (weight * mask).to(y_bar.dtype), (_rows(y_bar).T @ _rows(x)).to(weight.dtype) * mask


def _rows(t: Tensor) -> Tensor:
    """(..., units) -> (N, units)."""
    return t.reshape(-1, t.shape[-1])


def _masks(diagonals: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """Those of the steps' diagonals, (rows, seen - full) each."""
    shapes = [step.diagonal for step in steps]
    parts = diagonals.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _parts(weight: Tensor, diagonals: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Step, Tensor, Tensor]]:
    """Each step with the weights that all its rows see, and with its diagonal, masked."""
    for step, mask in zip(steps, _masks(diagonals, steps), strict=True):
        rows = weight[step.first : step.last]
        yield step, rows[:, : step.full], rows[:, step.full : step.seen] * mask


def _product(x: Tensor, weight: Tensor, bias: Tensor, diagonals: Tensor, steps: Sequence[Step]) -> Tensor:
    y = bias.repeat(len(x), 1)
    for step, block, diagonal in _parts(weight, diagonals, steps):
        into = y[:, step.first : step.last]
        into.addmm_(x[:, : step.full], block.T)
        into.addmm_(x[:, step.full : step.seen], diagonal.T)
    return y


def _input_gradient(y_bar: Tensor, weight: Tensor, diagonals: Tensor, steps: Sequence[Step]) -> Tensor:
    x_bar = y_bar.new_zeros(len(y_bar), weight.shape[1])
    for step, block, diagonal in _parts(weight, diagonals, steps):
        received = y_bar[:, step.first : step.last]
        x_bar[:, : step.full].addmm_(received, block)
        x_bar[:, step.full : step.seen].addmm_(received, diagonal)
    return x_bar


def _weight_gradient(y_bar: Tensor, x: Tensor, diagonals: Tensor, steps: Sequence[Step]) -> Tensor:
    weight_bar = y_bar.new_empty(y_bar.shape[1], x.shape[1])
    for step, mask in zip(steps, _masks(diagonals, steps), strict=True):
        rows = weight_bar[step.first : step.last]
        torch.mm(y_bar[:, step.first : step.last].T, x[:, : step.seen], out=rows[:, : step.seen])
        rows[:, step.full : step.seen].mul_(mask)
        rows[:, step.seen :].zero_()
    return weight_bar


class _Linear(torch.autograd.Function):
    """The product in steps. Its second derivatives, and what torch.func makes of it, are those of the dense one."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, diagonals: Tensor, steps: Sequence[Step]
    ) -> Tensor:
        y = _product(_rows(x), weight.to(x.dtype), bias.to(x.dtype), diagonals.to(x.dtype), steps)
        return y.view(*x.shape[:-1], len(bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mask, diagonals, ctx.steps = inputs
        ctx.save_for_backward(x, weight, mask, diagonals)
        ctx.save_for_forward(x, weight, mask)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mask, diagonals = ctx.saved_tensors
        if torch.is_grad_enabled():
            x_bar, weight_bar = _dense_gradients(y_bar, x, weight, mask)
        else:
            needed = ctx.needs_input_grad[:2]
            x_bar, weight_bar = _Gradients.apply(y_bar, x, weight, mask, diagonals, ctx.steps, needed)
        return x_bar, weight_bar, _rows(y_bar).sum(0).to(weight.dtype), None, None, None

    @staticmethod
    def jvp(ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None, *_: None) -> Tensor:
        x, weight, mask = ctx.saved_tensors
        y_dot = x.new_zeros(*x.shape[:-1], len(weight))
        if x_dot is not None:
            y_dot = y_dot + F.linear(x_dot, (weight * mask).to(x.dtype))
        if weight_dot is not None:
            y_dot = y_dot + F.linear(x, (weight_dot * mask).to(x.dtype))
        return y_dot if bias_dot is None else y_dot + bias_dot.to(x.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return torch.vmap(_dense, in_dims[:4])(*args[:4]), 0


class _Gradients(torch.autograd.Function):
    """The backward pass of `_Linear`: a function of its own, so that a batch of cotangents can be mapped over."""

    @staticmethod
    def forward(
        y_bar: Tensor,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        diagonals: Tensor,
        steps: Sequence[Step],
        needed: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        received, low, x_bar, weight_bar = _rows(y_bar).contiguous(), diagonals.to(x.dtype), None, None
        if needed[0]:
            x_bar = _input_gradient(received, weight.to(x.dtype), low, steps).view(x.shape)
        if needed[1]:
            weight_bar = _weight_gradient(received, _rows(x), low, steps).to(weight.dtype)
        return x_bar, weight_bar

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep: it only runs where nothing is recorded."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return torch.vmap(_dense_gradients, in_dims[:4])(*args[:4]), (0, 0)
