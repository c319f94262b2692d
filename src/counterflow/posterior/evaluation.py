"""Evaluation of log densities and their gradients at many points, in chunks, where they may fail to be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributions import Distribution

LogDensity = Callable[[Tensor], Tensor]  # theta (B, D) -> (B,), differentiable once
MAX_POINTS = 1024  # points evaluated at once, unless the target's attribute max_points says otherwise


def log_density(target: LogDensity, theta: Tensor) -> Tensor:
    """Evaluate the log density at theta (..., D); -inf where it is not finite."""
    with torch.no_grad(), without_validation():
        value = torch.cat([target(chunk) for chunk in _chunks(target, theta)])
    return torch.nan_to_num(value, nan=-math.inf, posinf=-math.inf, neginf=-math.inf).reshape(theta.shape[:-1])


def log_density_and_score(target: LogDensity, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Evaluate the log density at theta (..., D) and its gradient; -inf and zeros where either is not finite."""
    found = [_value_and_score(target, chunk) for chunk in _chunks(target, theta.detach())]
    value, score = (torch.cat(parts) for parts in zip(*found, strict=True))
    finite = torch.isfinite(value) & torch.isfinite(score).all(-1)
    value = torch.where(finite, value, -math.inf)
    score = torch.where(finite[:, None], score, 0.0)
    return value.reshape(theta.shape[:-1]), score.reshape(theta.shape)


def _chunks(target: LogDensity, theta: Tensor) -> tuple[Tensor, ...]:
    """Split theta (..., D) into chunks (n, D) of at most as many points as the target evaluates at once."""
    return theta.reshape(-1, theta.shape[-1]).split(getattr(target, "max_points", MAX_POINTS))


def _value_and_score(target: LogDensity, theta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), without_validation():
        leaf = theta.clone().requires_grad_()
        value = target(leaf)
        (score,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), score


@contextmanager
def without_validation() -> Iterator[None]:
    """Turn off the argument checks of torch.distributions: a scale that underflows to 0 far out shall give -inf."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
