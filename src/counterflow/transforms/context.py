"""A transform whose context is standardized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from counterflow.transforms.base import Transform, check_context
from counterflow.transforms.constant import Standardize


class StandardizedContext(Transform):
    """Transform with a context that is standardized first: f(x; (c - mean) / std).

    mean and std are buffers: saved with the transform, never trained.

    Args:
        transform: f, with a context of C numbers.
        mean: (C,).
        std: (C,), positive.

    Raises:
        ValueError: a transform without a context, mean and std that are not of shape (C,), numbers that are not finite,
            or a std that is not positive.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Autoregressive(features=3, context=2, hidden=(8,))
        >>> x, year = torch.randn(5, 3), torch.tensor([1999.0, 2001.0])
        >>> by_year = cf.transforms.StandardizedContext(t, [2000.0, 2000.0], [10.0, 10.0])
        >>> torch.allclose(by_year(x, year)[0], t(x, (year - 2000) / 10)[0])
        True
    """

    def __init__(self, transform: Transform, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        super().__init__()
        self.transform = transform
        self.standardize = Standardize(mean, std)
        self.features, self.context = transform.features, transform.context
        self.forward_cost, self.inverse_cost = transform.forward_cost, transform.inverse_cost
        if self.context != self.standardize.features:
            raise ValueError(
                f"expected mean and std of shape ({self.context},), the context of the transform, got "
                f"({self.standardize.features},)"
            )

    def _standardized(self, c: Tensor | None) -> Tensor:
        check_context(c, self.context, type(self).__name__)
        y, _ = self.standardize(c)  # type: ignore[arg-type]  # it is not None: the context is at least 1
        return y

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        return self.transform(x, self._standardized(c))

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        return self.transform.inverse(y, self._standardized(c))

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.transform.forward_by_feature(x, total, self._standardized(c))

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        return self.transform.push_score(x, score, self._standardized(c))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        mean, std = self.standardize.mean, self.standardize.std
        return {"transform": self.transform, "mean": mean.tolist(), "std": std.tolist()}

    def __repr__(self) -> str:
        return f"StandardizedContext({self.transform!r})"
