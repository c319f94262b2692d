"""Split of a table into training and test rows, such that training sees every category of the context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from counterflow.io.data.cells import is_numeric

Array = np.ndarray[Any, Any]


def split_rows(
    rows: int, test_share: float, seed: int, context: Mapping[str, Array] | None = None
) -> tuple[Array, Array]:
    """Return the indices of training and of test rows.

    The rows are split at random. A test row with a category that no training row has then moves to training, because a
    density cannot be evaluated for a category that it was not trained on.

    Args:
        rows: N.
        test_share: the share of the test rows, in (0, 1); the test gets at least one row.
        seed: seed of the split.
        context: columns (N,) by name; those that do not hold numbers are categories.

    Raises:
        ValueError: no row is left for the test.

    Example:
        >>> train, test = split_rows(5, 0.4, 0, {"colour": np.array(["red", "red", "blue", "red", "red"])})
        >>> 2 in train, len(test)
        (True, 1)
    """
    order = np.random.default_rng(seed).permutation(rows)
    held_out = max(1, round(test_share * rows))
    in_test = np.zeros(rows, dtype=bool)
    in_test[order[:held_out]] = True
    for column in (context or {}).values():
        if not is_numeric(column):
            in_test[_first_of_unseen(column.astype(str), order, in_test)] = False
    if not in_test.any():
        raise ValueError(
            "expected rows to test whose categories are in training rows as well, got none; leave out of the context "
            f"({', '.join(context or {})}) columns with another category in every row"
        )
    return order[~in_test[order]], order[in_test[order]]


def _first_of_unseen(categories: Array, order: Array, in_test: Array) -> list[int]:
    """Return the first test row of each category that no training row has."""
    seen = {*categories[~in_test]}
    first: dict[str, int] = {}
    for row in order[in_test[order]]:
        if categories[row] not in seen:
            first.setdefault(categories[row], int(row))
    return list(first.values())
