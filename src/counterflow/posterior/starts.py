"""Gaussian approximations of a log density: where to start, and on which scale, before a flow is trained.

`climb` goes uphill from several points at once and keeps, of each path, the place whose local Gaussian has the
highest ELBO: a density may be unbounded, an ELBO is not. `match` then fits mean and covariance to the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

LogDensity = Callable[[Tensor], Tensor]  # theta (B, D) -> (B,), differentiable once
CLIMBS, MATCHES = 40, 40  # iterations; most ways end sooner
ROWS = 1024  # points at once, so that a model of many data does not need memory for all draws
STEPS = 2.0 ** torch.arange(3.0, -18.0, -1.0, dtype=torch.float64)  # of one line search, the Newton step being 1


class Gaussians(NamedTuple):
    """K Gaussians N(mean, factor factor^T) and their ELBOs, in nats."""

    mean: Tensor  # (K, D)
    factor: Tensor  # lower triangular, (K, D, D)
    elbo: Tensor  # (K,)

    def pick(self, index: Tensor) -> Gaussians:
        """Those at the index, in its order."""
        return Gaussians(*(part[index] for part in self))

    def rsample_and_log_prob(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The points mean + factor eps for eps (K, S, D), and their log densities (K, S)."""
        return self.mean[:, None] + eps @ self.factor.mT, _log_normal(eps) - _log_det(self.factor)[:, None]

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log densities (K, S) of points (S, D)."""
        offset = (theta - self.mean[:, None]).mT
        eps = torch.linalg.solve_triangular(self.factor, offset, upper=False).mT
        return _log_normal(eps) - _log_det(self.factor)[:, None]


def _log_normal(eps: Tensor) -> Tensor:
    return -0.5 * (eps.square().sum(-1) + eps.shape[-1] * math.log(2 * math.pi))


def _log_det(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_density_and_score(target: LogDensity, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The log density of theta (..., D) and its gradient; -inf and zeros where either is not finite."""
    rows = theta.detach().reshape(-1, theta.shape[-1]).split(ROWS)
    value, score = (torch.cat(parts) for parts in zip(*(_value_and_score(target, part) for part in rows), strict=True))
    finite = torch.isfinite(value) & torch.isfinite(score).all(-1)
    value, score = torch.where(finite, value, -math.inf), torch.where(finite[:, None], score, 0.0)
    return value.reshape(theta.shape[:-1]), score.reshape(theta.shape)


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Torch's distributions refuse a scale that has underflowed to 0; far out it shall make -inf or NaN instead."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def _value_and_score(target: LogDensity, theta: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), _unvalidated():
        leaf = theta.clone().requires_grad_()
        value = target(leaf)
        (score,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), score


def log_density(target: LogDensity, theta: Tensor) -> Tensor:
    """The log density of theta (..., D); -inf where it is not a number."""
    with torch.no_grad(), _unvalidated():
        value = torch.cat([target(part) for part in theta.reshape(-1, theta.shape[-1]).split(ROWS)])
    return torch.nan_to_num(value, nan=-math.inf, posinf=-math.inf, neginf=-math.inf).reshape(theta.shape[:-1])


def newton_paths(
    target: LogDensity,
    starts: Tensor,
    iterations: int,
    generator: torch.Generator,
    draws: int = 16,
    least: float = 1.0,
) -> Gaussians:
    """Newton's way uphill from starts (K, D); of each path the Gaussian with the highest ELBO.

        x <- x + a |H|^-1 g,    a from a line search over powers of 2,    q = N(x, |H|^-1)

    |H| has the absolute eigenvalues of the Hessian, which is taken by differences of the gradient: D + 1 gradients
    a step, whatever the scales are. A path into a spike of the density is left where its ELBO is highest.

    Source: Zhang et al. 2022, "Pathfinder: Parallel quasi-Newton variational inference", for the choice by ELBO.
    """
    x, best = (
        starts,
        Gaussians(starts, torch.diag_embed(torch.ones_like(starts)), torch.full_like(starts[:, 0], -math.inf)),
    )
    for _ in range(iterations):
        value, score, hessian = _curvature(target, x)
        factor = _inverse_root(hessian)
        eps = torch.randn(len(x), draws, x.shape[-1], generator=generator, dtype=x.dtype)
        here = _with_elbo(target, Gaussians(x, _triangular(factor), value), eps, least)
        best = _better(best, here)
        step = (factor @ (factor.mT @ score[..., None]))[..., 0]
        along = x[:, None] + STEPS[:, None] * step[:, None]  # (K, A, D)
        reached, a = log_density(target, along).max(1)
        moved = reached > value
        if not (moved & ((score * step).sum(-1) > 1e-3)).any():
            break
        x = torch.where(moved[:, None], along[torch.arange(len(x)), a], x)
    return best


def _better(a: Gaussians, b: Gaussians) -> Gaussians:
    better = b.elbo > a.elbo
    return Gaussians(*(torch.where(better.reshape(-1, *[1] * (p.dim() - 1)), q, p) for p, q in zip(a, b, strict=True)))


def _curvature(target: LogDensity, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log density (K,), its gradient (K, D) and minus its Hessian (K, D, D), by forward differences."""
    D = x.shape[-1]
    h = 1e-6 * (1 + x.abs())
    points = torch.cat([x[:, None], x[:, None] + torch.diag_embed(h)], 1)
    value, score = log_density_and_score(target, points)
    hessian = (score[:, :1] - score[:, 1:]) / h[:, :, None]
    hessian = torch.where(torch.isfinite(value[:, 1:, None]), hessian, torch.eye(D, dtype=x.dtype))
    return value[:, 0], score[:, 0], (hessian + hessian.mT) / 2


def _inverse_root(hessian: Tensor, least: float = 1e-12) -> Tensor:
    """A with A A^T = |H|^-1, the scale of each coordinate taken out before the eigenvalues."""
    scale = hessian.diagonal(dim1=1, dim2=2).abs().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    values, vectors = torch.linalg.eigh(hessian / (scale[:, :, None] * scale[:, None]))
    return vectors / scale[:, :, None] * values.abs().clamp_min(least).rsqrt()[:, None]


def _triangular(root: Tensor) -> Tensor:
    """The lower triangular L with L L^T = A A^T."""
    upper = torch.linalg.qr(root.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None]).mT


def _with_elbo(target: LogDensity, q: Gaussians, eps: Tensor, least: float) -> Gaussians:
    """The Gaussians with their ELBOs at the draws eps (K, S, D), cut off where the target is not finite.

    E[log p - log q | p > 0] + log P(p > 0),    or -inf where that P, a share of the draws, is below `least`
    """
    theta, log_q = q.rsample_and_log_prob(eps)
    log_p = log_density(target, theta)
    inside = log_p > -math.inf
    share = inside.double().mean(1)
    elbo = torch.where(inside, log_p - log_q, 0.0).mean(1) / share + share.log()
    return q._replace(elbo=torch.where(share >= least, elbo, -math.inf))


def batch_and_match(
    target: LogDensity,
    q: Gaussians,
    iterations: int,
    generator: torch.Generator,
    draws: int | None = None,
    least: float = 1.0,
) -> Gaussians:
    """Fit each Gaussian's scores to those of the target: batch and match, in coordinates where q is N(0, I).

        U = l cov(g) + r g' g'^T,    V = I + l cov(e) + r e' e'^T,    S U S + S = V
        mean <- mean + r L (S g' + e'),    L L^T <- L S L^T,    r = l / (1 + l),    l = draws D / iteration

    e are the draws and g the scores there, with means e' and g'. Where the target is a Gaussian one iteration is
    exact. Draws of which the target makes no number are left out; where it makes none of most, q shrinks.

    Source: Cai et al. 2024, "Batch and match: black-box variational inference with a score-based divergence".
    """
    K, D = q.mean.shape
    S = draws or max(32, 2 * D)
    for t in range(1, iterations + 1):
        half = torch.randn(K, S // 2, D, generator=generator, dtype=q.mean.dtype)
        eps = torch.cat([half, -half], 1)
        theta, _ = q.rsample_and_log_prob(eps)
        value, score = log_density_and_score(target, theta)
        q = _matched(q, eps, score @ q.factor, torch.isfinite(value), S * D / t)
    return _with_elbo(target, q, torch.randn(K, 32 * S, D, generator=generator, dtype=q.mean.dtype), least)


def _matched(q: Gaussians, eps: Tensor, score: Tensor, counted: Tensor, rate: float) -> Gaussians:
    """One iteration of `match`: eps, score (K, S, D) in the coordinates of q; those not counted (K, S) are left out."""
    ratio = rate / (1 + rate)
    e_mean, e_cov = _moments(eps, counted)
    g_mean, g_cov = _moments(score, counted)
    u = rate * g_cov + ratio * g_mean[:, :, None] * g_mean[:, None]
    v = torch.eye(eps.shape[-1], dtype=eps.dtype) + rate * e_cov + ratio * e_mean[:, :, None] * e_mean[:, None]
    root = torch.linalg.cholesky(v)
    values, vectors = torch.linalg.eigh(root.mT @ u @ root)
    root = root @ vectors * (2 / (1 + (1 + 4 * values.clamp_min(0)).sqrt())).sqrt()[:, None]
    step = ratio * ((root @ (root.mT @ g_mean[..., None]))[..., 0] + e_mean)
    usable = (counted.double().mean(1) > 0.5) & torch.isfinite(root).all((1, 2))
    factor = q.factor @ _triangular(torch.where(usable[:, None, None], root, 0.3 * torch.eye(eps.shape[-1])))
    shift = (q.factor @ torch.where(usable[:, None], step, 0.0)[..., None])[..., 0]
    return Gaussians(q.mean + shift, factor, q.elbo)


def _moments(x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (K, D) and covariance (K, D, D) over the rows of x (K, S, D) that are counted."""
    w = counted.to(x.dtype) / counted.sum(1, keepdim=True).clamp_min(1)
    mean = (w[..., None] * x).sum(1)
    centred = x - mean[:, None]
    return mean, (w[..., None] * centred).mT @ centred


def initial_gaussians(target: LogDensity, starts: Tensor, generator: torch.Generator, most: int = 4) -> Gaussians:
    """Local Gaussians of the target, at most `most` that differ, the one with the highest ELBO first.

    Half of the ways uphill begin at starts (K, D), the other half far around the best Gaussian that these found. Where
    every Gaussian has draws at which the target is not finite, those are taken of which half of the draws are.

    Raises:
        ValueError: no Gaussian with a finite ELBO.
    """
    for least in (1.0, 0.5):
        near = newton_paths(target, starts, CLIMBS, generator, least=least)
        far = newton_paths(target, _around(near, len(starts), generator), CLIMBS, generator, least=least)
        found = refine_and_dedupe(target, join(near, far), generator, most, least)
        if len(found.mean):
            return found
    raise ValueError(
        f"expected a log density that is finite around one of {len(starts)} starting points at least, got none; "
        "look for data outside of a support and for wrong bounds"
    )


def refine_and_dedupe(
    target: LogDensity, q: Gaussians, generator: torch.Generator, most: int = 4, least: float = 1.0
) -> Gaussians:
    """The Gaussians that differ, at most `most`, each matched to the target."""
    return _distinct(batch_and_match(target, _distinct(q, most), MATCHES, generator, least=least), most)


def join(a: Gaussians, b: Gaussians) -> Gaussians:
    """Both sets, one after the other."""
    return Gaussians(*(torch.cat(parts) for parts in zip(a, b, strict=True)))


def _around(q: Gaussians, n: int, generator: torch.Generator) -> Tensor:
    """n points (n, D) around the best Gaussian, at 3 to 30 of its standard deviations in every direction."""
    best, D = q.elbo.argmax(), q.mean.shape[-1]
    eps = torch.randn(n, D, generator=generator, dtype=q.mean.dtype)
    far = torch.logspace(0.5, 1.5, n, dtype=eps.dtype)[:, None]
    return q.mean[best] + far * eps @ q.factor[best].T


def _distinct(q: Gaussians, most: int) -> Gaussians:
    """The best by ELBO, leaving out those that sit within a better one or have it within themselves."""
    q = q.pick(q.elbo.argsort(descending=True))
    log_q, D = q.log_prob(q.mean), q.mean.shape[-1]
    reach = (D + 4 * (2 * D) ** 0.5 + 4) / 2  # nats below the top: four standard deviations of chi-squared and more
    within = log_q > log_q.diagonal()[:, None] - reach
    kept: list[int] = []
    for k in range(len(q.mean)):
        if q.elbo[k] > -math.inf and not (within[kept, k] | within[k, kept]).any():
            kept.append(k)
    return q.pick(torch.tensor(kept[:most], dtype=torch.long))
