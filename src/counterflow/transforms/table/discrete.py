"""Columns whose values repeat: ordinal values, a grid, and real numbers with frequent values among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from counterflow.transforms.base import rank
from counterflow.transforms.table.column import Column, clamp, optional


class OrdinalColumn(Column):
    """Column of a few ordered values: y = Phi^-1(F(x)), where F is linear within the cell of each value.

    The cell of a value ends half-way to its neighbours, and F rises by the value's share within it. F is clipped to
    [1e-12, 1 - 1e-12]. The density counts the mass of the cell. With a tail, numbers beyond the outer cells have cells
    of the same width, whose shares fall by the factor e from one to the next: 1 - F = tail exp(-distance / width).

    Args:
        name: the name of the column.
        values: the values, ascending; at least two.
        shares: the probability of each value, positive; their sum is 1 - 2 tail.
        recorded: the values that samples are rounded to; all values by default.
        tail: the probability of all numbers below the cell of the first value, and of all above that of the last.

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

    _recorded: Tensor
    _shares: Tensor
    _edges: Tensor  # ends of the cells, one more than there are values
    _widths: Tensor
    _below: Tensor  # F at the lower end of each cell

    def __init__(
        self,
        name: str,
        values: Sequence[float],
        shares: Sequence[float],
        tail: float = 0.0,
        recorded: Sequence[float] | None = None,
    ) -> None:
        super().__init__(name)
        if not 0 <= tail < 0.5:
            raise ValueError(f"expected tail of column {name!r} to be in [0, 0.5), got {tail}")
        if len(values) < 2 or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"expected at least two ascending values for column {name!r}, got {list(values)}")
        if len(shares) != len(values) or min(shares) <= 0:
            raise ValueError(f"expected {len(values)} positive shares for column {name!r}, got {list(shares)}")
        self.values = tuple(values)
        self.shares = tuple(shares)
        self.tail = float(tail)
        self.recorded = self.values if recorded is None else tuple(recorded)
        inner = [(a + b) / 2 for a, b in pairwise(values)]
        first = values[0] - (inner[0] - values[0])
        last = values[-1] + (values[-1] - inner[-1])
        edges = torch.tensor([first, *inner, last], dtype=torch.float64)
        probabilities = torch.tensor(shares, dtype=torch.float64)
        # The buffers follow from the constructor's arguments, so they are not saved a second time.
        self.register_buffer("_recorded", torch.tensor(self.recorded, dtype=torch.float64), persistent=False)
        self.register_buffer("_shares", probabilities, persistent=False)
        self.register_buffer("_edges", edges, persistent=False)
        self.register_buffer("_widths", edges.diff(), persistent=False)
        self.register_buffer("_below", tail + probabilities.cumsum(0) - probabilities, persistent=False)

    def _beyond(self, x: Tensor) -> Tensor:
        """Return the distance of each number from the outer cells in their widths; negative below, 0 within."""
        low, high = (x - self._edges[0]) / self._widths[0], (x - self._edges[-1]) / self._widths[-1]
        return low.clamp_max(0) + high.clamp_min(0)

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
        if not self.tail:
            y = torch.special.ndtri(F.clamp(self.MIN_PROBABILITY, 1 - self.MIN_PROBABILITY))
            return y, self._log_slope(k, y)
        beyond = self._beyond(x)
        is_beyond = beyond != 0
        outer = self.tail * torch.exp(-beyond.abs())  # F below the cells, 1 - F above them
        smaller = torch.where(is_beyond, outer, torch.minimum(F, 1 - F)).clamp_min(self.MIN_PROBABILITY)
        upper = torch.where(is_beyond, beyond > 0, F > 0.5)
        y = torch.special.ndtri(smaller) * (1 - 2 * upper.to(x))
        log_density = math.log(self.tail) - beyond.abs() - self._widths[k].log()
        return y, torch.where(is_beyond, log_density + (y * y + math.log(2 * math.pi)) / 2, self._log_slope(k, y))

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and log dx/dy."""
        F = torch.special.ndtr(y)
        k = rank(F, self._below[1:])
        x = self._edges[k] + self._widths[k] * (F - self._below[k]) / self._shares[k]
        log_slope = -self._log_slope(k, y)
        if not self.tail:
            return x, log_slope
        smaller = torch.special.ndtr(-y.abs()).clamp_min(self.MIN_PROBABILITY)
        distance = math.log(self.tail) - smaller.log()  # from the outer cells, in their widths
        edge = torch.where(y < 0, self._edges[0], self._edges[-1])
        width = torch.where(y < 0, self._widths[0], self._widths[-1])
        is_beyond = distance > 0
        beyond = edge + y.sign() * width * distance
        log_density = math.log(self.tail) - distance - width.log()
        return (
            torch.where(is_beyond, beyond, x),
            torch.where(is_beyond, -log_density - (y * y + math.log(2 * math.pi)) / 2, log_slope),
        )

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each number in one of the cells; for all numbers with a tail."""
        if self.tail:
            return torch.ones_like(x, dtype=torch.bool)
        return (x >= self._edges[0]) & (x <= self._edges[-1])

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell of each number."""
        k = self._cell(x)
        if not self.tail:
            return self._edges[k], self._widths[k]
        beyond = self._beyond(x)
        edge = torch.where(beyond > 0, self._edges[-1], self._edges[k])
        return edge + beyond.floor() * self._widths[k], self._widths[k]

    def snap(self, x: Tensor) -> Tensor:
        """Round each number to the nearest value that is recorded."""
        return self._recorded[rank(x, (self._recorded[1:] + self._recorded[:-1]) / 2)]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "name": self.name,
            "values": list(self.values),
            "shares": list(self.shares),
            "tail": self.tail,
            "recorded": list(self.recorded),
        }


class GridColumn(Column):
    """Column recorded on an even grid, such as whole numbers or numbers with one decimal.

    The map is that of the wrapped column. Each number fills the cell [x - step / 2, x + step / 2].

    Args:
        column: the map of the numbers within their cells.
        step: the width of a cell; positive.
        offset: a number of the grid.
        mass: whether the density of a row counts the mass of the cell, as for whole numbers, or its mean density.
        minimum: lower limit that samples are clamped to; None for no limit.
        maximum: upper limit that samples are clamped to; None for no limit.

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
        self.minimum = optional(minimum)
        self.maximum = optional(maximum)

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
        multiple = torch.round((x - self.offset) / self.step)
        each = round(1 / self.step)  # 1657 / 10 is the recorded 165.7; 1657 * 0.1 is not
        distance = multiple / each if self.step < 1 and math.isclose(each * self.step, 1) else multiple * self.step
        return clamp(self.offset + distance, self.minimum, self.maximum)

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
        minimum: lower limit that samples are clamped to; None for no limit.
        maximum: upper limit that samples are clamped to; None for no limit.

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
        self.minimum = optional(minimum)
        self.maximum = optional(maximum)
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
        x = clamp(x, self.minimum, self.maximum)
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
