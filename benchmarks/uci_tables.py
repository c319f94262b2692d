"""UCI regression tables as continuous data, features and target jointly: what every density estimator is given.

A density of raw values rewards spikes without bound where values repeat. So each column is made continuous before
anything is fitted, with the same seeded noise for all:

* a column of at most max(32, 5 % of the rows) distinct values becomes the rank of its value, 0, 1, ..., plus U[0, 1);
* any other column gets U[0, r), r being the resolution that it is recorded with: the largest of 1, 2 and 5 times a
  power of ten of which at least 95 % of its values are multiples (kin8nm: 1e-8, which changes nothing);
* a column without a second value is left out, and so is one whose ranks are those of an earlier column, or the reverse
  of them (surface_area of energy, which is a function of relative_compactness).

Other deterministic relations (energy: the wall, roof and height of twelve buildings) stay: with the noise of one rank
their density is bounded by that of a cell.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

SETS = ("yacht", "bostonHousing", "energy", "concrete", "wine-quality-red", "kin8nm", "power-plant")
FEW, SHARE = 32, 0.05


class Split(NamedTuple):
    """Standardised by the training rows, whose log densities are therefore in nats per standard deviations."""

    train: np.ndarray  # (N, D) float64
    test: np.ndarray


class Table(NamedTuple):
    """A table made continuous."""

    rows: np.ndarray  # (N, D) float64
    names: tuple[str, ...]
    kinds: tuple[str, ...]  # what was done, by column
    left_out: tuple[str, ...]
    test_mask: np.ndarray  # (splits, N)

    def split(self, k: int) -> Split:
        train, test = self.rows[~self.test_mask[k]], self.rows[self.test_mask[k]]
        mean, std = train.mean(0), train.std(0)
        return Split((train - mean) / std, (test - mean) / std)


def resolution(values: np.ndarray) -> float:
    """The largest of 1, 2 and 5 times a power of ten of which 95 % of the values are multiples.

    Example:
        >>> resolution(np.array([0.25, 0.5, 1.75])), resolution(np.array([10.0, 30.0]))
        (0.05, 10.0)
    """
    steps = [digit * 10.0**power for power in range(6, -9, -1) for digit in (5, 2, 1)]
    for step in steps:
        multiples = values / step
        if step <= np.ptp(values) and np.mean(np.abs(multiples - np.round(multiples)) < 1e-6) >= 0.95:
            return step
    return steps[-1]


def continuous(data: np.ndarray, names: list[str], test_mask: np.ndarray, seed: int = 0) -> Table:
    """The table with each column made continuous; see above."""
    noise = np.random.default_rng(seed).random(data.shape)
    columns, kept, kinds, left_out, ranks = [], [], [], [], []
    for j, name in enumerate(names):
        values, rank = np.unique(data[:, j], return_inverse=True)
        if len(values) < 2:
            left_out.append(f"{name}, constant")
            continue
        if len(values) <= max(FEW, SHARE * len(data)):
            twins = [n for n, r in ranks if np.array_equal(r, rank) or np.array_equal(r.max() - r, rank)]
            if twins:
                left_out.append(f"{name}, a function of {twins[0]}")
                continue
            ranks.append((name, rank))
            columns.append(rank + noise[:, j])
            kinds.append(f"{len(values)} ranks")
        else:
            step = resolution(data[:, j])
            columns.append(data[:, j] + step * noise[:, j])
            kinds.append(f"steps of {step:g}")
        kept.append(name)
    return Table(np.stack(columns, 1), tuple(kept), tuple(kinds), tuple(left_out), test_mask)


def load(name: str, folder: Path) -> Table:
    file = np.load(folder / "uci" / "regression" / f"{name}.npz")
    return continuous(file["data"], [str(n) for n in file["columns"]], file["test_mask"])
