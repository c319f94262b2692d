"""Local Gaussian approximations of a log density, by Newton paths and by matching scores.

`newton_paths` climbs from several points at once and keeps, of each path, the point whose local Gaussian has the
highest ELBO: a density may be unbounded, an ELBO is not. `batch_and_match` then fits mean and covariance to the scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.posterior.evaluation import LogDensity, log_density, log_density_and_score

NEWTON_STEPS = 40  # maximum per path; most paths end sooner
MATCHING_STEPS = 40  # iterations of batch and match
STEP_SIZES = 2.0 ** torch.arange(3.0, -18.0, -1.0, dtype=torch.float64)  # tried in each line search; Newton's is 1
SHRINKAGES = 2.0 ** -torch.arange(0.0, 41.0, dtype=torch.float64)  # of a Gaussian that is wider than the support


class Gaussians(NamedTuple):
    """Means, factors and ELBOs, in nats, of K Gaussians N(mean, factor factor^T)."""

    mean: Tensor  # (K, D)
    factor: Tensor  # lower triangular, (K, D, D)
    elbo: Tensor  # (K,)

    def pick(self, index: Tensor) -> Gaussians:
        """Select Gaussians by index, in the order of the index."""
        return Gaussians(*(part[index] for part in self))

    def rsample_and_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points mean + factor eps for eps (K, S, D), and their log densities (K, S)."""
        return self.mean[:, None] + eps @ self.factor.mT, _log_normal(eps) - _log_det(self.factor)[:, None]

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density of each Gaussian at points (S, D), (K, S)."""
        offset = (theta - self.mean[:, None]).mT
        eps = torch.linalg.solve_triangular(self.factor, offset, upper=False).mT
        return _log_normal(eps) - _log_det(self.factor)[:, None]

    def score(self, theta: Tensor) -> Tensor:
        """Gradient of the first Gaussian's log density at points (..., D), (..., D)."""
        offset = (theta - self.mean[0]).reshape(-1, theta.shape[-1])
        return -torch.cholesky_solve(offset.mT, self.factor[0]).mT.reshape(theta.shape)


def _log_normal(eps: Tensor) -> Tensor:
    return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def newton_paths(
    target: LogDensity,
    starts: Tensor,
    iterations: int,
    generator: torch.Generator,
    samples: int = 16,
    min_finite: float = 1.0,
) -> Gaussians:
    """Climb by Newton steps from starts (K, D) and return, for each path, the Gaussian with the highest ELBO.

        x <- x + a |H|^-1 g,    a from a line search over powers of 2,    q = N(x, |H|^-1)

    |H| has the absolute eigenvalues of the Hessian, which is computed by differences of the gradient: D + 1 gradients
    per step, for any scales of the coordinates. A path into a spike of the density is cut at its highest ELBO.

    Args:
        target: log density.
        starts: K starting points.
        iterations: maximum number of steps.
        generator: source of the noise of the ELBOs.
        samples: number of draws for each ELBO.
        min_finite: share of these draws at which the target must be finite.

    Source: Zhang et al. 2022, "Pathfinder: Parallel quasi-Newton variational inference", for the choice by ELBO.
    """
    x = starts
    best = Gaussians(starts, torch.diag_embed(torch.ones_like(starts)), torch.full_like(starts[:, 0], -math.inf))
    for _ in range(iterations):
        value, score, hessian = _curvature(target, x)
        factor = _inverse_root(hessian)
        eps = torch.randn(len(x), samples, x.shape[-1], generator=generator, dtype=x.dtype)
        here = _with_elbo(target, Gaussians(x, _triangular(factor), value), eps, min_finite)
        best = _better(best, here)
        step = (factor @ (factor.mT @ score[..., None]))[..., 0]
        along = x[:, None] + STEP_SIZES[:, None] * step[:, None]  # (K, A, D) for A step sizes
        reached, a = log_density(target, along).max(1)
        moved = reached > value
        if not (moved & ((score * step).sum(-1) > 1e-3)).any():
            break
        x = torch.where(moved[:, None], along[torch.arange(len(x)), a], x)
    return best


def shrunk_gaussians(
    target: LogDensity, starts: Tensor, generator: torch.Generator, max_count: int = 4, min_finite: float = 0.5
) -> Gaussians:
    """Find at most max_count distinct Gaussians around starts (K, D), each inside the bounds of the support there.

    Bounds leave no trace in scores, so that a Gaussian by curvature may be far wider than a hard-bounded support. Here
    each coordinate of the Gaussian by curvature is shrunk until the target is finite two standard deviations away on
    both sides, and all of them until the share min_finite of the draws is finite.
    """
    K, D = starts.shape
    _, _, hessian = _curvature(target, starts)
    factor = _triangular(_inverse_root(hessian))
    reach = 2 * factor.norm(dim=2)  # of each coordinate, (K, D)
    shrinkage = torch.ones_like(starts)
    for _ in SHRINKAGES:
        sides = torch.diag_embed(shrinkage * reach)
        finite = log_density(target, starts[:, None] + torch.stack([sides, -sides])).isfinite().all(0)
        if finite.all():
            break
        shrinkage = torch.where(finite, shrinkage, shrinkage / 2)
    factor = shrinkage[:, :, None] * factor
    best = Gaussians(starts, factor, torch.full((K,), -math.inf, dtype=starts.dtype))
    for common in SHRINKAGES:
        eps = torch.randn(K, 64, D, generator=generator, dtype=starts.dtype)
        best = _better(best, _with_elbo(target, best._replace(factor=common * factor), eps, min_finite))
    return _distinct(best, max_count)


def _better(a: Gaussians, b: Gaussians) -> Gaussians:
    """Select, for each k, the Gaussian with the higher ELBO."""
    better = b.elbo > a.elbo
    return Gaussians(*(torch.where(better.reshape(-1, *[1] * (p.dim() - 1)), q, p) for p, q in zip(a, b, strict=True)))


def _curvature(target: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log density (K,), its gradient (K, D) and its negative Hessian (K, D, D), by forward differences."""
    D = x.shape[-1]
    h = 1e-6 * (1 + x.abs())
    points = torch.cat([x[:, None], x[:, None] + torch.diag_embed(h)], 1)
    value, score = log_density_and_score(target, points)
    hessian = (score[:, :1] - score[:, 1:]) / h[:, :, None]
    hessian = torch.where(torch.isfinite(value[:, 1:, None]), hessian, torch.eye(D, dtype=x.dtype))
    return value[:, 0], score[:, 0], (hessian + hessian.mT) / 2


def _inverse_root(hessian: Tensor, floor: float = 1e-12) -> Tensor:
    """Matrix A with A A^T = |H|^-1; coordinates are scaled to a unit diagonal before the eigendecomposition."""
    scale = hessian.diagonal(dim1=1, dim2=2).abs().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(hessian / (scale[:, :, None] * scale[:, None]))
    return vectors / scale[:, :, None] * values.abs().clamp_min(floor).rsqrt()[:, None]


def _triangular(root: Tensor) -> Tensor:
    """Lower triangular L with L L^T = A A^T."""
    upper = torch.linalg.qr(root.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT


def _with_elbo(target: LogDensity, q: Gaussians, eps: Tensor, min_finite: float) -> Gaussians:
    """Compute the ELBOs of Gaussians, restricted to where the target is finite, from noise eps (K, S, D).

        E[log p - log q | p > 0] + log P(p > 0)

    It is -inf if P(p > 0), a share of the draws, is below min_finite.
    """
    theta, log_q = q.rsample_and_log_prob(eps)
    log_p = log_density(target, theta)
    inside = log_p > -math.inf
    share = inside.double().mean(1)
    elbo = torch.where(inside, log_p - log_q, 0.0).mean(1) / share + share.log()
    return q._replace(elbo=torch.where(share >= min_finite, elbo, -math.inf))


def batch_and_match(
    target: LogDensity,
    q: Gaussians,
    iterations: int,
    generator: torch.Generator,
    samples: int | None = None,
    min_finite: float = 1.0,
) -> Gaussians:
    """Fit each Gaussian to the scores of the target by batch and match, in coordinates where q is N(0, I).

        U = l cov(g) + r g' g'^T,    V = I + l cov(e) + r e' e'^T,    S U S + S = V
        mean <- mean + r L (S g' + e'),    L L^T <- L S L^T,    r = l / (1 + l),    l = S D / iteration

    e are S draws and g the scores there, with means e' and g'. For a Gaussian target one iteration is exact. Draws at
    which the target is not finite are ignored; if they are the majority, q shrinks.

    Source: Cai et al. 2024, "Batch and match: black-box variational inference with a score-based divergence".
    """
    K, D = q.mean.shape
    S = samples or max(32, 2 * D)
    for t in range(1, iterations + 1):
        half = torch.randn(K, S // 2, D, generator=generator, dtype=q.mean.dtype)
        eps = torch.cat([half, -half], 1)
        theta, _ = q.rsample_and_log_prob(eps)
        value, score = log_density_and_score(target, theta)
        q = _matched(q, eps, score @ q.factor, torch.isfinite(value), S * D / t)
    return _with_elbo(target, q, torch.randn(K, 32 * S, D, generator=generator, dtype=q.mean.dtype), min_finite)


def _matched(q: Gaussians, eps: Tensor, score: Tensor, finite: Tensor, rate: float) -> Gaussians:
    """One iteration of `batch_and_match`.

    eps and score (K, S, D) are in the coordinates of q; draws that are not finite (K, S) are ignored.
    """
    ratio = rate / (1 + rate)
    e_mean, e_cov = _moments(eps, finite)
    g_mean, g_cov = _moments(score, finite)
    u = rate * g_cov + ratio * g_mean[:, :, None] * g_mean[:, None]
    v = torch.eye(eps.shape[-1], dtype=eps.dtype) + rate * e_cov + ratio * e_mean[:, :, None] * e_mean[:, None]
    root = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(root.mT @ u @ root)
    root = root @ vectors * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt()[:, None]
    step = ratio * ((root @ (root.mT @ g_mean[..., None]))[..., 0] + e_mean)
    usable = (finite.double().mean(1) > 0.5) & torch.isfinite(root).all((1, 2))
    factor = q.factor @ _triangular(torch.where(usable[:, None, None], root, 0.3 * torch.eye(eps.shape[-1])))
    shift = (q.factor @ torch.where(usable[:, None], step, 0.0)[..., None])[..., 0]
    return Gaussians(q.mean + shift, factor, q.elbo)


def _moments(x: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and covariance (K, D, D) of those draws x (K, S, D) that are finite (K, S)."""
    w = finite.to(x.dtype) / finite.sum(1, keepdim=True).clamp_min(1)
    mean = (w[..., None] * x).sum(1)
    centred = x - mean[:, None]
    return mean, (w[..., None] * centred).mT @ centred


def refine_and_dedupe(
    target: LogDensity, q: Gaussians, generator: torch.Generator, max_count: int = 4, min_finite: float = 1.0
) -> Gaussians:
    """Select at most max_count distinct Gaussians and match each to the target."""
    matched = batch_and_match(target, _distinct(q, max_count), MATCHING_STEPS, generator, min_finite=min_finite)
    return _distinct(matched, max_count)


def join(a: Gaussians, b: Gaussians) -> Gaussians:
    """Concatenate two sets of Gaussians."""
    return Gaussians(*(torch.cat(parts) for parts in zip(a, b, strict=True)))


def _distinct(q: Gaussians, max_count: int) -> Gaussians:
    """Select the Gaussians with the highest ELBOs, without those that overlap a better one.

    Two overlap if the mean of either lies within about four standard deviations of the other.
    """
    q = q.pick(q.elbo.argsort(descending=True))
    log_q = q.log_prob(q.mean)
    D = q.mean.shape[-1]
    reach = (D + 4 * (2 * D) ** 0.5 + 4) / 2  # nats below the peak: chi-squared's mean plus four standard deviations
    within = log_q > log_q.diagonal()[:, None] - reach
    kept: list[int] = []
    for k in range(len(q.mean)):
        if q.elbo[k] > -math.inf and not (within[kept, k] | within[k, kept]).any():
            kept.append(k)
    return q.pick(torch.tensor(kept[:max_count], dtype=torch.long))
