"""Flow: a base distribution and a transform. Called with a context, it is a torch distribution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.distributions import StudentT as StudentTDistribution

from counterflow.transform import Cost, Transform, check_context, positive, prepare

PAIRS = 1 << 22  # of a row and a point that are held at a time


class Base(nn.Module, ABC):
    """The simple distribution that a flow starts from; called with a context, a torch distribution over (D,)."""

    features: int
    context: int = 0

    @abstractmethod
    def forward(self, c: Tensor | None = None) -> Distribution:
        """The distribution for context c (..., C), of batch shape (...)."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features}


def _normal(mean: Tensor, std: Tensor) -> Distribution:
    return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)


class StandardNormal(Base):
    """D independent normals of mean 0 and standard deviation 1.

    Example:
        >>> import counterflow as cf
        >>> cf.StandardNormal(3)().event_shape
        torch.Size([3])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.register_buffer("mean", torch.zeros(features), persistent=False)
        self.register_buffer("std", torch.ones(features), persistent=False)

    def forward(self, c: Tensor | None = None) -> Distribution:
        """The same for every context."""
        return _normal(self.mean, self.std)

    def extra_repr(self) -> str:
        """The size."""
        return f"features={self.features}"


class StudentT(Base):
    """D independent Student t variables of location 0 and scale 1, whose degrees of freedom are trained: df = 1 / u.

        u = 1 / most + exp(a - 4)

    a starts at 0 and is free for each feature; no feature gets lighter tails than `most` degrees of freedom have. A
    flow of affine maps keeps the tails of its base, and importance weights are bounded only where those of the
    approximation are no lighter than the target's.

    Source: Jaini et al. 2020, "Tails of Lipschitz Triangular Flows", for what a flow can do to the tails of its base.

    Example:
        >>> import counterflow as cf
        >>> base = cf.StudentT(3, most=25.0)
        >>> base().event_shape, round(base.df[0].item(), 1)
        (torch.Size([3]), 17.1)
    """

    def __init__(self, features: int, most: float = 25.0) -> None:
        super().__init__()
        if not (math.isfinite(most) and most > 0):
            raise ValueError(f"expected most, the highest degrees of freedom, as a positive number, got {most}")
        self.features, self.most = positive(features, "features"), float(most)
        self.a = nn.Parameter(torch.zeros(features))

    @property
    def df(self) -> Tensor:
        """The degrees of freedom (D,)."""
        return 1 / (1 / self.most + torch.exp(self.a - 4))

    def forward(self, c: Tensor | None = None) -> Distribution:
        """The same for every context."""
        zero = torch.zeros_like(self.a)
        each = StudentTDistribution(self.df, zero, zero + 1, validate_args=False)
        return Independent(each, 1, validate_args=False)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features, "most": self.most}

    def __repr__(self) -> str:
        return f"StudentT(features={self.features}, most={self.most:g})"


class DiagonalNormal(Base):
    """D independent normals whose means and scales depend on the context: (mean, a) = W c + b.

        std = exp(s),    s = bound * tanh(a / bound),    bound = 7

    Without a context mean and a are D trained numbers each. b starts at 0.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.DiagonalNormal(2, context=5)(torch.zeros(4, 5)).mean.shape
        torch.Size([4, 2])
    """

    bound = 7.0  # standard deviations from 1e-3 to 1e3

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.context = positive(context, "context") if context else 0
        self.linear = nn.Linear(context, 2 * features) if context else None
        self.constant = None if context else nn.Parameter(torch.zeros(2 * features))
        if self.linear is not None:
            nn.init.zeros_(self.linear.bias)

    def forward(self, c: Tensor | None = None) -> Distribution:
        """The distribution for each context."""
        both = self.constant if self.linear is None else self.linear(c)
        # One of the two is always there; under autocast the linear map gives a lower precision.
        mean, a = (both if c is None else both.to(c.dtype)).chunk(2, -1)  # type: ignore[union-attr]
        return _normal(mean, torch.exp(self.bound * torch.tanh(a / self.bound)))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features, "context": self.context}

    def __repr__(self) -> str:
        return f"DiagonalNormal(features={self.features}, context={self.context})"


class KernelMixture(Base):
    """A standard normal and a Gaussian kernel at each of N points: it knows what the flow left over.

        q_0(z) = (1 - share) N(z; 0, I) + share / N sum_n N(z; point_n, width^2 I)

    With the points at which a trained flow puts its training rows, this is a kernel density estimate with the flow as
    its start: of rows that come nearly twice, of clusters too small for a network. points (N, D), width and share are
    buffers: saved, not trained. Scoring B rows takes N D B multiplications, a block of rows at a time.

    Args:
        features: D.
        points: the points (N, D), or N alone, and all points 0.
        width: the standard deviation of each kernel.
        share: of the kernels, from 0 to 1, neither included.

    Source: Hjort and Glad 1995, "Nonparametric density estimation with a parametric start", for the idea of the start.

    Example:
        >>> import torch, counterflow as cf
        >>> base = cf.KernelMixture(2, torch.tensor([[1.0, 1.0], [3.0, 0.0]]), width=0.1, share=0.5)
        >>> base().log_prob(torch.tensor([[1.0, 1.0], [9.0, 9.0]])).tolist()
        [1.3..., -83.5...]
    """

    points: Tensor
    width: Tensor
    share: Tensor

    def __init__(self, features: int, points: Tensor | int, width: float = 0.3, share: float = 0.3) -> None:
        super().__init__()
        self.features = positive(features, "features")
        if isinstance(points, int):
            points = torch.zeros(positive(points, "points"), features)
        if points.dim() != 2 or points.shape[1] != features or not len(points):
            raise ValueError(f"expected points of shape (N, {features}), got {tuple(points.shape)}")
        if not (math.isfinite(width) and width > 0 and 0 < share < 1):
            raise ValueError(f"expected a positive width and a share in (0, 1), got width={width} and share={share}")
        self.register_buffer("points", points.detach().clone())
        self.register_buffer("width", torch.tensor(float(width), dtype=points.dtype))
        self.register_buffer("share", torch.tensor(float(share), dtype=points.dtype))

    def forward(self, c: Tensor | None = None) -> Distribution:
        """The same for every context."""
        return _Kernels(self.points, self.width, self.share)

    def standardized(self, z: Tensor) -> Tensor:
        """z (B, D) less the centre of the part that it came from, in that part's deviations: N(0, I) if z is from q_0.

        The part is drawn in proportion to its density at z.
        """
        N, D = self.points.shape
        parts = []
        for rows in z.split(max(1, PAIRS // N)):
            near = torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist") / self.width
            kernels = torch.log(self.share / N) - D * self.width.log() - near.square() / 2
            normal = torch.log1p(-self.share) - rows.square().sum(-1, keepdim=True) / 2
            picked = torch.distributions.Categorical(logits=torch.cat([kernels, normal], 1)).sample()
            centre = self.points[picked.clamp_max(N - 1)]
            parts.append(torch.where((picked == N)[:, None], rows, (rows - centre) / self.width))
        return torch.cat(parts)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; the numbers themselves are among the weights."""
        return {"features": self.features, "points": len(self.points)}

    def extra_repr(self) -> str:
        """The sizes."""
        return f"features={self.features}, points={len(self.points)}"


class _Kernels(Distribution):
    """The distribution of `KernelMixture`."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = False  # which part a draw comes from is a choice

    def __init__(self, points: Tensor, width: Tensor, share: Tensor, batch_shape: Size = Size()) -> None:  # noqa: B008
        self.points, self.width, self.share = points, width, share
        super().__init__(batch_shape, points.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Kernels:
        return _Kernels(self.points, self.width, self.share, Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        N, D = self.points.shape
        rows = value.reshape(-1, D).split(max(1, PAIRS // N))
        near = torch.cat([self._log_kernels(part) for part in rows]).reshape(value.shape[:-1])
        normal = -value.square().sum(-1) / 2 - D / 2 * math.log(2 * math.pi)
        return torch.logaddexp(torch.log1p(-self.share) + normal, self.share.log() + near)

    def _log_kernels(self, rows: Tensor) -> Tensor:
        """The log density of the kernels alone, (B, D) -> (B,)."""
        N, D = self.points.shape
        # The differences themselves: squares that are multiplied out lose the digits of near points.
        distance = torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist") / self.width
        scale = math.log(N) + D * self.width.log() + D / 2 * math.log(2 * math.pi)
        return torch.logsumexp(-distance.square() / 2, -1) - scale

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        eps = torch.randn(*shape, self.event_shape[0], dtype=self.points.dtype, device=self.points.device)
        picked = self.points[torch.randint(len(self.points), shape, device=eps.device)]
        kernel = torch.rand(shape, device=eps.device) < self.share
        return torch.where(kernel[..., None], picked + self.width * eps, eps)


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
        >>> flow = cf.Flow(cf.StandardNormal(2), cf.Autoregressive(features=2, context=3, hidden=(8,)))
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
