"""Encoding of context columns, which a density is conditioned on, as numbers on a scale near 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from counterflow.io.data.cells import check_cells, is_numeric, to_numbers

Array = np.ndarray[Any, Any]
ContextColumn = tuple[str, tuple[str, ...] | None, float, float]  # name, categories (None for numbers), mean, std

MAX_LISTED = 10  # categories that an error names


@dataclass(frozen=True)
class ContextEncoder:
    """Encoder of context columns: numbers are standardized, categories are one-hot encoded.

    Example:
        >>> table = {"colour": np.array(["red", "blue", "red"]), "age": np.array([1.0, 2.0, 3.0])}
        >>> encoder = ContextEncoder.from_table(table)
        >>> encoder.encode({"age": np.array([2.0]), "colour": np.array(["red"])}).tolist()
        [[0.0, 1.0, 0.0]]
    """

    columns: tuple[ContextColumn, ...]

    @classmethod
    def from_table(cls, table: dict[str, Array]) -> ContextEncoder:
        """Fit the encoder to columns (N,) by name. Columns that do not hold numbers hold categories.

        Raises:
            ValueError: no columns, a missing value, or a constant column.
        """
        if not table:
            raise ValueError("expected at least one column as context, got none")
        return cls(tuple(_fitted(name, column) for name, column in table.items()))

    @classmethod
    def from_json(cls, columns: Sequence[Sequence[Any]]) -> ContextEncoder:
        """Build an encoder from its columns as read from JSON, which has no tuples."""
        return cls(tuple((n, None if k is None else tuple(k), float(m), float(s)) for n, k, m, s in columns))

    @property
    def names(self) -> list[str]:
        """Names of the columns, in order."""
        return [name for name, *_ in self.columns]

    @property
    def size(self) -> int:
        """C, the size of an encoded row."""
        return sum(1 if categories is None else len(categories) for _, categories, _, _ in self.columns)

    def encode(self, table: dict[str, Array], first: int | None = None) -> Array:
        """Encode columns (N,) by name, in any order, as (N, C) float64.

        Args:
            table: the columns.
            first: the number of the first row, if these rows are one batch of a longer table; for errors.

        Raises:
            ValueError: other columns than in training, a missing value, or a category that training did not see.
        """
        if {*self.names} != {*table}:
            raise ValueError(f"expected a context of the columns {self.names}, got {list(table)}")
        parts = []
        for name, categories, mean, std in self.columns:
            if categories is None:
                parts.append(((_numbers(table[name], name, first) - mean) / std)[:, None])
            else:
                parts.append(_one_hot(_texts(table[name], name, first), categories, name, first or 0))
        return np.concatenate(parts, 1)


def _fitted(name: str, column: Array) -> ContextColumn:
    """Return the encoding of one column."""
    if is_numeric(column):
        values = _numbers(column, name)
        mean, std = float(values.mean()), float(values.std())
        if std > 0:
            return name, None, mean, std
    else:
        categories = tuple(sorted(set(_texts(column, name))))
        if len(categories) > 1:
            return name, categories, 0.0, 1.0
    raise ValueError(f"expected context columns that vary, got the constant column {name!r}; drop it")


def _numbers(column: Array, name: str, first: int | None = None) -> Array:
    """Return a column as float64, every cell of which is finite."""
    values = to_numbers(column, name, "the context", first or 0)
    check_cells(values[:, None], [name], "the context", first)
    return values


def _texts(column: Array, name: str, first: int | None = None) -> list[str]:
    """Return a column as texts, none of which is missing."""
    check_cells(column.astype(object)[:, None], [name], "the context", first)
    return [str(v) for v in column]


def _one_hot(texts: list[str], categories: tuple[str, ...], name: str, first: int) -> Array:
    """Encode N texts as (N, K), K the number of categories."""
    indices = {category: k for k, category in enumerate(categories)}
    unseen = [k for k, text in enumerate(texts) if text not in indices]
    if unseen:
        known = ", ".join(categories[:MAX_LISTED]) + (", .." if len(categories) > MAX_LISTED else "")
        raise ValueError(
            f"expected categories of the context column {name!r} that training saw ({known}), got "
            f"{texts[unseen[0]]!r} in row {first + unseen[0]} (counted from 0), and {len(unseen)} such rows in all"
        )
    encoded = np.zeros((len(texts), len(categories)))
    encoded[np.arange(len(texts)), [indices[text] for text in texts]] = 1.0
    return encoded
