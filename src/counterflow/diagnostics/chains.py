"""Convergence of Markov chains."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

# -- chains ------------------------------------------------------------------------------------------


class Convergence(NamedTuple):
    """How far chains have mixed, for each feature."""

    r_hat: Tensor  # rank-normalised, (D,): 1 where all chains agree; infinite where chains do not move
    ess_bulk: Tensor  # effective draws for the centre, (D,)
    ess_tail: Tensor  # effective draws for the 5 % and 95 % quantiles, (D,)


def convergence(draws: Tensor) -> Convergence:
    """R-hat and effective sample sizes of chains (chains, draws, D), by ArviZ.

    Raises:
        ValueError: not (chains, draws, D) with at least four draws a chain.
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
        raise ValueError(f"expected draws (chains, draws, D) with at least 4 a chain, got {tuple(draws.shape)}")
    arviz = import_arviz()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more chains than draws are meant; 0 / 0 is where a chain stands still
        data = arviz.convert_to_dataset({"x": draws.detach().double().cpu().numpy()})
        found = (arviz.rhat(data), arviz.ess(data, method="bulk"), arviz.ess(data, method="tail"))
    r_hat, bulk, tail = (torch.as_tensor(part["x"].values).reshape(-1) for part in found)
    return Convergence(torch.where(r_hat.isnan(), math.inf, r_hat), bulk, tail)


def import_arviz() -> Any:
    """ArviZ, imported when it is needed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on import ArviZ 0.23 announces version 1
            import arviz
    except ImportError as error:
        raise ImportError(
            "expected arviz for k-hat, R-hat and effective sizes; pip install 'counterflow[posterior]'"
        ) from error
    return arviz
