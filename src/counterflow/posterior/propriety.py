"""Detection of improper posteriors: log densities that do not decrease along a direction.

The integral of a density along a line is finite only if the log density decreases faster than -log(r), r being the
distance. For a proper posterior this holds along almost every line; along coordinates and along directions in which
the density is constant it is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from counterflow.diagnostics.verdict import listed
from counterflow.posterior.evaluation import LogDensity, log_density, log_density_and_score

DISTANCES = 10.0 ** torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 5, 7, 9, 11, 13], dtype=torch.float64)
MIN_DISTANCE = 100.0  # a density that overflows before this distance is not judged
MIN_SLOPE = -0.5  # d log p / d log r, above which the integral diverges; -1 is the limit in theory
MAX_FALL = 700.0  # nats; a tail so low has no mass up to the largest float64 number, e^709, but clipping ends there
MAX_LINES = 3  # points from which each suspicious direction is checked
MAX_COMBINED = 1e5  # distance along combinations of coordinates, whose rounding errors matter farther out
MIN_WEIGHT = 1e-6  # smallest coefficient of a coordinate in a direction, relative to the largest
MAX_NAMED = 4  # coordinates of one direction that an error names
LINES = 64  # lines evaluated at once, which bounds the memory


def check_proper(target: LogDensity, points: Tensor, coordinates: Sequence[str], seed: int) -> None:
    """Raise ValueError if the log density does not decrease along some direction, naming the directions.

    Args:
        target: log density.
        points: points (K, D) where it is finite.
        coordinates: names of the D coordinates.
        seed: seed of the points at which scores are compared.
    """
    directions = flat_directions(target, points, torch.Generator().manual_seed(seed))
    if len(directions):
        described = listed([describe_direction(direction, coordinates) for direction in directions])
        raise ValueError(
            "expected a proper posterior, whose density falls in all directions, got one that does not fall along "
            f"{described}; give these parameters a prior, or data that inform them"
        )


def flat_directions(target: LogDensity, points: Tensor, generator: torch.Generator) -> Tensor:
    """Find directions (M, D) along which the log density does not decrease: coordinates, then their combinations."""
    D = points.shape[-1]
    axes = torch.eye(D, dtype=points.dtype)
    flat = _improper(target, points, axes, DISTANCES)
    combinations = _null_directions(target, points, ~flat, generator)
    near = DISTANCES[DISTANCES <= MAX_COMBINED]
    return torch.cat([axes[flat], combinations[_improper(target, points, combinations, near)]])


def describe_direction(direction: Tensor, coordinates: Sequence[str]) -> str:
    """Describe a direction (D,) by the names of the coordinates.

    Example:
        >>> describe_direction(torch.tensor([0.0, 0.5, -1.0]), ("a", "b", "c"))
        '0.5 b - c'
    """
    weights = (direction / direction.abs().max()).tolist()
    used = [(weight, name) for weight, name in zip(weights, coordinates, strict=True) if abs(weight) >= MIN_WEIGHT]
    if len(used) > MAX_NAMED:
        return f"a combination of {', '.join(name for _, name in used[:MAX_NAMED])} and {len(used) - MAX_NAMED} more"
    sign = math.copysign(1.0, used[0][0])
    text = " ".join(_term(sign * weight, name) for weight, name in used)
    return text.removeprefix("+ ")


def _term(weight: float, name: str) -> str:
    """Format a signed term, such as "+ a" or "- 0.5 b"."""
    size = f"{abs(weight):.3g}"
    return f"{'-' if weight < 0 else '+'} {'' if size == '1' else f'{size} '}{name}"


def _improper(target: LogDensity, points: Tensor, directions: Tensor, distances: Tensor) -> Tensor:
    """Judge directions (M, D), (M,): True if the log density does not decrease on one side of all points."""
    signed = torch.cat([directions, -directions])
    improper = torch.ones(len(signed), dtype=torch.bool)
    steps = torch.cat([torch.zeros(1, dtype=distances.dtype), distances])
    for point in points[:MAX_LINES]:
        for lines in improper.nonzero()[:, 0].split(LINES):
            along = point + steps[:, None] * signed[lines][:, None]  # (lines, R + 1, D)
            improper[lines] = _does_not_decrease(log_density(target, along), distances)
    return improper[: len(directions)] | improper[len(directions) :]


def _does_not_decrease(values: Tensor, distances: Tensor) -> Tensor:
    """Judge log densities (M, R + 1) at distances 0 and (R,): False if they fall, or are not finite early on.

    Those of torch's simplex stop to fall at log(2e-308), where it clips.
    """
    finite = values.isfinite().long().cumprod(1)
    last = finite.sum(1) - 2  # index of the last distance up to which all values are finite
    judged = (last >= 1) & (distances[last.clamp_min(0)] >= MIN_DISTANCE)
    slope = (values[:, 2:] - values[:, 1:-1]) / (distances[1:] / distances[:-1]).log()
    at = (last - 1).clamp_min(0)[:, None]
    final = slope.gather(1, at)[:, 0]
    before = slope.gather(1, (at - 1).clamp_min(0))[:, 0]
    rounding = 1e-10 * (1 + values[:, 0].abs())
    accelerating = (final < -rounding) & (final < 1.5 * before.clamp_max(0))  # an exponential or faster decay
    fallen = values[:, 0] - values.gather(1, (last + 1).clamp_min(0)[:, None])[:, 0] > MAX_FALL
    return judged & (final > MIN_SLOPE) & ~accelerating & ~fallen


def _null_directions(target: LogDensity, points: Tensor, used: Tensor, generator: torch.Generator) -> Tensor:
    """Find directions (M, D), combinations of the used coordinates, that are orthogonal to the scores everywhere."""
    D = points.shape[-1]
    none = points.new_zeros(0, D)
    if used.sum() < 2:
        return none
    n = 2 * D + 8
    at = points[torch.arange(n) % len(points)] + torch.rand(n, D, generator=generator, dtype=points.dtype) - 0.5
    value, score = log_density_and_score(target, at)
    score = score[value > -math.inf][:, used]
    scale = score.abs().amax(0) if len(score) else torch.zeros(0)
    if len(score) < D + 4 or not (scale > 0).all():
        return none
    rows = score / scale
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    _, singular, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = _sparse(basis[singular < 1e-10 * singular[0]]) / scale
    directions = points.new_zeros(len(basis), D)
    directions[:, used] = basis / basis.abs().amax(1, keepdim=True)
    return directions


def _sparse(basis: Tensor) -> Tensor:
    """Reduce the rows of a basis (M, D) to echelon form, so that each has few coordinates."""
    basis = basis.clone()
    for row in range(len(basis)):
        pivot = basis[row].abs().argmax()
        basis[row] /= basis[row, pivot].clone()
        others = torch.arange(len(basis)) != row
        basis[others] -= basis[others][:, pivot, None] * basis[row]
    return torch.where(basis.abs() < 1e-9, 0.0, basis)
