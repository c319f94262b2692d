"""Memory that an evaluation takes, to choose how many points are evaluated at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

BUDGET = 1 << 30  # bytes for the intermediate values of one evaluation of a target
MAX_POINTS = 1024  # more points at once are hardly faster, however small the model is

# Bytes of intermediate values up to which an evaluation is fastest: larger arrays leave the cache, and memory is
# requested from the system for each. For fewer points than the minimum, calls take longer than that saves. Time for
# each point at 1024, 256 and 64 at once (one thread of an EPYC): a regression of PyMC on 1,330 rows 42, 11, 11 us;
# a logistic regression on 20,000 rows in torch 1.5, 1.2, 0.6 ms, in Pyro 4.1, 3.7, 2.1 ms.
FAST_BYTES, MIN_POINTS = 1 << 24, 64

# Bytes at the peak of a forward and a backward pass, for each byte of the forward pass's results. It is 1.5 to 2.3 for
# Normal(mu, sigma) with 20,000 observations; the rest is for what composite operations allocate inside.
PEAK = 3.0


def points_at_once(bytes_per_point: float) -> int:
    """Return how many points to evaluate at once, a power of two from 1 to 1024: fast, and within the budget.

    Example:
        >>> points_at_once(1e3), points_at_once(1e5), points_at_once(1e8)
        (1024, 128, 8)
    """
    needed = max(bytes_per_point, 1.0)
    points = min(MAX_POINTS, max(MIN_POINTS, FAST_BYTES // needed), BUDGET // needed)
    return 1 << (max(int(points), 1).bit_length() - 1)


def bytes_of_evaluation(log_density: Callable[[Tensor], Any], theta: Tensor) -> float:
    """Return the bytes that an evaluation with its gradient takes, about.

    Results that depend on theta are counted, and data are not: they are there once for all points.

    Args:
        log_density: the function, differentiable.
        theta: one point.
    """
    with torch.enable_grad(), _SizeOfResults() as results:
        log_density(theta.clone().requires_grad_())
    return PEAK * results.total


class _SizeOfResults(TorchFunctionMode):
    """Add up the bytes of new tensors that require gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.requires_grad and not x._is_view():
                self.total += x.numel() * x.element_size()
        return result
