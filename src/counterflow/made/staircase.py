"""Products with a weight whose mask is a staircase: each row sees the first columns, no fewer than the row before.

If it is faster, the weight is cut into steps, which are blocks of rows, and each product leaves out the columns that no
row of a step sees:

    y[:, rows]           =  b[rows] + x[:, :seen] W[rows, :seen]^T
    x_bar[:, :seen]     +=  y_bar[:, rows] W[rows, :seen]
    W_bar[rows, :seen]   =  y_bar[:, rows]^T x[:, :seen]

With many steps that is half of the dense arithmetic. A masked entry of the weight is never read, or multiplied by 0
before it is used, so that a finite value there has no effect. Its gradient is exactly 0, so that an entry that starts
at 0 stays at 0 with any optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Private in torch. Its public alternative, a vmap rule, costs 50 us more per layer (one core of an EPYC 9004).
from torch._C import _are_functorch_transforms_active as functions_are_transformed
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__

from counterflow.made.derived import Derived, with_values

# Overheads, as the number of weights that are multiplied in the same time; measured in benchmarks/results/staircase.md.
STEP = 1 << 13  # overhead of one step: its calls, and the lower speed of narrow products
START = 1 << 15  # overhead of the product in steps compared with the dense one, which is a single call
LINE = 16  # steps begin and end at multiples of it: the number of float32 numbers in a cache line


class Step(NamedTuple):
    """Rows first..last - 1; each of them sees all columns before `full` and none sees column `seen` or a later one."""

    first: int
    last: int
    full: int
    seen: int


@lru_cache(maxsize=256)
def cut(reach: tuple[int, ...], columns: int) -> tuple[Step, ...]:
    """Return the steps with the smallest sum of rows * seen + STEP, or () if the dense product is as fast.

    Args:
        reach: the number of first columns that each row sees, in ascending order.
        columns: the number of columns of the weight.

    Example:
        >>> cut((0,) * 256 + (512,) * 256, columns=512)
        (Step(first=0, last=256, full=0, seen=0), Step(first=256, last=512, full=512, seen=512))
        >>> cut((1, 2, 3), columns=3)
        ()
    """
    rows = len(reach)
    high = max(columns // 32, 1)
    # A border between two steps helps only next to rows that see more columns than the rows before them.
    near = [row for row in range(0, rows, LINE) if reach[max(row - LINE, 0)] < reach[min(row + LINE, rows) - 1]]
    sudden = [row for row in range(1, rows) if reach[row] - reach[row - 1] >= high]
    borders = sorted({0, *near, *sudden, rows})
    best = [(0, 0)]  # for the rows before each border: the smallest cost, and the border where the last step begins
    for k, last in enumerate(borders[1:], 1):
        best.append(min((best[j][0] + (last - borders[j]) * reach[last - 1] + STEP, j) for j in range(k)))
    if best[-1][0] + START >= rows * columns:
        return ()
    steps = []
    k = len(borders) - 1
    while k:
        before = best[k][1]
        steps.append(step(reach, columns, borders[before], borders[k]))
        k = before
    return tuple(reversed(steps))


def step(reach: Sequence[int], columns: int, first: int, last: int) -> Step:
    """Return the step of rows first..last - 1.

    The columns that only some of these rows see, its diagonal, are widened to whole cache lines.
    """
    full = reach[first]
    seen = reach[last - 1]
    if full < seen:
        full -= full % LINE
        seen = min(seen + -seen % LINE, columns)
    return Step(first, last, full, seen)


class Staircase(Derived):
    """Mask of a weight (out, in) and the steps into which it is cut. Nothing in it is saved or trained.

    Args:
        mask: (out, in), True where the weight has an effect: the first columns of each row, no fewer than in the row
            before.
        steps: chosen by `cut` when not given.

    Attributes:
        mask: the mask as numbers if the product is dense, since a product with booleans takes five times as long
            (512 x 512, one core of an EPYC 9004); as booleans if the weight is cut.
        diagonals: the masks of the diagonals of all steps, flattened and joined.
    """

    mask: Tensor
    diagonals: Tensor

    def __init__(self, mask: Tensor, steps: Sequence[Step] | None = None) -> None:
        super().__init__()
        with with_values():
            self.reach = tuple(mask.sum(1).tolist())
        self.columns = mask.shape[1]
        self.steps = cut(self.reach, self.columns) if steps is None else tuple(steps)
        self.register_derived()

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        reach = torch.tensor(self.reach, device="cpu")
        mask = torch.arange(self.columns, device="cpu") < reach[:, None]
        numbers = mask.to(torch.get_default_dtype())
        parts = [numbers[first:last, full:seen].flatten() for first, last, full, seen in self.steps]
        return {
            "mask": mask if parts else numbers,
            "diagonals": torch.cat(parts) if parts else numbers.new_empty(0),
        }


def linear(x: Tensor, weight: Tensor, bias: Tensor, staircase: Staircase) -> Tensor:
    """Return y = b + x (W * mask)^T, (..., out), for x (..., in), weight (out, in) and bias (out,).

    The product is computed in steps on the CPU; other devices, the compiler, tracers and torch.func use the dense one.
    """
    steps, mask = staircase.steps, staircase.mask
    in_steps = steps and x.device.type == "cpu" and x.shape[-1:] == weight.shape[1:]  # F.linear raises for other shapes
    if not in_steps or is_compiling() or is_tracing() or functions_are_transformed():
        return F.linear(x, weight * mask, bias)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:  # as F.linear does
        low = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(low), weight.to(low), bias.to(low)
    return _Linear.apply(x, weight, bias, mask, staircase.diagonals.to(x.dtype), steps)


def weight_gradient(staircase: Staircase, y_bar: Tensor, x: Tensor) -> Tensor:
    """Return the gradient (out, in) of the weight, y_bar^T x * mask, for rows y_bar (N, out) and x (N, in)."""
    if not staircase.steps or y_bar.device.type != "cpu" or is_compiling():
        return (y_bar.T @ x) * staircase.mask
    return _weight_gradient(y_bar, x, staircase.diagonals.to(y_bar.dtype), staircase.steps)


def is_batched(t: Tensor) -> bool:
    """Return True for a batched tensor, which has no storage, such as the cotangents of a vectorized Jacobian."""
    try:
        t.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _rows(t: Tensor) -> Tensor:
    """Reshape (..., units) to (N, units)."""
    return t.reshape(-1, t.shape[-1])


def _split(masks: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """Return the mask of the diagonal of each step, (rows, seen - full)."""
    shapes = [(last - first, seen - full) for first, last, full, seen in steps]
    parts = masks.split([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _diagonals(weight: Tensor, masks: Tensor, steps: Sequence[Step]) -> list[Tensor]:
    """Return the diagonal of each step, masked."""
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
    """Product in steps; its second derivatives are computed by the dense product."""

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
        rows = _rows(y_bar).contiguous()  # the gradient of a sum is one row, expanded
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(y_bar):
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
