"""Context: columns to condition on, as numbers on a scale near 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.io.data.cells import check_cells, is_numeric, to_numbers

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Context:
    """Columns to condition on: numbers are standardised, categories become one number each, 0 or 1.

    A column is (name, categories, mean, std); categories is None for numbers.

    Example:
        >>> context = Context.of({"colour": np.array(["red", "blue", "red"]), "age": np.array([1.0, 2.0, 3.0])})
        >>> context.encode({"age": np.array([2.0]), "colour": np.array(["red"])}).tolist()
        [[0.0, 1.0, 0.0]]
    """

    columns: tuple[tuple[str, tuple[str, ...] | None, float, float], ...]

    @classmethod
    def of(cls, table: dict[str, Array]) -> Context:
        """What the columns (N,) by name are; all that is not a number is a category.

        Raises:
            ValueError: no columns, a missing value, or a column that is constant.
        """
        if not table:
            raise ValueError("expected at least one column as context, got none")
        columns: list[tuple[str, tuple[str, ...] | None, float, float]] = []
        for name, column in table.items():
            if is_numeric(column):
                numbers = _numbers(column, name)
                std = float(numbers.std())
                if not std > 0:
                    raise ValueError(f"expected a context that varies, got column {name!r}, which is constant; drop it")
                columns.append((name, None, float(numbers.mean()), std))
            else:
                categories = tuple(sorted(set(_texts(column, name))))
                if len(categories) < 2:
                    raise ValueError(f"expected a context that varies, got column {name!r}, which is constant; drop it")
                columns.append((name, categories, 0.0, 1.0))
        return cls(tuple(columns))

    @classmethod
    def read(cls, columns: Sequence[Sequence[Any]]) -> Context:
        """From what JSON makes of the columns."""
        return cls(tuple((n, None if k is None else tuple(k), float(m), float(s)) for n, k, m, s in columns))

    @property
    def names(self) -> list[str]:
        """Of the columns, in order."""
        return [name for name, *_ in self.columns]

    @property
    def size(self) -> int:
        """C, the numbers that it becomes."""
        return sum(1 if categories is None else len(categories) for _, categories, _, _ in self.columns)

    def encode(self, table: dict[str, Array], first: int | None = None) -> Array:
        """Encode columns (N,) by name, in any order, as (N, C) float64.

        Args:
            table: the columns.
            first: the number of the first row, where these rows are one batch of a longer table; for errors.

        Raises:
            ValueError: a column that is missing or not wanted, a missing value, a category that training did not see.
        """
        missing, surplus = [n for n in self.names if n not in table], [n for n in table if n not in self.names]
        if missing or surplus:
            raise ValueError(f"expected a context of the columns {self.names}, got {list(table)}")
        parts = []
        for name, categories, mean, std in self.columns:
            if categories is None:
                parts.append(((_numbers(table[name], name, first) - mean) / std)[:, None])
            else:
                parts.append(_one_hot(_texts(table[name], name, first), categories, name, first or 0))
        return np.concatenate(parts, 1)


def _numbers(column: Array, name: str, first: int | None = None) -> Array:
    values = to_numbers(column, name, "the context", first or 0)
    check_cells(values[:, None], [name], "the context", first)
    return values


def _texts(column: Array, name: str, first: int | None = None) -> list[str]:
    check_cells(column.astype(object)[:, None], [name], "the context", first)
    return [str(v) for v in column]


def _one_hot(texts: list[str], categories: tuple[str, ...], name: str, first: int) -> Array:
    place = {category: k for k, category in enumerate(categories)}
    unseen = [k for k, text in enumerate(texts) if text not in place]
    if unseen:
        known = ", ".join(categories[:10]) + (", .." if len(categories) > 10 else "")
        raise ValueError(
            f"expected the categories of the context column {name!r} that training saw ({known}), got "
            f"{texts[unseen[0]]!r} in row {first + unseen[0]} (counted from 0), and {len(unseen)} such rows in all"
        )
    encoded = np.zeros((len(texts), len(categories)))
    encoded[np.arange(len(texts)), [place[text] for text in texts]] = 1.0
    return encoded
