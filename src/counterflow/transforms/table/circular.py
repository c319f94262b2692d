"""Columns of a circle: hours, angles, days of a year."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from counterflow.transforms.table.column import Column

LIFTS = (-1, 0, 1)  # turns by which a number is lifted; more hold no mass, as the numbers span one turn


class CircularColumn(Column):
    """Column whose numbers repeat after a period P: its density is that of a real column, wrapped around the circle.

        p(x) = sum over k of q(x + k P),    k = -1, 0, 1

    where q is the density of lifted numbers, of which nearly all lie within a turn of [cut, cut + P). The wrapped
    density has no seam, whatever q is. The map of lifted numbers is that of the wrapped column.

    Args:
        column: the map of lifted numbers.
        period: P; positive.
        cut: where the circle is cut open; numbers in [cut, cut + P) are lifted by k = 0.
        low: samples are in [low, low + P).

    Raises:
        ValueError: the period is not positive.

    Source: Mardia and Jupp 2000, "Directional Statistics", section 3.5.7; circular splines, the other way, are those of
    Rezende et al. 2020, "Normalizing Flows on Tori and Spheres".

    Example:
        >>> import torch, counterflow as cf
        >>> hour = cf.transforms.CircularColumn(cf.transforms.LinearColumn("hour"), period=24.0, cut=4.0)
        >>> hour.wrapped(torch.tensor([1.0, 23.0])).tolist(), hour.snap(torch.tensor([25.0])).tolist()
        ([25.0, 23.0], [1.0])
    """

    def __init__(self, column: Column, period: float, cut: float = 0.0, low: float = 0.0) -> None:
        super().__init__(column.name)
        if not period > 0:
            raise ValueError(f"expected period of column {column.name!r} to be positive, got {period}")
        self.column = column
        self.map = "circular"
        self.quantized = column.quantized
        self.mass = column.mass
        self.period = float(period)
        self.cut = float(cut)
        self.low = float(low)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx of lifted numbers."""
        return self.column(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return lifted numbers x and log dx/dy."""
        return self.column.inverse(y)

    def wrapped(self, x: Tensor) -> Tensor:
        """Return the numbers in [cut, cut + P) that stand for the same points of the circle."""
        return self.cut + torch.remainder(x - self.cut, self.period)

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower end and the width of the cell of each number."""
        return self.column.cells(x)

    def snap(self, x: Tensor) -> Tensor:
        """Round each number as the wrapped column does, and wrap it to [low, low + P)."""
        turned = self.column.snap(self.low + torch.remainder(x - self.low, self.period))
        return torch.where(turned >= self.low + self.period, turned - self.period, turned)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"column": self.column, "period": self.period, "cut": self.cut, "low": self.low}
