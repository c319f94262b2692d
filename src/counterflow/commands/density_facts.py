"""Facts about the columns of a table and its unusual rows, for summary.json and the report."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from counterflow.density.attribution import cell_gains
from counterflow.density.categories import CategoryColumn
from counterflow.density.model import TableDensity

if TYPE_CHECKING:
    from counterflow.commands.density_run import Rows

Array = np.ndarray[Any, Any]
BINS = 20
MAX_CARDS = 60  # columns
MAX_VALUES = 5  # categories whose shares are given
UNUSUAL = 10  # rows, those with the lowest log density
MAX_CELLS = 4  # of a row that are named
MIN_GAIN = 3.0  # nats that a usual value in place of a named cell gains at least: a factor of 20 in density
MAX_SCORED = 50_000  # rows that are scored to find these cells
LEVELS = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


def column_cards(density: TableDensity, rows: Rows, samples: Array) -> list[dict[str, Any]]:
    """Describe the columns of held-out rows: kind, quantiles, and histograms beside those of as many draws."""
    cards = []
    for k, (name, kind) in enumerate(list(density.kinds.items())[:MAX_CARDS]):
        category = density.categories.get(name)
        card = _card if category is None else partial(_category_card, category)
        cards.append({"column": name, "kind": kind, **card(rows.x[:, k], samples[:, k])})
    return cards


def _category_card(category: CategoryColumn, data: Array, samples: Array) -> dict[str, Any]:
    """Describe a column of codes by the shares of its most frequent values."""
    known = ~np.isnan(data)
    counts = [np.bincount(part[known].astype(int), minlength=len(category.values)) for part in (data, samples)]
    order = np.argsort(-counts[0], kind="stable")[:BINS]
    scale = max(1, *(int(part.max()) for part in counts))
    heights = [[round(float(part[k]) / scale, 4) for k in order] for part in counts]
    most = {str(category.values[k]): round(float(counts[0][k]) / len(data), 4) for k in order[:MAX_VALUES]}
    return {"distinct": int((counts[0] > 0).sum()), "most": most, "data": heights[0], "samples": heights[1]}


def _card(data: Array, samples: Array) -> dict[str, Any]:
    known = ~np.isnan(data)
    if known.any():
        data, samples = data[known], samples[known]
    else:
        data = samples
    low, high = np.quantile(data, [0.005, 0.995])
    distinct = len(np.unique(data))
    bins = np.linspace(low, high, min(BINS, max(2, distinct)) + 1) if high > low else np.array([low - 0.5, low + 0.5])
    heights = [np.histogram(part.clip(bins[0], bins[-1]), bins)[0] for part in (data, samples)]
    scale = max(1, *(int(part.max()) for part in heights))
    quantiles = np.quantile(data, list(LEVELS.values()))
    return {
        "distinct": distinct,
        **{name: float(value) for name, value in zip(LEVELS, quantiles, strict=True)},
        "data": [round(float(part), 4) for part in heights[0] / scale],
        "samples": [round(float(part), 4) for part in heights[1] / scale],
    }


def unusual_rows(
    density: TableDensity, scores: Array, test: Rows, numbers: Array, train: Array
) -> list[dict[str, Any]]:
    """Describe the test rows with the lowest log density, the lowest first.

    Args:
        density: the density.
        scores: log densities of the test rows (M,), nats.
        test: the test rows.
        numbers: their numbers in the table (M,), from 0.
        train: training rows (N, D), whose quantiles are the usual values.

    Returns:
        For each row its number, its log density, its context, and the cells in whose place a usual value gains most.
    """
    lowest = np.argsort(scores, kind="stable")[:UNUSUAL]
    rows = test.take(lowest)
    levels = max(2, min(20, MAX_SCORED // rows.x.size))
    usual = np.nanquantile(train, (np.arange(levels) + 0.5) / levels, axis=0, method="nearest")
    gains, values = cell_gains(density, rows.x, usual, density.encode(rows.context))
    found = []
    for k, row in enumerate(rows.x):
        most = np.argsort(-gains[k], kind="stable")[:MAX_CELLS]
        cells = [
            {
                "column": test.names[j],
                "value": _value(density, test.names[j], row[j]),
                "usual": _value(density, test.names[j], values[k, j]),
                "gain": float(gains[k, j]) if np.isfinite(gains[k, j]) else None,
            }
            for j in most
            if gains[k, j] > MIN_GAIN
        ]
        given = {name: str(column[k]) for name, column in (rows.context or {}).items()}
        found.append(
            {"row": int(numbers[lowest[k]]), "log_density": float(scores[lowest[k]]), "given": given, "cells": cells}
        )
    return found


def _value(density: TableDensity, name: str, number: float) -> Any:
    """Return a number, or the category of a code."""
    category = density.categories.get(name)
    return float(number) if category is None else category.decode(np.array([number]))[0]
