"""A column of a table: an increasing map from its own units to a scale near 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn


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


def optional(value: float | None) -> float | None:
    """Return value as a float, or None for None."""
    return None if value is None else float(value)


def clamp(x: Tensor, minimum: float | None, maximum: float | None) -> Tensor:
    """Return x clamped to the limits that are given."""
    return x if minimum is None and maximum is None else x.clamp(minimum, maximum)
