"""Base distributions of flows."""

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
from counterflow.made.derived import Derived


class Base(nn.Module, ABC):
    """Base distribution of a flow; called with a context, it returns a torch distribution with event shape (D,).

    Attributes:
        features: D.
        context: C, the size of the context; 0 for a distribution that does not depend on it.
    """

    features: int
    context: int = 0

    @abstractmethod
    def forward(self, c: Tensor | None = None) -> Distribution:
        """Return the distribution for a context c (..., C), of batch shape (...), or for None."""

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"features": self.features}


def _normal(mean: Tensor, std: Tensor) -> Distribution:
    return Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)


class StandardNormal(Derived, Base):
    """Standard normal N(0, I) in D dimensions.

    Args:
        features: D.

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
        self.register_derived()

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        mean = torch.zeros(self.features, device="cpu")
        return {"mean": mean, "std": torch.ones_like(mean)}

    def forward(self, c: Tensor | None = None) -> Distribution:
        """Return the distribution, the same for every context."""
        return _normal(self.mean, self.std)

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"


class StudentT(Base):
    """D independent Student t variables of location 0 and scale 1 with trained degrees of freedom.

        df = 1 / (1 / max_df + exp(a - 4))

    a is trained for each feature and starts at 0. A flow of affine maps keeps the tails of its base, and importance
    weights are bounded only if the tails of the approximation are no lighter than those of the target.

    Args:
        features: D.
        max_df: upper limit of the degrees of freedom, and so the lightest tails.

    Raises:
        ValueError: max_df is not positive and finite.

    Source: Jaini et al. 2020, "Tails of Lipschitz Triangular Flows", for the effect of a flow on the tails.

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
        """Degrees of freedom (D,)."""
        return 1 / (1 / self.max_df + torch.exp(self.a - 4))

    def forward(self, c: Tensor | None = None) -> Distribution:
        """Return the distribution, the same for every context."""
        zero = torch.zeros_like(self.a)
        each = StudentTDistribution(self.df, zero, zero + 1, validate_args=False)
        return Independent(each, 1, validate_args=False)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"features": self.features, "max_df": self.max_df}

    def __repr__(self) -> str:
        return f"StudentT(features={self.features}, max_df={self.max_df:g})"


class DiagonalNormal(Base):
    """D independent normals whose means and standard deviations are linear in the context, up to a clip.

        (mean, a) = W c + b,    std = exp(bound * tanh(a / bound)),    bound = 7

    b starts at 0. Without a context, mean and a are D trained numbers each, which start at 0.

    Args:
        features: D.
        context: C; 0 for no context.

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
        """Return the distribution for each context."""
        both = self.constant if self.linear is None else self.linear(c)
        # One of the two is not None. Under autocast the linear map lowers the precision.
        mean, a = (both if c is None else both.to(c.dtype)).chunk(2, -1)  # type: ignore[union-attr]
        return _normal(mean, torch.exp(self.bound * torch.tanh(a / self.bound)))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"features": self.features, "context": self.context}

    def __repr__(self) -> str:
        return f"DiagonalNormal(features={self.features}, context={self.context})"


MAX_PAIRS = 1 << 22  # largest number of (row, point) pairs whose distances are held in memory at a time


class KernelMixture(Base):
    """Mixture of a standard normal and a Gaussian kernel at each of N points.

        q_0(z) = (1 - share) N(z; 0, I) + share / N sum_n N(z; point_n, width^2 I)

    If the points are the base-space images of the training rows under a trained flow, this is a kernel density estimate
    on top of the flow: it covers rows that occur nearly twice, and clusters too small for a network. Points, width and
    share are saved with the flow and never trained. Scoring B rows takes N D B multiplications.

    Args:
        features: D.
        points: (N, D), or only the number N, for points that are loaded later and 0 until then.
        width: standard deviation of each kernel.
        share: total weight of the kernels, in (0, 1).

    Raises:
        ValueError: points of a wrong shape, a width that is not positive, or a share outside (0, 1).

    Source: Hjort and Glad 1995, "Nonparametric density estimation with a parametric start".

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
        """Return the distribution, the same for every context."""
        return _KernelDistribution(self.points, self.width, self.share)

    def standardized(self, z: Tensor) -> Tensor:
        """Return residuals (B, D) of z (B, D), which are N(0, I) if z is from q_0.

        residual = (z - centre) / std of one component, drawn in proportion to its density at z
        """
        N, D = self.points.shape
        residuals = []
        for rows in z.split(max(1, MAX_PAIRS // N)):
            distances = torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist") / self.width
            kernels = torch.log(self.share / N) - D * self.width.log() - distances.square() / 2
            normal = torch.log1p(-self.share) - rows.square().sum(-1, keepdim=True) / 2
            drawn = torch.distributions.Categorical(logits=torch.cat([kernels, normal], 1)).sample()
            centre = self.points[drawn.clamp_max(N - 1)]
            residuals.append(torch.where((drawn == N)[:, None], rows, (rows - centre) / self.width))
        return torch.cat(residuals)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, with the number of points; the points are saved among the weights."""
        return {"features": self.features, "points": len(self.points)}

    def extra_repr(self) -> str:
        """Return the numbers of features and points."""
        return f"features={self.features}, points={len(self.points)}"


class _KernelDistribution(Distribution):
    """Distribution of a `KernelMixture`."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.real_vector
    has_rsample = False  # the choice of a component has no gradient

    def __init__(self, points: Tensor, width: Tensor, share: Tensor, batch_shape: Size = Size()) -> None:  # noqa: B008
        self.points, self.width, self.share = points, width, share
        super().__init__(batch_shape, points.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _KernelDistribution:
        return _KernelDistribution(self.points, self.width, self.share, Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        N, D = self.points.shape
        rows = value.reshape(-1, D).split(max(1, MAX_PAIRS // N))
        kernels = torch.cat([self._log_kernels(part) for part in rows]).reshape(value.shape[:-1])
        normal = -value.square().sum(-1) / 2 - D / 2 * math.log(2 * math.pi)
        return torch.logaddexp(torch.log1p(-self.share) + normal, self.share.log() + kernels)

    def _log_kernels(self, rows: Tensor) -> Tensor:
        """Return the log density (B,) of the mixture of the kernels, without the normal, at rows (B, D)."""
        N, D = self.points.shape
        # Distances from differences: expanding the square would lose all digits for close points.
        distance = torch.cdist(rows, self.points, compute_mode="donot_use_mm_for_euclid_dist") / self.width
        scale = math.log(N) + D * self.width.log() + D / 2 * math.log(2 * math.pi)
        return torch.logsumexp(-distance.square() / 2, -1) - scale

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        eps = torch.randn(*shape, self.event_shape[0], dtype=self.points.dtype, device=self.points.device)
        centres = self.points[torch.randint(len(self.points), shape, device=eps.device)]
        from_kernel = torch.rand(shape, device=eps.device) < self.share
        return torch.where(from_kernel[..., None], centres + self.width * eps, eps)
