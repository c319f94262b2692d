"""Monte Carlo estimate of a Kullback-Leibler divergence, with its standard error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from counterflow.flows.flow import FlowDistribution


class KLEstimate(NamedTuple):
    """Estimate of KL(q, p) in nats."""

    value: Tensor  # mean of log q(z) - log p(z), (...)
    standard_error: Tensor  # of the value, (...)


@torch.no_grad()
def kl_divergence(q: Distribution, p: Distribution, samples: int = 10_000) -> KLEstimate:
    """Estimate KL(q, p) from S draws of q.

        (1/S) sum_s log q(z_s) - log p(z_s),    z_s ~ q

    Neither a flow nor a mixture has a closed form, so `torch.distributions.kl_divergence` refuses them.

    Args:
        q: a distribution, such as `flow(c)`.
        p: a distribution of the same event shape, and of a batch shape that broadcasts with that of q.
        samples: S, at least 2.

    Returns:
        The estimate and its standard error, both of the batch shape. The value is inf, and its error NaN, where p is
        zero at a draw of q. A standard error means little if a few draws decide it: double S and compare.

    Raises:
        ValueError: samples below 2, or event shapes that differ.

    Example:
        >>> import torch, counterflow as cf
        >>> _ = torch.manual_seed(0)
        >>> q, p = cf.IAF(2)(), torch.distributions.Independent(torch.distributions.Normal(torch.ones(2), 1.0), 1)
        >>> value, standard_error = cf.diagnostics.kl_divergence(q, p)  # of N(0, I), where the flow starts, to N(1, I)
        >>> bool((value - 1.0).abs() < 4 * standard_error), standard_error.item() < 0.02
        (True, True)
    """
    if samples < 2:
        raise ValueError(f"expected samples of at least 2, got {samples}")
    if q.event_shape != p.event_shape:
        raise ValueError(f"expected distributions of one event shape, got {q.event_shape} and {p.event_shape}")
    if isinstance(q, FlowDistribution):
        z, log_q = q.rsample_and_log_prob((samples,))
    else:
        z = q.sample((samples,))
        log_q = q.log_prob(z)
    terms = (log_q - p.log_prob(z)).double()
    return KLEstimate(terms.mean(0), terms.std(0) / samples**0.5)
