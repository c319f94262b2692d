"""Mixture of flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from counterflow.flows.flow import (
    DISTRIBUTION_METHODS,
    Flow,
    FlowDistribution,
    SampleShape,
    as_size,
    call_first,
)
from counterflow.notebook import html_table


class MixtureDistribution(Distribution):
    """Distribution of a `FlowMixture`: log q(z) = log sum_m w_m q_m(z).

    Args:
        components: M distributions of the same batch and event shape.
        weights: w_m, which sum to one; 1 / M when not given.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = False  # the choice of a component has no gradient

    def __init__(self, components: Sequence[FlowDistribution], weights: Sequence[float] | None = None) -> None:
        self.components = tuple(components)
        self.weights = (1 / len(components),) * len(components) if weights is None else tuple(weights)
        super().__init__(components[0].batch_shape, components[0].event_shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MixtureDistribution:
        """Return the same distribution, of the same class, with a larger batch shape."""
        new: MixtureDistribution = self._get_checked_instance(MixtureDistribution, _instance)
        new.components = tuple(q.expand(batch_shape) for q in self.components)
        new.weights = self.weights
        Distribution.__init__(new, new.components[0].batch_shape, self.event_shape, validate_args=False)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(value) in nats, (...), for value (..., D)."""
        each = [q.log_prob(value) + math.log(w) for q, w in zip(self.components, self.weights, strict=True)]
        return torch.logsumexp(torch.stack(each), 0)

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Return samples (S..., B..., D) without gradients.

        Without a batch, each component draws only its share of the samples. With a batch, each component draws all, and
        one of them is chosen for each sample.
        """
        size = as_size(sample_shape)
        edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)[:-1]
        chosen = torch.searchsorted(edges, torch.rand((*size, *self.batch_shape), dtype=torch.float64), right=True)
        if self.batch_shape:
            each = torch.stack([q.sample(size) for q in self.components])
            chosen = chosen.to(each.device)[None, ..., None].expand(1, *each.shape[1:])
            return each.gather(0, chosen)[0]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.components)).tolist()
        drawn = torch.cat([q.sample((n,)) for q, n in zip(self.components, counts, strict=True)])
        return drawn[torch.randperm(len(drawn)).to(drawn.device)].reshape(*size, drawn.shape[-1])

    def __repr__(self) -> str:
        return (
            f"MixtureDistribution(components={len(self.components)}, batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)})"
        )


class FlowMixture(nn.Module):
    """Mixture of flows: q(z | c) = sum_m w_m q_m(z | c).

    Use it with one flow for each mode of a distribution, or, with equal weights, as an ensemble of flows that were
    trained on the same rows with different seeds: by Jensen's inequality, its log density of new rows is at least the
    mean of those of its members. It is called like a flow.

    Args:
        flows: M flows of any kind with the same features and context.
        weights: w_m, positive numbers that sum to one; 1 / M when not given.

    Raises:
        ValueError: no flows, flows that disagree on features or context, or weights that are not M positive numbers
            whose sum is one.

    Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles".

    Example:
        >>> import torch, counterflow as cf
        >>> q = cf.flows.FlowMixture([cf.MAF(2, layers=1, hidden=(8,), seed=k) for k in range(3)])()
        >>> q.log_prob(torch.zeros(5, 2)).shape, q.sample((7,)).shape
        (torch.Size([5]), torch.Size([7, 2]))
    """

    def __init__(self, flows: Sequence[Flow], weights: Sequence[float] | None = None) -> None:
        super().__init__()
        sizes = {(flow.features, flow.context) for flow in flows}
        if len(sizes) != 1:
            raise ValueError(f"expected flows of one (features, context), got {sorted(sizes)}")
        if weights is not None and not (
            len(weights) == len(flows) and all(w > 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)
        ):
            raise ValueError(f"expected {len(flows)} positive weights that sum to one, got {list(weights)}")
        self.flows = nn.ModuleList(flows)
        self.weights = None if weights is None else tuple(weights)
        ((self.features, self.context),) = sizes

    if TYPE_CHECKING:  # the call of a torch module returns Any otherwise

        def __call__(self, context: Tensor | None = None) -> MixtureDistribution: ...

    def __getattr__(self, name: str) -> Any:
        if name in DISTRIBUTION_METHODS:
            raise call_first(self, name)
        return super().__getattr__(name)

    def forward(self, context: Tensor | None = None) -> MixtureDistribution:
        """Return the distribution q(z | c), for a context c (..., C) or None."""
        return MixtureDistribution([flow(context) for flow in self.flows], self.weights)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"flows": list(self.flows), "weights": self.weights}

    def _repr_html_(self) -> str:
        """Return sizes and members as a table, for notebooks."""
        parameters = sum(p.numel() for p in self.parameters())
        rows = [("features", self.features), ("context", self.context), ("parameters", f"{parameters:,}")]
        members = [(f"member {k}", repr(flow)) for k, flow in enumerate(self.flows, 1)]
        return html_table(("FlowMixture", ""), [*rows, *members])
