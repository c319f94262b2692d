"""Starting points with a finite density, and local Gaussians around the modes that are found from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from counterflow.posterior.evaluation import LogDensity, log_density_and_score, without_validation
from counterflow.posterior.gaussians import (
    NEWTON_STEPS,
    Gaussians,
    join,
    newton_paths,
    refine_and_dedupe,
    shrunk_gaussians,
)
from counterflow.posterior.targets.target import NoStartingPointError, Target

RADII = (1.0, 0.5, 0.1)  # tried around 0 after the usual radius of 2, and around a point that is finite
COMPLETIONS = 20  # random draws, for each radius, of the variables that the user's starts leave open


def starting_points(target: Target, n: int, seed: int, values: Mapping[str, Any] | None = None) -> Tensor:
    """Find points (K, D) with a finite log density and gradient.

    These are n points that are uniform on (-2, 2)^D, and the user's. If the uniform points are not finite, the model's
    own initial point is tried, smaller radii, the origin, draws of the prior, and the surroundings of a point that is
    finite; there may be fewer than n points then.

    Args:
        target: the target.
        n: number of uniform points.
        seed: seed of all random points.
        values: values of variables at which to start, name -> (*shape) or (K, *shape).

    Raises:
        ValueError: no point is finite; unknown variables, wrong shapes, or values at which the density is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    with without_validation():
        given = torch.empty(0, target.dim, dtype=torch.float64)
        if values is not None:
            given = points_of_values(target, values, generator)
        try:
            return torch.cat([target.initial(n, seed), given])
        except NoStartingPointError as error:
            known = torch.cat([given, _finite(target, _initial_points(target, 1, generator))])
            found = _harder(target, n, seed, known, generator)
            if not len(found):
                raise ValueError(f"{error}; or pass starts=, values of variables at which it is finite") from None
            return found


def points_of_values(target: Target, values: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """Map the user's starting values to unconstrained points (K, D); variables that are not given are drawn randomly.

    Raises:
        ValueError: unknown variables, wrong shapes, or values at which the log density is not finite.
    """
    unknown = [name for name in values if name not in target.parameters]
    if unknown or not values:
        raise ValueError(
            f"expected starts for some of {', '.join(target.parameters)}, got {', '.join(unknown) or 'none'}"
        )
    default = target.constrain(torch.zeros(1, target.dim, dtype=torch.float64))
    given = {name: _rows(name, value, default[name].shape[1:]) for name, value in values.items()}
    K = max(len(value) for value in given.values())
    if any(len(value) not in (1, K) for value in given.values()):
        lengths = ", ".join(f"{name} {len(value)}" for name, value in given.items())
        raise ValueError(f"expected the same number of starts for all variables, got {lengths}")
    given = {name: value.expand(K, *value.shape[1:]) for name, value in given.items()}
    theta = torch.empty(0, target.dim, dtype=torch.float64)
    for radius in (2.0, *RADII, 0.0):
        for _ in range(COMPLETIONS):
            uniform = radius * (2 * torch.rand(K, target.dim, generator=generator, dtype=torch.float64) - 1)
            theta = target.unconstrain({**target.constrain(uniform), **given})
            found = _finite(target, theta)
            if len(found):
                return found
            if len(given) == len(target.parameters):
                break
    raise ValueError(
        f"expected starts at which the log density and its gradient are finite, got none; {target.explain(theta[0])}"
    )


def _rows(name: str, value: Any, shape: torch.Size) -> Tensor:
    """Return the starting values of one variable as (K, *shape)."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if tensor.shape == shape:
        return tensor[None]
    if tensor.shape[1:] == shape and tensor.dim() > 0 and len(tensor):
        return tensor
    raise ValueError(f"expected starts of {name} of shape {tuple(shape)} or (K, *shape), got {tuple(tensor.shape)}")


def _harder(target: Target, n: int, seed: int, known: Tensor, generator: torch.Generator) -> Tensor:
    """Look for points where they are rarely finite: near 0, at draws of the prior, and around those that are known."""
    if not len(known):
        for radius in RADII:
            try:
                return target.initial(n, seed, radius=radius)
            except NoStartingPointError:
                continue
        known = _finite(target, torch.zeros(1, target.dim, dtype=torch.float64))
    if not len(known):
        known = _finite(target, _initial_points(target, 10 * n, generator))[:n]
    if not len(known):
        return known
    for radius in RADII:
        try:
            return torch.cat([known, target.initial(n, seed, radius=radius, center=known[0])])
        except NoStartingPointError:
            continue
    return known


def _initial_points(target: Target, n: int, generator: torch.Generator) -> Tensor:
    """Ask the target for n points (n, D): its own initial point, then draws of the prior; none if it has none."""
    if target.initial_points is None:
        return torch.empty(0, target.dim, dtype=torch.float64)
    return target.initial_points(n, generator)


def _finite(target: LogDensity, theta: Tensor) -> Tensor:
    """Select the points (K, D) at which the log density and its gradient are finite."""
    theta = theta[theta.isfinite().all(-1)]
    if not len(theta):
        return theta
    return theta[log_density_and_score(target, theta)[0].isfinite()]


def initial_gaussians(target: LogDensity, starts: Tensor, generator: torch.Generator, max_count: int = 4) -> Gaussians:
    """Find at most max_count distinct local Gaussians of the target, sorted by ELBO, the highest first.

    Half of the Newton paths begin at starts (K, D), the other half far around the best Gaussian that these found. If
    every Gaussian has draws at which the target is not finite, half of the draws being finite is enough. If the support
    is so small that none has, Gaussians around the starts are shrunk to it.

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
    found = shrunk_gaussians(target, starts, generator, max_count)
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
