"""Flow: a base distribution and a transform; called with a context, it returns a torch distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor, nn
from torch._subclasses import FakeTensor  # torch imports it, and has no public name for it
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.kl import register_kl

from counterflow.flows.bases import Base
from counterflow.flows.scores import log_prob_and_score
from counterflow.notebook import html_table
from counterflow.transforms.base import Cost, Transform, check_context, prepare

# Methods of the distribution that are not methods of the flow, and are often looked for there.
DISTRIBUTION_METHODS = frozenset({"log_prob", "sample", "rsample", "rsample_and_log_prob"})
SampleShape = int | Sequence[int]  # n, or a shape S


def as_size(sample_shape: SampleShape) -> Size:
    """Return the shape of a sample_shape argument; n stands for (n,)."""
    return Size((int(sample_shape),)) if isinstance(sample_shape, Integral) else Size(sample_shape)  # type: ignore[arg-type]


class FlowDistribution(Distribution):
    """Distribution of z = f(eps; c) with eps from the base: log q(z) = log q_0(eps) - log|det df/deps|.

    It is a torch distribution whose batch_shape is that of the context, (...), and whose event_shape is (D,). Mean and
    entropy have no closed form. sample(100) means sample((100,)), also for the other methods that draw.

    Args:
        base: distribution of eps, with event shape (D,).
        transform: f.
        context: c, (..., C), or None.
        validate_args: False to skip the checks of `log_prob`; torch's own default when not given.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, base: Distribution, transform: Transform, context: Tensor | None, validate_args: bool | None = None
    ) -> None:
        self.base = base
        self.transform = transform
        self.context = context
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """Return the same distribution, of the same class, with a larger batch shape."""
        new: FlowDistribution = self._get_checked_instance(FlowDistribution, _instance)
        new.base = self.base.expand(Size(batch_shape))
        new.transform = self.transform
        new.context = None if self.context is None else self.context.expand(*batch_shape, self.context.shape[-1])
        Distribution.__init__(new, new.base.batch_shape, new.base.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(value) in nats, (...), for value (..., D).

        With finite values and weights it is finite or -inf, never NaN: a value that overflows on its way to the base
        has density 0. With validate_args=False it may be NaN there.

        Raises:
            TypeError: value is not a floating-point tensor.
            ValueError: a wrong number of features, a batch shape that does not broadcast, or a NaN.
        """
        value = prepare(self.transform, value, self.context, "value", "flow")
        validate = self._validate_args and not (value.is_meta or isinstance(value, FakeTensor))  # they have no values
        if validate and value.numel():
            self._validate_sample(value)
        eps, log_det = self.transform.inverse(value, self.context)
        log_q = self._log_base(eps) + log_det
        if validate and log_q.isnan().any() and self._has_finite_weights():
            finite = True if self.context is None else self.context.isfinite().all(-1)
            log_q = log_q.masked_fill(log_q.isnan() & finite, -math.inf)
        return log_q

    def _has_finite_weights(self) -> bool:
        """Return True if all weights are finite; a NaN of the transform is then the result of an overflow."""
        return all(bool(p.isfinite().all()) for p in self.transform.parameters())

    def _log_base(self, eps: Tensor) -> Tensor:
        """Return log q_0(eps), (...); the sum of torch's Independent fails for empty batches."""
        if isinstance(self.base, Independent):
            return self.base.base_dist.log_prob(eps).sum(-1)
        return self.base.log_prob(eps)

    def rsample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Return samples (S..., B..., D) that are differentiable in the weights and the context."""
        return self.transform(self._sample_base(sample_shape), self.context)[0]

    def _sample_base(self, sample_shape: SampleShape) -> Tensor:
        """Return eps from the base, differentiable if the base supports it."""
        size = as_size(sample_shape)
        return self.base.rsample(size) if self.base.has_rsample else self.base.sample(size)

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Return samples (S..., B..., D) without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(self, sample_shape: SampleShape = ()) -> tuple[Tensor, Tensor]:
        """Return samples z (S..., B..., D) and log q(z) (S..., B...), from a single pass through the layers."""
        eps = self._sample_base(sample_shape)
        z, log_det = self.transform(eps, self.context)
        return z, self._log_base(eps) - log_det

    def rsample_and_log_prob_by_feature(self, sample_shape: SampleShape = ()) -> tuple[Tensor, Tensor]:
        """Return samples z, and log q(z) split into one term per feature of z, both (S..., B..., D).

        The term of a feature is the log density of its eps under the base, minus the log-slopes of the layers. For a
        diagonal Gaussian it is the log density of the feature. Permutations move the terms along with the features.

        Raises:
            TypeError: the features of the base are not independent, or a transform has no terms per feature.
        """
        if not isinstance(self.base, Independent):
            raise TypeError(f"expected a base of independent features, got {type(self.base).__name__}")
        eps = self.base.rsample(as_size(sample_shape))
        # The terms of the base move along with the features as well, so log_det - log q_0 is carried.
        z, total = self.transform.forward_by_feature(eps, -self.base.base_dist.log_prob(eps), self.context)
        return z, -total

    def rsample_and_path_log_prob(self, sample_shape: SampleShape = ()) -> tuple[Tensor, Tensor]:
        """Return samples z and log q(z), whose gradient is the path derivative (sticking the landing).

        The gradient is (d log q / dz) dz/dphi, without the score d log q / dphi at fixed z, whose mean is zero.
        d log q / dz is computed by one back substitution per layer.

        Source: Roeder et al. 2017, "Sticking the Landing"; Vaitl et al. 2024, "Fast and unified path gradient
        estimators for normalizing flows".
        """
        eps = self._sample_base(sample_shape)
        log_base, score = log_prob_and_score(self.base, eps)
        z, log_det, score = self.transform.push_score(eps, score, self.context)
        return z, (log_base - log_det).detach() + (score * (z - z.detach())).sum(-1)

    def __repr__(self) -> str:
        return f"FlowDistribution(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"


@register_kl(FlowDistribution, FlowDistribution)  # type: ignore[untyped-decorator]  # torch has no types for it
def _without_closed_form(q: FlowDistribution, p: FlowDistribution) -> Tensor:
    raise NotImplementedError(
        "expected distributions whose divergence has a closed form, got two flows; "
        "cf.diagnostics.kl_divergence(q, p) estimates it with its standard error"
    )


def call_first(module: nn.Module, name: str) -> AttributeError:
    """Return the error for a method of the distribution that is looked for on the flow itself."""
    return AttributeError(
        f"expected a call that returns the distribution first: use flow().{name}(...), or flow(c).{name}(...) with a "
        f"context; a {type(module).__name__} has no {name}"
    )


class Flow(nn.Module):
    """Normalizing flow z = f(eps; c) with eps from the base; called with a context, it returns q(z | c).

    flow(c) and flow(context=c) are the same; a flow without a context is called as flow().

    Args:
        base: distribution of eps.
        transform: f, from eps to z.

    Raises:
        ValueError: base and transform disagree on features or context.

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
        self.base = base
        self.transform = transform
        self.features = base.features
        self.context = contexts.pop() if contexts else 0

    if TYPE_CHECKING:  # the call of a torch module returns Any otherwise

        def __call__(self, context: Tensor | None = None) -> FlowDistribution: ...

    def __getattr__(self, name: str) -> Any:
        if name in DISTRIBUTION_METHODS:
            raise call_first(self, name)
        return super().__getattr__(name)

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """Return the distribution q(z | c).

        Args:
            context: c, (..., C), or None for a flow without a context.

        Raises:
            TypeError: the context is not a floating-point tensor.
            ValueError: a context that is missing, not expected or of a wrong shape.
        """
        check_context(context, self.context, "flow")
        base = self.base(context if self.base.context else None)
        if context is not None:
            base = base.expand(context.shape[:-1])
        return FlowDistribution(base, self.transform, context if self.transform.context else None)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"base": self.base, "transform": self.transform}

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        lines = [
            f"Flow(features={self.features}, context={self.context}, parameters={parameters:,})",
            f"  sample    {_describe(self.transform.forward_cost)}",
            f"  log_prob  {_describe(self.transform.inverse_cost)}",
            f"  base      {self.base!r}",
            f"  transform {self.transform!r}".replace("\n", "\n  "),
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return sizes, the cost of each direction and the layers as a table, for notebooks."""
        parameters = sum(p.numel() for p in self.parameters())
        rows = [
            ("features", self.features),
            ("context", self.context),
            ("parameters", f"{parameters:,}"),
            ("sample", _describe(self.transform.forward_cost)),
            ("log_prob", _describe(self.transform.inverse_cost)),
            ("base", repr(self.base)),
            ("transform", repr(self.transform)),
        ]
        return html_table(("Flow", ""), rows)


def _describe(cost: Cost) -> str:
    return {
        "one pass": "one pass",
        "forward substitution": "forward substitution: solved exactly, about the work of one pass",
        "mixed": "some layers one pass, others forward substitution",
    }[cost]
