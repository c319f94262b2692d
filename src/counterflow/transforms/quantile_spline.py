"""Monotone splines through the quantiles of each feature, which make its marginal distribution about normal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterflow.transforms.base import Transform, prepare, rank
from counterflow.univariate import rational_quadratic

Knots = tuple[Tensor, Tensor, Tensor]  # x, y and slopes of one feature, (K,) each


class QuantileSpline(Transform):
    """Increasing spline of each feature, y_i = g_i(x_i): rational-quadratic between knots, linear beyond them.

        y = y_k + h (s t^2 + d_k t (1 - t)) / (s + (d_k + d_k+1 - 2 s) t (1 - t)),    t = (x - x_k) / w,  s = h / w

    where d_k is the slope at knot k, and w and h are the width and height of bin k. The knots and slopes are constants,
    saved with the transform and never trained. `QuantileSpline.from_data` computes them from data.

    Args:
        x: knots (D, K), ascending along K.
        y: their values (D, K), ascending along K.
        slopes: slopes at the knots (D, K), positive.

    Raises:
        ValueError: shapes that differ, fewer than two knots, or splines that do not increase.

    Source: Gregory and Delbourgo 1982, "Piecewise rational quadratic interpolation to monotonic data"; the formula is
    equation 4 of Durkan et al. 2019, "Neural Spline Flows".

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.transforms.QuantileSpline([[0.0, 1.0, 2.0]], [[-1.0, 0.0, 3.0]], [[1.0, 2.0, 3.0]])
        >>> y, log_det = t(torch.tensor([[1.0], [4.0]]))
        >>> y.flatten().tolist(), [round(v, 4) for v in log_det.tolist()]
        ([0.0, 9.0], [0.6931, 1.0986])
    """

    x: Tensor
    y: Tensor
    slopes: Tensor

    def __init__(
        self,
        x: Tensor | Sequence[Sequence[float]],
        y: Tensor | Sequence[Sequence[float]],
        slopes: Tensor | Sequence[Sequence[float]],
    ) -> None:
        super().__init__()
        x, y, slopes = (torch.as_tensor(v) for v in (x, y, slopes))
        if x.dim() != 2 or x.shape[1] < 2 or not len(x) or not (x.shape == y.shape == slopes.shape):
            shapes = ", ".join(str(tuple(v.shape)) for v in (x, y, slopes))
            raise ValueError(f"expected x, y and slopes of one shape (D, K) with K of at least 2, got {shapes}")
        rising = torch.stack([x.diff() > 0, y.diff() > 0, slopes[:, 1:] > 0, slopes[:, :-1] > 0]).all(0).all(1)
        if not rising.all():
            raise ValueError(
                "expected x and y to increase and slopes to be positive, got something else at feature "
                f"{int((~rising).nonzero()[0, 0])}; merge knots that coincide"
            )
        self.features = len(x)
        for name, value in (("x", x), ("y", y), ("slopes", slopes)):
            self.register_buffer(name, value.detach().clone())

    @classmethod
    def from_data(cls, rows: Tensor, min_gain: float = -math.inf) -> QuantileSpline:
        """Build the splines that make each feature of rows (N, D) about standard normal.

            y = Phi^-1(F(x)) at the knots

        F is the empirical distribution function. The knots are about sqrt(N) quantiles, from 8 to 64, at levels from
        1 / 2N to 1 - 1 / 2N. The slope at an inner knot is the harmonic mean of the slopes of its two chords.

        Args:
            rows: (N, D).
            min_gain: a feature is standardized instead if its spline gains less than this over a normal fitted to it,
                in nats per row. A spline through quantiles is rough, and is worth it only for spikes and long tails.

        Raises:
            ValueError: fewer than two rows, or a feature with a single value.

        Example:
            >>> import torch, counterflow as cf
            >>> rows = torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)).square()
            >>> y, log_det = cf.transforms.QuantileSpline.from_data(rows)(rows)
            >>> [round(y.quantile(p).item(), 1) for p in (0.25, 0.5, 0.75)]
            [-0.7, 0.0, 0.7]
        """
        if rows.dim() != 2 or len(rows) < 2:
            raise ValueError(f"expected at least two rows (N, D), got shape {tuple(rows.shape)}")
        curves = [_through_quantiles(column) for column in rows.double().T]
        if min_gain > -math.inf:
            gains = [_gain(column, curve) for column, curve in zip(rows.double().T, curves, strict=True)]
            curves = [
                curve if gain >= min_gain else _line(column, curve)
                for column, curve, gain in zip(rows.double().T, curves, gains, strict=True)
            ]
        K = max(len(x) for x, _, _ in curves)
        # A feature whose knots coincide has fewer of them; more on the line beyond its last knot change nothing.
        curves = [_padded(*curve, K) for curve in curves]
        return cls(*(torch.stack(part).to(rows.dtype) for part in zip(*curves, strict=True)))

    def _bin(self, at: Tensor, edges: Tensor) -> rational_quadratic.Bin:
        """Return the bin of each number, the first or last one for numbers beyond the knots."""
        k = rank(at.movedim(-1, 0).reshape(self.features, -1), edges)
        k = (k - 1).clamp(0, edges.shape[1] - 2)

        def pick(values: Tensor, more: int) -> Tensor:
            return values.gather(1, k + more).reshape(self.features, *at.shape[:-1]).movedim(0, -1)

        x0, y0 = pick(self.x, 0), pick(self.y, 0)
        return rational_quadratic.Bin(
            x0, y0, pick(self.x, 1) - x0, pick(self.y, 1) - y0, pick(self.slopes, 0), pick(self.slopes, 1)
        )

    def _beyond(self, at: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signed distance of each number beyond the knots, 0 between them, and the slope there, else 1."""
        beyond = (at - edges[:, -1]).clamp_min(0) + (at - edges[:, 0]).clamp_max(0)
        slope = torch.where(beyond > 0, self.slopes[:, -1], torch.where(beyond < 0, self.slopes[:, 0], 1.0))
        return beyond, slope

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        y, log_slope = self._forward(prepare(self, x, c))
        return y, log_slope.sum(-1)

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        beyond, slope = self._beyond(x, self.x)
        y, log_slope = rational_quadratic.value(self._bin(x, self.x), x - beyond)
        return y + beyond * slope, torch.where(beyond == 0, log_slope, slope.log())

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        y = prepare(self, y, c, "y")
        beyond, slope = self._beyond(y, self.y)
        x, log_slope = rational_quadratic.inverse(self._bin(y, self.y), y - beyond)
        return x + beyond / slope, torch.where(beyond == 0, log_slope, -slope.log()).sum(-1)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        y, log_slope = self._forward(prepare(self, x, c))
        return y, total + log_slope

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"x": self.x.tolist(), "y": self.y.tolist(), "slopes": self.slopes.tolist()}

    def extra_repr(self) -> str:
        """Return the numbers of features and knots."""
        return f"features={self.features}, knots={self.x.shape[1]}"


def _through_quantiles(column: Tensor) -> Knots:
    """Return knots and slopes (K,) for one feature (N,)."""
    N = len(column)
    ordered = column.sort().values
    pieces = max(8, min(64, round(math.sqrt(N))))
    inner = (torch.arange(1, pieces) * N / pieces).round().long().clamp(1, N - 1).unique()
    middle = (ordered[inner - 1] + ordered[inner]) / 2
    # The outer knots are half a gap beyond the extremes; a gap is the mean distance between the outermost few values.
    few = min(3, N - 1)
    reach = torch.stack([ordered[few] - ordered[0], ordered[-1] - ordered[-1 - few]]) / (2 * few) + 1e-4 * column.std()
    x = torch.cat([ordered[:1] - reach[0], middle, ordered[-1:] + reach[1]])
    ends = torch.tensor([0.5 / N], dtype=column.dtype)
    y = torch.special.ndtri(torch.cat([ends, (inner / N).clamp(ends, 1 - ends), 1 - ends]))
    kept = torch.cat([torch.ones(1, dtype=torch.bool), (x.diff() > 1e-7 * column.std()) & (y.diff() > 0)])
    x, y = x[kept], y[kept]
    if len(x) < 2:
        raise ValueError(f"expected features with at least two values, got {ordered[0].item()} in all {N} rows")
    chord = y.diff() / x.diff()
    return x, y, torch.cat([chord[:1], 2 / (1 / chord[1:] + 1 / chord[:-1]), chord[-1:]])


def _gain(column: Tensor, curve: Knots) -> float:
    """Return the mean log density of a feature (N,) under its spline, minus that under a normal fitted to it."""
    y, log_det = QuantileSpline(*(part[None] for part in curve))(column[:, None])
    normal = -((column - column.mean()) / column.std(correction=0)).square() / 2 - column.std(correction=0).log()
    return float((log_det - y[:, 0].square() / 2 - normal).mean())


def _line(column: Tensor, curve: Knots) -> Knots:
    """Return the line that standardizes a feature, with knots at the first and last one of its spline."""
    x = curve[0][[0, -1]]
    std = column.std(correction=0)
    return x, (x - column.mean()) / std, (1 / std).expand(2)


def _padded(x: Tensor, y: Tensor, slopes: Tensor, size: int) -> Knots:
    """Return `size` knots: the given ones, and more on the line beyond the last one."""
    more = torch.arange(1, size - len(x) + 1, dtype=x.dtype)
    return (
        torch.cat([x, x[-1] + more]),
        torch.cat([y, y[-1] + slopes[-1] * more]),
        torch.cat([slopes, slopes[-1:].expand(len(more))]),
    )
