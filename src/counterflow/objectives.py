"""Training objectives. An objective takes (model, batch) and returns terms in nats; the loss is -mean(terms).

Variational objectives take a model that implements `Variational.draw`, such as a `VAE`. They return terms of shape
(S, B), or (1, B) if the S draws of a datum are combined into one term. If q = p(z|x), every term equals log p(x);
otherwise the terms are lower in expectation, except those of `renyi_elbo` with alpha < 0. The weights of the draws are
w_s = p(x, z_s) / q(z_s|x).

| objective | maximising it minimises | its gradient if q is exact |
|---|---|---|
| `elbo` | KL(q, p), which favours the inside of p | zero in the mean, with noise |
| `path_elbo` | the same | exactly zero |
| `iw_elbo`, `dreg_elbo` | a divergence whose optimal q widens as S grows | with noise; exactly zero |
| `renyi_elbo` | from alpha = 1, the ELBO, to alpha = 0, `iw_elbo`, and beyond both | with noise |
| `forward_kl` | KL(p, q), which covers all of p | with noise |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from counterflow.flows.flow import Flow, FlowDistribution

DensityMode = Literal["joint", "by_feature", "path", "score"]


class Draws(NamedTuple):
    """Log densities, in nats, of S draws z ~ q(z|x) for each of B data."""

    log_likelihood: Tensor  # log p(x|z), (S, B)
    log_prior: Tensor  # log p(z), (S, B), or (S, B, D) by feature
    log_q: Tensor  # log q(z|x), (S, B), or (S, B, D) by feature
    z: Tensor | None = None  # the draws (S, B, D), the very tensor that the log densities were computed from


class Variational(Protocol):
    """A model that draws from its approximate posterior and returns the three log densities of the ELBO."""

    def draw(self, x: Tensor, samples: int = 1, density: DensityMode = "joint") -> Draws:
        """Draw S times for each of B data."""


def draw_from(q: FlowDistribution, samples: int, density: DensityMode = "joint") -> tuple[Tensor, Tensor]:
    """Draw S times from q, with log densities.

    Args:
        q: of batch shape (B,).
        samples: S.
        density: which log density, and which gradient it carries. "joint": log q(z), reparameterised. "by_feature":
            the D terms of log q(z), reparameterised. "path": log q(z) without the gradient through q's own parameters
            at fixed z. "score": log q(z) at draws that are constants.

    Returns:
        The draws (S, B, D) and their log density, (S, B), or (S, B, D) by feature.
    """
    if density == "score":
        z = q.sample((samples,))
        return z, q.log_prob(z)
    run = {
        "joint": q.rsample_and_log_prob,
        "by_feature": q.rsample_and_log_prob_by_feature,
        "path": q.rsample_and_path_log_prob,
    }
    return run[density]((samples,))


def elbo(
    model: Variational,
    x: Tensor,
    samples: int = 1,
    *,
    beta: float = 1.0,
    free_bits: float = 0.0,
    groups: int | None = None,
) -> Tensor:
    """Evidence lower bound, (S, B) terms.

        log p(x|z) - beta (log q(z|x) - log p(z)),    z ~ q(z|x)

    With free bits lambda > 0, the latent features are split into equal groups of neighbours, and the second part
    becomes beta sum_g max(lambda, KL_g). KL_g is the mean of log q - log p of the group's features over samples and
    batch, so that a group whose KL is below lambda nats receives no gradient from it.

    Args:
        model: the variational model.
        x: the batch of B data.
        samples: S, draws per datum.
        beta: weight of the KL.
        free_bits: lambda, in nats per group.
        groups: number of groups; None makes each latent feature its own group.

    Raises:
        ValueError: samples below 1, free_bits below 0, or groups that do not divide the latent features.

    Source: Kingma et al. 2016, section 2, and its appendix for free bits.

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(3,), latent=2, likelihood="gaussian", hidden=(8,), context=8)
        >>> cf.objectives.elbo(vae, torch.randn(5, 3), samples=4, free_bits=0.1).shape
        torch.Size([4, 5])
    """
    _check_samples(samples)
    if not free_bits >= 0:
        raise ValueError(f"expected free_bits of at least 0 nats, got {free_bits}")
    if not free_bits:
        d = model.draw(x, samples)
        return d.log_likelihood - beta * (d.log_q - d.log_prior)
    d = model.draw(x, samples, "by_feature")
    kl = (d.log_q - d.log_prior).mean((0, 1))
    groups = len(kl) if groups is None else groups
    if groups < 1 or len(kl) % groups:
        raise ValueError(f"expected groups to divide {len(kl)} latent features, got groups={groups}")
    return d.log_likelihood - beta * kl.reshape(groups, -1).sum(1).clamp_min(free_bits).sum()


def iw_elbo(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """Importance-weighted bound, (1, B) terms: log (1/S) sum_s w_s. It increases with S towards log p(x).

    Source: Burda et al. 2016, "Importance Weighted Autoencoders", equation 8.
    """
    _check_samples(samples)
    return _log_mean(_log_weights(model.draw(x, samples)))


def path_elbo(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """ELBO, (S, B) terms, whose gradient is the path derivative: it omits the score of q and is zero if q is exact.

    Source: Roeder et al. 2017, "Sticking the Landing"; computed by back substitution as in Vaitl et al. 2024.
    """
    _check_samples(samples)
    return _log_weights(model.draw(x, samples, "path"))


def dreg_elbo(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """Bound of `iw_elbo`, (1, B) terms, with the doubly reparameterised gradient, which omits the score of q.

        sum_s v_s^2 (d log w_s / dz_s) dz_s/dphi    for q,    v_s = w_s / sum_s w_s
        sum_s v_s d log p(x, z_s) / dtheta          for p

    Its signal-to-noise ratio does not decrease as S grows, and it is zero if q = p. With one sample it is `path_elbo`.

    Raises:
        ValueError: samples below 1, or a model whose draws lack z.

    Source: Tucker et al. 2019, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives".

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(3,), latent=2, likelihood="gaussian", hidden=(8,), context=8)
        >>> dreg_elbo(vae, torch.randn(5, 3), samples=4).shape
        torch.Size([1, 5])
    """
    _check_samples(samples)
    d = model.draw(x, samples, "path")
    if d.z is None:
        raise ValueError("expected the model's draw to return z, got None; return Draws(..., z=z)")
    log_w = _log_weights(d)
    v = log_w.detach().softmax(0)
    if d.z.requires_grad:  # False under torch.no_grad
        d.z.register_hook(lambda gradient: v[..., None] * gradient)  # the second factor v_s of the formula
    return _with_gradient(_log_mean(log_w), (v * log_w).sum(0, keepdim=True))


def renyi_elbo(model: Variational, x: Tensor, samples: int = 1, *, alpha: float = 0.5) -> Tensor:
    """Variational Renyi bound, (1, B) terms: 1 / (1 - alpha) log (1/S) sum_s w_s^(1 - alpha).

    It decreases with alpha. The limit alpha = 1 is the mean of `elbo`'s terms, and alpha = 0 is `iw_elbo`. A large
    alpha concentrates q inside p, a negative one spreads q over p. For alpha >= 0 it is a lower bound of log p(x) in
    expectation.

    Raises:
        ValueError: samples below 1, or alpha that is not finite.

    Source: Li and Turner 2016, "Renyi Divergence Variational Inference".

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(3,), latent=2, likelihood="gaussian", hidden=(8,), context=8)
        >>> renyi_elbo(vae, torch.randn(5, 3), samples=4, alpha=0.5).shape
        torch.Size([1, 5])
    """
    _check_samples(samples)
    if not math.isfinite(alpha):
        raise ValueError(f"expected alpha to be finite, got {alpha}")
    log_w = _log_weights(model.draw(x, samples))
    if alpha == 1:
        return log_w.mean(0, keepdim=True)
    # Dividing by the dominant weight prevents overflow. expm1 and log1p keep full precision near alpha = 1, where
    # log-sum-exp would divide its rounding error by 1 - alpha.
    dominant = (log_w.max(0).values if alpha < 1 else log_w.min(0).values).detach()
    powers = torch.expm1((1 - alpha) * (log_w - dominant)).mean(0, keepdim=True)
    return dominant + torch.log1p(powers) / (1 - alpha)


def forward_kl(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """Estimate of log p(x) - KL(p(z|x), q(z|x)) by self-normalised importance weights, (1, B) terms.

        log Z - sum_s v_s log(S v_s),    Z = (1/S) sum_s w_s,    v_s = w_s / sum_s w_s

    Maximising it spreads q over all of p. The gradient is sum_s v_s d log q(z_s|x) / dphi for q, at draws that are
    constants, and sum_s v_s d log p(x, z_s) / dtheta for p; log p is not differentiated with respect to z. Evaluating
    an IAF's density at given draws is its solved direction, which costs one pass here. Self-normalised weights are
    biased: use at least tens of samples. A single sample has weight 1 wherever it lies and carries no information.

    Raises:
        ValueError: samples below 2.

    Source: Bornschein and Bengio 2015, "Reweighted Wake-Sleep"; Jerfel et al. 2021, "Variational Refinement for
    Importance Sampling Using the Forward Kullback-Leibler Divergence".

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(3,), latent=2, likelihood="gaussian", hidden=(8,), context=8)
        >>> forward_kl(vae, torch.randn(5, 3), samples=50).shape
        torch.Size([1, 5])
    """
    _check_samples(samples, 2)
    d = model.draw(x, samples, "score")
    log_w = _log_weights(d).detach()
    v = log_w.softmax(0)
    divergence = math.log(samples) - torch.special.entr(v).sum(0, keepdim=True)
    logs = d.log_likelihood + d.log_prior + d.log_q
    return _with_gradient(_log_mean(log_w) - divergence, torch.where(v > 0, v * logs, 0.0).sum(0, keepdim=True))


def log_likelihood(flow: Flow, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Log density log q(x), or log q(x | c) for a batch (x, c): (B,) terms. The objective of density estimation."""
    x, c = batch if isinstance(batch, tuple) else (batch, None)
    return flow(c).log_prob(x)


def warm_up(epoch: float, epochs: float) -> float:
    """Linear warm-up of the KL weight beta: min(1, epoch / epochs).

    Source: Sonderby et al. 2016, "Ladder Variational Autoencoders".
    """
    return min(1.0, epoch / epochs) if epochs > 0 else 1.0


class Evaluation(NamedTuple):
    """Estimates for each of N data, in nats."""

    elbo: Tensor  # mean over S draws of log p(x, z) - log q(z|x), (N,)
    log_likelihood: Tensor  # log p(x) by importance sampling: the bound of `iw_elbo` with S draws, (N,)
    kl: Tensor  # mean over S draws of log q(z|x) - log p(z), (N,)


@torch.no_grad()
def evaluate(
    model: Variational,
    x: Tensor,
    samples: int = 500,
    draws_at_once: int = 4096,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Estimate the ELBO, the log-likelihood (by importance sampling) and the KL of each datum.

    Args:
        model: the variational model.
        x: N data.
        samples: S, draws per datum.
        draws_at_once: maximum of rows times samples in one call of the model, which bounds the memory.
        on_batch: called as on_batch(done, total) after each call of the model, with numbers of draws.
    """
    _check_samples(samples)
    parts = []
    done = 0
    rows = max(1, min(len(x), draws_at_once // min(samples, 64)))
    step = max(1, draws_at_once // rows)
    for batch in x.split(rows):
        total, kl = torch.zeros(2, len(batch), device=x.device)
        log_sum = torch.full_like(total, -math.inf)
        for first in range(0, samples, step):
            draws = min(step, samples - first)
            d = model.draw(batch, draws)
            weights = _log_weights(d)
            total = total + weights.sum(0)
            kl = kl + (d.log_q - d.log_prior).sum(0)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(weights, 0))
            done += len(batch) * draws
            if on_batch is not None:
                on_batch(done, len(x) * samples)
        parts.append((total / samples, log_sum - math.log(samples), kl / samples))
    return Evaluation(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _log_weights(d: Draws) -> Tensor:
    return d.log_likelihood + d.log_prior - d.log_q


def _log_mean(log_w: Tensor) -> Tensor:
    """Log of the mean weight, log (1/S) sum_s w_s, (1, B)."""
    return torch.logsumexp(log_w, 0, keepdim=True) - math.log(len(log_w))


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return a tensor with the value of `value` and the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def _check_samples(samples: int, minimum: int = 1) -> None:
    if samples < minimum:
        raise ValueError(f"expected samples of at least {minimum}, got {samples}")
