"""Columns of categories: the values that a table holds, and the codes that a density works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.io.data.cells import is_missing, is_number, to_numbers

Array = np.ndarray[Any, Any]

UNSEEN = -1.0  # code of a value that training did not see
MAX_CATEGORIES = 1_000  # of a column: each of them is an input of the networks
MIN_ROWS = 2  # rows per category on average; names and numbers of documents have fewer


@dataclass(frozen=True)
class CategoryColumn:
    """Column of categories and the values that training saw, whose places are their codes.

    Args:
        name: the name of the column.
        values: the values, in ascending order: texts or numbers.

    Example:
        >>> colour = CategoryColumn.from_cells("colour", np.array(["red", "blue", "red"], dtype=object))
        >>> colour.values, colour.encode(np.array(["red", "pink"], dtype=object)).tolist()
        (('blue', 'red'), [1.0, -1.0])
    """

    name: str
    values: tuple[str, ...] | tuple[float, ...]

    @classmethod
    def from_cells(cls, name: str, cells: Array, stated: bool = False) -> CategoryColumn:
        """Collect the values of a column (N,) of texts or numbers; None and NaN are missing.

        Args:
            name: the name of the column.
            cells: its cells.
            stated: whether the user states that these are categories; if not, they may be numbers with a fault.

        Raises:
            ValueError: values that hardly repeat, or numbers among which there are a few texts.
        """
        known = [cell for cell in cells.tolist() if not is_missing(cell)]
        values = tuple(sorted(set(known)))
        if cells.dtype == object and not stated:
            odd = [cell for cell in known if not is_number(cell)]
            if 0 < len(odd) <= len(known) / 2:
                raise ValueError(
                    f"expected a number in every cell of column {name!r}, as in most, got {odd[0]!r:.50}; correct it, "
                    "or state that these are categories"
                )
        if len(values) > MAX_CATEGORIES or len(values) * MIN_ROWS > max(len(known), 2 * MIN_ROWS):
            raise ValueError(
                f"expected categories that repeat in column {name!r}, got {len(values):,} different ones in "
                f"{len(known):,} rows, such as {values[0]!r:.50}; drop the column"
            )
        return cls(name, values)

    @property
    def is_text(self) -> bool:
        """True if the values are texts."""
        return bool(self.values) and isinstance(self.values[0], str)

    def cells(self, column: Any, where: object = "X", first: int = 0) -> Array:
        """Return a column (N,) of a table as `encode` takes it: texts or numbers, as in training."""
        return text_cells(column) if self.is_text else to_numbers(column, self.name, where, first)

    def encode(self, cells: Array) -> Array:
        """Return the code of each cell (N,), float64: -1 for values that training did not see, NaN for missing ones."""
        codes = {value: float(code) for code, value in enumerate(self.values)}
        each = [np.nan if is_missing(cell) else codes.get(cell, UNSEEN) for cell in cells.tolist()]
        return np.array(each, dtype=np.float64)

    def decode(self, codes: Array) -> Array:
        """Return the value of each code (N,), as a column of Python objects."""
        values = np.array([*self.values, None], dtype=object)
        decoded: Array = values[np.where(np.isnan(codes), len(self.values), np.nan_to_num(codes)).round().astype(int)]
        return decoded


def text_cells(column: Any) -> Array:
    """Return a column (N,) of Arrow, NumPy or pandas as texts, None for missing cells and empty texts.

    Example:
        >>> text_cells(np.array(["a", "", None, True], dtype=object)).tolist()
        ['a', None, None, 'True']
    """
    cells = column.to_pylist() if hasattr(column, "to_pylist") else np.asarray(column, dtype=object).tolist()
    texts = np.empty(len(cells), dtype=object)
    texts[:] = [None if is_missing(cell) or cell == "" else str(cell) for cell in cells]
    return texts


def unseen_in(x: Array, names: Sequence[str]) -> list[str]:
    """Return the names of the columns of codes (N, J) with a value that training did not see."""
    return [name for name, column in zip(names, x.T, strict=True) if (column == UNSEEN).any()]
