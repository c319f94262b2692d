"""Inference of the kind and the map of each column of a table from its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from counterflow.checks import positive_number
from counterflow.density.validation import listed
from counterflow.transforms.table.circular import CircularColumn
from counterflow.transforms.table.column import Column
from counterflow.transforms.table.continuous import AsinhColumn, LinearColumn, LogColumn, LogitColumn
from counterflow.transforms.table.discrete import GridColumn, OrdinalColumn, SpikedColumn
from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]
Kind = Literal["auto", "real", "integer", "ordinal", "category"]
Bounds = tuple[float | None, float | None]

KINDS = ("auto", "real", "integer", "ordinal")  # of numbers; the codes of categories come here no more
MIN_ROWS = 10  # a column of a table with fewer rows is taken to be real and linear, unless stated otherwise
MAX_VALUES = 50  # an ordinal column has at most this many distinct values
MIN_COUNT = 5  # each value of an ordinal column is in at least this many rows: an unseen value is then unlikely
MAX_FILLED = 1_000  # whole numbers of an ordinal column, those that did not occur included
UNSEEN = 0.5  # count of a whole number that did not occur, as of Krichevsky and Trofimov 1981
MIN_STEP = 1e-3  # in standard deviations of the column; numbers on a finer grid are taken to be continuous
MIN_SPIKE = 0.01  # share of the rows in which a number of a continuous column must repeat to be a spike
TURN_PLACES = 48  # of a circle at which it may be cut open
TURN_SHARPNESS = 20.0  # concentration of the kernels, of von Mises, that find the rarest
MIN_GAIN = 0.1  # nats per row that another map must be nearer to a normal distribution than the linear one


class Grid(NamedTuple):
    """Arguments of a GridColumn beside the column it wraps."""

    step: float
    offset: float = 0.0
    mass: bool = False
    minimum: float | None = None
    maximum: float | None = None


class Spikes(NamedTuple):
    """Arguments of a SpikedColumn beside the column it wraps."""

    spikes: tuple[float, ...]
    room: tuple[float, ...]
    width: float
    minimum: float | None = None
    maximum: float | None = None


def detect(
    x: Array,
    names: Sequence[str],
    kinds: Mapping[str, Kind] | Kind = "auto",
    bounds: Mapping[str, Bounds] | None = None,
    seed: int = 0,
    circular: Mapping[str, float] | None = None,
) -> TableTransform:
    """Infer the map of each column of a table.

    First the cells, which recorded numbers fill. A column is ordinal if it has at most 50 distinct values, each in at
    least 5 rows. A column of whole numbers, or of multiples of a whole number, is an integer column: the density counts
    the mass of a cell. Otherwise, numbers with up to eight decimals fill a cell of that width if it is above 0.001
    standard deviations. Samples of a column on a finer grid are rounded to its decimals. In the remaining, continuous
    columns, numbers that repeat in more than 1 % of the rows are spikes: each fills a cell as wide as the typical gap
    between numbers.

    Then the map. One stated bound makes it log, two make it logit. Otherwise log(x), for positive numbers, and
    asinh((x - median) / unit) are compared with x itself by

        mean log|dv/dx| - log std(v),

    the mean log-likelihood of a normal distribution fitted to v = map(x), as Box and Cox do. The best map replaces x if
    it gains at least 0.1 nats per row. Unlike the kurtosis, this criterion exists for any tails.

    A circular column is linear on the circle, which is cut open where its numbers are rarest.

    Args:
        x: the table (N, D), float64, finite.
        names: the names of the D columns.
        kinds: the kind of all columns, or of some by name; the others are "auto".
        bounds: (low, high) by name; None for no bound.
        seed: seed of the noise within cells.
        circular: the periods of circular columns by name.

    Raises:
        ValueError: unknown names or kinds, numbers outside of the bounds, periods that are not positive, bounds of a
            circular column, or an integer column with fractions.

    Source: Box and Cox 1964, "An analysis of transformations"; for the noise within cells, Uria et al. 2013, "RNADE",
    section 4.2, and Theis et al. 2016, "A note on the evaluation of generative models".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.stack([rng.normal(size=200), rng.lognormal(size=200), rng.integers(0, 3, 200)], 1)
        >>> [column.map for column in detect(x, ["a", "b", "c"]).columns]
        ['linear', 'log', 'ordinal']
    """
    bounds = bounds or {}
    if not isinstance(kinds, str | Mapping):
        raise ValueError(f"expected columns to be one of {', '.join(KINDS)}, or kinds by name, got {kinds!r}")
    stated = dict.fromkeys(names, kinds) if isinstance(kinds, str) else dict(kinds)
    circular = circular or {}
    unknown = sorted({*stated, *bounds, *circular} - {*names})
    if unknown:
        raise ValueError(f"expected names of columns ({listed(names)}), got {unknown}")
    wrong = {name: kind for name, kind in stated.items() if kind not in KINDS}
    if wrong:
        raise ValueError(f"expected kinds of columns among {', '.join(KINDS)}, got {wrong}")
    both = sorted({*bounds} & {*circular})
    if both:
        raise ValueError(f"expected bounds of columns that are not circular, got {both} in both; leave one out")
    rng = np.random.default_rng(seed)
    columns = [
        _circular(column, name, circular[name], rng)
        if name in circular
        else _column(column, name, stated.get(name, "auto"), bounds.get(name), rng)
        for column, name in zip(x.T, names, strict=True)
    ]
    with_cells = OrdinalColumn | GridColumn | CircularColumn
    decimals = [
        None if isinstance(column, with_cells) or stated.get(name) == "real" else _decimals(values)
        for column, name, values in zip(columns, names, x.T, strict=True)
    ]
    return TableTransform(columns, decimals)


def _column(x: Array, name: str, kind: Kind, bounds: Bounds | None, rng: np.random.Generator) -> Column:
    """Infer the map of one column x (N,)."""
    _check_bounds(x, name, bounds)
    values, counts = np.unique(x, return_counts=True)
    enough = len(x) >= MIN_ROWS
    few_values = enough and 1 < len(values) <= MAX_VALUES and counts.min() >= MIN_COUNT
    if kind == "ordinal" or (kind == "auto" and few_values and bounds is None):
        return _ordinal(name, values, counts)
    cells = _find_cells(x, name, values, counts, kind if enough or kind != "auto" else "real")
    noise = rng.random(len(x)) - 0.5
    low, high = bounds or (None, None)
    if isinstance(cells, Spikes):
        jittered = x + cells.width * noise * np.isin(x, cells.spikes)
        stretch = SpikedColumn(LinearColumn(name), *cells)
        u = stretch(torch.from_numpy(jittered))[0].numpy()
        column = _bounded(name, jittered, low, high, cells.width, sum(cells.room)) or _most_normal(u, [_asinh(name, u)])
        return SpikedColumn(_standardized(column, u), *cells)
    step = 0.0 if cells is None else cells.step
    u = x + step * noise
    column = _bounded(name, u, low, high, step) or (_unbounded(name, u, step) if enough else LinearColumn(name))
    column = _standardized(column, u)
    if cells is None:
        return column
    if low is not None or high is not None:
        cells = cells._replace(minimum=low, maximum=high)
    return GridColumn(column, *cells)


def _circular(x: Array, name: str, period: float, rng: np.random.Generator) -> CircularColumn:
    """Return the circular column of numbers x (N,), cut open where they are rarest.

    Samples are in [0, P), or in [-P / 2, P / 2) if the numbers are.
    """
    positive_number(period, f"the period of column {name!r}")
    low = -period / 2 if x.min() < 0 and np.abs(x).max() <= period / 2 else 0.0
    turned = low + np.mod(x - low, period)
    values = np.unique(turned)
    whole = bool((values == np.round(values)).all())
    decimals = 0 if whole else _decimals(turned)
    step = 0.0 if decimals is None or len(x) < MIN_ROWS else 10.0**-decimals
    if step <= MIN_STEP * period:
        step = 0.0
    places = low + period * (np.arange(TURN_PLACES) + 0.5) / TURN_PLACES
    if step:  # between two numbers that could have been recorded
        places = np.unique(np.round(places / step - 0.5) + 0.5) * step
    angle = 2 * np.pi / period
    rarest = np.exp(TURN_SHARPNESS * np.cos(angle * (turned - places[:, None]))).sum(1).argmin()
    cut = float(places[rarest])
    lifted = cut + np.mod(x - cut, period) + step * (rng.random(len(x)) - 0.5)
    column = _standardized(LinearColumn(name), lifted)
    return CircularColumn(GridColumn(column, step, mass=whole) if step else column, period, cut, low)


def _check_bounds(x: Array, name: str, bounds: Bounds | None) -> None:
    """Raise ValueError unless the bounds are in order and all numbers lie between them."""
    if bounds is None:
        return
    low = -math.inf if bounds[0] is None else bounds[0]
    high = math.inf if bounds[1] is None else bounds[1]
    if not low < high:
        raise ValueError(f"expected bounds (low, high) of column {name!r} with low < high, got {bounds}")
    outside = np.flatnonzero((x < low) | (x > high))
    if len(outside):
        raise ValueError(
            f"expected numbers in [{low}, {high}] in column {name!r}, its stated bounds, got {len(outside)} others, "
            f"the first {x[outside[0]]} in row {outside[0]} (counted from 0)"
        )


def _ordinal(name: str, values: Array, counts: Array) -> OrdinalColumn:
    """Return the ordinal column of these distinct values and their counts.

    Whole numbers that did not occur have a share as well, as if each had been seen half a time: those between others
    one by one, those beyond the others together, on either side.
    """
    if len(values) < 2:
        raise ValueError(f"expected more than one value in the ordinal column {name!r}, got {values[0]}")
    if not (values == np.round(values)).all():
        return OrdinalColumn(name, values.tolist(), (counts / counts.sum()).tolist())
    step = _common_step(values)
    every = values[0] + step * np.arange(round((values[-1] - values[0]) / step) + 1)
    recorded = values
    if len(every) <= MAX_FILLED:
        seen = np.full(len(every), UNSEEN)
        seen[np.searchsorted(every, values)] = counts
        values, counts = every, seen
    total = counts.sum() + 2 * UNSEEN
    return OrdinalColumn(name, values.tolist(), (counts / total).tolist(), UNSEEN / total, recorded.tolist())


def _find_cells(x: Array, name: str, values: Array, counts: Array, kind: Kind) -> Grid | Spikes | None:
    """Return the cells of a column that is not ordinal, or None for a continuous column without spikes."""
    whole = bool((values == np.round(values)).all())
    spread = float(x.std())
    if kind == "integer" and not whole:
        bad = np.flatnonzero(x != np.round(x))
        raise ValueError(
            f"expected whole numbers in the integer column {name!r}, got {x[bad[0]]} in row {bad[0]} (counted from 0)"
        )
    if whole and kind in ("integer", "auto"):
        step = _common_step(values)
        if kind == "integer" or step > MIN_STEP * spread:
            return Grid(step, float(values[0]), True, float(values[0]), float(values[-1]))
    if kind == "auto":
        decimals = None if whole else _decimals(values)
        if decimals is not None and 10.0**-decimals > MIN_STEP * spread:
            return Grid(10.0**-decimals)
    return _find_spikes(x, values, counts)


def _common_step(values: Array) -> float:
    """Return the greatest common divisor of the gaps between whole numbers."""
    gaps = np.diff(values)
    if not len(gaps) or values[-1] - values[0] >= 2**53:
        return 1.0
    return float(math.gcd(*(int(gap) for gap in gaps)))


def _decimals(x: Array) -> int | None:
    """Return the number of decimals, up to eight, that all numbers have; None for more, or for too few numbers."""
    values = np.unique(x)
    if len(x) < MIN_ROWS:
        return None
    return next((places for places in range(9) if _on_grid(values, 10.0**-places)), None)


def _on_grid(values: Array, step: float) -> bool:
    """Return True if all values are distinct multiples of the step within the precision of float32."""
    multiples = values / step
    nearest = np.round(multiples)
    near = (np.abs(multiples - nearest) < 1e-3).all() and np.abs(multiples).max() < 1e12
    return bool(near and (np.diff(nearest) > 0).all())


def _find_spikes(x: Array, values: Array, counts: Array) -> Spikes | None:
    """Return the numbers that repeat in a continuous column, or None."""
    often = counts > max(MIN_COUNT, MIN_SPIKE * len(x))
    if not often.any() or often.all():
        return None
    spikes = values[often]
    shares = counts[often] / len(x)
    width = min(_typical_gap(values), float(np.diff(spikes).min(initial=np.inf)) / 2)  # cells do not overlap
    # A spike's cell becomes as wide for its share as the middle half of the other rows is for theirs.
    quartiles = np.percentile(x[~np.isin(x, spikes)], [25, 75])
    other = (quartiles[1] - quartiles[0]) / 0.5 / (1 - shares.sum())
    room = np.maximum(shares * other - width, 0.0)
    return Spikes(
        tuple(spikes.tolist()),
        tuple(room.tolist()),
        width,
        float(values[0]) if often[0] else None,
        float(values[-1]) if often[-1] else None,
    )


def _typical_gap(values: Array) -> float:
    """Return the mean gap between neighbours in the middle four fifths of the distinct numbers."""
    inner = values[len(values) // 10 : len(values) - len(values) // 10]
    return float((inner[-1] - inner[0]) / (len(inner) - 1)) if len(inner) > 1 else float(values[-1] - values[0])


def _bounded(
    name: str, x: Array, low: float | None, high: float | None, width: float, room: float = 0.0
) -> Column | None:
    """Return the log or logit column between the bounds, or None if there are none.

    Args:
        name: the name of the column.
        x: its numbers, dequantized.
        low: the stated lower bound. A number at a bound has half of its cell beyond the bound.
        high: the stated upper bound.
        width: the width of a cell; 0 for no cells.
        room: the length by which spikes stretch the column below the upper bound.
    """
    low = None if low is None else low - width / 2
    high = None if high is None else high + width / 2
    if low is not None and high is not None:
        return LogitColumn(name, low, high + room, _half_distance(x - low, high - x))
    if low is not None:
        return LogColumn(name, low=low, min_distance=_half_distance(x - low))
    if high is not None:
        return LogColumn(name, high=high + room, min_distance=_half_distance(high - x))
    return None


def _half_distance(*distances: Array) -> float:
    """Return half of the smallest positive distance from a bound."""
    joined = np.concatenate(distances)
    joined = joined[joined > 0]
    return float(joined.min()) / 2 if len(joined) else 1e-6


def _unbounded(name: str, x: Array, step: float) -> Column:
    """Return the linear, asinh or, for numbers that are all positive, log column."""
    low = -step / 2  # the lower end of the cell of 0
    candidates: list[Column] = [_asinh(name, x)]
    if x.min() > low:
        candidates.insert(0, LogColumn(name, low=low, min_distance=_half_distance(x - low)))
    return _most_normal(x, candidates)


def _asinh(name: str, x: Array) -> AsinhColumn:
    """Return the asinh column that bends one standard deviation from the median, estimated by the quartiles."""
    quartiles = np.percentile(x, [25, 50, 75])
    unit = float(quartiles[2] - quartiles[0]) / 1.35 or float(np.std(x)) or 1.0
    return AsinhColumn(name, float(quartiles[1]), unit)


def _most_normal(x: Array, candidates: Sequence[Column]) -> Column:
    """Return the candidate under which x is nearest to a normal distribution, or the linear column."""
    linear = LinearColumn(candidates[0].name)
    best = max(candidates, key=lambda candidate: _normality(x, candidate))
    return best if _normality(x, best) > _normality(x, linear) + MIN_GAIN else linear


def _normality(x: Array, column: Column) -> float:
    """Return mean log|dv/dx| - log std(v), in nats per row."""
    v, log_slope = column(torch.from_numpy(x))
    spread = float(v.std(correction=0))
    return float(log_slope.mean()) - math.log(spread) if spread > 0 else -math.inf


def _standardized(column: Column, x: Array) -> Column:
    """Set center and scale of the column so that the images of x have mean 0 and standard deviation 1."""
    v = column(torch.from_numpy(x))[0].numpy()
    spread = float(v.std())
    column.center = float(v.mean())
    column.scale = spread if spread > 0 else 1.0
    return column
