"""Columns: the invertible map from a table in its own units to real numbers on a scale near 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.transforms.base import Transform, prepare, rank

MAPS = ("linear", "log", "logit", "asinh", "ordinal")


@dataclass(frozen=True)
class Column:
    """One column: y = (v - center) / scale, where v depends on the map.

        linear   v = x
        log      v = log(x - low), or -log(high - x) where high alone is given
        logit    v = log(x - low) - log(high - x)
        asinh    v = asinh((x - low) / unit), any x: its tails become those of a logarithm
        ordinal  v = Phi^-1(F(x)), F linear from share to share within the cell of each of the values

    Recorded numbers fill a cell. The cell of x is [x - step / 2, x + step / 2], where spikes are given only if x is one
    of them; that of an ordinal value ends half-way to its neighbours. With step = 0 a number is its own cell.

    A cell of a spike holds far more rows than its width deserves. Before the map it is stretched,

        x + sum over the spikes of room_k clip((x - spike_k) / step + 1 / 2, 0, 1)

    and the numbers of the map (low but for asinh, high, unit) are taken before, center and scale after it.

    Raises:
        ValueError: a map that does not exist, or numbers that do not fit it.
    """

    name: str
    map: str = "linear"
    low: float | None = None  # of the support; the middle, for asinh
    high: float | None = None
    unit: float = 0.0  # log, logit: nothing is nearer to a bound than this; asinh: where it bends
    center: float = 0.0
    scale: float = 1.0
    step: float = 0.0  # width of a cell
    offset: float = 0.0  # a number of the even grid
    mass: bool = False  # the log density counts the mass of the cell, not mass / width
    least: float | None = None  # what samples of a column with a grid are kept within
    most: float | None = None
    spikes: tuple[float, ...] = ()  # values that repeat in a column that is continuous otherwise
    room: tuple[float, ...] = ()  # what the cell of each spike is stretched by
    values: tuple[float, ...] = ()  # of an ordinal column, ascending
    shares: tuple[float, ...] = ()  # of the rows that have them, above 0, with sum 1

    def __post_init__(self) -> None:
        for name in ("spikes", "room", "values", "shares"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.map not in MAPS:
            raise ValueError(f"expected map as one of {', '.join(MAPS)}, got {self.map!r} for column {self.name!r}")
        wanted = {
            "log": (self.low is None) != (self.high is None),
            "logit": self.low is not None and self.high is not None and self.low < self.high,
            "asinh": self.low is not None and self.unit > 0,
            "ordinal": len(self.values) > 1
            and len(self.shares) == len(self.values)
            and min(self.shares) > 0
            and all(a < b for a, b in pairwise(self.values)),
        }
        fits = wanted.get(self.map, True) and self.scale > 0 and self.step >= 0 and len(self.room) == len(self.spikes)
        if not fits or (self.spikes and not self.step):
            raise ValueError(f"expected the numbers that the map {self.map!r} of Column takes, got {self}")

    @property
    def top(self) -> float | None:
        """Where high is after stretching."""
        return None if self.high is None else self.high + sum(self.room)

    @property
    def edges(self) -> list[float]:
        """The ends of the cells of an ordinal column, one more than values."""
        v = self.values
        inner = [(a + b) / 2 for a, b in pairwise(v)]
        return [v[0] - (inner[0] - v[0]), *inner, v[-1] + (v[-1] - inner[-1])]


class TableTransform(Transform):
    """The columns of a table, each by its own map: y_i = g_i(x_i), log_det = sum_i log dy_i/dx_i.

    The maps are those of `Column`; their numbers are constants. x is in the units of the table, y on a scale near 1.
    Within `unit` of a bound the map of log and logit columns is taken at `unit`.

    Args:
        columns: a Column for each feature.

    Raises:
        ValueError: no columns.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.transforms.TableTransform([cf.transforms.Column("length", scale=2.0), cf.transforms.Column("price", "log", low=0.0)])
        >>> y, log_det = t(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> y.tolist(), round(log_det.item(), 4)
        ([2.0, 0.0], -0.6931)
    """

    center: Tensor
    scale: Tensor
    step: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    top: Tensor
    near_low: Tensor
    near_high: Tensor
    middle: Tensor
    bend: Tensor

    def __init__(self, columns: Sequence[Column | Sequence[Any]]) -> None:
        super().__init__()
        self.columns = tuple(c if isinstance(c, Column) else Column(*c) for c in columns)
        if not self.columns:
            raise ValueError("expected at least one column in Columns, got none")
        self.features = len(self.columns)
        self._constant("center", [c.center for c in self.columns])
        self._constant("scale", [c.scale for c in self.columns])
        self._constant("step", [0.0 if c.spikes else c.step for c in self.columns])
        self._constant("offset", [c.offset for c in self.columns])
        self._below, self._above, self._bent, self._ordinal = (
            [i for i, c in enumerate(self.columns) if chosen(c)]
            for chosen in (
                lambda c: c.map in ("log", "logit") and c.low is not None,
                lambda c: c.map in ("log", "logit") and c.high is not None,
                lambda c: c.map == "asinh",
                lambda c: c.map == "ordinal",
            )
        )
        self._constant("low", [self.columns[i].low for i in self._below])
        self._constant("high", [self.columns[i].high for i in self._above])
        self._constant("top", [self.columns[i].top for i in self._above])
        self._constant("near_low", [self.columns[i].unit for i in self._below])
        self._constant("near_high", [self.columns[i].unit for i in self._above])
        self._constant("middle", [self.columns[i].low for i in self._bent])
        self._constant("bend", [self.columns[i].unit for i in self._bent])
        self.ranks = nn.ModuleList(_Ranks(self.columns[i]) for i in self._ordinal)
        self._spiked = [i for i, c in enumerate(self.columns) if c.spikes]
        for i in self._spiked:
            self._constant(f"spikes_{i}", self.columns[i].spikes)
            self._constant(f"room_{i}", self.columns[i].room)
        self._mass = [i for i, c in enumerate(self.columns) if c.mass]

    def _constant(self, name: str, numbers: Sequence[float | None] | Sequence[float]) -> None:
        """Built from the configuration, so not saved a second time."""
        self.register_buffer(name, torch.tensor(numbers, dtype=torch.float64), persistent=False)

    def _ranked(self) -> Iterator[tuple[int, _Ranks]]:
        """The ordinal features, each with its map."""
        yield from zip(self._ordinal, self.ranks, strict=True)

    @property
    def quantised(self) -> list[int]:
        """The features whose numbers fill a cell."""
        return [i for i, c in enumerate(self.columns) if c.step or c.map == "ordinal"]

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        x = prepare(self, x, c)
        total = (-self.scale.log().sum()).expand(x.shape[:-1])
        if not (self._ordinal or self._below or self._above or self._bent or self._spiked):
            return (x - self.center) / self.scale, total
        v = x.clone()
        for i in self._spiked:
            v[..., i], log_slope = self._stretch(i, x[..., i])
            total = total + log_slope
        if self._below or self._above:
            from_low = (v[..., self._below] - self.low).clamp_min(self.near_low)
            to_high = (self.top - v[..., self._above]).clamp_min(self.near_high)
            v[..., self._below + self._above] = 0.0
            v[..., self._below] += from_low.log()
            v[..., self._above] -= to_high.log()
            total = total + self._log_slope(from_low, to_high)
        if self._bent:
            t = (v[..., self._bent] - self.middle) / self.bend
            v[..., self._bent] = torch.asinh(t)
            total = total - (torch.log1p(t * t) / 2 + self.bend.log()).sum(-1)
        for i, ranks in self._ranked():
            v[..., i], log_slope = ranks(x[..., i])
            total = total + log_slope
        return (v - self.center) / self.scale, total

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        y = prepare(self, y, c, "y")
        v = y * self.scale + self.center
        total = self.scale.log().sum().expand(y.shape[:-1])
        x = v.clone()
        if self._below or self._above:
            x[..., self._below] = self.low + v[..., self._below].exp()
            x[..., self._above] = self.top - (-v[..., self._above]).exp()
            for i in sorted({*self._below} & {*self._above}):
                column = self.columns[i]
                # such columns have both bounds, which mypy does not know
                x[..., i] = column.low + (column.top - column.low) * torch.sigmoid(v[..., i])  # type: ignore[operator]
            from_low = (x[..., self._below] - self.low).clamp_min(self.near_low)
            to_high = (self.top - x[..., self._above]).clamp_min(self.near_high)
            total = total - self._log_slope(from_low, to_high)
        if self._bent:
            u = v[..., self._bent]
            x[..., self._bent] = self.middle + self.bend * torch.sinh(u)
            total = total + (u.abs() + torch.log1p(torch.exp(-2 * u.abs())) - math.log(2) + self.bend.log()).sum(-1)
        for i, ranks in self._ranked():
            x[..., i], log_slope = ranks.inverse(v[..., i])
            total = total + log_slope
        for i in self._spiked:
            x[..., i], log_slope = self._relax(i, x[..., i])
            total = total + log_slope
        return x, total

    def _stretch(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cells of the spikes of column i made wider, and the log-slope."""
        spikes, room, step = self.get_buffer(f"spikes_{i}"), self.get_buffer(f"room_{i}"), self.columns[i].step
        t = (x[..., None] - spikes) / step + 0.5
        inside = (t > 0) & (t < 1)
        return x + (room * t.clamp(0, 1)).sum(-1), (inside * torch.log1p(room / step)).sum(-1)

    def _relax(self, i: int, v: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `_stretch`."""
        spikes, room, step = self.get_buffer(f"spikes_{i}"), self.get_buffer(f"room_{i}"), self.columns[i].step
        start = spikes - step / 2 + room.cumsum(0) - room
        t = (v[..., None] - start) / (step + room)
        inside = (t > 0) & (t < 1)
        return v - (room * t.clamp(0, 1)).sum(-1), -(inside * torch.log1p(room / step)).sum(-1)

    def _log_slope(self, from_low: Tensor, to_high: Tensor) -> Tensor:
        """sum log dv/dx of the log and logit columns: 1 / a for one bound, 1 / a + 1 / b for two."""
        both = sorted({*self._below} & {*self._above})
        # as their name says, they have both bounds
        width = sum(math.log(self.columns[i].top - self.columns[i].low) for i in both)  # type: ignore[operator,misc]
        return width - from_low.log().sum(-1) - to_high.log().sum(-1)

    def inside(self, x: Tensor) -> Tensor:
        """Whether rows (..., D) lie in the support, its ends included: (...), boolean."""
        inside = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        if self._below or self._above:
            low, high = x[..., self._below] >= self.low, x[..., self._above] <= self.high
            inside = low.all(-1) & high.all(-1)
        for i, ranks in self._ranked():
            inside = inside & (x[..., i] >= ranks.edges[0]) & (x[..., i] <= ranks.edges[-1])
        return inside

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The lower ends and the widths of the cells that numbers (..., D) fill; width 0 where they have none."""
        width = self.step.expand(x.shape)
        if not (self._ordinal or self._spiked):
            return x - width / 2, width
        width = width.clone()
        for i in self._spiked:
            width[..., i] = torch.isin(x[..., i], self.get_buffer(f"spikes_{i}")) * self.columns[i].step
        start = x - width / 2
        for i, ranks in self._ranked():
            k = ranks.place(x[..., i])
            start[..., i], width[..., i] = ranks.edges[k], ranks.widths[k]
        return start, width

    def log_mass(self, width: Tensor) -> Tensor:
        """What turns a density into the mass of cells of these widths (..., D), where columns ask for it: (...)."""
        return width[..., self._mass].log().sum(-1)

    def snap(self, x: Tensor) -> Tensor:
        """Numbers (..., D) put back to those that are recorded: to the grid, the values, the spikes."""
        on_grid = self.offset + self.step * torch.round((x - self.offset) / self.step)
        x = torch.where(self.step > 0, on_grid, x)
        for i, column in enumerate(self.columns):
            if column.least is not None or column.most is not None:
                x[..., i] = x[..., i].clamp(column.least, column.most)
        for i in self._spiked:
            spikes = self.get_buffer(f"spikes_{i}")
            away = (x[..., i, None] - spikes).abs()
            nearest = away.argmin(-1)
            near = away.gather(-1, nearest[..., None])[..., 0] <= self.columns[i].step / 2
            x[..., i] = torch.where(near, spikes[nearest], x[..., i])
        for i, ranks in self._ranked():
            x[..., i] = ranks.values[ranks.place(x[..., i])]
        return x

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"columns": [list(astuple(c)) for c in self.columns]}

    def __repr__(self) -> str:
        maps = [c.map for c in self.columns]
        counts = ", ".join(f"{maps.count(m)} {m}" for m in MAPS if m in maps)
        cells = len(self.quantised)
        return f"TableTransform({counts}" + (f"; {cells} with cells)" if cells else ")")


class _Ranks(nn.Module):
    """v = Phi^-1(F(x)) of an ordinal column, F linear within each cell."""

    values: Tensor
    edges: Tensor
    widths: Tensor
    below: Tensor
    shares: Tensor

    least = 1e-12  # of F, and its distance from 1

    def __init__(self, column: Column) -> None:
        super().__init__()
        edges = torch.tensor(column.edges, dtype=torch.float64)
        shares = torch.tensor(column.shares, dtype=torch.float64)
        numbers = {
            "values": torch.tensor(column.values, dtype=torch.float64),
            "edges": edges,
            "widths": edges.diff(),
            "below": shares.cumsum(0) - shares,
            "shares": shares,
        }
        for name, value in numbers.items():
            self.register_buffer(name, value, persistent=False)

    def place(self, x: Tensor) -> Tensor:
        """In which cell x lies; the outer ones reach on for ever."""
        return rank(x, self.edges[1:-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.place(x)
        u = self.below[k] + self.shares[k] * (x - self.edges[k]) / self.widths[k]
        v = torch.special.ndtri(u.clamp(self.least, 1 - self.least))
        return v, self._log_slope(k, v)

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.special.ndtr(v)
        k = rank(u, self.below[1:])
        return self.edges[k] + self.widths[k] * (u - self.below[k]) / self.shares[k], -self._log_slope(k, v)

    def _log_slope(self, k: Tensor, v: Tensor) -> Tensor:
        """log dv/dx = log(share / width) - log phi(v)."""
        return (self.shares[k] / self.widths[k]).log() + (v * v + math.log(2 * math.pi)) / 2
