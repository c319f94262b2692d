"""Conversion of data frames, arrays and dictionaries to columns by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from counterflow.density.categories import CategoryColumn, text_cells
from counterflow.density.detection import Kind
from counterflow.io.data.cells import NotANumberError, is_missing, to_typed_numbers

Array = np.ndarray[Any, Any]

FLOATS = {"float64": "double", "float32": "float", "float16": "halffloat"}  # Arrow's names of NumPy's types


class CodedTable(NamedTuple):
    """Result of `coded_table`."""

    table: Any  # of numbers, with codes for categories and NaN for missing cells
    types: dict[str, str]  # the recorded types by name
    categories: dict[str, CategoryColumn]


def coded_table(
    X: Any, kinds: Mapping[str, Kind] | Kind = "auto", known: Mapping[str, CategoryColumn] | None = None
) -> CodedTable:
    """Return a table with the same columns as numbers and codes of categories, with the recorded types.

    Masked cells of a NumPy array are missing. In a pandas frame, dates, truth values, decimals and nullable numbers are
    converted as those of a file are; see `counterflow.io.data.types`. Columns with texts are categories, in an array of
    Python objects as well. Arrays of numbers, and what is no table, are returned as they are.

    Args:
        X: the table.
        kinds: the kind of all columns, or of some by name; those of kind "category" are categories.
        known: the categories of training by name; None in training, which collects them.

    Raises:
        ValueError: texts in a column of numbers, or categories that do not repeat.
    """
    if isinstance(X, np.ma.MaskedArray):
        X = np.ma.filled(X.astype(np.float64), np.nan)
    stated = {} if isinstance(kinds, str) or not isinstance(kinds, Mapping) else kinds
    wanted = {name for name, kind in stated.items() if kind == "category"} if known is None else {*known}
    is_frame = hasattr(X, "dtypes") and hasattr(X, "columns") and hasattr(X, "iloc")
    if isinstance(X, list | tuple) and X and isinstance(X[0], list | tuple):
        X = _objects(X)
    if not is_frame and not (isinstance(X, np.ndarray) and X.ndim == 2 and (X.dtype.kind in "OUS" or wanted)):
        return CodedTable(X, {}, {})
    if not is_frame and X.dtype == object and not all(_is_cell(cell) for cell in X.flat):
        return CodedTable(X, {}, {})  # scikit-learn has the words for it
    names = list(X.columns) if is_frame else [f"x{k}" for k in range(X.shape[1])]
    dtypes = list(X.dtypes) if is_frame else [X.dtype] * len(names)
    types: dict[str, str] = {}
    categories: dict[str, CategoryColumn] = {}
    converted: dict[int, Array] = {}
    for k, (label, dtype) in enumerate(zip(names, dtypes, strict=True)):
        name = str(label)
        column = X.iloc[:, k] if is_frame else X[:, k]
        numeric = isinstance(dtype, np.dtype) and dtype.kind in "buif"
        if numeric:
            types[name] = FLOATS.get(dtype.name, dtype.name)
            if name not in wanted:
                continue
        try:
            converted[k], type = to_typed_numbers(column, name, "X")
        except NotANumberError:
            if known is not None and name not in known:
                raise
            type = "string"
        if type is not None and not numeric:
            types[name] = type
        if type == "string" or name in wanted:
            category = None if known is None else known[name]
            cells = text_cells(column) if (category.is_text if category else type == "string") else converted[k]
            categories[name] = category or CategoryColumn.from_cells(name, cells, name in wanted)
            converted[k] = categories[name].encode(cells)
    if not is_frame:
        every = [converted.get(k, X[:, k]) for k in range(len(names))]
        return CodedTable(np.stack(every, 1).astype(np.float64) if every else X, types, categories)
    if converted:
        X = X.copy(deep=False)
        for k, column in converted.items():
            X[X.columns[k]] = column
    return CodedTable(X, types, categories)


def _objects(rows: Any) -> Any:
    """Return rows in lists as an array of Python objects if some of their cells are texts; else as they are."""
    if not any(isinstance(cell, str) for row in rows if isinstance(row, list | tuple) for cell in row):
        return rows
    array = np.array(rows, dtype=object)
    return array if array.ndim == 2 else rows


def _is_cell(cell: Any) -> bool:
    """Return True for what a cell of a table may hold."""
    return isinstance(cell, str | int | float | np.number | np.bool_) or is_missing(cell)


def columns_by_name(context: Any, rows: int | None) -> dict[str, Array]:
    """Return the columns (N,) of a data frame, a series, a dictionary or an array (N,) or (N, C) by name.

    Columns of an array are called c0, c1, ...

    Raises:
        ValueError: an array of another shape, or a number of rows other than `rows`, if given.
    """
    if hasattr(context, "iloc") and hasattr(context, "columns"):
        table = {str(name): context[name].to_numpy() for name in context.columns}
    elif hasattr(context, "iloc"):
        table = {str("c0" if context.name is None else context.name): context.to_numpy()}
    elif isinstance(context, dict):
        table = {str(name): np.asarray(column) for name, column in context.items()}
    else:
        array = np.asarray(context)
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2:
            raise ValueError(f"expected context of shape (N,) or (N, C), got {array.shape}")
        table = {f"c{i}": column for i, column in enumerate(array.T)}
    sizes = {len(column) for column in table.values()}
    if rows is not None and sizes != {rows}:
        raise ValueError(f"expected as many rows in context as in X, {rows}, got {sorted(sizes)}")
    return table
