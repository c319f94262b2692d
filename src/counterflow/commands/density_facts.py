"""Facts about the columns of a table and its unusual rows, for summary.json and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from counterflow.density.model import TableDensity

if TYPE_CHECKING:
    from counterflow.commands.density_run import Rows

Array = np.ndarray[Any, Any]
BINS = 20
MAX_CARDS = 60  # columns
UNUSUAL = 10  # rows, those with the lowest log density
TAIL = 0.05  # two-sided share of the training rows beyond a cell, below which the cell is unusual by itself
MAX_CELLS = 4  # of a row that are named
LEVELS = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


def column_cards(density: TableDensity, rows: Rows, seed: int) -> list[dict[str, Any]]:
    """Describe the columns of held-out rows: kind, quantiles, and histograms beside those of as many draws."""
    samples = density.sample(len(rows.x), density.encode(rows.context), seed)
    return [
        {"column": column.name, "kind": column.map, **_card(rows.x[:, k], samples[:, k])}
        for k, column in enumerate(density.columns.columns[:MAX_CARDS])
    ]


def _card(data: Array, samples: Array) -> dict[str, Any]:
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


def unusual_rows(scores: Array, test: Rows, numbers: Array, train: Array) -> list[dict[str, Any]]:
    """Describe the test rows with the lowest log density, the lowest first.

    Args:
        scores: log densities of the test rows (M,), nats.
        test: the test rows.
        numbers: their numbers in the table (M,), from 0.
        train: training rows (N, D), to which cells are compared.

    Returns:
        For each row its number, its log density, its context, and the cells that are unusual by themselves.
    """
    lowest = np.argsort(scores, kind="stable")[:UNUSUAL]
    ordered = np.sort(train, 0)
    found = []
    for k in lowest:
        row = test.x[k]
        below = np.array([np.searchsorted(column, cell) for column, cell in zip(ordered.T, row, strict=True)])
        above = len(train) - np.array(
            [np.searchsorted(column, cell, "right") for column, cell in zip(ordered.T, row, strict=True)]
        )
        outside = 2 * np.minimum(1 - below / len(train), 1 - above / len(train))
        cells = [
            {
                "column": test.names[j],
                "value": float(row[j]),
                "side": "high" if below[j] > above[j] else "low",
                "share": float(max(below[j], above[j]) / len(train)),
            }
            for j in np.argsort(outside, kind="stable")[:MAX_CELLS]
            if outside[j] < TAIL
        ]
        given = {name: str(values[k]) for name, values in (test.context or {}).items()}
        found.append({"row": int(numbers[k]), "log_density": float(scores[k]), "given": given, "cells": cells})
    return found
