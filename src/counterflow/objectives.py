"""What training maximises. An objective takes (model, batch) and returns terms in nats; the loss is -mean(terms).

The variational ones take a model with `draw(batch, samples, density) -> Draws`, such as a `VAE`, and return terms
(S, B). Each bounds log p(x) from below in expectation, and q = p(z|x) makes every term log p(x).
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from counterflow.flow import Flow
from counterflow.vae import Density, Draws


class Variational(Protocol):
    """A model that draws from its posterior and gives the three log densities of the ELBO."""

    def draw(self, x: Tensor, samples: int = 1, density: Density = "joint") -> Draws:
        """S draws for each of B data."""


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

    With free bits lambda > 0 the latent features are cut into groups of neighbours (each feature its own when groups is
    None), and the second part becomes beta sum_g max(lambda, KL_g), KL_g the mean of log q - log p of the group's
    features over samples and batch: a group that costs less than lambda nats is not pressed any further.

    Raises:
        ValueError: samples below 1, or groups that do not divide the latent features.

    Source: Kingma et al. 2016, section 2, and its appendix for free bits.

    Example:
        >>> import torch, counterflow as cf
        >>> vae = cf.VAE(data_shape=(3,), latent=2, likelihood="gaussian", hidden=(8,), context=8)
        >>> cf.elbo(vae, torch.randn(5, 3), samples=4, free_bits=0.1).shape
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
        raise ValueError(f"expected groups that divide {len(kl)} latent features, got groups={groups}")
    return d.log_likelihood - beta * kl.reshape(groups, -1).sum(1).clamp_min(free_bits).sum()


def iw_elbo(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """Importance-weighted bound, (1, B) terms: log (1/S) sum_s p(x, z_s) / q(z_s|x). It grows with S towards log p(x).

    Source: Burda et al. 2016, "Importance Weighted Autoencoders", equation 8.
    """
    _check_samples(samples)
    d = model.draw(x, samples)
    weights = d.log_likelihood + d.log_prior - d.log_q
    return torch.logsumexp(weights, 0, keepdim=True) - math.log(samples)


def path_elbo(model: Variational, x: Tensor, samples: int = 1) -> Tensor:
    """The ELBO, (S, B) terms, with the path derivative as its gradient: no score of q, no variance where q is exact.

    Source: Roeder et al. 2017, "Sticking the Landing"; by back substitution as in Vaitl et al. 2024.
    """
    _check_samples(samples)
    d = model.draw(x, samples, "path")
    return d.log_likelihood + d.log_prior - d.log_q


def log_likelihood(flow: Flow, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """log q(x), or log q(x | c) for a batch (x, c): (B,) terms. For density estimation."""
    x, c = batch if isinstance(batch, tuple) else (batch, None)
    return flow(c).log_prob(x)


def warm_up(epoch: float, epochs: float) -> float:
    """The weight beta of the KL: 0 at the start, 1 from `epochs` on, linear between.

    Source: Sonderby et al. 2016, "Ladder Variational Autoencoders".
    """
    return min(1.0, epoch / epochs) if epochs > 0 else 1.0


class Evaluation(NamedTuple):
    """How well a model explains each of N data, in nats."""

    elbo: Tensor  # mean over S draws of log p(x, z) - log q(z|x), (N,)
    log_likelihood: Tensor  # log p(x) by importance sampling: the bound of `iw_elbo` with S draws, (N,)
    kl: Tensor  # mean over S draws of log q(z|x) - log p(z), (N,)


@torch.no_grad()
def evaluate(model: Variational, x: Tensor, samples: int = 500, draws_at_once: int = 4096) -> Evaluation:
    """ELBO, log-likelihood by importance sampling and KL of each datum.

    The draws are made in chunks of at most draws_at_once = rows times samples, so that memory does not grow with
    the number of data or samples.
    """
    _check_samples(samples)
    parts = []
    rows = max(1, min(len(x), draws_at_once // min(samples, 64)))
    step = max(1, draws_at_once // rows)
    for batch in x.split(rows):
        total, kl = torch.zeros(2, len(batch), device=x.device)
        log_sum = torch.full_like(total, -math.inf)
        for first in range(0, samples, step):
            d = model.draw(batch, min(step, samples - first))
            weights = d.log_likelihood + d.log_prior - d.log_q
            total = total + weights.sum(0)
            kl = kl + (d.log_q - d.log_prior).sum(0)
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(weights, 0))
        parts.append((total / samples, log_sum - math.log(samples), kl / samples))
    return Evaluation(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"expected samples of at least 1, got {samples}")
