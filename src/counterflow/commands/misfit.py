"""Where an approximation and the posterior differ, as its importance weights tell: by number and by pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from counterflow.plots import Array

BINS = 6  # of each number: 36 cells for a pair hold some 280 of 10,000 draws each
MOST = 60  # numbers whose pairs are looked at, those that differ most: a table of (60 * 6)^2 cells


class Misfit(NamedTuple):
    """Shares of the mass that the approximation has in the wrong cells of a histogram, 0 to 1."""

    alone: Array  # of each number, (N,)
    pairs: list[tuple[int, int, float]]  # (i, j, share), the largest first


def misfit(columns: Array, weights: Array) -> Misfit:
    """Compare draws (S, N) as they are with the same draws under their weights (S,), which sum to one.

        share = sum over cells |sum of the weights in it - its share of the draws| / 2

    Each number is cut into BINS cells that hold as much as each other, a pair into their products.

    Example:
        >>> columns = np.random.default_rng(0).normal(size=(5000, 3))
        >>> weights = np.exp(0.5 * columns[:, 0] * columns[:, 2])
        >>> found = misfit(columns, weights / weights.sum())
        >>> found.pairs[0][:2], bool(found.pairs[0][2] > 0.1 > found.alone[1])
        ((0, 2), True)
    """
    surplus = weights - 1 / len(columns)
    cells = [_cells(column, surplus + 2 / len(columns)) for column in columns.T]
    alone = np.array([abs(np.bincount(cell, surplus, BINS)).sum() / 2 for cell in cells])
    worst = np.sort(np.argsort(-alone, kind="stable")[:MOST])
    table = np.concatenate([np.eye(BINS)[cells[i]] for i in worst], 1) if len(worst) else np.zeros((len(columns), 0))
    moved = abs(table.T @ (surplus[:, None] * table)).reshape(len(worst), BINS, len(worst), BINS).sum((1, 3)) / 2
    pairs = [
        (int(worst[i]), int(worst[j]), float(moved[i, j])) for i, j in zip(*np.triu_indices(len(worst), 1), strict=True)
    ]
    return Misfit(alone, sorted(pairs, key=lambda pair: -round(pair[2], 9)))


def noise(weights: Array) -> float:
    """The share that a pair has in the mean where the weights (S,) have nothing to do with it.

    0.4 sqrt(cells (1 / ESS - 1 / S)),    0.4 being half of the mean of an absolute normal number
    """
    return float(0.4 * BINS * np.sqrt(max(np.square(weights).sum() - 1 / len(weights), 0.0)))


def _cells(column: Array, weights: Array) -> Array:
    """Which of the cells, of equal weight, each of the numbers (S,) is in."""
    order = np.argsort(column, kind="stable")
    reached = np.cumsum(weights[order])
    edges = column[order][np.searchsorted(reached, reached[-1] * np.arange(1, BINS) / BINS)]
    return np.searchsorted(edges, column, side="right")
