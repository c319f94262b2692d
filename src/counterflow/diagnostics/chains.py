"""Convergence of Markov chains."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.diagnostics.arviz import r_hat_and_ess


class Convergence(NamedTuple):
    """Convergence diagnostics of each feature."""

    r_hat: Tensor  # rank-normalised, (D,); near 1 if the chains agree, infinite if they do not move
    ess_bulk: Tensor  # effective sample size for the centre, (D,)
    ess_tail: Tensor  # effective sample size for the 5 % and 95 % quantiles, (D,)


def convergence(draws: Tensor) -> Convergence:
    """Compute R-hat and effective sample sizes of chains (chains, draws, D), by ArviZ.

    Of a feature in which no chain moves, R-hat is infinite and the effective sample sizes are the number of chains.

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
    draws = draws.detach().double().cpu()
    r_hat, bulk, tail = (torch.as_tensor(part) for part in r_hat_and_ess(draws.numpy()))
    stuck = (draws == draws[:, :1]).all(1).all(0)  # rounding would decide what 0 / 0 or 1 / 0 becomes
    chains = torch.full_like(bulk, len(draws))
    return Convergence(
        torch.where(stuck | r_hat.isnan(), math.inf, r_hat),
        torch.where(stuck, chains, bulk),
        torch.where(stuck, chains, tail),
    )
