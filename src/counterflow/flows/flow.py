"""Flow: a base distribution and a transform. Called with a context, it is a torch distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, constraints

from counterflow.flows.bases import Base
from counterflow.transforms.base import Cost, Transform, check_context, prepare


class FlowDistribution(Distribution):
    """The distribution of z = f(eps; c), eps from the base: log q(z) = log q_0(eps) - log|det df/deps|.

    A torch distribution: batch_shape is the context's (...), event_shape (D,). There is no closed mean or entropy.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, base: Distribution, transform: Transform, c: Tensor | None, validate_args: bool | None = None
    ) -> None:
        self.base, self.transform, self.context = base, transform, c
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same distribution with a larger batch shape."""
        c = None if self.context is None else self.context.expand(*batch_shape, self.context.shape[-1])
        return FlowDistribution(self.base.expand(Size(batch_shape)), self.transform, c, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value) in nats: (..., D) -> (...).

        It is finite or -inf, never NaN, for finite numbers and weights: what overflows on its way to the base ends
        where the base has no density. Without validation (validate_args=False) it may be NaN there.

        Raises:
            ValueError: a wrong number of features, a batch shape that does not broadcast, or a NaN.
        """
        value = prepare(self.transform, value, self.context, "value", "flow")
        if self._validate_args and value.numel():
            self._validate_sample(value)
        eps, log_det = self.transform.inverse(value, self.context)
        log_q = self._log_base(eps) + log_det
        if self._validate_args and log_q.isnan().any() and self._is_sound():
            numbers = True if self.context is None else self.context.isfinite().all(-1)
            log_q = log_q.masked_fill(log_q.isnan() & numbers, -math.inf)
        return log_q

    def _is_sound(self) -> bool:
        """Whether the weights are finite, so that a NaN is made of infinities: of sums and scales that overflowed."""
        return all(bool(p.isfinite().all()) for p in self.transform.parameters())

    def _log_base(self, eps: Tensor) -> Tensor:
        """log q_0, (...); Independent's own sum does not take empty batches."""
        if isinstance(self.base, Independent):
            return self.base.base_dist.log_prob(eps).sum(-1)
        return self.base.log_prob(eps)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples (S..., B..., D) through which gradients flow."""
        return self.transform(self._start(sample_shape), self.context)[0]

    def _start(self, sample_shape: Sequence[int]) -> Tensor:
        """eps from the base, through which gradients flow where it has any."""
        size = Size(sample_shape)
        return self.base.rsample(size) if self.base.has_rsample else self.base.sample(size)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples (S..., B..., D) without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Samples z (S..., B..., D) and log q(z), from one run through the layers."""
        eps = self._start(sample_shape)
        z, log_det = self.transform(eps, self.context)
        return z, self._log_base(eps) - log_det

    def rsample_and_log_prob_by_feature(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Samples z, and log q(z) as a sum of one term for each feature of z, both (S..., B..., D).

        The term of a feature is the base's log density where it started less the log-slopes on its way. For a
        diagonal Gaussian it is the feature's own log density. Permutations move the terms along.
        """
        if not isinstance(self.base, Independent):
            raise TypeError(f"expected a base of independent features, got {type(self.base).__name__}")
        eps = self.base.rsample(Size(sample_shape))
        # The base's terms travel with their features as well: what is carried is log_det - log q_0.
        z, total = self.transform.forward_by_feature(eps, -self.base.base_dist.log_prob(eps), self.context)
        return z, -total

    def rsample_and_path_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Samples z and log q(z), whose gradient takes the path through z alone (sticking the landing).

        The value of the second is log q(z); its gradient is (d log q / dz) dz/dphi, without the score
        d log q / dphi at fixed z, whose mean is zero. d log q / dz comes from one back substitution a layer.

        Source: Roeder et al. 2017, "Sticking the Landing"; Vaitl et al. 2024, as in `Transform.push_score`.
        """
        eps = self._start(sample_shape)
        with torch.enable_grad():
            leaf = eps.detach().requires_grad_()
            log_base = self._log_base(leaf)
            (score,) = torch.autograd.grad(log_base.sum(), leaf)
        z, log_det, score = self.transform.push_score(eps, score, self.context)
        return z, (log_base - log_det).detach() + (score * (z - z.detach())).sum(-1)

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


class Flow(nn.Module):
    """A normalizing flow: z = f(eps; c) with eps from the base. Called with a context it returns q(z | c).

    Args:
        base: where eps comes from.
        transform: f, from eps to z.

    Raises:
        ValueError: base and transform disagree on features or context; a context that is missing or not wanted.

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.Flow(cf.bases.StandardNormal(2), cf.Autoregressive(features=2, context=3, hidden=(8,)))
        >>> q = flow(torch.zeros(5, 3))
        >>> z, log_q = q.rsample_and_log_prob((7,))
        >>> z.shape, log_q.shape, torch.allclose(q.log_prob(z), log_q, atol=1e-5)
        (torch.Size([7, 5, 2]), torch.Size([7, 5]), True)
    """

    def __init__(self, base: Base, transform: Transform) -> None:
        super().__init__()
        contexts = {part.context for part in (base, transform) if part.context}
        if base.features != transform.features or len(contexts) > 1:
            raise ValueError(
                f"expected base and transform that agree, got features={base.features}, context={base.context} "
                f"and features={transform.features}, context={transform.context}"
            )
        self.base, self.transform = base, transform
        self.features = base.features
        self.context = contexts.pop() if contexts else 0

    def forward(self, c: Tensor | None = None) -> FlowDistribution:
        """The distribution q(z | c), c (..., C) or None."""
        check_context(c, self.context, "flow")
        base = self.base(c if self.base.context else None)
        if c is not None:
            base = base.expand(c.shape[:-1])
        return FlowDistribution(base, self.transform, c if self.transform.context else None)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"base": self.base, "transform": self.transform}

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        lines = [
            f"Flow(features={self.features}, context={self.context}, parameters={parameters:,})",
            f"  sample    {_in_words(self.transform.forward_cost)}",
            f"  log_prob  {_in_words(self.transform.inverse_cost)}",
            f"  base      {self.base!r}",
            f"  transform {self.transform!r}".replace("\n", "\n  "),
        ]
        return "\n".join(lines)


def _in_words(cost: Cost) -> str:
    return {
        "one pass": "one pass",
        "forward substitution": "forward substitution: solved exactly, about the work of one pass",
        "mixed": "some layers one pass, others forward substitution",
    }[cost]
