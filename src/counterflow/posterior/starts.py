"""Starting points of a fit: points with a finite density, and local Gaussians around the modes found from them."""

from __future__ import annotations

import torch
from torch import Tensor

from counterflow.posterior.evaluation import LogDensity
from counterflow.posterior.gaussians import NEWTON_STEPS, Gaussians, join, newton_paths, refine_and_dedupe


def initial_gaussians(target: LogDensity, starts: Tensor, generator: torch.Generator, max_count: int = 4) -> Gaussians:
    """Find at most max_count distinct local Gaussians of the target, sorted by ELBO, the highest first.

    Half of the Newton paths begin at starts (K, D), the other half far around the best Gaussian that these found. If
    every Gaussian has draws at which the target is not finite, half of the draws being finite is enough.

    Raises:
        ValueError: no Gaussian has a finite ELBO.
    """
    for min_finite in (1.0, 0.5):
        near = newton_paths(target, starts, NEWTON_STEPS, generator, min_finite=min_finite)
        far_starts = _around_best(near, len(starts), generator)
        far = newton_paths(target, far_starts, NEWTON_STEPS, generator, min_finite=min_finite)
        found = refine_and_dedupe(target, join(near, far), generator, max_count, min_finite)
        if len(found.mean):
            return found
    raise ValueError(
        f"expected a log density that is finite around at least one of {len(starts)} starting points, got none; "
        "look for data outside of a support and for wrong bounds"
    )


def _around_best(q: Gaussians, n: int, generator: torch.Generator) -> Tensor:
    """Draw n points (n, D) around the best Gaussian, 3 to 30 of its standard deviations away in every direction."""
    best = q.elbo.argmax()
    eps = torch.randn(n, q.mean.shape[-1], generator=generator, dtype=q.mean.dtype)
    distance = torch.logspace(0.5, 1.5, n, dtype=eps.dtype)[:, None]
    return q.mean[best] + distance * eps @ q.factor[best].T
