"""Attribution of an unusual row to its cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from counterflow.density.model import TableDensity

Array = np.ndarray[Any, Any]


class CellGains(NamedTuple):
    """Result of `cell_gains`."""

    gains: Array  # (N, D), nats
    values: Array  # (N, D), the value that gains as much


def cell_gains(density: TableDensity, x: Array, values: Array, c: Array | None = None) -> CellGains:
    """Return by how much the log density of a row would rise if one of its cells had a usual value.

        gain_j = max_k log p(x_1, ..., v_kj, ..., x_D) - log p(x),    at least 0

    The gain of a cell that fits the others is small. Where cells contradict each other, each of them has a gain.

    Args:
        density: the density p.
        x: rows (N, D).
        values: usual values v of each column (K, D), such as quantiles of a table.
        c: the encoded context (N, C); None without context.

    Returns:
        The gains (N, D) in nats, infinite where a row outside of the support would be inside, and the values that
        reach them, which are the cell's own where nothing is gained.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> height = rng.normal(1.7, 0.1, 300)
        >>> table = np.stack([height, 22 * height**2 + rng.normal(0, 1, 300), rng.normal(size=300)], 1)
        >>> from counterflow.density.fitting import DensityConfig, DensityTrainer
        >>> density = DensityTrainer(table, config=DensityConfig(layers=1, hidden=(16,), members=1, epochs=20)).fit()
        >>> gains, usual = cell_gains(density, np.array([[1.8, 60.0, 0.0]]), np.quantile(table, [0.1, 0.5, 0.9], 0))
        >>> int(gains.argmin()), bool(gains[0, :2].min() > 3 + gains[0, 2])
        (2, True)
    """
    N, D = x.shape
    K = len(values)
    own = density.score(x, c)
    changed = np.repeat(x, D * K, 0).reshape(N, D, K, D)
    for j in range(D):
        changed[:, j, :, j] = values[:, j]
    given = None if c is None else np.repeat(c, D * K, 0)
    scores = density.score(changed.reshape(-1, D), given).reshape(N, D, K)
    best = scores.argmax(2)
    highest = scores.max(2)
    better = (highest > own[:, None]) & ~np.isnan(x)  # a missing cell does not make a row unusual
    gains = np.where(better, highest, 0.0) - np.where(better, own[:, None], 0.0)
    return CellGains(gains, np.where(better, values[best, np.arange(D)], x))
