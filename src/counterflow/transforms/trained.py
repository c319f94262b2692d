"""Trained maps without a network: a shift and scale of every feature, and a linear map by its LU factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from counterflow.checks import positive
from counterflow.engine.chain import Scale, Stage
from counterflow.transforms.base import Transform, prepare
from counterflow.transforms.compose import Inverse


class ActNorm(Transform):
    """Trained shift and scale of every feature, from data to noise.

        y = (x - mean) / std,    std = exp(log_std),    log_det = -sum_i log_std_i

    It starts as the identity. `initialize` sets mean and std from data, so that the outputs start standardized.

    Args:
        features: D.

    Attributes:
        mean: (D,).
        log_std: (D,), not bounded, because features may have any unit.

    Raises:
        ValueError: features is not a whole number of at least 1.

    Source: Kingma and Dhariwal 2018, "Glow: Generative Flow with Invertible 1x1 Convolutions", section 3.1.

    Example:
        >>> import torch, counterflow as cf
        >>> from counterflow.transforms.trained import initialize
        >>> t = cf.transforms.ActNorm(2)
        >>> x = torch.tensor([[0.0, 5.0], [2.0, 9.0]])
        >>> initialize(t, x)[0].tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_std = nn.Parameter(torch.zeros(features))
        self._stage = Scale(features)

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`; compiled code has no gradient of a scale, and the bits should not depend on it."""
        if self.mean.requires_grad or self.log_std.requires_grad:
            return None
        zeros = torch.zeros_like(self.mean)
        if inverse:
            return [self._stage], [torch.cat([self.log_std.exp(), zeros, self.mean, self.log_std])]
        return [self._stage], [torch.cat([(-self.log_std).exp(), self.mean, zeros, -self.log_std])]

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x - mean) / std and -sum_i log_std_i."""
        x = prepare(self, x, c)
        return (x - self.mean) * (-self.log_std).exp(), -self.log_std.sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean + y std and sum_i log_std_i."""
        y = prepare(self, y, c, "y")
        return self.mean + y * self.log_std.exp(), self.log_std.sum().expand(y.shape[:-1])

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.forward(x, c)[0], total - self.log_std

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        return self.inverse(y, c)[0], total + self.log_std

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        y, log_det = self.forward(x, c)
        return y, log_det, (score * self.log_std.exp()).detach()

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`."""
        x, log_det = self.inverse(y, c)
        return x, log_det, (score * (-self.log_std).exp()).detach()

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"features": self.features}

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"


class LULinear(Transform):
    """Trained linear map by its LU factors: y = L U x + bias, log_det = sum_i log U_ii.

    L is lower triangular with ones on its diagonal, U upper triangular with a positive one. Both directions take D^2
    multiplications for each row, and no direction needs the inverse of a matrix. It starts as the identity. With a
    `Permute` before it, it is the PLU convolution of Glow for vectors.

    Args:
        features: D.

    Attributes:
        factors: (D, D): L below the diagonal, U above it, log U_ii on it.
        bias: (D,).

    Raises:
        ValueError: features is not a whole number of at least 1.

    Source: Kingma and Dhariwal 2018, "Glow: Generative Flow with Invertible 1x1 Convolutions", section 3.2.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.transforms.LULinear(3)
        >>> t.weight.tolist() == torch.eye(3).tolist()
        True
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.factors = nn.Parameter(torch.zeros(features, features))
        self.bias = nn.Parameter(torch.zeros(features))

    def triangular(self) -> tuple[Tensor, Tensor]:
        """Return L and U, (D, D) each."""
        lower = self.factors.tril(-1) + torch.eye(self.features, dtype=self.factors.dtype, device=self.factors.device)
        return lower, self.factors.triu(1) + torch.diag(self.factors.diagonal().exp())

    @property
    def weight(self) -> Tensor:
        """Matrix W = L U, (D, D)."""
        lower, upper = self.triangular()
        return lower @ upper

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return L U x + bias and sum_i log U_ii."""
        x = prepare(self, x, c)
        lower, upper = self.triangular()
        return self.bias + (x @ upper.T) @ lower.T, self._log_det(x)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return U^-1 L^-1 (y - bias) and -sum_i log U_ii; two triangular systems."""
        y = prepare(self, y, c, "y")
        lower, upper = self.triangular()
        rows = (y - self.bias).reshape(-1, self.features)
        rows = torch.linalg.solve_triangular(lower.T, rows, upper=True, left=False)
        rows = torch.linalg.solve_triangular(upper.T, rows, upper=False, left=False)
        return rows.reshape(y.shape), -self._log_det(y)

    @torch.no_grad()
    def _divided(self, score: Tensor) -> Tensor:
        """Return W^-T score."""
        lower, upper = self.triangular()
        rows = score.reshape(-1, self.features)
        rows = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
        return torch.linalg.solve_triangular(lower, rows, upper=False, left=False).reshape(score.shape)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`; W^-T score."""
        y, log_det = self.forward(x, c)
        return y, log_det, self._divided(score.expand(y.shape))

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`; W^T score."""
        x, log_det = self.inverse(y, c)
        return x, log_det, (score.expand(x.shape) @ self.weight).detach()

    def _log_det(self, like: Tensor) -> Tensor:
        return self.factors.diagonal().sum().expand(like.shape[:-1])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"features": self.features}

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"


@torch.no_grad()
def initialize(transform: Transform, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Set every ActNorm of a transform from the rows that reach it, so that its outputs are standardized.

    Call it once, before the training, with rows of data: `initialize(cf.Inverse(flow.transform), rows)` for a flow.

    Args:
        transform: map from data to noise.
        x: (N, D), at least two rows.
        c: context (N, C), or None.

    Returns:
        The value and the log_det of the transform at x.

    Raises:
        ValueError: fewer than two rows, or a feature that is constant where an ActNorm meets it.

    Source: data-dependent initialization, Kingma and Dhariwal 2018, section 3.1.

    Example:
        >>> import torch, counterflow as cf
        >>> from counterflow.transforms.trained import initialize
        >>> t = cf.Compose([cf.Autoregressive(3, hidden=(8,)), cf.transforms.ActNorm(3)])
        >>> y, _ = initialize(t, 5 + 2 * torch.randn(1000, 3))
        >>> torch.allclose(y.mean(0), torch.zeros(3), atol=1e-4), torch.allclose(y.std(0), torch.ones(3), atol=0.01)
        (True, True)
    """
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"expected at least two rows (N, D) to initialize from, got x of shape {tuple(x.shape)}")
    total = x.new_zeros(len(x))
    for part in transform.flattened():
        inner = part.transform if isinstance(part, Inverse) else part
        if isinstance(inner, ActNorm):
            mean = x.mean(0)
            std = x.std(0, correction=0)
            constant = torch.nonzero(~(std > 0))[:, 0].tolist()
            if constant:
                raise ValueError(f"expected features that vary, got a constant one: {constant[0]}; drop it first")
            is_inverse = inner is not part  # which multiplies by std and adds the mean
            inner.mean.copy_(-mean / std if is_inverse else mean)
            inner.log_std.copy_(-std.log() if is_inverse else std.log())
        x, log_det = part(x, c if part.context else None)
        total = total + log_det
    return x, total
