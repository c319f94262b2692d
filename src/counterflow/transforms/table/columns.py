"""Columns of a table: one increasing map per kind of column, from the column's own units to a scale near 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.transforms.base import rank


class Column(nn.Module, ABC):
    """One column of a table and its increasing map y = g(x). Tensors hold numbers of this column alone, (...).

    The maps with a center and a scale are y = (v(x) - center) / scale; the subclasses say what v is. `GridColumn` and
    `SpikedColumn` wrap another column whose recorded numbers stand for intervals, called cells.

    Attributes:
        name: the name of the column.
        map: the name of the map v, such as "log".
        quantized: True if some numbers of the column fill a cell.
        mass: True if the density of a row counts the probability mass of the cell instead of its mean density.
    """

    map: str
    quantized: bool = False
    mass: bool = False

    def __init__(self, name: str, center: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"expected scale of column {name!r} to be positive, got {scale}")
        self.name = name
        self.center = float(center)
        self.scale = float(scale)

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx, both (...)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy, both (...)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number in the support, its ends included."""
        return torch.ones_like(x, dtype=torch.bool)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell that each number fills; width 0 if it fills none."""
        return x, torch.zeros_like(x)

    def snap(self, x: Tensor) -> Tensor:
        """Round each number to one that the column records."""
        return x

    def extra_repr(self) -> str:
        """Return the constructor's arguments as text."""
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items() if name != "column")

    def _to_scale(self, v: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = (v - center) / scale and log dy/dx for v and log dv/dx."""
        return (v - self.center) / self.scale, log_slope - math.log(self.scale)

    def _from_scale(self, y: Tensor) -> Tensor:
        """Return v = scale * y + center."""
        return y * self.scale + self.center


class LinearColumn(Column):
    """Column without bounds: v = x.

    Args:
        name: the name of the column.
        center, scale: y = (v - center) / scale; scale is positive.

    Raises:
        ValueError: scale is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.transforms.LinearColumn("length", center=1.0, scale=2.0)(torch.tensor([5.0]))[0].tolist()
        [2.0]
    """

    map = "linear"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        return self._to_scale(x, torch.zeros_like(x))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        return self._from_scale(y), torch.full_like(y, math.log(self.scale))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"name": self.name, "center": self.center, "scale": self.scale}


class LogColumn(Column):
    """Column with one bound: v = log(x - low) for a lower bound, v = -log(high - x) for an upper bound.

    Args:
        name: the name of the column.
        low, high: the bound; exactly one of them.
        min_distance: numbers nearer to the bound are mapped as if they had this distance.
        center, scale: y = (v - center) / scale; scale is positive.

    Raises:
        ValueError: none or both of low and high, or a scale that is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.transforms.LogColumn("price", low=0.0)(torch.tensor([1.0]))[0].tolist()
        [0.0]
    """

    map = "log"

    def __init__(
        self,
        name: str,
        low: float | None = None,
        high: float | None = None,
        min_distance: float = 0.0,
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(name, center, scale)
        if (low is None) == (high is None):
            raise ValueError(f"expected one bound, low or high, for column {name!r}, got low={low}, high={high}")
        self.low = _optional(low)
        self.high = _optional(high)
        self.min_distance = float(min_distance)
        self._sign = 1.0 if high is None else -1.0
        self._bound = float(low if high is None else high)  # type: ignore[arg-type]  # one of them is given

    def _distance(self, x: Tensor) -> Tensor:
        """Return the distance of x from the bound."""
        return (self._sign * (x - self._bound)).clamp_min(self.min_distance)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        log_distance = self._distance(x).log()
        return self._to_scale(self._sign * log_distance, -log_distance)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        distance = (self._sign * self._from_scale(y)).exp()
        x = self._bound + self._sign * distance
        return x, self._distance(x).log() + math.log(self.scale)

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number on the right side of the bound."""
        return self._sign * (x - self._bound) >= 0

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "name": self.name,
            "low": self.low,
            "high": self.high,
            "min_distance": self.min_distance,
            "center": self.center,
            "scale": self.scale,
        }


class LogitColumn(Column):
    """Column with two bounds: v = log(x - low) - log(high - x).

    Args:
        name: the name of the column.
        low, high: the bounds, low < high.
        min_distance: numbers nearer to a bound are mapped as if they had this distance.
        center, scale: y = (v - center) / scale; scale is positive.

    Raises:
        ValueError: low is not below high, or scale is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.transforms.LogitColumn("share", low=0.0, high=2.0)(torch.tensor([1.0]))[0].tolist()
        [0.0]
    """

    map = "logit"

    def __init__(
        self,
        name: str,
        low: float,
        high: float,
        min_distance: float = 0.0,
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__(name, center, scale)
        if not low < high:
            raise ValueError(f"expected low < high for column {name!r}, got low={low}, high={high}")
        self.low = float(low)
        self.high = float(high)
        self.min_distance = float(min_distance)

    def _log_distances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logs of the distances of x from both bounds."""
        from_low = (x - self.low).clamp_min(self.min_distance)
        to_high = (self.high - x).clamp_min(self.min_distance)
        return from_low.log(), to_high.log()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        from_low, to_high = self._log_distances(x)
        return self._to_scale(from_low - to_high, math.log(self.high - self.low) - from_low - to_high)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        x = self.low + (self.high - self.low) * torch.sigmoid(self._from_scale(y))
        from_low, to_high = self._log_distances(x)
        return x, from_low + to_high - math.log(self.high - self.low) + math.log(self.scale)

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number between the bounds."""
        return (x >= self.low) & (x <= self.high)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "name": self.name,
            "low": self.low,
            "high": self.high,
            "min_distance": self.min_distance,
            "center": self.center,
            "scale": self.scale,
        }


class AsinhColumn(Column):
    """Column with heavy tails: v = asinh((x - middle) / unit), linear near the middle and logarithmic far from it.

    Args:
        name: the name of the column.
        middle: the point around which the map is linear.
        unit: the distance from the middle at which the map bends; positive.
        center, scale: y = (v - center) / scale; scale is positive.

    Raises:
        ValueError: unit or scale is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.transforms.AsinhColumn("return", middle=1.0, unit=0.5)(torch.tensor([1.0]))[0].tolist()
        [0.0]
    """

    map = "asinh"

    def __init__(self, name: str, middle: float, unit: float, center: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(name, center, scale)
        if not unit > 0:
            raise ValueError(f"expected unit of column {name!r} to be positive, got {unit}")
        self.middle = float(middle)
        self.unit = float(unit)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        t = (x - self.middle) / self.unit
        return self._to_scale(torch.asinh(t), -torch.log1p(t * t) / 2 - math.log(self.unit))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy = log cosh v + log unit + log scale."""
        v = self._from_scale(y)
        log_cosh = v.abs() + torch.log1p(torch.exp(-2 * v.abs())) - math.log(2)
        return self.middle + self.unit * torch.sinh(v), log_cosh + math.log(self.unit) + math.log(self.scale)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "name": self.name,
            "middle": self.middle,
            "unit": self.unit,
            "center": self.center,
            "scale": self.scale,
        }


class OrdinalColumn(Column):
    """Column of a few ordered values: y = Phi^-1(F(x)), where F is linear within the cell of each value.

    The cell of a value ends half-way to its neighbours, and F rises by the value's share within it. F is clipped to
    [1e-12, 1 - 1e-12]. The density counts the mass of the cell.

    Args:
        name: the name of the column.
        values: the values, ascending; at least two.
        shares: the probability of each value, positive, with sum 1.

    Raises:
        ValueError: fewer than two values, values that do not ascend, or shares that are not one positive number each.

    Example:
        >>> import torch, counterflow as cf
        >>> column = cf.transforms.OrdinalColumn("grade", values=[1.0, 2.0], shares=[0.5, 0.5])
        >>> column(torch.tensor([1.5], dtype=torch.float64))[0].tolist()
        [0.0]
    """

    map = "ordinal"
    quantized = True
    mass = True

    MIN_PROBABILITY = 1e-12  # smallest F, and its smallest distance from 1

    _values: Tensor
    _shares: Tensor
    _edges: Tensor  # ends of the cells, one more than there are values
    _widths: Tensor
    _below: Tensor  # F at the lower end of each cell

    def __init__(self, name: str, values: Sequence[float], shares: Sequence[float]) -> None:
        super().__init__(name)
        if len(values) < 2 or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"expected at least two ascending values for column {name!r}, got {list(values)}")
        if len(shares) != len(values) or min(shares) <= 0:
            raise ValueError(f"expected {len(values)} positive shares for column {name!r}, got {list(shares)}")
        self.values = tuple(values)
        self.shares = tuple(shares)
        inner = [(a + b) / 2 for a, b in pairwise(values)]
        first = values[0] - (inner[0] - values[0])
        last = values[-1] + (values[-1] - inner[-1])
        edges = torch.tensor([first, *inner, last], dtype=torch.float64)
        probabilities = torch.tensor(shares, dtype=torch.float64)
        # The buffers follow from the constructor's arguments, so they are not saved a second time.
        self.register_buffer("_values", torch.tensor(values, dtype=torch.float64), persistent=False)
        self.register_buffer("_shares", probabilities, persistent=False)
        self.register_buffer("_edges", edges, persistent=False)
        self.register_buffer("_widths", edges.diff(), persistent=False)
        self.register_buffer("_below", probabilities.cumsum(0) - probabilities, persistent=False)

    def _cell(self, x: Tensor) -> Tensor:
        """Return the index of the cell that each number lies in; the outer cells reach to infinity."""
        return rank(x, self._edges[1:-1])

    def _log_slope(self, k: Tensor, y: Tensor) -> Tensor:
        """Return log dy/dx = log(share / width) - log phi(y) in cell k."""
        return (self._shares[k] / self._widths[k]).log() + (y * y + math.log(2 * math.pi)) / 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        k = self._cell(x)
        F = self._below[k] + self._shares[k] * (x - self._edges[k]) / self._widths[k]
        y = torch.special.ndtri(F.clamp(self.MIN_PROBABILITY, 1 - self.MIN_PROBABILITY))
        return y, self._log_slope(k, y)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        F = torch.special.ndtr(y)
        k = rank(F, self._below[1:])
        return self._edges[k] + self._widths[k] * (F - self._below[k]) / self._shares[k], -self._log_slope(k, y)

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number in one of the cells."""
        return (x >= self._edges[0]) & (x <= self._edges[-1])

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell of each number."""
        k = self._cell(x)
        return self._edges[k], self._widths[k]

    def snap(self, x: Tensor) -> Tensor:
        """Round each number to the value of its cell."""
        return self._values[self._cell(x)]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"name": self.name, "values": list(self.values), "shares": list(self.shares)}


class GridColumn(Column):
    """Column recorded on an even grid, such as whole numbers or numbers with one decimal.

    The map is that of the wrapped column. Each number fills the cell [x - step / 2, x + step / 2].

    Args:
        column: the map of the numbers within their cells.
        step: the width of a cell; positive.
        offset: a number of the grid.
        mass: whether the density of a row counts the mass of the cell, as for whole numbers, or its mean density.
        minimum, maximum: range that samples are clamped to; None for no limit.

    Raises:
        ValueError: step is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> column = cf.transforms.GridColumn(cf.transforms.LinearColumn("children"), step=1.0, minimum=0.0)
        >>> column.snap(torch.tensor([-0.7, 1.6])).tolist(), column.cells(torch.tensor([2.0]))[0].tolist()
        ([0.0, 2.0], [1.5])
    """

    quantized = True

    def __init__(
        self,
        column: Column,
        step: float,
        offset: float = 0.0,
        mass: bool = False,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        super().__init__(column.name)
        if not step > 0:
            raise ValueError(f"expected step of column {column.name!r} to be positive, got {step}")
        self.column = column
        self.map = column.map
        self.step = float(step)
        self.offset = float(offset)
        self.mass = bool(mass)
        self.minimum = _optional(minimum)
        self.maximum = _optional(maximum)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx of the wrapped column."""
        return self.column(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy of the wrapped column."""
        return self.column.inverse(y)

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number in the support of the wrapped column."""
        return self.column.inside(x)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell of each number."""
        return x - self.step / 2, torch.full_like(x, self.step)

    def snap(self, x: Tensor) -> Tensor:
        """Round each number to the grid."""
        return _clamp(self.offset + self.step * torch.round((x - self.offset) / self.step), self.minimum, self.maximum)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "column": self.column,
            "step": self.step,
            "offset": self.offset,
            "mass": self.mass,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }


class SpikedColumn(Column):
    """Continuous column in which some values, called spikes, repeat.

    A spike fills the cell [spike - width / 2, spike + width / 2]. The cell holds far more rows than its width deserves,
    so it is stretched before the wrapped column maps the result u:

        u = x + sum over the spikes of room_k clip((x - spike_k) / width + 1 / 2, 0, 1)

    Args:
        column: the map of the stretched numbers u. Its upper bound, if any, is larger by the sum of the rooms.
        spikes: the values that repeat, ascending; their cells must not overlap.
        room: the length that is added to the cell of each spike, at least 0.
        width: the width of a cell before stretching; positive.
        minimum, maximum: range that samples are clamped to; None for no limit.

    Raises:
        ValueError: no spikes, a number of rooms that differs from theirs, or a width that is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> rain = cf.transforms.SpikedColumn(cf.transforms.LinearColumn("rain"), [0.0], [3.0], width=1.0)
        >>> rain(torch.tensor([-0.5, 0.0, 0.5]))[0].tolist()
        [-0.5, 1.5, 3.5]
    """

    quantized = True

    _spikes: Tensor
    _room: Tensor

    def __init__(
        self,
        column: Column,
        spikes: Sequence[float],
        room: Sequence[float],
        width: float,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> None:
        super().__init__(column.name)
        if not spikes or len(room) != len(spikes):
            raise ValueError(
                f"expected spikes and one room for each in column {column.name!r}, got {len(spikes)} spikes and "
                f"{len(room)} rooms"
            )
        if not width > 0:
            raise ValueError(f"expected width of the spikes of column {column.name!r} to be positive, got {width}")
        self.column = column
        self.map = column.map
        self.spikes = tuple(spikes)
        self.room = tuple(room)
        self.width = float(width)
        self.minimum = _optional(minimum)
        self.maximum = _optional(maximum)
        self.register_buffer("_spikes", torch.tensor(spikes, dtype=torch.float64), persistent=False)
        self.register_buffer("_room", torch.tensor(room, dtype=torch.float64), persistent=False)

    def _stretch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return u and log du/dx."""
        t = (x[..., None] - self._spikes) / self.width + 0.5
        in_cell = (t > 0) & (t < 1)
        return x + (self._room * t.clamp(0, 1)).sum(-1), (in_cell * torch.log1p(self._room / self.width)).sum(-1)

    def _shrink(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/du, the inverse of `_stretch`."""
        start = self._spikes - self.width / 2 + self._room.cumsum(0) - self._room
        t = (u[..., None] - start) / (self.width + self._room)
        in_cell = (t > 0) & (t < 1)
        return u - (self._room * t.clamp(0, 1)).sum(-1), -(in_cell * torch.log1p(self._room / self.width)).sum(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx."""
        u, log_stretch = self._stretch(x)
        y, log_slope = self.column(u)
        return y, log_slope + log_stretch

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        u, log_slope = self.column.inverse(y)
        x, log_shrink = self._shrink(u)
        return x, log_slope + log_shrink

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number that is stretched into the support of the wrapped column."""
        return self.column.inside(self._stretch(x)[0])

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell of each number; width 0 for all but the spikes."""
        width = torch.isin(x, self._spikes).to(x) * self.width
        return x - width / 2, width

    def snap(self, x: Tensor) -> Tensor:
        """Round the numbers in the cells of the spikes to these."""
        x = _clamp(x, self.minimum, self.maximum)
        distance = (x[..., None] - self._spikes).abs()
        nearest = distance.argmin(-1)
        in_cell = distance.gather(-1, nearest[..., None])[..., 0] <= self.width / 2
        return torch.where(in_cell, self._spikes[nearest], x)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "column": self.column,
            "spikes": list(self.spikes),
            "room": list(self.room),
            "width": self.width,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }


def _optional(value: float | None) -> float | None:
    """Return value as a float, or None for None."""
    return None if value is None else float(value)


def _clamp(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    """Return x clamped to the limits that are given."""
    return x if minimum is None and maximum is None else x.clamp(minimum, maximum)
