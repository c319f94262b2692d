"""The rational-quadratic formula on one bin, shared by the splines."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEWTON_STEPS = 2  # for slopes from 1e-3 to 1e3 in float32, log dx/dy is off by 0.5 nats with 0, 0.1 with 1, 0.01 with 2


class Bin(NamedTuple):
    """The bin of each number: its lower left corner, its size, and the slopes at its two ends, each (...)."""

    x0: Tensor
    y0: Tensor
    width: Tensor
    height: Tensor
    d0: Tensor
    d1: Tensor

    @property
    def s(self) -> Tensor:
        """Mean slope of the bin."""
        return self.height / self.width


class Terms(NamedTuple):
    """The three quadratics in t of which the curve and its slope are made; see `value`."""

    over: Tensor  # s t^2 + d0 t (1 - t)
    below: Tensor  # s + (d0 + d1 - 2 s) t (1 - t)
    above: Tensor  # d1 t^2 + 2 s t (1 - t) + d0 (1 - t)^2


def terms(b: Bin, t: Tensor) -> Terms:
    """Return the three quadratics at t in [0, 1]."""
    s = b.s
    rest = 1 - t
    u = t * rest
    return Terms(
        s * t * t + b.d0 * u,
        s + (b.d0 + b.d1 - 2 * s) * u,
        b.d1 * t * t + 2 * s * u + b.d0 * rest * rest,
    )


def value(b: Bin, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y and log dy/dx for x inside its bin.

        y = y0 + height over / below,    dy/dx = s^2 above / below^2,    t = (x - x0) / width,    s = height / width

    Source: Gregory and Delbourgo 1982, "Piecewise rational quadratic interpolation to monotonic data"; Durkan et al.
    2019, "Neural Spline Flows", equations 4 and 5.
    """
    t = ((x - b.x0) / b.width).clamp(0, 1)
    q = terms(b, t)
    return b.y0 + b.height * q.over / q.below, _log_slope(b, q)


def inverse(b: Bin, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and log dx/dy for y inside its bin.

    t is the root of a quadratic, computed by the form that does not cancel for the sign of its linear coefficient.
    Its coefficients still cancel when the slopes differ by orders of magnitude; Newton steps on the curve itself
    remove that error.

    Source: Durkan et al. 2019, equations 6 to 8; the choice of the form and the Newton steps are ours.
    """
    s = b.s
    up = y - b.y0
    mixed = up * (b.d0 + b.d1 - 2 * s)
    quadratic = b.height * (s - b.d0) + mixed
    linear = b.height * b.d0 - mixed
    constant = -s * up
    root = torch.sqrt((linear * linear - 4 * quadratic * constant).clamp_min(0))
    positive = linear >= 0
    over = torch.where(positive, 2 * constant, root - linear)
    below = torch.where(positive, -linear - root, 2 * quadratic)
    t = (over / below).clamp(0, 1)
    for _ in range(NEWTON_STEPS):
        q = terms(b, t)
        residual = b.height * q.over - up * q.below
        t = (t - residual * q.below / (b.height * s * q.above)).clamp(0, 1)
    return b.x0 + t * b.width, -_log_slope(b, terms(b, t))


def _log_slope(b: Bin, q: Terms) -> Tensor:
    return 2 * b.s.log() + q.above.log() - 2 * q.below.log()
