"""How far importance weights can be trusted."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Importance effective sample size of log weights (S, ...): (sum w)^2 / sum w^2, between 1 and S.

    Source: Kong 1992, "A note on importance sampling using standardized weights".

    Example:
        >>> import torch
        >>> round(effective_sample_size(torch.zeros(100)).item(), 3)
        100.0
    """
    w = torch.softmax(log_weights, 0)
    return 1 / w.square().sum(0)


def resample(draws: Tensor, log_weights: Tensor, n: int) -> Tensor:
    """n of the draws (S, ...), picked with replacement in proportion to their weights (S,).

    Example:
        >>> import torch
        >>> resample(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, -torch.inf]), 3).flatten().tolist()
        [1.0, 1.0, 1.0]
    """
    return draws[torch.multinomial(torch.softmax(log_weights, 0), n, replacement=True)]
