"""Conversion of data frames, arrays and dictionaries to columns by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from counterflow.io.data.cells import is_numeric

Array = np.ndarray[Any, Any]


def check_no_text(X: Any) -> None:
    """Raise ValueError if columns of a data frame do not hold numbers, naming them."""
    if not (hasattr(X, "dtypes") and hasattr(X, "columns") and hasattr(X, "iloc")):
        return
    text = [
        name
        for name, dtype in zip(X.columns, X.dtypes, strict=True)
        if getattr(dtype, "kind", "O") not in "buif" and not is_numeric(X[name].to_numpy())
    ]
    if text:
        raise ValueError(
            f"expected numbers in every column, got text or categories in {', '.join(map(repr, text))}; give them as "
            "context, fit(X, context=table[names]), encode them as numbers, or drop them"
        )


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
