"""Scores of base distributions: the gradient of the log density, in closed form where there is one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, StudentT


def log_prob_and_score(base: Distribution, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Return log q_0(eps), (...), and its gradient by eps, (..., D), both without gradients of their own.

        normal       score = -z / scale
        Student t    score = -(df + 1) z / (df + z^2) / scale,    z = (eps - loc) / scale

    Other distributions are differentiated by autograd.

    Args:
        base: distribution of eps, with event shape (D,).
        eps: (..., D).

    Example:
        >>> import torch, counterflow as cf
        >>> log_prob_and_score(cf.bases.StandardNormal(2)(), torch.tensor([1.0, -2.0]))[1].tolist()
        [-1.0, 2.0]
    """
    each = base.base_dist if isinstance(base, Independent) else None
    eps = eps.detach()
    if isinstance(each, (Normal, StudentT)):
        with torch.no_grad():
            z = (eps - each.loc) / each.scale
            score = -z if isinstance(each, Normal) else -(each.df + 1) * z / (each.df + z.square())
            return each.log_prob(eps).sum(-1), score / each.scale
    with torch.enable_grad():
        leaf = eps.requires_grad_()
        log_prob = base.log_prob(leaf) if each is None else each.log_prob(leaf).sum(-1)
        (score,) = torch.autograd.grad(log_prob.sum(), leaf)
    return log_prob.detach(), score
