"""Cells of tables: columns as numbers or texts, and errors that name missing and non-finite cells by row and column.

A column comes from Arrow, NumPy or pandas. A null, an empty text, NaN and the texts of MISSING are missing cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.checks import require
from counterflow.io.data.types import MISSING, decode, is_time

Array = np.ndarray[Any, Any]

MAX_LISTED = 3  # cells that an error names


class NotANumberError(ValueError):
    """A cell that is neither missing nor a number.

    Attributes:
        cell: the content.
        row: the number of its row.
    """

    def __init__(self, cell: Any, name: str, where: object, row: int) -> None:
        super().__init__(
            f"expected numbers in column {name!r:.100} of {where}, got {cell!r:.100} in row {row} (counted from 0); "
            "drop the column, encode it as numbers or, for a density, name it as context"
        )
        self.cell = cell
        self.row = row


def is_number(text: str) -> bool:
    """Return True if a text is a number as files write them.

    Example:
        >>> is_number("1e3"), is_number("1_000")
        (True, False)
    """
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text  # Python also reads 1_000 and the digits of other scripts


def is_numeric(column: Array) -> bool:
    """Return True if a column (N,) holds numbers, also as a column of Python objects.

    Example:
        >>> is_numeric(np.array([1, 2.5], dtype=object)), is_numeric(np.array(["1", "2"]))
        (True, False)
    """
    if column.dtype.kind in "buif":
        return True
    return column.dtype == object and len(column) > 0 and all(isinstance(v, int | float | np.number) for v in column)


def to_numbers(column: Any, name: str, where: object, first: int = 0) -> Array:
    """Convert a column (N,) to float64, with NaN for missing cells.

    Texts that are numbers count as numbers, dates and times as seconds since 1970, truth values as 0 and 1.

    Args:
        column: an Arrow, NumPy or pandas column.
        name: of the column, for errors.
        where: the table, for errors, such as its path.
        first: the number of the column's first row in the table, for errors.

    Raises:
        NotANumberError: a cell is neither missing nor a number.

    Example:
        >>> to_numbers(np.array(["1.5", "NA"], dtype=object), "a", "table.csv")
        array([1.5, nan])
        >>> to_numbers(np.array([1, "high"], dtype=object), "a", "table.csv", first=100)
        Traceback (most recent call last):
        ...
        counterflow.io.data.cells.NotANumberError: expected numbers in column 'a' of table.csv, got 'high' in row 101 \
(counted from 0); drop the \
column, encode it as numbers or, for a density, name it as context
    """
    return to_typed_numbers(column, name, where, first)[0]


def to_typed_numbers(column: Any, name: str, where: object, first: int = 0) -> tuple[Array, str | None]:
    """Convert a column as `to_numbers` does; return the numbers and the recorded type, None if all cells are missing.

    Example:
        >>> import pyarrow
        >>> to_typed_numbers(pyarrow.array(["1970-01-02"]), "day", "table.csv")
        (array([86400.]), 'date32[day]')
    """
    if not hasattr(column, "null_count"):
        column = _as_arrow(column)
    if hasattr(column, "null_count"):
        converted, type = decode(column)
        if converted is not None:
            return converted, type
    numbers = np.empty(len(column))
    for row, cell in enumerate(column.to_pylist() if hasattr(column, "null_count") else np.asarray(column).tolist()):
        value = cell.strip() if isinstance(cell, str) else cell
        if is_missing(value) or (isinstance(value, str) and value in MISSING):
            numbers[row] = np.nan
        elif isinstance(value, int | float | np.number) or (isinstance(value, str) and is_number(value)):
            numbers[row] = float(value)
        else:
            raise NotANumberError(cell, name, where, first + row)
    return numbers, "double"


def to_texts(column: Any) -> Array:
    """Convert an Arrow column (N,) to Python texts, with None for nulls and empty texts."""
    texts = np.empty(len(column), dtype=object)
    texts[:] = [None if cell is None or cell == "" else str(cell) for cell in column.to_pylist()]
    return texts


def to_numbers_or_texts(column: Any) -> Array:
    """Convert an Arrow column (N,) to float64 if all of its cells are numbers or missing, else to texts."""
    try:
        return to_numbers(column, "", "")
    except ValueError:
        return to_texts(column)


def numbers(
    batch: Any,
    names: Sequence[str],
    path: Path,
    first: int = 0,
    types: Sequence[str | None] | None = None,
    keep_missing: bool = False,
) -> Array:
    """Convert columns of an Arrow record batch to a float64 array (N, D), every cell of which is finite.

    Args:
        batch: N rows of a table.
        names: the D columns.
        path: the file, for errors.
        first: the number of the batch's first row in the file, for errors.
        types: the types that the columns had in training; None where that is not known.
        keep_missing: missing cells stay NaN.

    Raises:
        ValueError: a cell is missing, not a number or not finite, or a date where numbers were, or the other way round.
    """
    values = np.empty((batch.num_rows, len(names)))
    for k, name in enumerate(names):
        values[:, k], type = to_typed_numbers(batch.column(name), name, path, first)
        trained = None if types is None else types[k]
        if trained and type and is_time(trained) != is_time(type):
            raise ValueError(f"expected {trained} in column {name!r} of {path}, as in training, got {type}")
    check_cells(np.where(np.isnan(values), 0.0, values) if keep_missing else values, names, path, first)
    return values


def check_cells(x: Array, names: Sequence[str], where: object = "", first: int | None = None) -> None:
    """Raise ValueError if a cell of x (N, D) is missing or infinite, naming the first such cells.

    Args:
        x: numbers, or Python objects such as texts.
        names: the D columns.
        where: the table, for the error, such as its path.
        first: the number of x's first row, where x is one batch of a longer table; the error then counts no rows.

    Example:
        >>> check_cells(np.array([[1.0, np.nan], [2.0, 3.0]]), ["a", "b"])
        Traceback (most recent call last):
        ...
        ValueError: expected a value in every cell, got 1 missing (NaN): row 0 of 'b' (rows counted from 0); impute \
them, for example by sklearn.impute, or drop 1 of 2 rows
    """
    if x.dtype.kind == "f":
        if np.isfinite(x).all():
            return
        missing, infinite, kind = np.isnan(x), np.isinf(x), "missing (NaN)"
    else:
        missing = np.array([[is_missing(cell) for cell in row] for row in x], dtype=bool).reshape(x.shape)
        infinite, kind = np.zeros_like(missing), "missing"
    if missing.any():
        wish = f"a value in every cell{f' of {where}' if where else ''}"
        raise _refusal(wish, missing, kind, "impute them, for example by sklearn.impute,", names, first)
    if infinite.any():
        wish = f"finite numbers in every cell{f' of {where}' if where else ''}"
        raise _refusal(wish, infinite, "infinite (inf)", "clip or mask them,", names, first)


def _refusal(wish: str, bad: Array, kind: str, todo: str, names: Sequence[str], first: int | None) -> ValueError:
    cells = np.argwhere(bad)
    listed = [f"row {(first or 0) + row} of {names[k]!r:.100}" for row, k in cells[:MAX_LISTED]]
    listed += [".."] if len(cells) > MAX_LISTED else []
    got, rows = f"{len(cells)} {kind}", f"{bad.any(1).sum()} of {len(bad)} rows"
    if first is not None:  # a count of this batch would be read as one of the table
        got, rows = kind, "such rows"
    return ValueError(f"expected {wish}, got {got}: {', '.join(listed)} (rows counted from 0); {todo} or drop {rows}")


def _as_arrow(column: Any) -> Any:
    """Return a NumPy or pandas column as an Arrow array; the column itself where Arrow does not know its cells."""
    arrow = require("pyarrow", "data", "a table")
    try:
        if isinstance(column, np.ma.MaskedArray):
            return arrow.array(column.data, mask=np.ma.getmaskarray(column))
        return arrow.array(column, from_pandas=True)
    except (arrow.ArrowException, TypeError, ValueError):
        return column


def is_missing(cell: Any) -> bool:
    """Return True for None, NaN and pandas.NA."""
    return cell is None or type(cell).__name__ == "NAType" or bool(cell != cell)  # pandas.NA has no truth value
