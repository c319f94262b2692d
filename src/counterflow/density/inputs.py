"""Conversion of data frames, arrays and dictionaries to columns by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.io.data.cells import NotANumberError, to_typed_numbers

Array = np.ndarray[Any, Any]

FLOATS = {"float64": "double", "float32": "float", "float16": "halffloat"}  # Arrow's names of NumPy's types


def numeric_table(X: Any) -> tuple[Any, dict[str, str]]:
    """Return a table with the same columns as numbers, NaN for missing cells, and the recorded types by name.

    Masked cells of a NumPy array are missing. In a pandas frame, dates, truth values, decimals and nullable numbers are
    converted as those of a file are; see `counterflow.io.data.types`. Everything else is returned as it is.

    Raises:
        ValueError: columns of a data frame hold texts or categories; it names them.
    """
    if isinstance(X, np.ma.MaskedArray):
        return np.ma.filled(X.astype(np.float64), np.nan), {}
    if not (hasattr(X, "dtypes") and hasattr(X, "columns") and hasattr(X, "iloc")):
        return X, {}
    types: dict[str, str] = {}
    converted: dict[int, Array] = {}
    text = []
    for k, (name, dtype) in enumerate(zip(X.columns, X.dtypes, strict=True)):
        if isinstance(dtype, np.dtype) and dtype.kind in "buif":
            types[str(name)] = {"float64": "double", "float32": "float", "float16": "halffloat"}.get(
                dtype.name, dtype.name
            )
            continue
        try:
            converted[k], type = to_typed_numbers(X.iloc[:, k], str(name), "X")
        except NotANumberError:
            text.append(name)
            continue
        if type is not None:
            types[str(name)] = type
    if text:
        raise ValueError(
            f"expected numbers in every column, got text or categories in {', '.join(map(repr, text))}; give them as "
            "context, fit(X, context=table[names]), encode them as numbers, or drop them"
        )
    if converted:
        X = X.copy(deep=False)
        for k, column in converted.items():
            X[X.columns[k]] = column
    return X, types


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
