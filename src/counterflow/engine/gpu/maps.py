"""Univariate maps and activations as functions of Triton, for the kernels of this folder.

A map works on one feature of a tile of R rows: numbers are (R,), `params` are (R,) pointers to the first of the P
parameters of each row, and `ok` is (R,), False beyond the last row. K is the number of bins, raised to a power of two.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from counterflow.made.activations import ACTIVATIONS, Activation
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.rational_quadratic import NEWTON_STEPS
from counterflow.univariate.spline import RationalQuadraticSpline

STEPS = tl.constexpr(NEWTON_STEPS)


class Constants(NamedTuple):
    """The constants of a map, of which a kernel is compiled for each set."""

    MAP: str
    BOUND: float = 1.0
    BINS: int = 1
    K: int = 1
    MIN_SLOPE: float = 0.0
    OFFSET: float = 0.0


def constants_of(univariate: Univariate) -> Constants | None:
    """Return the constants of a map, or None if it has no functions here."""
    if type(univariate) is Affine:
        return Constants("affine", univariate.bound)
    if type(univariate) is Gated:
        return Constants("gated")
    if type(univariate) is RationalQuadraticSpline and not univariate.clipped:
        u = univariate
        return Constants("spline", u.bound, u.bins, triton.next_power_of_2(u.bins), u.min_slope, u.softplus_offset)
    return None


def activation_name(activation: Activation) -> str | None:
    """Return the name of an activation, or None if it has no functions here."""
    return next((name for name, known in ACTIVATIONS.items() if known == activation), None)


@triton.jit
def sigmoid(v):
    """Return 1 / (1 + exp(-v)) without overflow."""
    e = tl.exp(-tl.abs(v))
    return tl.where(v < 0, e, 1.0) / (1 + e)


@triton.jit
def softplus(v):
    """Return log(1 + exp(v)) without overflow."""
    return tl.maximum(v, 0.0) + tl.log(1 + tl.exp(-tl.abs(v)))


@triton.jit
def tanh(v):
    """Return tanh(v) without overflow."""
    e = tl.exp(-2 * tl.abs(v))
    t = (1 - e) / (1 + e)
    return tl.where(v < 0, -t, t)


@triton.jit
def activate(v, NAME: tl.constexpr):
    """Return the activation of that name."""
    if NAME == "relu":
        return tl.maximum(v, 0.0)
    elif NAME == "leaky_relu":
        return tl.where(v > 0, v, 0.01 * v)
    elif NAME == "elu":
        return tl.where(v > 0, v, tl.exp(tl.minimum(v, 0.0)) - 1)
    elif NAME == "tanh":
        return tanh(v)
    elif NAME == "sigmoid":
        return sigmoid(v)
    elif NAME == "silu":
        return v * sigmoid(v)
    else:
        return softplus(v)


@triton.jit
def slope(v, NAME: tl.constexpr):
    """Return the derivative of the activation of that name."""
    if NAME == "relu":
        return tl.where(v > 0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        return tl.where(v > 0, 1.0, tl.full(v.shape, 0.01, v.dtype))
    elif NAME == "elu":
        return tl.exp(tl.minimum(v, 0.0))
    elif NAME == "tanh":
        t = tanh(v)
        return 1 - t * t
    elif NAME == "sigmoid":
        return sigmoid(v) * sigmoid(-v)
    elif NAME == "silu":
        s = sigmoid(v)
        return s * (1 + v * (1 - s))
    else:
        return sigmoid(v)


@triton.jit
def shares(raw, BINS: tl.constexpr, K: tl.constexpr, MIN_SLOPE: tl.constexpr):
    """Return the softmax of raw (R, K) over the bins, and the shares of the bins, 0 beyond the last."""
    exists = tl.arange(0, K)[None, :] < BINS
    raw = tl.where(exists, raw, -float("inf"))
    e = tl.exp(raw - tl.max(raw, 1)[:, None])
    p = e / tl.sum(e, 1)[:, None]
    return p, tl.where(exists, MIN_SLOPE + (1 - MIN_SLOPE * BINS) * p, 0.0)


@triton.jit
def pick(table, k, K: tl.constexpr):
    """Return table[r, k[r]] for each row r; 0 for k out of range."""
    return tl.sum(tl.where(tl.arange(0, K)[None, :] == k[:, None], table, 0.0), 1)


@triton.jit
def find_bin(
    v, params, ok, OF_Y: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr,
    MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return the bin of v, an x or, with OF_Y, a y, and the tables (R, K) that it comes from.

    That is x0, y0, width, height, and the slopes d0 and d1 at its ends; its number k; the softmax of the widths,
    that of the heights, and the slopes at the right edges of all bins.
    """
    column = tl.arange(0, K)[None, :]
    w = tl.load(params[:, None] + column, mask=ok[:, None] & (column < BINS), other=0.0)
    h = tl.load(params[:, None] + BINS + column, mask=ok[:, None] & (column < BINS), other=0.0)
    d = tl.load(params[:, None] + 2 * BINS + column, mask=ok[:, None] & (column < BINS - 1), other=0.0)
    p_w, share_w = shares(w, BINS, K, MIN_SLOPE)
    p_h, share_h = shares(h, BINS, K, MIN_SLOPE)
    last = column == BINS - 1
    xs = tl.where(last, BOUND, BOUND * (2 * tl.cumsum(share_w, 1) - 1))  # right edges
    ys = tl.where(last, BOUND, BOUND * (2 * tl.cumsum(share_h, 1) - 1))
    slopes = MIN_SLOPE + softplus(d + OFFSET)  # at the right edges
    edges = ys if OF_Y else xs
    k = tl.sum(tl.where((column < BINS - 1) & (v[:, None] >= edges), 1, 0), 1)
    x0 = tl.where(k == 0, -BOUND, pick(xs, k - 1, K))
    y0 = tl.where(k == 0, -BOUND, pick(ys, k - 1, K))
    d0 = tl.where(k == 0, 1.0, pick(slopes, k - 1, K))
    d1 = tl.where(k == BINS - 1, 1.0, pick(slopes, k, K))
    return x0, y0, pick(xs, k, K) - x0, pick(ys, k, K) - y0, d0, d1, k, p_w, p_h, slopes


@triton.jit
def terms(s, d0, d1, t):
    """Return over, below and above; see `univariate.rational_quadratic`."""
    rest = 1 - t
    u = t * rest
    return s * t * t + d0 * u, s + (d0 + d1 - 2 * s) * u, d1 * t * t + 2 * s * u + d0 * rest * rest


@triton.jit
def unit(t):
    """Return t, clipped to [0, 1]."""
    return tl.minimum(tl.maximum(t, 0.0), 1.0)


@triton.jit
def spline(
    x, params, ok, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr, MIN_SLOPE: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """Return y and log dy/dx of a spline."""
    inside = tl.abs(x) < BOUND
    v = tl.where(inside, x, 0.0)
    x0, y0, width, height, d0, d1, _k, _p_w, _p_h, _slopes = find_bin(
        v, params, ok, False, BOUND, BINS, K, MIN_SLOPE, OFFSET
    )
    s = height / width
    over, below, above = terms(s, d0, d1, unit((v - x0) / width))
    log_slope = 2 * tl.log(s) + tl.log(above) - 2 * tl.log(below)
    return tl.where(inside, y0 + height * over / below, x), tl.where(inside, log_slope, 0.0)


@triton.jit
def inverse(
    y, params, ok, MAP: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr, K: tl.constexpr,
    MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Return x and log dx/dy."""
    if MAP == "affine":
        m = tl.load(params, mask=ok, other=0.0)
        s = BOUND * tanh(tl.load(params + 1, mask=ok, other=0.0) / BOUND)
        return (y - m) * tl.exp(-s), -s
    elif MAP == "gated":
        m = tl.load(params, mask=ok, other=0.0)
        a = tl.load(params + 1, mask=ok, other=0.0) + 2
        return m + (y - m) / sigmoid(a), softplus(-a)
    else:
        inside = tl.abs(y) < BOUND
        v = tl.where(inside, y, 0.0)
        x0, y0, width, height, d0, d1, _k, _p_w, _p_h, _slopes = find_bin(
            v, params, ok, True, BOUND, BINS, K, MIN_SLOPE, OFFSET
        )
        s = height / width
        up = v - y0
        mixed = up * (d0 + d1 - 2 * s)
        quadratic = height * (s - d0) + mixed
        linear = height * d0 - mixed
        constant = -s * up
        root = tl.sqrt(tl.maximum(linear * linear - 4 * quadratic * constant, 0.0))
        positive = linear >= 0
        t = unit(tl.where(positive, 2 * constant, root - linear) / tl.where(positive, -linear - root, 2 * quadratic))
        for _ in tl.static_range(STEPS):
            over, below, above = terms(s, d0, d1, t)
            t = unit(t - (height * over - up * below) * below / (height * s * above))
        over, below, above = terms(s, d0, d1, t)
        log_slope = 2 * tl.log(s) + tl.log(above) - 2 * tl.log(below)
        return tl.where(inside, x0 + t * width, y), tl.where(inside, -log_slope, 0.0)


@triton.jit
def pullback(
    x, params, ok, v, w, adjoints, SOLVE: tl.constexpr, MAP: tl.constexpr, BOUND: tl.constexpr, BINS: tl.constexpr,
    K: tl.constexpr, MIN_SLOPE: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Store the adjoints of params for cotangents of y and of l = log dy/dx, and return the other unknown.

    SOLVE       the cotangent u of y with u dy/dx = v - w dl/dx is returned, and u and w are the cotangents
    otherwise   v and w are the cotangents, and the adjoint of x, v dy/dx + w dl/dx, is returned
    """
    if MAP == "spline":
        inside = tl.abs(x) < BOUND
        at = tl.where(inside, x, 0.0)
        x0, _y0, width, height, d0, d1, k, p_w, p_h, slopes = find_bin(
            at, params, ok, False, BOUND, BINS, K, MIN_SLOPE, OFFSET
        )
        s = height / width
        t = (at - x0) / width
        over, below, above = terms(s, d0, d1, t)
        rest = 1 - t
        u = t * rest
        below_t = (d0 + d1 - 2 * s) * (rest - t)
        above_t = 2 * (d1 * t + s * (rest - t) - d0 * rest)
        dy_dx = tl.where(inside, s * s * above / (below * below), 1.0)
        dl_dx = tl.where(inside, (above_t / above - 2 * below_t / below) / width, 0.0)
        if SOLVE:
            found = (v - w * dl_dx) / dy_dx
            by_y = tl.where(inside, found, 0.0)
        else:
            found = v * dy_dx + w * dl_dx
            by_y = tl.where(inside, v, 0.0)
        by_l = tl.where(inside, w, 0.0)
        by_over = by_y * height / below
        by_above = by_l / above
        by_below = -by_y * height * over / (below * below) - 2 * by_l / below
        by_s = 2 * by_l / s + 2 * u * by_above + t * t * by_over + (1 - 2 * u) * by_below
        by_t = by_over * (2 * s * t + d0 * (rest - t)) + by_above * above_t + by_below * below_t
        by_height = by_s / width + by_y * over / below
        by_width = -(by_s * s + by_t * t) / width
        by_d0 = by_over * u + by_above * rest * rest + by_below * u
        by_d1 = by_above * t * t + by_below * u
        column = tl.arange(0, K)[None, :]
        begun = tl.where(column <= k[:, None], 1.0, 0.0)  # the bin of x and the bins before it
        before = tl.where(column < k[:, None], 1.0, 0.0)
        scale: tl.constexpr = 2 * BOUND * (1 - MIN_SLOPE * BINS)
        by_w = (-by_t / width - by_width)[:, None] * before + by_width[:, None] * begun
        by_w = scale * p_w * (by_w - tl.sum(p_w * by_w, 1)[:, None])
        by_h = (by_y - by_height)[:, None] * before + by_height[:, None] * begun
        by_h = scale * p_h * (by_h - tl.sum(p_h * by_h, 1)[:, None])
        by_d = tl.where(column == k[:, None], by_d1[:, None], 0.0)
        by_d = tl.where(column == k[:, None] - 1, by_d0[:, None], by_d) * (1 - tl.exp(MIN_SLOPE - slopes))
        tl.store(adjoints[:, None] + column, by_w, mask=ok[:, None] & (column < BINS))
        tl.store(adjoints[:, None] + BINS + column, by_h, mask=ok[:, None] & (column < BINS))
        tl.store(adjoints[:, None] + 2 * BINS + column, by_d, mask=ok[:, None] & (column < BINS - 1))
        return found
    else:
        m = tl.load(params, mask=ok, other=0.0)
        a = tl.load(params + 1, mask=ok, other=0.0)
        if MAP == "affine":
            t = tanh(a / BOUND)
            dy_dx = tl.exp(BOUND * t)
            dy_dm = 1.0
            dl_da = 1 - t * t
            dy_da = x * dy_dx * dl_da
        else:
            dy_dx = sigmoid(a + 2)
            dy_dm = sigmoid(-a - 2)
            dl_da = dy_dm
            dy_da = dy_dx * dy_dm * (x - m)
        if SOLVE:
            found = v / dy_dx
            by_y = found
        else:
            found = v * dy_dx
            by_y = v
        tl.store(adjoints, by_y * dy_dm, mask=ok)
        tl.store(adjoints + 1, by_y * dy_da + w * dl_da, mask=ok)
        return found
