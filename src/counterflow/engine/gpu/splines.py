"""The rational-quadratic spline in the one-pass direction: one kernel for its value, one for its gradient."""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from counterflow.engine.gpu.maps import Constants, constants_of, pullback, spline
from counterflow.made.staircase import is_batched
from counterflow.univariate.spline import RationalQuadraticSpline

NUMBERS = 64  # of a program


def forward(univariate: RationalQuadraticSpline, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and log dy/dx (...), for x (...) and params (..., P)."""
    with torch.cuda.device_of(x):  # Triton launches on the current device
        y, log_slope = _Spline.apply(univariate, x.flatten().contiguous(), params.flatten(0, -2).contiguous())
    return y.view(x.shape), log_slope.view(x.shape)


def _constants(univariate: RationalQuadraticSpline) -> Constants:
    return cast(Constants, constants_of(univariate))  # it is not `clipped`


class _Spline(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, univariate: RationalQuadraticSpline, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        ctx.univariate = univariate
        ctx.save_for_backward(x, params)
        y = torch.empty_like(x)
        log_slope = torch.empty_like(x)
        if len(x):
            _value[(triton.cdiv(len(x), NUMBERS),)](
                len(x), x, params, y, log_slope, *_constants(univariate)[1:], NUMBERS
            )
        return y, log_slope

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor, log_slope_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, params = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(y_bar) or is_batched(log_slope_bar):
            return None, *_gradients_in_torch(ctx.univariate, x, params, (y_bar, log_slope_bar))
        x_bar = torch.empty_like(x)
        params_bar = torch.empty_like(params)
        if len(x):
            grid = (triton.cdiv(len(x), NUMBERS),)
            bars = (y_bar.contiguous(), log_slope_bar.contiguous())
            _gradient[grid](len(x), x, params, *bars, x_bar, params_bar, *_constants(ctx.univariate), NUMBERS)
        return None, x_bar, params_bar


def _gradients_in_torch(
    univariate: RationalQuadraticSpline, x: Tensor, params: Tensor, cotangents: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to x and params, themselves differentiable where grad mode is on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = (x, params) if differentiable else (x.detach().requires_grad_(), params.detach().requires_grad_())
        return torch.autograd.grad(univariate.forward(*leaves), leaves, cotangents, create_graph=differentiable)


@triton.jit
def _value(
    N, x, params, y, log_slope, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    ok = i < N
    value, slope = spline(
        tl.load(x + i, mask=ok, other=0.0), params + i * (3 * BINS - 1), ok, BOUND, BINS, K, MIN_SLOPE, OFFSET
    )
    tl.store(y + i, value, mask=ok)
    tl.store(log_slope + i, slope, mask=ok)


@triton.jit
def _gradient(
    N, x, params, y_bar, log_slope_bar, x_bar, params_bar, MAP: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr,
    K: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    ok = i < N
    v = tl.load(y_bar + i, mask=ok, other=0.0)
    w = tl.load(log_slope_bar + i, mask=ok, other=0.0)
    at = i * (3 * BINS - 1)
    found = pullback(
        tl.load(x + i, mask=ok, other=0.0), params + at, ok, v, w, params_bar + at, False, MAP, BOUND, BINS, K,
        MIN_SLOPE, OFFSET,
    )  # fmt: skip
    tl.store(x_bar + i, found, mask=ok)
