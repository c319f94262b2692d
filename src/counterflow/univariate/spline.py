"""The rational-quadratic spline as a univariate map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.checks import positive_number
from counterflow.univariate import rational_quadratic
from counterflow.univariate.affine import softclip
from counterflow.univariate.base import Partials, Univariate


@dataclass(frozen=True)
class RationalQuadraticSpline(Univariate):
    """Monotone rational-quadratic spline on [-bound, bound], the identity outside.

    params (..., 3 bins - 1) holds bins widths w, bins heights h and bins - 1 inner slopes d, unnormalised:

        width_k  = 2 bound (min_slope + (1 - min_slope bins) softmax(w)_k), heights alike;  knots by cumulative sum
        slope_k  = min_slope + softplus(d_k + log(exp(1 - min_slope) - 1)), and 1 at both ends
        y = y_k + height_k (s t^2 + slope_k t (1 - t)) / (s + (slope_k + slope_k+1 - 2 s) t (1 - t))

    with t = (x - x_k) / width_k and s = height_k / width_k in bin k. With zero parameters y = x. With `clipped`, widths
    and slopes are bounded as in zuko:

        width_k  = 2 bound softmax(clip(w, b / 2))_k, heights alike
        slope_k  = exp(clip(d_k, b)),    b = log(1 / min_slope),    clip(a, b) = a / (1 + |a| / b)

    Args:
        bins: number of bins, from 2 to 500.
        bound: the spline covers [-bound, bound].
        min_slope: the smallest slope at a knot, and the smallest share of a bin in the width and in the height of the
            spline.
        clipped: True for zuko's normalization.

    Raises:
        ValueError: bins out of range, min_slope not in (0, 1 / (2 bins)], or a bound that is not positive.

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
    min_slope: float = 1e-3  # the default of Durkan et al. and of zuko
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
        """Return the derivatives in closed form: the chain rule from params to the corners and slopes of the bin."""
        inside, x_inside = self._inside(x)
        xs, ys, slopes = self._knots(params)
        found = _bin(x_inside, xs, xs, ys, slopes)
        x0, _, width, height, d0, d1 = found
        s = found.s
        t = (x_inside - x0) / width
        over, below, above = rational_quadratic.terms(found, t)
        rest = 1 - t
        u = t * rest
        below_t = (d0 + d1 - 2 * s) * (rest - t)
        above_t = 2 * (d1 * t + s * (rest - t) - d0 * rest)
        dy_dx = s * s * above / (below * below)
        dl_dx = (above_t / above - 2 * below_t / below) / width

        def to_params(by_over: Tensor, by_above: Tensor, by_below: Tensor, by_s: Tensor, by_y0: Tensor) -> Tensor:
            """Return the derivatives by params, from those by over, above, below, and directly by s and y0."""
            by_s = by_s + 2 * u * by_above + t * t * by_over + (1 - 2 * u) * by_below
            by_t = by_over * (2 * s * t + d0 * (rest - t)) + by_above * above_t + by_below * below_t
            by_height = by_s / width + by_y0 * over / below
            by_width = -(by_s * s + by_t * t) / width
            by_d0 = by_over * u + by_above * rest * rest + by_below * u
            by_d1 = by_above * t * t + by_below * u
            return torch.cat(
                [
                    self._by_shares(w, x_inside, xs, xs, -by_t / width - by_width, by_width),
                    self._by_shares(h, x_inside, xs, ys, by_y0 - by_height, by_height),
                    self._by_slopes(d, x_inside, xs, slopes, by_d0, by_d1),
                ],
                -1,
            )

        w, h, d = self._split(params)
        zero = torch.zeros_like(x)
        one = torch.ones_like(x)
        dy = to_params(height / below, zero, -height * over / (below * below), zero, one)
        dl = to_params(zero, 1 / above, -2 / below, 2 / s, zero)
        outside = ~inside[..., None]
        return Partials(
            torch.where(inside, dy_dx, one),
            dy.masked_fill(outside, 0),
            torch.where(inside, dl_dx, zero),
            dl.masked_fill(outside, 0),
        )

    def _by_shares(
        self, raw: Tensor, x: Tensor, xs: Tensor, edges: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Return the derivatives by w or h (..., bins), from those by the two edges of the bin of x."""
        begun = (x[..., None] >= xs[..., :-1]).to(x.dtype)  # 1 for the bin of x and the bins before it
        before = F.pad(begun[..., 1:], (0, 1))  # 1 for the bins before that of x
        by_share = by_left[..., None] * before + by_right[..., None] * begun
        shares = (edges.diff(dim=-1) / (2 * self.bound) - self._min_share) / (1 - self._min_share * self.bins)
        mean = (shares * by_share).sum(-1, keepdim=True)
        by_raw = 2 * self.bound * (1 - self._min_share * self.bins) * shares * (by_share - mean)
        return by_raw * (1 + raw.abs() / (self._clip / 2)) ** -2 if self.clipped else by_raw

    def _by_slopes(
        self, raw: Tensor, x: Tensor, xs: Tensor, slopes: Tensor, by_left: Tensor, by_right: Tensor
    ) -> Tensor:
        """Return the derivatives by d (..., bins - 1), from those by the slopes at the two ends of the bin of x."""
        k = (x[..., None] >= xs[..., 1:-1]).sum(-1, keepdim=True)
        by = torch.zeros_like(slopes).scatter(-1, k, by_left[..., None]).scatter(-1, k + 1, by_right[..., None])
        by_inner = by[..., 1:-1]
        inner = slopes[..., 1:-1]
        if self.clipped:
            return by_inner * inner * (1 + raw.abs() / self._clip) ** -2
        return by_inner * -torch.expm1(self.min_slope - inner)  # softplus'(v) = 1 - exp(-softplus(v))

    def _inside(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask of the numbers inside the bound, and the numbers with 0 in place of all others."""
        inside = v.abs() < self.bound
        return inside, torch.where(inside, v, torch.zeros_like(v))

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return knots xs and ys, the outer ones exactly at -bound and bound, and slopes, (..., bins + 1) each."""
        w, h, d = self._split(params)
        if self.clipped:
            w = softclip(w, self._clip / 2)
            h = softclip(h, self._clip / 2)
            slopes = softclip(d, self._clip).exp()
        else:
            slopes = self.min_slope + F.softplus(d + self.softplus_offset)
        return self._edges(w), self._edges(h), F.pad(slopes, (1, 1), value=1.0)

    def _edges(self, raw: Tensor) -> Tensor:
        shares = self._min_share + (1 - self._min_share * self.bins) * raw.softmax(-1)
        inner = self.bound * (2 * shares[..., :-1].cumsum(-1) - 1)
        return F.pad(F.pad(inner, (1, 0), value=-self.bound), (0, 1), value=self.bound)

    def _split(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.split([self.bins, self.bins, self.bins - 1], -1)

    @property
    def softplus_offset(self) -> float:
        """Argument of softplus at d = 0, where the slope is 1."""
        return math.log(math.expm1(1 - self.min_slope))

    @property
    def _min_share(self) -> float:
        return 0.0 if self.clipped else self.min_slope

    @property
    def _clip(self) -> float:
        """Clip b of the raw slopes; see the class."""
        return -math.log(self.min_slope)


def _bin(v: Tensor, edges: Tensor, xs: Tensor, ys: Tensor, slopes: Tensor) -> rational_quadratic.Bin:
    """Return the bin of `edges` (..., bins + 1) in which each v (...) lies."""
    k = (v.unsqueeze(-1) >= edges[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (table.gather(-1, k + side).squeeze(-1) for table in (xs, ys, slopes) for side in (0, 1))
    return rational_quadratic.Bin(x0, y0, x1 - x0, y1 - y0, d0, d1)
