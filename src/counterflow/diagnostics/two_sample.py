"""Two-sample tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TwoSamples(NamedTuple):
    """Result of `energy_test`."""

    distance: float  # at least 0
    p_value: float  # share of random splits of the pooled sample that lie at least as far apart


def energy_test(x: Tensor, y: Tensor, permutations: int = 999) -> TwoSamples:
    """Test by permutation of the energy distance whether x (N, D) and y (M, D) come from the same distribution.

        distance = 2 mean|a - b| - mean|a - a'| - mean|b - b'|,    a_ij = Phi^-1((rank of x_ij - 1/2) / (N + M))

    and b is computed from y in the same way. The ranks are taken among both samples' values of feature j. These normal
    scores remove the scale and limit outliers, and the test stays exact: the p-value is uniform if both samples have
    the same distribution, and at least 1 / (permutations + 1). Memory and time are quadratic in N + M. Noise comes from
    torch's global generator.

    Args:
        x: N draws.
        y: M draws.
        permutations: number of random splits of the pooled sample.

    Raises:
        ValueError: not (N, D) and (M, D) with two rows each, a NaN, or permutations below 1.

    Source: Szekely and Rizzo 2004, "Testing for equal distributions in high dimension".

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(200, 2), torch.randn(200, 2)
        >>> energy_test(x, y).p_value > 0.01, energy_test(x, y + 0.5).p_value
        (True, 0.001)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"expected samples (N, D) and (M, D) of at least two rows, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"expected permutations of at least 1, got {permutations}")
    pooled = torch.cat([x, y]).detach().double()
    if pooled.isnan().any():
        raise ValueError(f"expected numbers, got {int(pooled.isnan().sum())} NaN of {pooled.numel()}")
    scores = torch.special.ndtri((pooled.argsort(0).argsort(0) + 0.5) / len(pooled))
    apart = torch.cdist(scores, scores)
    side = torch.cat([scores.new_full((len(x),), 1 / len(x)), scores.new_full((len(y),), -1 / len(y))])
    sides = torch.stack([side, *(side[torch.randperm(len(side))] for _ in range(permutations))], 1)
    found = -(sides * (apart @ sides)).sum(0)
    as_far = int((found[1:] >= found[0] - 1e-12).sum())
    return TwoSamples(found[0].item(), (as_far + 1) / (permutations + 1))
