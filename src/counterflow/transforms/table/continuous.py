"""Columns of real numbers: linear, logarithmic, logit and asinh scales."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from counterflow.transforms.table.column import Column, optional


class LinearColumn(Column):
    """Column without bounds: v = x.

    Args:
        name: the name of the column.
        center: the v that is mapped to y = 0.
        scale: y = (v - center) / scale; positive.

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
        low: the lower bound; None if there is an upper one.
        high: the upper bound; None if there is a lower one.
        min_distance: numbers nearer to the bound are mapped as if they had this distance.
        center: the v that is mapped to y = 0.
        scale: y = (v - center) / scale; positive.

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
        self.low = optional(low)
        self.high = optional(high)
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
        low: the lower bound.
        high: the upper bound, above low.
        min_distance: numbers nearer to a bound are mapped as if they had this distance.
        center: the v that is mapped to y = 0.
        scale: y = (v - center) / scale; positive.

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
        center: the v that is mapped to y = 0.
        scale: y = (v - center) / scale; positive.

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
