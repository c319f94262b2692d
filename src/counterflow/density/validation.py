"""Checks that the columns of a table have a bounded density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MIN_SIZE = 1e-140  # bounds of the largest absolute number of a column: its square, and a hundredth of it, fit float64
MAX_SIZE = 1e140
COPY_TOLERANCE = 1e-9  # a column is an affine copy of another if 1 - |correlation| is below this
MIN_EIGENVALUE = 1e-10  # of a correlation matrix, relative to the largest; rounding errors are about 1e-15
MAX_LISTED = 20  # names in an error


def check_sizes(x: Array, names: Sequence[str]) -> None:
    """Raise ValueError for columns of a table (N, D) whose squares overflow or underflow in float64.

    Example:
        >>> check_sizes(np.array([[1.0, 1e-300], [2.0, 3e-300]]), ["a", "b"])
        Traceback (most recent call last):
        ...
        ValueError: expected columns whose largest number is between 1e-140 and 1e+140 in size, got 'b' up to 3e-300; \
give them in another unit
    """
    largest = np.abs(x).max(0, initial=0)
    bad = np.flatnonzero((largest > 0) & ((largest < MIN_SIZE) | (largest > MAX_SIZE)))
    if len(bad):
        found = ", ".join(f"{names[i]!r} up to {largest[i]:.3g}" for i in bad[:MAX_LISTED])
        raise ValueError(
            f"expected columns whose largest number is between {MIN_SIZE:g} and {MAX_SIZE:g} in size, got {found}; "
            "give them in another unit"
        )


def check_columns(x: Array, names: Sequence[str], quantized: Sequence[int] = ()) -> None:
    """Raise one ValueError that names all columns under which a density would be unbounded.

    These are constant columns, affine copies of others (y = a x + b) and, in tables with more rows than columns, sets
    of columns of which one is a linear function of the others.

    Args:
        x: the table (N, D).
        names: the names of the D columns.
        quantized: indices of columns whose numbers fill cells, among which linear functions do no harm.

    Example:
        >>> a = np.arange(12.0) ** 2
        >>> check_columns(np.stack([a, 3 - 2 * a, np.ones(12)], 1), ["a", "b", "c"])
        Traceback (most recent call last):
        ...
        ValueError: expected distinct, non-constant columns; 'c' is constant and 'b' is an affine copy of 'a'; drop them
    """
    found = list(degenerate_columns(x, names, quantized).values())
    if found:
        last = found[-1] if len(found) <= MAX_LISTED else f"{len(found) - MAX_LISTED} more such columns"
        text = " and ".join(filter(None, [", ".join(found[: min(len(found) - 1, MAX_LISTED)]), last]))
        raise ValueError(f"expected distinct, non-constant columns; {text}; drop them")


def degenerate_columns(x: Array, names: Sequence[str], quantized: Sequence[int] = ()) -> dict[str, str]:
    """Return what is wrong with the columns that `check_columns` refuses: name of one to drop -> description.

    Example:
        >>> a = np.arange(12.0) ** 2
        >>> degenerate_columns(np.stack([a, 3 - 2 * a, np.ones(12)], 1), ["a", "b", "c"])
        {'c': "'c' is constant", 'b': "'b' is an affine copy of 'a'"}
    """
    spread = x.std(0)
    constant = spread <= 1e-14 * np.abs(x).max(0, initial=0)
    found = {names[i]: f"{names[i]!r} is constant" for i in np.flatnonzero(constant).tolist()}
    kept = np.flatnonzero(~constant)
    if len(x) > 3 and len(kept) > 1:
        z = (x[:, kept] - x[:, kept].mean(0)) / spread[kept]
        correlation = z.T @ z / len(z)
        originals = _copies(correlation)
        for i, k in sorted(originals.items()):
            found[names[kept[i]]] = f"{names[kept[i]]!r} is an affine copy of {names[kept[k]]!r}"
        rest = [i for i in range(len(kept)) if i not in originals and kept[i] not in quantized]
        if rest and len(x) > len(rest) + 1:
            for related in _linear_relations(correlation[np.ix_(rest, rest)]):
                columns = kept[np.array(rest)[related]]
                found[names[columns[-1]]] = f"one of {listed(names, columns)} is a linear function of the others"
    return found


def _copies(correlation: Array) -> dict[int, int]:
    """Return the index of each column that is an affine copy, and that of the first column it copies."""
    first, second = np.nonzero(np.triu(np.abs(correlation) > 1 - COPY_TOLERANCE, 1))
    return {int(b): int(a) for a, b in sorted(zip(first, second, strict=True), reverse=True)}


def _linear_relations(correlation: Array) -> list[Array]:
    """Return one boolean mask for each linear relation, True for the columns that take part."""
    values, vectors = np.linalg.eigh(correlation)
    null = vectors.T[values < MIN_EIGENVALUE * values[-1]]
    return [np.abs(vector) > 1e-3 * np.abs(vector).max() for vector in null]


def listed(names: Sequence[str], indices: Sequence[int] | Array | None = None) -> str:
    """Return the quoted names at the indices, or all names, up to 20 of them."""
    chosen = list(names) if indices is None else [names[i] for i in indices]
    more = f" and {len(chosen) - MAX_LISTED} more" if len(chosen) > MAX_LISTED else ""
    return ", ".join(map(repr, chosen[:MAX_LISTED])) + more
