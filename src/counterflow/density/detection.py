"""How the columns of a table are found out, and what makes a table unfit for a density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from counterflow.transforms.table.columns import Column, TableTransform

Array = np.ndarray[Any, Any]
Kind = Literal["auto", "real", "integer", "ordinal"]
Bounds = tuple[float | None, float | None]

KINDS = ("auto", "real", "integer", "ordinal")
FEWEST = 10  # rows from which anything is concluded from them
DISTINCT = 50  # an ordinal column has at most as many values,
OFTEN = 5  # and each of them in at least as many rows, so that hardly a value is left to be seen for the first time
COARSE = 1e-3  # of the standard deviation: a finer grid is as good as none
REPEATED = 0.01  # of the rows: what a number of a continuous column repeats in, to be a spike
GAIN = 0.1  # nats a row by which a map must be nearer to a normal than the plain number is, to be taken unasked
ALIKE = 1e-9  # of a correlation from 1: one column is an affine copy of the other
SMALLEST, LARGEST = 1e-140, 1e140  # of a column's largest number: squares and what is a hundredth of it are floats too
DEPENDENT = 1e-10  # least eigenvalue of a correlation matrix, relative to the greatest; rounding leaves about 1e-15


def check_sizes(x: Array, names: Sequence[str]) -> None:
    """Raise ValueError for columns (N, D) whose squares float64 does not hold, by name.

    Example:
        >>> check_sizes(np.array([[1.0, 1e-300], [2.0, 3e-300]]), ["a", "b"])
        Traceback (most recent call last):
        ...
        ValueError: expected columns whose largest number is between 1e-140 and 1e+140 in size, got 'b' up to 3e-300; \
give them in another unit
    """
    largest = np.abs(x).max(0, initial=0)
    far = np.flatnonzero((largest > 0) & ((largest < SMALLEST) | (largest > LARGEST)))
    if len(far):
        listed = ", ".join(f"{names[i]!r} up to {largest[i]:.3g}" for i in far[:20])
        raise ValueError(
            f"expected columns whose largest number is between {SMALLEST:g} and {LARGEST:g} in size, got {listed}; "
            "give them in another unit"
        )


def check_columns(x: Array, names: Sequence[str], cells: Sequence[int] = ()) -> None:
    """Raise one ValueError that names all columns (N, D) under which a density would have no bound.

    Constant columns, affine copies of others (y = a x + b), and sets of columns of which one is a linear function of
    the rest, where there are more rows than columns. The latter is no harm in columns whose numbers fill cells.

    Example:
        >>> a = np.arange(12.0) ** 2
        >>> check_columns(np.stack([a, 3 - 2 * a, np.ones(12)], 1), ["a", "b", "c"])
        Traceback (most recent call last):
        ...
        ValueError: expected columns that vary and differ, got constant: 'c'; copies: 'b' of 'a'; drop them
    """
    spread = x.std(0)
    constant = spread <= 1e-14 * np.abs(x).max(0, initial=0)
    found = [f"constant: {_listed(names, np.flatnonzero(constant))}"] if constant.any() else []
    kept = np.flatnonzero(~constant)
    if len(x) > 3 and len(kept) > 1:
        z = (x[:, kept] - x[:, kept].mean(0)) / spread[kept]
        correlation = z.T @ z / len(z)
        first, second = np.nonzero(np.triu(np.abs(correlation) > 1 - ALIKE, 1))
        original = {int(b): int(a) for a, b in sorted(zip(first, second, strict=True), reverse=True)}  # the first one
        if original:
            copies = [f"{names[kept[b]]!r} of {names[kept[a]]!r}" for b, a in sorted(original.items())]
            found.append("copies: " + ", ".join(copies))
        rest = [i for i in range(len(kept)) if i not in original and kept[i] not in cells]
        if rest and len(x) > len(rest) + 1:
            values, vectors = np.linalg.eigh(correlation[np.ix_(rest, rest)])
            for vector in vectors.T[values < DEPENDENT * values[-1]]:
                parts = kept[np.array(rest)[np.abs(vector) > 1e-3 * np.abs(vector).max()]]
                found.append(f"one a linear function of the others: {_listed(names, parts)}")
    if found:
        raise ValueError(f"expected columns that vary and differ, got {'; '.join(found)}; drop them")


def _listed(names: Sequence[str], places: Array, most: int = 20) -> str:
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return ", ".join(repr(names[i]) for i in places[:most]) + more


def detect(
    x: Array,
    names: Sequence[str],
    kinds: Mapping[str, Kind] | Kind = "auto",
    bounds: Mapping[str, Bounds] | None = None,
    seed: int = 0,
) -> TableTransform:
    """Find the map of each column of x (N, D), float64.

    Cells first. `ordinal`: at most 50 different numbers, each of them in at least 5 rows. `integer`: whole
    numbers, or an even grid of them; the log density counts the mass of a number. Otherwise numbers recorded to so and
    so many decimals fill a cell of that width if it is above 1e-3 standard deviations, and numbers that
    repeat in more than 1 % of the rows of a continuous column are spread over a typical gap between its numbers.

    Then the map. Stated bounds make it log (one) or logit (two). Otherwise, of log(x) for numbers above 0 and of
    asinh((x - median) / unit), the better one is taken if it is nearer to a normal than x by 0.1 nats a row, measured
    as Box and Cox do, by the likelihood of a normal: mean log|dv/dx| - log std(v). Heavy tails and skewness show in
    it before they do in the kurtosis, which has no limit where it would be needed.

    Args:
        x: finite, no column constant.
        names: of the columns, D.
        kinds: of all columns, or by name; auto for those that are not named.
        bounds: by name, (low, high), None where there is none.
        seed: of the noise within cells while maps are compared.

    Raises:
        ValueError: names that are not there, kinds that do not exist, numbers outside of stated bounds.

    Source: Box and Cox 1964, "An analysis of transformations"; Uria et al. 2013, "RNADE", section 4.2, and Theis et al.
    2016, "A note on the evaluation of generative models", for the noise within cells.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.stack([rng.normal(size=200), rng.lognormal(size=200), rng.integers(0, 3, 200)], 1)
        >>> [column.map for column in detect(x, ["a", "b", "c"]).columns]
        ['linear', 'log', 'ordinal']
    """
    bounds = bounds or {}
    if not isinstance(kinds, str | Mapping):
        raise ValueError(f"expected columns as one of {', '.join(KINDS)}, or as kinds by name, got {kinds!r}")
    stated = dict.fromkeys(names, kinds) if isinstance(kinds, str) else dict(kinds)
    strangers = sorted({*stated, *bounds} - {*names})
    if strangers:
        raise ValueError(f"expected names of columns ({_listed(names, np.arange(len(names)))}), got {strangers}")
    wrong = {name: kind for name, kind in stated.items() if kind not in KINDS}
    if wrong:
        raise ValueError(f"expected kinds of columns as one of {', '.join(KINDS)}, got {wrong}")
    rng = np.random.default_rng(seed)
    return TableTransform(
        [
            _column(column, name, stated.get(name, "auto"), bounds.get(name), rng)
            for column, name in zip(x.T, names, strict=True)
        ]
    )


def _column(x: Array, name: str, kind: Kind, bounds: Bounds | None, rng: np.random.Generator) -> Column:
    _check_bounds(x, name, bounds)
    values, counts = np.unique(x, return_counts=True)
    enough = len(x) >= FEWEST
    few = enough and len(values) <= DISTINCT and counts.min() >= OFTEN
    if kind == "ordinal" or (kind == "auto" and few and bounds is None and len(values) > 1):
        if len(values) < 2:
            raise ValueError(f"expected more than one value in the ordinal column {name!r}, got {values[0]}")
        shares = counts / counts.sum()
        return Column(name, "ordinal", mass=True, values=tuple(values.tolist()), shares=tuple(shares.tolist()))
    cells = _cells(x, name, values, counts, kind if enough or kind != "auto" else "real")
    noise = cells["step"] * (rng.random(len(x)) - 0.5)
    noisy = x + (noise * np.isin(x, cells["spikes"]) if cells["spikes"] else noise)
    low, high = bounds or (None, None)
    if low is not None or high is not None:
        half = cells["step"] / 2
        if cells["step"] and not cells["spikes"]:
            cells["least"], cells["most"] = low, high
        low, high = None if low is None else low - half, None if high is None else high + half
        chosen = _bounded(noisy, low, high)
    elif cells["spikes"]:
        stretched = TableTransform([Column(name, **cells)])(torch.from_numpy(noisy)[:, None])[0][:, 0].numpy()
        chosen = _nearest(stretched, [_asinh(stretched)])
    else:
        chosen = _free(noisy, cells["step"]) if enough else {"map": "linear"}
    made = TableTransform([Column(name, **cells, **chosen)])
    v = made(torch.from_numpy(noisy)[:, None])[0].numpy()
    scale = float(v.std())
    return Column(name, **cells, **chosen, center=float(v.mean()), scale=scale if scale > 0 else 1.0)


def _check_bounds(x: Array, name: str, bounds: Bounds | None) -> None:
    if bounds is None:
        return
    low, high = (side if side is not None else far for side, far in zip(bounds, (-math.inf, math.inf), strict=True))
    if not low < high:
        raise ValueError(f"expected bounds (low, high) of column {name!r} with low < high, got {bounds}")
    out = np.flatnonzero((x < low) | (x > high))
    if len(out):
        raise ValueError(
            f"expected numbers in [{low}, {high}] in column {name!r}, as its bounds say, got {len(out)} others, the "
            f"first {x[out[0]]} in row {out[0]} (counted from 0)"
        )


def _cells(x: Array, name: str, values: Array, counts: Array, kind: Kind) -> dict[str, Any]:
    """step, offset, mass, spikes and ends of a column that is not ordinal."""
    whole = bool((values == np.round(values)).all())
    spread = float(x.std())
    if kind == "integer" and not whole:
        bad = np.flatnonzero(x != np.round(x))
        raise ValueError(
            f"expected whole numbers in the integer column {name!r}, got {x[bad[0]]} in row {bad[0]} (counted from 0)"
        )
    if whole and kind in ("integer", "auto"):
        gaps = np.diff(values)
        step = float(math.gcd(*(int(gap) for gap in gaps))) if len(gaps) and values[-1] - values[0] < 2**53 else 1.0
        if kind == "integer" or step > COARSE * spread:
            ends: dict[str, float | None] = {"least": float(values[0]), "most": float(values[-1])}
            return {"step": step, "offset": float(values[0]), "mass": True, "spikes": (), **ends}
    if kind == "auto":
        decimals = next((d for d in range(1, 9) if _on_grid(values, 10.0**-d)), None)
        if decimals is not None and 10.0**-decimals > COARSE * spread:
            return {"step": 10.0**-decimals, "spikes": ()}
    often = counts > max(OFTEN, REPEATED * len(x))
    if often.any() and not often.all():
        spikes, shares = values[often], counts[often] / len(x)
        width = min(_typical_gap(values), float(np.diff(spikes).min(initial=np.inf)) / 2)  # no cell meets another
        # as wide for their share as the middle half of the rest is for its own
        rest = np.subtract(*np.percentile(x[~np.isin(x, spikes)], [75, 25])) / 0.5 / (1 - shares.sum())
        room = np.maximum(shares * rest - width, 0.0)
        ends = {"least": values[0].item() if often[0] else None, "most": values[-1].item() if often[-1] else None}
        return {"step": width, "spikes": tuple(spikes.tolist()), "room": tuple(room.tolist()), **ends}
    return {"step": 0.0, "spikes": ()}


def _on_grid(values: Array, step: float) -> bool:
    """Whether all are multiples of the step, as far as float32 tells, and no two the same one."""
    steps = values / step
    places = np.round(steps)
    near = (np.abs(steps - places) < 1e-3).all() and np.abs(steps).max() < 1e12
    return bool(near and (np.diff(places) > 0).all())


def _typical_gap(values: Array) -> float:
    """Between neighbours, in the middle four fifths of the different numbers."""
    inner = values[len(values) // 10 : len(values) - len(values) // 10]
    return float((inner[-1] - inner[0]) / (len(inner) - 1)) if len(inner) > 1 else float(values[-1] - values[0])


def _bounded(x: Array, low: float | None, high: float | None) -> dict[str, Any]:
    """log or logit; nearer to a bound than half of the nearest number, nothing is told apart."""
    away = np.concatenate([x - side if side is low else side - x for side in (low, high) if side is not None])
    away = away[away > 0]
    nearest = float(away.min()) / 2 if len(away) else 1e-6
    return {
        "map": "logit" if low is not None and high is not None else "log",
        "low": low,
        "high": high,
        "unit": nearest,
    }


def _free(x: Array, step: float) -> dict[str, Any]:
    """The map that is nearest to a normal, the plain number unless another is clearly better."""
    low = -step / 2  # where the cell of 0 begins
    return _nearest(x, [_bounded(x, low, None), _asinh(x)] if x.min() > low else [_asinh(x)])


def _asinh(x: Array) -> dict[str, Any]:
    """Bends at about a standard deviation from the median, by the quartiles, which tails do not move."""
    quartiles = np.percentile(x, [25, 50, 75])
    unit = float(quartiles[2] - quartiles[0]) / 1.35 or float(np.std(x)) or 1.0
    return {"map": "asinh", "low": float(quartiles[1]), "unit": unit}


def _nearest(x: Array, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    best = max(candidates, key=lambda candidate: _normality(x, candidate))
    return best if _normality(x, best) > _normality(x, {"map": "linear"}) + GAIN else {"map": "linear"}


def _normality(x: Array, chosen: dict[str, Any]) -> float:
    """mean log|dv/dx| - log std(v), nats a row."""
    v, log_slope = TableTransform([Column("x", **chosen)])(torch.from_numpy(x)[:, None])
    spread = float(v.std(correction=0))
    return float(log_slope.mean()) - math.log(spread) if spread > 0 else -math.inf
