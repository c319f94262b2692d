"""TableTransform: the columns of a table, each by its own map."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.transforms.base import Transform, prepare
from counterflow.transforms.table.circular import LIFTS, CircularColumn
from counterflow.transforms.table.column import Column
from counterflow.transforms.table.continuous import LinearColumn


class TableTransform(Transform):
    """Columns of a table, each by its own increasing map: y_i = g_i(x_i), log_det = sum_i log dy_i/dx_i.

    x is in the units of the table, y on a scale near 1. The numbers of the maps are constants.

    Args:
        columns: one column for each feature: `LinearColumn`, `LogColumn`, `LogitColumn`, `AsinhColumn`,
            `OrdinalColumn`, `GridColumn`, `SpikedColumn` or `CircularColumn`, whose numbers are lifted ones here.
        decimals: the number of decimals of each column that `snap` rounds to, None for no rounding; by default none.

    Attributes:
        quantized: the indices of the features some of whose numbers fill a cell.
        circular: the indices of the features on a circle.

    Raises:
        ValueError: no columns, or another number of decimals.

    Example:
        >>> import torch, counterflow as cf
        >>> length, price = cf.transforms.LinearColumn("length", scale=2.0), cf.transforms.LogColumn("price", low=0.0)
        >>> y, log_det = cf.transforms.TableTransform([length, price])(torch.tensor([4.0, 1.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([2.0, 0.0], -0.6931)
    """

    columns: Any  # a ModuleList of Columns, whose methods mypy does not know
    _center: Tensor
    _scale: Tensor

    def __init__(self, columns: Sequence[Column], decimals: Sequence[int | None] | None = None) -> None:
        super().__init__()
        if not columns or not all(isinstance(column, Column) for column in columns):
            raise ValueError(f"expected at least one column, and columns only, got {list(columns)}")
        if decimals is not None and len(decimals) != len(columns):
            raise ValueError(f"expected decimals of {len(columns)} columns, got {len(decimals)}")
        self.columns = nn.ModuleList(columns)
        self.decimals = [None] * len(columns) if decimals is None else list(decimals)
        self.features = len(columns)
        self.quantized = [i for i, column in enumerate(columns) if column.quantized]
        self.circular = [i for i, column in enumerate(columns) if isinstance(column, CircularColumn)]
        self._mass = [i for i, column in enumerate(columns) if column.mass]
        self._bounded = [i for i, column in enumerate(columns) if type(column).inside is not Column.inside]
        # Linear columns are mapped in one step: a loop over 1,000 of them adds a third to the time of scoring by a
        # spline flow of three layers. The other columns have center 0 and scale 1 here.
        self._curved = [i for i, column in enumerate(columns) if not isinstance(column, LinearColumn)]
        linear = [column if isinstance(column, LinearColumn) else LinearColumn("") for column in columns]
        self.register_buffer(
            "_center", torch.tensor([column.center for column in linear], dtype=torch.float64), persistent=False
        )
        self.register_buffer(
            "_scale", torch.tensor([column.scale for column in linear], dtype=torch.float64), persistent=False
        )

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        x = prepare(self, x, c)
        scale = self._scale.to(x.dtype)
        y = (x - self._center.to(x.dtype)) / scale
        total = -scale.log().sum().expand(x.shape[:-1])
        for i in self._curved:
            y[..., i], log_slope = self.columns[i](x[..., i])
            total = total + log_slope
        return y, total

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        x = prepare(self, x, c)
        each = [column(x[..., i]) for i, column in enumerate(self.columns)]
        y, terms = (torch.stack(part, -1) for part in zip(*each, strict=True))
        return y, total + terms

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        y = prepare(self, y, c, "y")
        scale = self._scale.to(y.dtype)
        x = y * scale + self._center.to(y.dtype)
        total = scale.log().sum().expand(y.shape[:-1])
        for i in self._curved:
            x[..., i], log_slope = self.columns[i].inverse(y[..., i])
            total = total + log_slope
        return x, total

    def inside(self, x: Tensor) -> Tensor:
        """Return True for each row (..., D) in the support, its ends included: (...)."""
        inside = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        for i in self._bounded:
            inside = inside & self.columns[i].inside(x[..., i])
        return inside

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lower ends and the widths of the cells of numbers (..., D), both (..., D); width 0 for no cell."""
        start, width = x.clone(), torch.zeros_like(x)
        for i in self.quantized:
            start[..., i], width[..., i] = self.columns[i].cells(x[..., i])
        return start, width

    def wrapped(self, x: Tensor) -> Tensor:
        """Return rows (..., D) whose circular numbers are in the turn from their cut on."""
        if not self.circular:
            return x
        x = x.clone()
        for i in self.circular:
            x[..., i] = self.columns[i].wrapped(x[..., i])
        return x

    def lifts(self, like: Tensor) -> Tensor:
        """Return the shifts (L, D) of a row to all of its lifts, of which the first is zero, like a tensor (..., D)."""
        turns = [sorted(LIFTS, key=abs) if i in self.circular else (0,) for i in range(self.features)]
        periods = [self.columns[i].period if i in self.circular else 0.0 for i in range(self.features)]
        return torch.tensor(list(product(*turns))).to(like) * torch.tensor(periods).to(like)

    def log_mass(self, width: Tensor) -> Tensor:
        """Return the sum of the log widths (..., D) of the columns whose mass is counted: (...).

        Added to a log density that is constant within a cell, it gives the log of the mass of the cell.
        """
        return width[..., self._mass].log().sum(-1)

    def snap(self, x: Tensor) -> Tensor:
        """Round rows (..., D) to numbers that the columns record: to grids, values, spikes and decimals."""
        x = x.clone()
        for i in sorted({*self.quantized, *self.circular}):
            x[..., i] = self.columns[i].snap(x[..., i])
        for i, places in enumerate(self.decimals):
            if places is not None:
                x[..., i] = torch.round(x[..., i] * 10**places) / 10**places
        return x

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"columns": list(self.columns), "decimals": list(self.decimals)}

    def __repr__(self) -> str:
        maps = [column.map for column in self.columns]
        counts = ", ".join(f"{maps.count(name)} {name}" for name in dict.fromkeys(maps))
        return f"TableTransform({counts}" + (f"; {len(self.quantized)} with cells)" if self.quantized else ")")
