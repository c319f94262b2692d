"""FlowMixture: several flows as one density, the average of theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from counterflow.flows.flow import Flow, FlowDistribution


class MixtureDistribution(Distribution):
    """The distribution of `FlowMixture`: log q(z) = log (1/M) sum_m q_m(z)."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = False  # which part a draw comes from is a choice

    def __init__(self, parts: Sequence[FlowDistribution]) -> None:
        self.parts = tuple(parts)
        super().__init__(parts[0].batch_shape, parts[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MixtureDistribution:
        """The same distribution with a larger batch shape."""
        return MixtureDistribution([part.expand(batch_shape) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value) in nats: (..., D) -> (...); every part scores once."""
        each = torch.stack([part.log_prob(value) for part in self.parts])
        return torch.logsumexp(each, 0) - math.log(len(self.parts))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples (S..., B..., D) without gradients.

        Without a batch every part draws its own share; else every part draws all, and one of them is taken.
        """
        picked = torch.randint(len(self.parts), (*sample_shape, *self.batch_shape))
        if self.batch_shape:
            each = torch.stack([part.sample(sample_shape) for part in self.parts])
            picked = picked.to(each.device)[None, ..., None].expand(1, *each.shape[1:])
            return each.gather(0, picked)[0]
        shares = torch.bincount(picked.flatten(), minlength=len(self.parts)).tolist()
        drawn = torch.cat([part.sample((share,)) for part, share in zip(self.parts, shares, strict=True)])
        return drawn[torch.randperm(len(drawn)).to(drawn.device)].reshape(*sample_shape, -1)

    def __repr__(self) -> str:
        return (
            f"MixtureDistribution(parts={len(self.parts)}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


class FlowMixture(nn.Module):
    """The average of several flows' densities: q(z | c) = (1/M) sum_m q_m(z | c).

    Flows that were trained on the same rows from other seeds err in different places; their average has a higher
    log density of new rows than they have on average, by Jensen's inequality.

    Args:
        flows: M flows of the same features and context, which may be of any kind.

    Raises:
        ValueError: no flows, or flows that disagree on features or context.

    Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles".

    Example:
        >>> import torch, counterflow as cf
        >>> q = cf.flows.FlowMixture([cf.MAF(2, layers=1, hidden=(8,), seed=k) for k in range(3)])()
        >>> q.log_prob(torch.zeros(5, 2)).shape, q.sample((7,)).shape
        (torch.Size([5]), torch.Size([7, 2]))
    """

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        sizes = {(flow.features, flow.context) for flow in flows}
        if len(sizes) != 1:
            raise ValueError(f"expected flows of one number of features and context, got {sorted(sizes)}")
        self.flows = nn.ModuleList(flows)
        ((self.features, self.context),) = sizes

    def forward(self, c: Tensor | None = None) -> MixtureDistribution:
        """The distribution q(z | c), c (..., C) or None."""
        return MixtureDistribution([flow(c) for flow in self.flows])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"flows": list(self.flows)}
