"""Cells of a table that are no finite numbers, collected over all columns and batches for one error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.io.data.cells import Array, NotANumberError, is_missing, to_typed_numbers
from counterflow.io.data.types import joined

MAX_LISTED = 20  # columns that an error names


class TableFaultsError(ValueError):
    """Cells that are no finite numbers.

    Attributes:
        faults: the faults, by column.
        incomplete: the number of rows with a missing cell.
        rows: the number of rows.
        others: the columns that were read as numbers or texts, by name.
    """

    def __init__(self, path: Path, faults: Faults, incomplete: int, rows: int, others: dict[str, Array]) -> None:
        super().__init__(faults.describe(path))
        self.faults = faults
        self.incomplete = incomplete
        self.rows = rows
        self.others = others


class Faults:
    """Faults of the columns of a table, found batch by batch."""

    def __init__(self) -> None:
        self.text: dict[str, str] = {}  # column -> its first text, and where it is
        self.infinite: dict[str, str] = {}
        self.missing: dict[str, tuple[int, str]] = {}  # column -> the number of missing cells, and the first one
        self.types: dict[str, str] = {}  # column -> the recorded type of its cells so far

    def numbers(self, batch: Any, names: Sequence[str], path: Path, first: int) -> Array:
        """Convert columns of an Arrow record batch to float64 (N, D), with NaN for missing cells and for texts."""
        x = np.full((batch.num_rows, len(names)), np.nan)
        for k, name in enumerate(names):
            try:
                x[:, k], type = to_typed_numbers(batch.column(name), name, path, first)
            except NotANumberError as error:
                self.text.setdefault(name, f"{error.cell!r:.50} in row {error.row}")
                continue
            if type is not None:
                both = joined(self.types.get(name), type)
                if both is None:
                    self.text.setdefault(name, f"{type} from row {first} on, after {self.types[name]}")
                    continue
                self.types[name] = both
            infinite = np.flatnonzero(np.isinf(x[:, k]))
            if len(infinite):
                self.infinite.setdefault(name, f"row {first + infinite[0]}")
            if name not in self.text:
                self.add_missing(name, np.isnan(x[:, k]), first)
        return x

    def add_missing(self, name: str, missing: Array, first: int = 0) -> None:
        """Add missing cells of a column (N,), whose first row has the number `first`."""
        found = np.flatnonzero(missing)
        if len(found):
            count, where = self.missing.get(name, (0, f"row {first + found[0]}"))
            self.missing[name] = count + len(found), where

    def describe(self, path: Path) -> str:
        """Return the message of the error, on one line."""
        parts = [
            ("text", [f"{name!r} ({where})" for name, where in self.text.items()]),
            ("missing cells", [f"{name!r} ({count:,}, the first in {w})" for name, (count, w) in self.missing.items()]),
            ("infinite numbers", [f"{name!r} (the first in {where})" for name, where in self.infinite.items()]),
        ]
        listed = [
            f"{kind} in {', '.join(found[:MAX_LISTED])}"
            + (f" and {len(found) - MAX_LISTED} more columns" if len(found) > MAX_LISTED else "")
            for kind, found in parts
            if found
        ]
        return f"expected a finite number in every cell of {path}, got {'; '.join(listed)}; rows are counted from 0"


def missing_cells(column: Array) -> Array:
    """Return True for each missing cell of a column (N,) of numbers or texts."""
    if column.dtype.kind == "f":
        return np.isnan(column)
    return np.array([is_missing(cell) for cell in column], dtype=bool)
