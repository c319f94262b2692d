"""What a density trains: a flow's first weights, what stands before it, and kernels behind it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.flows.bases import StandardNormal
from counterflow.flows.flow import Flow
from counterflow.flows.kde import with_kernel_base
from counterflow.made.network import MADE
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Whiten
from counterflow.transforms.quantile_spline import QuantileSpline
from counterflow.transforms.table.table import TableTransform

Array = np.ndarray[Any, Any]

CURVED = 0.7  # nats a row that a curve through its quantiles gains a column; below, it is jagged for nothing
KERNELLED = 0.1  # nats a row of the validation part that kernels must gain
KNOWN = 20_000  # training rows up to which there are kernels: each row that is scored meets all of them


def torch_init(flow: Flow) -> Flow:
    """Hidden layers start as torch's own do, U(-k, k) with k = 1 / sqrt(inputs): smaller than those of a `MADE`.

    On few rows a larger start overfits sooner: on MINIBOONE, with a MAF, it costs 1.5 nats a row.
    """
    for made in (module for module in flow.modules() if isinstance(module, MADE)):
        for layer in made.masked_layers()[:-1]:
            k = layer.in_features**-0.5
            with torch.no_grad():
                layer.weight.uniform_(-k, k).mul_(layer.mask)
                layer.bias.uniform_(-k, k)
    return flow


def preprocessing(columns: TableTransform, x: Tensor, weights: Array | None, seed: int, correlated: bool) -> Transform:
    """What stands between the flow and z = columns(x): curves for columns that are far from normal, and a Gaussian."""
    z = _noisy(columns, x, seed)
    if len(z) < 2:  # nothing to draw a curve through
        return _gaussian(z.numpy(), weights, correlated)
    curves = QuantileSpline.from_data(z, min_gain=CURVED)
    return Compose([_gaussian(curves(z)[0].numpy(), weights, correlated), Inverse(curves)])


def _gaussian(z: Array, weights: Array | None, correlated: bool) -> Inverse:
    """The linear layer: N(mean, L L^T) fitted to z, its correlations shrunk as by Ledoit and Wolf 2004, or none."""
    from sklearn.covariance import ledoit_wolf_shrinkage  # here, for the estimator says what to install without it

    mean = np.average(z, axis=0, weights=weights)
    if not correlated or len(z) < 2:
        covariance = np.diag(np.average((z - mean) ** 2, axis=0, weights=weights))
    else:
        covariance = np.atleast_2d(np.cov(z, rowvar=False, bias=True, aweights=weights))
        shrunk = max(float(ledoit_wolf_shrinkage(z)), 1e-6)
        covariance = (1 - shrunk) * covariance + shrunk * np.diag(np.diagonal(covariance))
    diagonal = np.diagonal(covariance)
    covariance = covariance + np.diag(np.where(diagonal > 0, 1e-9 * diagonal, 1.0))
    return Inverse(Whiten(torch.from_numpy(mean), torch.from_numpy(np.linalg.cholesky(covariance))))


@torch.no_grad()
def with_kernels(learner: Flow, columns: TableTransform, train: Tensor, validation: Tensor, seed: int) -> Flow:
    """The trained learner, with kernels at the training rows if the validation part says so."""
    if len(train) > KNOWN or not isinstance(learner.base, StandardNormal):
        return learner
    train, validation = (_noisy(columns, x, seed).float() for x in (train, validation))
    known = with_kernel_base(learner, train, validation, max_points=KNOWN)
    gain = (known().log_prob(validation) - learner().log_prob(validation)).mean().item()
    return known if gain > KERNELLED else learner


def _noisy(columns: TableTransform, x: Tensor, seed: int) -> Tensor:
    """z for rows x, recorded numbers put at random within their cells."""
    start, width = columns.cells(x)
    noise = torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed)).to(x.device)
    z: Tensor = columns(start + width * noise)[0]
    return z
