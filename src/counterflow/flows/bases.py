"""Base distributions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.distributions import StudentT as StudentTDistribution

from counterflow.checks import positive


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
        >>> cf.bases.StandardNormal(3)().event_shape
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

        u = 1 / max_df + exp(a - 4)

    a starts at 0 and is free for each feature; no feature gets lighter tails than `max_df` degrees of freedom have. A
    flow of affine maps keeps the tails of its base, and importance weights are bounded only where those of the
    approximation are no lighter than the target's.

    Source: Jaini et al. 2020, "Tails of Lipschitz Triangular Flows", for what a flow can do to the tails of its base.

    Example:
        >>> import counterflow as cf
        >>> base = cf.bases.StudentT(3, max_df=25.0)
        >>> base().event_shape, round(base.df[0].item(), 1)
        (torch.Size([3]), 17.1)
    """

    def __init__(self, features: int, max_df: float = 25.0) -> None:
        super().__init__()
        if not (math.isfinite(max_df) and max_df > 0):
            raise ValueError(f"expected max_df to be a positive number, got {max_df}")
        self.features = positive(features, "features")
        self.max_df = float(max_df)
        self.a = nn.Parameter(torch.zeros(features))

    @property
    def df(self) -> Tensor:
        """The degrees of freedom (D,)."""
        return 1 / (1 / self.max_df + torch.exp(self.a - 4))

    def forward(self, c: Tensor | None = None) -> Distribution:
        """The same for every context."""
        zero = torch.zeros_like(self.a)
        each = StudentTDistribution(self.df, zero, zero + 1, validate_args=False)
        return Independent(each, 1, validate_args=False)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"features": self.features, "max_df": self.max_df}

    def __repr__(self) -> str:
        return f"StudentT(features={self.features}, max_df={self.max_df:g})"


class DiagonalNormal(Base):
    """D independent normals whose means and scales depend on the context: (mean, a) = W c + b.

        std = exp(s),    s = bound * tanh(a / bound),    bound = 7

    Without a context mean and a are D trained numbers each. b starts at 0.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.bases.DiagonalNormal(2, context=5)(torch.zeros(4, 5)).mean.shape
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


PAIRS = 1 << 22  # of a row and a point that are held at a time


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
        >>> base = cf.bases.KernelMixture(2, torch.tensor([[1.0, 1.0], [3.0, 0.0]]), width=0.1, share=0.5)
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
