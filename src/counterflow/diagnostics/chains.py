"""Convergence of Markov chains, by ArviZ."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterflow.checks import require


class Convergence(NamedTuple):
    """Convergence diagnostics of each feature."""

    r_hat: Tensor  # rank-normalised, (D,); near 1 if the chains agree, infinite if they do not move
    ess_bulk: Tensor  # effective sample size for the centre, (D,)
    ess_tail: Tensor  # effective sample size for the 5 % and 95 % quantiles, (D,)


def convergence(draws: Tensor) -> Convergence:
    """Compute R-hat and effective sample sizes of chains (chains, draws, D).

    Raises:
        ValueError: not (chains, draws, D) with at least four draws per chain.
        ImportError: ArviZ is not installed.

    Source: Vehtari et al. 2021, "Rank-normalization, folding, and localization: an improved R-hat".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> mixed = convergence(torch.randn(4, 500, 2))
        >>> (mixed.r_hat < 1.05).all().item(), (mixed.ess_bulk > 1000).all().item()
        (True, True)
    """
    if draws.dim() != 3 or draws.shape[1] < 4:
        raise ValueError(f"expected draws (chains, draws, D) with at least 4 per chain, got {tuple(draws.shape)}")
    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more chains than draws are intended; 0 / 0 occurs if a chain does not move
        data = arviz.convert_to_dataset({"x": draws.detach().double().cpu().numpy()})
        found = (arviz.rhat(data), arviz.ess(data, method="bulk"), arviz.ess(data, method="tail"))
    r_hat, bulk, tail = (torch.as_tensor(part["x"].values).reshape(-1) for part in found)
    return Convergence(torch.where(r_hat.isnan(), math.inf, r_hat), bulk, tail)


def import_arviz() -> Any:
    """Import ArviZ on first use.

    Raises:
        ImportError: it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        return require("arviz", "posterior", "R-hat, effective sample sizes and NetCDF files")
