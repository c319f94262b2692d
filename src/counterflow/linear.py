"""Linear: a map by a constant matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterflow.transform import Transform, prepare


class Linear(Transform):
    """A linear map by a constant matrix: y = bias + W x, log_det = log|det W|.

    bias (D,) and weight (D, D) are buffers: saved with the transform, never trained. The inverse solves with W, D^3 / 3
    multiplications a call. Where W is triangular, or a product of triangular matrices, take `Triangular`.

    Raises:
        ValueError: shapes that do not agree, numbers that are not finite, or a singular weight.

    Example:
        >>> import torch, counterflow as cf
        >>> turn = cf.Linear(torch.zeros(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> y, log_det = turn(torch.tensor([1.0, 2.0]))
        >>> y.tolist(), log_det.item()
        ([-2.0, 1.0], 0.0)
    """

    bias: Tensor
    weight: Tensor

    def __init__(self, bias: Tensor | Sequence[float], weight: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__()
        bias, weight = (torch.as_tensor(v) for v in (bias, weight))
        bias, weight = (v if v.is_floating_point() else v.float() for v in (bias, weight))
        D = len(bias) if bias.dim() == 1 else 0
        if not D or weight.shape != (D, D):
            raise ValueError(f"expected bias (D,) and weight (D, D), got {tuple(bias.shape)} and {tuple(weight.shape)}")
        if not (bias.isfinite().all() and torch.linalg.slogdet(weight).logabsdet.isfinite()):
            raise ValueError("expected finite numbers and a weight that can be inverted, got others")
        self.features = D
        self.register_buffer("bias", bias.detach().clone())
        self.register_buffer("weight", weight.detach().clone(memory_format=torch.contiguous_format))

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return bias + W x and log|det W|."""
        x = prepare(self, x, c)
        return self.bias + x @ self.weight.T, self._log_det(x)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W^-1 (y - bias) and -log|det W|."""
        y = prepare(self, y, c, "y")
        rows = (y - self.bias).reshape(-1, self.features)
        return torch.linalg.solve(self.weight, rows.T).T.reshape(y.shape), -self._log_det(y)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`: W^-T score."""
        y, log_det = self.forward(x, c)
        rows = score.expand(y.shape).reshape(-1, self.features)
        return y, log_det, torch.linalg.solve(self.weight.T, rows.T).T.reshape(y.shape)

    def _log_det(self, like: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.weight).logabsdet.expand(like.shape[:-1])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"bias": self.bias.tolist(), "weight": self.weight.tolist()}

    def extra_repr(self) -> str:
        """The size."""
        return f"features={self.features}"
