"""A transform as `torch.distributions.transforms.Transform`, for code that composes those."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform as TorchTransform

from counterflow.transforms.base import Transform


class AsTorch(TorchTransform):
    """Wrap a transform and a context as a bijective `torch.distributions.transforms.Transform` of vectors.

    The wrapper keeps the last pair (x, y) and its log-determinant, so `log_abs_det_jacobian(x, transform(x))` costs no
    second pass. Made by `Transform.as_torch`.

    Args:
        transform: the transform, from x (..., D) to y (..., D).
        c: the context (..., C), or None.
        cache_size: 1 to keep the last pair, 0 to keep nothing.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.MAF(2, layers=1, hidden=(8,), seed=0).transform.as_torch()
        >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
        >>> q = torch.distributions.TransformedDistribution(base, [t])
        >>> q.log_prob(q.sample((5,))).shape
        torch.Size([5])
    """

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, transform: Transform, c: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.transform = transform
        self.c = c
        self._cached: tuple[Tensor, Tensor, Tensor] | None = None  # x, y, log_det

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the last pair, which may belong to a graph that cannot be copied or pickled."""
        return super().__getstate__() | {"_cached": None, "_cached_x_y": (None, None)}

    def with_cache(self, cache_size: int = 1) -> AsTorch:
        """Return a wrapper of the same transform with this cache size."""
        return self if cache_size == self._cache_size else type(self)(self.transform, self.c, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.transform(x, self.c)
        self._keep(x, y, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, inverse_log_det = self.transform.inverse(y, self.c)
        self._keep(x, y, -inverse_log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det dy/dx|, (...)."""
        if self._cached is not None and self._cached[0] is x and self._cached[1] is y:
            return self._cached[2]
        log_det: Tensor = self.transform(x, self.c)[1]
        return log_det

    def _keep(self, x: Tensor, y: Tensor, log_det: Tensor) -> None:
        if self._cache_size:
            self._cached = (x, y, log_det)
