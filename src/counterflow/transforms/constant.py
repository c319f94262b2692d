"""Transforms by constants, which are saved with the transform and never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from counterflow.engine.chain import Permutation, Scale, Stage
from counterflow.made.derived import Derived, with_values
from counterflow.transforms.base import Transform, prepare

Vector = Tensor | Sequence[float]
Matrix = Tensor | Sequence[Sequence[float]]


def _as_float(values: Vector | Matrix) -> Tensor:
    """Return a floating-point tensor of its own memory, without gradients."""
    tensor = torch.as_tensor(values)
    if not tensor.is_floating_point():
        tensor = tensor.float()
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _check_square(vector: Tensor, matrix: Tensor, names: tuple[str, str]) -> int:
    """Return D; raise ValueError unless the vector is (D,) and the matrix (D, D), D at least 1."""
    D = len(vector) if vector.dim() == 1 else 0
    if not D or matrix.shape != (D, D):
        raise ValueError(
            f"expected {names[0]} (D,) and {names[1]} (D, D), got {tuple(vector.shape)} and {tuple(matrix.shape)}"
        )
    return D


class Permute(Derived, Transform):
    """Reorder the features: y_i = x_order[i], log_det = 0.

    Args:
        order: a permutation of 0..D-1.

    Raises:
        TypeError: order holds numbers that are not integers.
        ValueError: order is not a permutation.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))[0].tolist()
        [30.0, 10.0, 20.0]
    """

    order: Tensor
    places: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        with with_values():
            self._set_order(torch.as_tensor(order, device=order.device if isinstance(order, Tensor) else "cpu"))
        self.register_derived()

    def _set_order(self, indices: Tensor) -> None:
        if indices.numel() and (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool):
            raise TypeError(
                f"expected order to hold integers, got a tensor of {indices.dtype}; convert it with .long()"
            )
        if indices.dim() != 1 or sorted(indices.tolist()) != list(range(len(indices))) or not len(indices):
            raise ValueError(f"expected order to be a permutation of 0..D-1, each index once, got {indices.tolist()}")
        self.features = len(indices)
        self._indices = tuple(indices.tolist())
        self._reversed = self._indices == tuple(range(self.features))[::-1]
        self._stages = (Permutation(self._indices), Permutation(tuple(torch.argsort(indices).tolist())))

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        order = torch.tensor(self._indices, device="cpu")
        return {"order": order, "places": torch.argsort(order)}

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`."""
        return [self._stages[inverse]], []

    def _take(self, x: Tensor, order: Tensor) -> Tensor:
        # A flip with its gradient takes a tenth of the time of an index with its gradient (256 x 784, one core).
        return x.flip(-1) if self._reversed else x[..., order]

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x in the new order, and zeros."""
        x = prepare(self, x, c)
        return self._take(x, self.order), x.new_zeros(x.shape[:-1])

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y in the old order, and zeros."""
        y = prepare(self, y, c, "y")
        return self._take(y, self.places), y.new_zeros(y.shape[:-1])

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`; the terms move with their features."""
        x = prepare(self, x, c)
        return self._take(x, self.order), self._take(total, self.order)

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        y = prepare(self, y, c, "y")
        return self._take(y, self.places), self._take(total, self.places)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        y, log_det = self.forward(x, c)
        return y, log_det, self._take(score, self.order)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"order": list(self._indices)}

    def extra_repr(self) -> str:
        """Return the order, or the number of features if it is long."""
        if self._reversed:
            return f"reversed, features={self.features}"
        return str(list(self._indices)) if self.features <= 8 else f"features={self.features}"


class Standardize(Transform):
    """Shift and scale every feature, from data to noise: y = (x - mean) / std, log_det = -sum_i log std_i.

    Args:
        mean: (D,).
        std: (D,), positive.

    Raises:
        ValueError: mean and std are not two vectors of one length, or hold numbers that are not finite, or a std is not
            positive.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_det = cf.Standardize(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))(torch.tensor([3.0, 2.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([1.0, 0.0], -2.0794)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Vector, std: Vector) -> None:
        super().__init__()
        mean = _as_float(mean)
        std = _as_float(std)
        if mean.dim() != 1 or mean.shape != std.shape or not len(mean):
            raise ValueError(f"expected mean and std of one shape (D,), got {tuple(mean.shape)} and {tuple(std.shape)}")
        bad = torch.nonzero(~(torch.isfinite(mean) & torch.isfinite(std) & (std > 0)))[:, 0].tolist()
        if bad:
            raise ValueError(
                f"expected finite means and positive, finite stds, got mean={mean[bad[0]].item()}, "
                f"std={std[bad[0]].item()} at feature {bad[0]}; drop constant columns first"
            )
        self.features = len(mean)
        self._stage = Scale(len(mean))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`."""
        log_std = self.std.log()
        zeros = torch.zeros_like(self.mean)
        if inverse:
            return [self._stage], [torch.cat([self.std, zeros, self.mean, log_std])]
        return [self._stage], [torch.cat([1 / self.std, self.mean, zeros, -log_std])]

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x - mean) / std and -sum_i log std_i."""
        x = prepare(self, x, c)
        return (x - self.mean) / self.std, -self.std.log().sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean + y std and sum_i log std_i."""
        y = prepare(self, y, c, "y")
        return y * self.std + self.mean, self.std.log().sum().expand(y.shape[:-1])

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.forward(x, c)[0], total - self.std.log()

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        return self.inverse(y, c)[0], total + self.std.log()

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        y, log_det = self.forward(x, c)
        return y, log_det, score * self.std

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"


class Whiten(Transform):
    """Whiten with a triangular matrix, from data to noise: y = L^-1 (x - mean), log_det = -sum_i log L_ii.

    It maps N(mean, L L^T) to N(0, I).

    Args:
        mean: (D,).
        factor: L, (D, D), lower triangular with a positive diagonal, such as a Cholesky factor of the covariance.

    Raises:
        ValueError: shapes that do not agree, numbers that are not finite, or a factor that is not triangular with a
            positive diagonal.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.transforms.Whiten(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> y, log_det = t(torch.tensor([3.0, 2.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([1.0, 1.0], -0.6931)
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Vector, factor: Matrix) -> None:
        super().__init__()
        mean = _as_float(mean)
        factor = _as_float(factor)
        self.features = _check_square(mean, factor, ("mean", "factor"))
        if not (mean.isfinite().all() and factor.isfinite().all()):
            raise ValueError("expected finite numbers in mean and factor, got a NaN or an infinity")
        if factor.triu(1).any() or not (factor.diagonal() > 0).all():
            raise ValueError(
                "expected factor to be a lower triangular matrix with a positive diagonal, such as "
                "torch.linalg.cholesky(covariance)"
            )
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return L^-1 (x - mean) and -sum_i log L_ii."""
        x = prepare(self, x, c)
        return self._divide(x - self.mean, self.factor.T), -self._log_det(x)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean + L y and sum_i log L_ii."""
        y = prepare(self, y, c, "y")
        return self.mean + y @ self.factor.T, self._log_det(y)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.forward(x, c)[0], total - self.factor.diagonal().log()

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        return self.inverse(y, c)[0], total + self.factor.diagonal().log()

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`; L^T score."""
        y, log_det = self.forward(x, c)
        return y, log_det, score.expand(y.shape) @ self.factor

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`; L^-T score."""
        x, log_det = self.inverse(y, c)
        return x, log_det, self._divide(score.expand(x.shape), self.factor)

    def _divide(self, v: Tensor, by: Tensor) -> Tensor:
        """Return v by^-1 for rows v (..., D), where by is L or L^T."""
        rows = v.reshape(-1, self.features)
        return torch.linalg.solve_triangular(by, rows, upper=by is not self.factor, left=False).reshape(v.shape)

    def _log_det(self, like: Tensor) -> Tensor:
        return self.factor.diagonal().log().sum().expand(like.shape[:-1])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"mean": self.mean.tolist(), "factor": self.factor.tolist()}

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"


class Linear(Transform):
    """Linear map by an invertible matrix: y = W x + bias, log_det = log|det W|.

    The inverse solves with W at every call, D^3 / 3 multiplications. `Whiten` is cheaper for triangular matrices.

    Args:
        bias: (D,).
        weight: W, (D, D), as in `torch.nn.Linear`.

    Raises:
        ValueError: shapes that do not agree, numbers that are not finite, or a singular weight.

    Example:
        >>> import torch, counterflow as cf
        >>> rotation = cf.transforms.Linear(torch.zeros(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
        >>> y, log_det = rotation(torch.tensor([1.0, 2.0]))
        >>> y.tolist(), log_det.item()
        ([-2.0, 1.0], 0.0)
    """

    bias: Tensor
    weight: Tensor

    def __init__(self, bias: Vector, weight: Matrix) -> None:
        super().__init__()
        bias = _as_float(bias)
        weight = _as_float(weight)
        self.features = _check_square(bias, weight, ("bias", "weight"))
        if not (bias.isfinite().all() and weight.isfinite().all()):
            raise ValueError("expected finite numbers in bias and weight, got a NaN or an infinity")
        if not torch.linalg.slogdet(weight).logabsdet.isfinite():
            raise ValueError("expected an invertible weight, got a singular one")
        self.register_buffer("bias", bias)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W x + bias and log|det W|."""
        x = prepare(self, x, c)
        return self.bias + x @ self.weight.T, self._log_det(x)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return W^-1 (y - bias) and -log|det W|."""
        y = prepare(self, y, c, "y")
        rows = (y - self.bias).reshape(-1, self.features)
        return torch.linalg.solve(self.weight, rows.T).T.reshape(y.shape), -self._log_det(y)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`; W^-T score."""
        y, log_det = self.forward(x, c)
        rows = score.expand(y.shape).reshape(-1, self.features)
        return y, log_det, torch.linalg.solve(self.weight.T, rows.T).T.reshape(y.shape)

    def _log_det(self, like: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.weight).logabsdet.expand(like.shape[:-1])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"bias": self.bias.tolist(), "weight": self.weight.tolist()}

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"features={self.features}"
