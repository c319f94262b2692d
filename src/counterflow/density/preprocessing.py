"""Constant transforms between the columns of a table and the flow: quantile splines and a whitening layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.transforms.base import Transform
from counterflow.transforms.constant import Whiten
from counterflow.transforms.quantile_spline import QuantileSpline
from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]

MIN_SPLINE_GAIN = 0.7  # nats per row that a quantile spline must gain a column over a normal; its knots add noise


def preprocessing(
    columns: TableTransform, x: Tensor, weights: Array | None, seed: int, correlated: bool
) -> list[Transform]:
    """Return the transforms that map z = columns(x) to about N(0, I).

    Columns whose z is far from normal pass through a spline through their quantiles. Whitening by the normal
    distribution fitted to the result follows, with its correlations or with its variances alone.

    Args:
        columns: the maps of the columns.
        x: rows (N, D).
        weights: weights (N,) of the rows; None for equal weights.
        seed: seed of the noise within cells.
        correlated: whether whitening removes correlations.
    """
    z = dequantized(columns, x, seed)
    if len(z) < 2:  # too few for a spline
        return [_whitening(z.numpy(), weights, correlated)]
    splines = QuantileSpline.from_data(z, min_gain=MIN_SPLINE_GAIN)
    return [splines, _whitening(splines(z)[0].numpy(), weights, correlated)]


def dequantized(columns: TableTransform, x: Tensor, seed: int) -> Tensor:
    """Return z = columns(x) of rows (N, D), recorded numbers put at random within their cells."""
    start, width = columns.cells(x)
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed)).to(x.device)
    z: Tensor = columns(start + width * noise)[0]
    return z


def _whitening(z: Array, weights: Array | None, correlated: bool) -> Whiten:
    """Return the whitening by the normal distribution fitted to z.

    Its correlations are shrunk towards zero as by Ledoit and Wolf 2004.
    """
    mean = np.average(z, axis=0, weights=weights)
    if not correlated or len(z) < 2:
        covariance = np.diag(np.average((z - mean) ** 2, axis=0, weights=weights))
    else:
        sklearn = require("sklearn.covariance", "data", "fitting densities of tables")
        covariance = np.atleast_2d(np.cov(z, rowvar=False, bias=True, aweights=weights))
        shrinkage = max(float(sklearn.ledoit_wolf_shrinkage(z)), 1e-6)
        covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diagonal(covariance))
    diagonal = np.diagonal(covariance)
    covariance = covariance + np.diag(np.where(diagonal > 0, 1e-9 * diagonal, 1.0))
    return Whiten(torch.from_numpy(mean), torch.from_numpy(np.linalg.cholesky(covariance)))
