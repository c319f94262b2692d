"""Columns without a density of their own: constants, copies of other columns and linear functions of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from counterflow.density.validation import degenerate_columns

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LeftOut:
    """Column of a table that the others determine: x = offset + sum of slope * source.

    Args:
        index: its place among all columns.
        name: its name.
        sources: places of the columns that determine it, none for a constant.
        slopes: one for each source.
        offset: in the unit of the column.
        reason: why it is left out, for the warning.
    """

    index: int
    name: str
    sources: tuple[int, ...]
    slopes: tuple[float, ...]
    offset: float
    reason: str

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)


def find_left_out(x: Array, names: Sequence[str], quantized: Sequence[int] = ()) -> list[LeftOut]:
    """Return the columns that a density has to leave out, in their order.

    Args:
        x: the table (N, D).
        names: the names of the D columns.
        quantized: indices of columns whose numbers fill cells, among which linear functions do no harm.

    Raises:
        ValueError: no column is left.

    Example:
        >>> a = np.arange(12.0) ** 2
        >>> [each.reason for each in find_left_out(np.stack([a, 3 - 2 * a, np.ones(12)], 1), ["a", "b", "c"])]
        ["'b' is an affine copy of 'a'", "'c' is constant"]
    """
    reasons: dict[int, str] = {}
    while True:
        kept = [i for i in range(len(names)) if i not in reasons]
        found = degenerate_columns(
            x[:, kept], [names[i] for i in kept], [kept.index(i) for i in quantized if i in kept]
        )
        if not found:
            break
        reasons |= {i: found[names[i]] for i in kept if names[i] in found}
    if not kept:
        raise ValueError("expected at least one column that varies, got constant columns only; bring more data")
    return [_left_out(x, i, names[i], kept, reasons[i]) for i in sorted(reasons)]


def _left_out(x: Array, index: int, name: str, kept: Sequence[int], reason: str) -> LeftOut:
    """Return a column as a linear function of those that are kept."""
    column = x[:, index]
    center = float(column.mean())
    if np.ptp(column) <= 1e-14 * np.abs(column).max():
        return LeftOut(index, name, (), (), float(column[0]), reason)
    means, spreads = x[:, kept].mean(0), x[:, kept].std(0)
    slopes = np.linalg.lstsq((x[:, kept] - means) / spreads, column - center, rcond=None)[0]
    used = np.flatnonzero(np.abs(slopes) > 1e-6 * np.abs(slopes).max()).tolist()
    slopes = slopes[used] / spreads[used]
    sources = tuple(kept[k] for k in used)
    return LeftOut(index, name, sources, tuple(slopes.tolist()), center - float(means[used] @ slopes), reason)


def restored(rows: Array, left_out: Sequence[LeftOut]) -> Array:
    """Return rows (N, D) with the columns that were left out, (N, D + len(left_out)).

    Example:
        >>> restored(np.array([[1.0], [2.0]]), [LeftOut(0, "a", (1,), (2.0,), 0.5, "'a' is an affine copy of 'b'")])
        array([[2.5, 1. ],
               [4.5, 2. ]])
    """
    if not left_out:
        return rows
    places = {each.index for each in left_out}
    every = np.empty((len(rows), rows.shape[1] + len(left_out)))
    every[:, [i for i in range(every.shape[1]) if i not in places]] = rows
    for each in left_out:
        every[:, each.index] = each.offset + every[:, list(each.sources)] @ np.array(each.slopes)
    return every
