"""Gaussian mixtures of scikit-learn, the baseline that `counterflow density` compares the flow with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]
COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16)  # numbers of components that BIC chooses from
MAX_ROWS = 20_000  # to fit the mixtures to


def mixture_log_density(
    columns: TableTransform,
    train: Array,
    test: Array,
    cell_points: int,
    seed: int,
    on_fit: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Array, str]:
    """Fit Gaussian mixtures to training rows and return the log density of test rows under the best one by BIC.

    Recorded numbers are dequantised for the mixture as they are for the flow: a mixture of the rounded numbers would
    have an unbounded density at values that repeat.

    Args:
        columns: the columns of the table, with the cells of recorded numbers.
        train: (N, D).
        test: (M, D).
        cell_points: points per cell over which the density of a test row is averaged.
        seed: of the points and the mixtures.
        on_fit: called as on_fit(done, total) after each of the mixtures that BIC chooses from.

    Returns:
        The log density in nats (M,), and a description of the mixture, such as "3 full".
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(seed)

    def dequantised(x: Array) -> tuple[Array, Tensor]:
        start, width = columns.cells(torch.from_numpy(x))
        return (start + width * torch.from_numpy(rng.random(x.shape))).numpy(), width

    rows, _ = dequantised(train[rng.permutation(len(train))[:MAX_ROWS]])
    mean = rows.mean(0)
    std = rows.std(0)
    rows = (rows - mean) / std
    candidates = [
        GaussianMixture(k, covariance_type=kind, random_state=seed)
        for kind, rows_per_component in (("full", rows.shape[1] + 3), ("diag", 4))
        for k in COMPONENTS
        if k * rows_per_component <= len(rows)
    ]
    fitted = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for candidate in candidates:
            fitted.append(candidate.fit(rows))
            on_fit(len(fitted), len(candidates))
    best = min(fitted, key=lambda mixture: mixture.bic(rows))
    points = cell_points if columns.quantized else 1
    drawn = [dequantised(test) for _ in range(points)]
    scores = torch.stack([torch.from_numpy(best.score_samples((x - mean) / std)) for x, _ in drawn])
    log_mean = torch.logsumexp(scores, 0) - math.log(points)
    log_p = log_mean - float(np.log(std).sum()) + columns.log_mass(drawn[0][1])
    return log_p.numpy(), f"{best.n_components} {best.covariance_type}"
