"""Monotone maps of one feature, given its parameters: y = g(x; params), strictly increasing in x.

Everything here is elementwise: x, y and the log-derivative are (...), params is (..., P). Which features
the parameters were computed from is the business of `made.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.checks import positive_number
from counterflow.univariate import rational_quadratic
from counterflow.univariate.affine import _softclip
from counterflow.univariate.base import Partials, Univariate


@dataclass(frozen=True)
class RationalQuadraticSpline(Univariate):
    """Monotone rational-quadratic spline on [-bound, bound], the identity outside.

    params (..., 3 bins - 1) holds bins widths w, bins heights h and bins - 1 inner slopes d, unnormalised:

        width_k  = 2 bound (1e-3 + (1 - 1e-3 bins) softmax(w)_k), heights alike;  knots by cumulative sum
        slope_k  = 1e-3 + softplus(d_k + log(exp(1 - 1e-3) - 1)), and 1 at both ends
        y = y_k + height_k (s t^2 + slope_k t (1 - t)) / (s + (slope_k + slope_k+1 - 2 s) t (1 - t))

    with t = (x - x_k) / width_k and s = height_k / width_k in bin k. With zero parameters y = x. 1e-3 is `min_slope`.
    With `clipped` it bounds the raw numbers instead, as in zuko:

        width_k  = 2 bound softmax(clip(w, b / 2))_k, heights alike
        slope_k  = exp(clip(d_k, b)),    b = log(1 / min_slope),    clip(a, b) = a / (1 + |a| / b)

    Raises:
        ValueError: fewer than 2 bins, bins that min_slope leaves no room for, or a bound that is not positive.

    Source: Durkan et al. 2019, "Neural Spline Flows", section 3.1; Rozet et al. 2022, zuko, for `clipped`.

    Example:
        >>> import torch, counterflow as cf
        >>> spline = cf.RationalQuadraticSpline(bins=4, bound=2.0)
        >>> y, log_slope = spline.forward(torch.tensor([0.5, 9.0]), torch.zeros(2, spline.parameters))
        >>> [round(v, 4) for v in y.tolist()]
        [0.5, 9.0]
    """

    bins: int = 8
    bound: float = 5.0
    min_slope: float = 1e-3  # the smallest slope, and the smallest share of a bin; Durkan et al.'s and zuko's own
    clipped: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bins, int) and 2 <= self.bins <= 500):
            raise ValueError(f"expected bins to be a whole number from 2 to 500, got {self.bins!r}")
        positive_number(self.bound, "bound")
        if not 0 < self.min_slope <= 1 / (2 * self.bins):
            raise ValueError(f"expected min_slope above 0 and at most 1 / (2 bins), got {self.min_slope!r}")

    @property
    def parameters(self) -> int:  # type: ignore[override]
        """P = 3 bins - 1."""
        return 3 * self.bins - 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        inside, x_inside = self._inside(x)
        xs, ys, slopes = self._knots(params)
        y, log_slope = rational_quadratic.value(_bin(x_inside, xs, xs, ys, slopes), x_inside)
        return torch.where(inside, y, x), torch.where(inside, log_slope, torch.zeros_like(x))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        inside, y_inside = self._inside(y)
        xs, ys, slopes = self._knots(params)
        x, log_slope = rational_quadratic.inverse(_bin(y_inside, ys, xs, ys, slopes), y_inside)
        return torch.where(inside, x, y), torch.where(inside, log_slope, torch.zeros_like(y))

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Closed form: the chain rule to the ends and slopes of the bin, and from there to the params."""
        inside, x_inside = self._inside(x)
        xs, ys, slopes = self._knots(params)
        found = _bin(x_inside, xs, xs, ys, slopes)
        x0, _, width, height, d0, d1 = found
        s = found.s
        t = (x_inside - x0) / width
        over, below, above = rational_quadratic.terms(found, t)
        rest = 1 - t
        u = t * rest
        bend = d0 + d1 - 2 * s
        below_t = bend * (rest - t)
        above_t = 2 * (d1 * t + s * (rest - t) - d0 * rest)
        dy_dx = s * s * above / (below * below)
        dl_dx = (above_t / above - 2 * below_t / below) / width

        def to_params(by_over: Tensor, by_above: Tensor, by_below: Tensor, by_s: Tensor, by_ends: Tensor) -> Tensor:
            """From derivatives by these to derivatives by the params; by_ends is dy/dy0, which is 1, or dl/dy0."""
            by_s = by_s + 2 * u * by_above + t * t * by_over + (1 - 2 * u) * by_below
            by_t = by_over * (2 * s * t + d0 * (rest - t)) + by_above * above_t + by_below * below_t
            by_height, by_width = by_s / width + by_ends * over / below, -(by_s * s + by_t * t) / width
            by_d0 = by_over * u + by_above * rest * rest + by_below * u
            return torch.cat(
                [
                    self._by_shares(w, x_inside, xs, xs, -by_t / width - by_width, by_width),
                    self._by_shares(h, x_inside, xs, ys, by_ends - by_height, by_height),
                    self._by_slopes(d, x_inside, xs, slopes, by_d0, by_above * t * t + by_below * u),
                ],
                -1,
            )

        w, h, d = self._split(params)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        dy = to_params(height / below, zero, -height * over / (below * below), zero, one)
        dl = to_params(zero, 1 / above, -2 / below, 2 / s, zero)
        beyond = ~inside[..., None]
        return Partials(
            torch.where(inside, dy_dx, one),
            dy.masked_fill(beyond, 0),
            torch.where(inside, dl_dx, zero),
            dl.masked_fill(beyond, 0),
        )

    def _by_shares(
        self, raw: Tensor, x: Tensor, xs: Tensor, edges: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Derivatives by w or h (..., bins), from those by the edges at both ends of the bin of x."""
        begun = (x[..., None] >= xs[..., :-1]).to(x.dtype)  # the bin of x and those before it
        before = F.pad(begun[..., 1:], (0, 1))
        by_share = by_left[..., None] * before + by_right[..., None] * begun
        shares = (edges.diff(dim=-1) / (2 * self.bound) - self._floor) / (1 - self._floor * self.bins)
        mean = (shares * by_share).sum(-1, keepdim=True)
        by_raw = 2 * self.bound * (1 - self._floor * self.bins) * shares * (by_share - mean)
        return by_raw * (1 + raw.abs() / (self._most / 2)) ** -2 if self.clipped else by_raw

    def _by_slopes(
        self, raw: Tensor, x: Tensor, xs: Tensor, slopes: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Derivatives by d (..., bins - 1), from those by the slopes at both ends of the bin of x."""
        place = (x[..., None] >= xs[..., 1:-1]).sum(-1, keepdim=True)
        by = torch.zeros_like(slopes).scatter(-1, place, by_left[..., None]).scatter(-1, place + 1, by_right[..., None])
        inner = slopes[..., 1:-1]
        if self.clipped:
            return by[..., 1:-1] * inner * (1 + raw.abs() / self._most) ** -2
        return by[..., 1:-1] * -torch.expm1(self.min_slope - inner)  # the sigmoid of what softplus was given

    def _inside(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask of numbers inside the bound, and the numbers with 0 in place of the others."""
        inside = v.abs() < self.bound
        return inside, torch.where(inside, v, torch.zeros_like(v))

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Knots xs, ys (..., bins + 1), the outer ones exactly at -bound and bound, and slopes (..., bins + 1)."""
        w, h, d = self._split(params)
        if self.clipped:
            w, h, slopes = (*(_softclip(v, self._most / 2) for v in (w, h)), _softclip(d, self._most).exp())
        else:
            slopes = self.min_slope + F.softplus(d + self.softplus_offset)
        return self._edges(w), self._edges(h), F.pad(slopes, (1, 1), value=1.0)

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self._floor + (1 - self._floor * self.bins) * raw.softmax(-1)
        inner = self.bound * (2 * shares[..., :-1].cumsum(-1) - 1)
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.split([self.bins, self.bins, self.bins - 1], -1)

    @property
    def softplus_offset(self) -> float:
        """What softplus is given at d = 0."""
        return math.log(math.expm1(1 - self.min_slope))

    @property
    def _floor(self) -> float:
        return 0.0 if self.clipped else self.min_slope

    @property
    def _most(self) -> float:
        return -math.log(self.min_slope)


def _bin(v: Tensor, edges: Tensor, xs: Tensor, ys: Tensor, slopes: Tensor) -> rational_quadratic.Bin:
    """Return the bin of `edges` (..., bins + 1) in which each v (...) lies."""
    k = (v.unsqueeze(-1) >= edges[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (table.gather(-1, k + side).squeeze(-1) for table in (xs, ys, slopes) for side in (0, 1))
    return rational_quadratic.Bin(x0, y0, x1 - x0, y1 - y0, d0, d1)
