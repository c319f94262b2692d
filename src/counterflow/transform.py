"""Invertible maps. Each returns its value and its log-determinant together.

Six letters are used everywhere: B batch, S samples, D features, C context, H hidden units, P parameters
per feature. A value is (..., D), a context (..., C), and log_det (...), in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

Cost = Literal["one pass", "forward substitution", "mixed"]


class Transform(nn.Module, ABC):
    """An invertible map of D features that may depend on a context of C numbers.

    Calling the transform is `forward`. Every argument may have any batch shape; the batch shapes of the
    value and of the context broadcast against each other.

    Attributes:
        features: D, the size of the last axis of x and y.
        context: C, the size of the last axis of c; 0 means that c must be None.
        forward_cost, inverse_cost: what each direction takes: "one pass" through the network, or
            "forward substitution", which solves a triangular system and costs about as much.
    """

    features: int
    context: int = 0
    forward_cost: Cost = "one pass"
    inverse_cost: Cost = "one pass"

    @abstractmethod
    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y = f(x; c) and log|det df/dx|."""

    @abstractmethod
    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x with f(x; c) = y, and log|det dx/dy|, the log-determinant of the inverse map."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, from which a saved transform is built again."""

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Like `forward`, but log_det is kept by feature and added to `total` (..., D).

        Each term stays with the feature that it belongs to when features change places, as the free bits of
        Kingma et al. 2016 need it. The sum of the terms over features is log_det.
        """
        raise TypeError(
            f"expected a transform with a log-determinant by feature, got {type(self).__name__}; free bits need a flow "
            "that samples in one pass, such as an IAF"
        )

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Carry a score through the map: y, log_det and, without a graph, the gradient of log q_y(y) for y.

            score_y = J^-T (score_x - d log_det / dx),     score_x = d log q_x(x) / dx,  J = dy/dx

        Source: Vaitl et al. 2024, "Fast and unified path gradient estimators for normalizing flows".
        """
        y, log_det = self.forward(x, c)
        with torch.enable_grad():
            # score_y is the vector-Jacobian product of (x, log_det of the inverse) for y with (score, 1).
            leaf = y.detach().requires_grad_()
            back, inverse_log_det = self.inverse(leaf, None if c is None else c.detach())
            (score_y,) = torch.autograd.grad((back * score).sum() + inverse_log_det.sum(), leaf)
        return y, log_det, score_y


def prepare(transform: Transform, x: Tensor, c: Tensor | None, name: str = "x", kind: str | None = None) -> Tensor:
    """Check x (..., D) and c (..., C) against the transform and expand x to their common batch shape.

    name and kind are what the messages call x and the transform.

    Raises:
        TypeError: x or c is not a floating-point tensor.
        ValueError: a wrong number of features, or a context that is missing, not wanted or of a wrong shape.
    """
    kind, D = kind or type(transform).__name__, transform.features
    _check_tensor(x, name)
    check_context(c, transform.context, kind)
    if x.dim() == 0 or x.shape[-1] != D:
        raise ValueError(
            f"expected {name} of shape (..., {D}), got {tuple(x.shape)}; this {kind} was built with features={D}"
        )
    if c is None:
        return x
    try:
        batch = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"expected batch shapes that broadcast, got {name} {tuple(x.shape)} and c {tuple(c.shape)}; "
            f"give c the batch shape of {name}, or one that torch broadcasts to it"
        ) from None
    return x.expand(*batch, D)


def check_context(c: Tensor | None, context: int, kind: str) -> None:
    """Raise unless c is (..., context), or None for context=0."""
    if c is not None:
        _check_tensor(c, "c")
    if (c is None) != (context == 0) or (c is not None and (c.dim() == 0 or c.shape[-1] != context)):
        wanted = f"a context c of shape (..., {context})" if context else "no context"
        came = "None" if c is None else f"c of shape {tuple(c.shape)}"
        raise ValueError(f"expected {wanted}, got {came}; this {kind} was built with context={context}")


def _check_tensor(value: Tensor, name: str) -> None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        came = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        how = ".float()" if isinstance(value, Tensor) else "torch.as_tensor(...).float()"
        raise TypeError(f"expected {name} as a floating-point tensor, got {came}; convert it with {how}")


def positive(value: int, name: str) -> int:
    """Return value if it is a whole number of at least 1, else say what came."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} as a whole number of at least 1, got {value!r}")
    return value


def rank(x: Tensor, edges: Tensor) -> Tensor:
    """How many of the ascending edges (..., K) each x (..., N) has reached: x >= edge. (..., N), whole numbers."""
    if is_compiling():  # ONNX has no search
        return (x[..., None] >= edges[..., None, :]).sum(-1)
    return torch.searchsorted(edges.contiguous(), x.contiguous(), right=True)


class Compose(Transform):
    """Transforms one after the other: y = f_n(... f_2(f_1(x))), log_det = the sum of theirs.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Compose([cf.Permute([1, 0]), cf.Standardize(torch.zeros(2), torch.full((2,), 2.0))])
        >>> y, log_det = t(torch.tensor([1.0, 3.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([1.5, 0.5], -1.3863)
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        if not transforms or not all(isinstance(t, Transform) for t in transforms):
            raise ValueError(f"expected at least one transform in Compose, and transforms only, got {transforms!r}")
        sizes = {t.features for t in transforms}
        contexts = {t.context for t in transforms if t.context}
        if len(sizes) > 1 or len(contexts) > 1:
            raise ValueError(
                f"expected transforms that agree on features and context, got features={sorted(sizes)} "
                f"and context={sorted(contexts)}"
            )
        self.transforms = nn.ModuleList(transforms)
        self.features = sizes.pop()
        self.context = contexts.pop() if contexts else 0
        costs = [(t.forward_cost, t.inverse_cost) for t in transforms]
        self.forward_cost, self.inverse_cost = _joint_costs(costs)

    def __iter__(self) -> Any:
        return iter(self.transforms)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        x = prepare(self, x, c)
        total = x.new_zeros(x.shape[:-1])
        for t in self:
            x, log_det = t(x, c if t.context else None)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|, the transforms undone from the last to the first."""
        y = prepare(self, y, c, "y")
        total = y.new_zeros(y.shape[:-1])
        for t in reversed(list(self)):
            y, log_det = t.inverse(y, c if t.context else None)
            total = total + log_det
        return y, total

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        x = prepare(self, x, c)
        for t in self:
            x, total = t.forward_by_feature(x, total, c if t.context else None)
        return x, total

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`: one back substitution a layer."""
        x = prepare(self, x, c)
        total = x.new_zeros(x.shape[:-1])
        for t in self:
            x, log_det, score = t.push_score(x, score, c if t.context else None)
            total = total + log_det
        return x, total, score

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"transforms": list(self)}

    def __repr__(self) -> str:
        return "\n  ".join(["Compose(", *(repr(t).replace("\n", "\n  ") for t in self)]) + "\n)"


def _joint_costs(costs: list[tuple[Cost, Cost]]) -> tuple[Cost, Cost]:
    """What both directions of a chain cost; layers without a network are one pass both ways and do not count."""
    counted = [pair for pair in costs if pair != ("one pass", "one pass")] or costs
    forward, inverse = ({pair[side] for pair in counted} for side in (0, 1))
    return forward.pop() if len(forward) == 1 else "mixed", inverse.pop() if len(inverse) == 1 else "mixed"


class Inverse(Transform):
    """The map that runs the other way: forward is t.inverse, inverse is t.forward.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Inverse(cf.Standardize(torch.tensor([1.0]), torch.tensor([2.0])))
        >>> t(torch.tensor([3.0]))[0].item()
        7.0
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform
        self.features, self.context = transform.features, transform.context
        self.forward_cost, self.inverse_cost = transform.inverse_cost, transform.forward_cost

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return t^-1(x) and its log-determinant."""
        return self.transform.inverse(x, c)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return t(y) and its log-determinant."""
        return self.transform(y, c)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"transform": self.transform}

    def __repr__(self) -> str:
        return f"Inverse({self.transform!r})"


class Permute(Transform):
    """Reorder the features: y_i = x_order[i], log_det = 0.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.Permute([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))[0].tolist()
        [30.0, 10.0, 20.0]
    """

    order: Tensor
    places: Tensor

    def __init__(self, order: Sequence[int] | Tensor) -> None:
        super().__init__()
        indices = torch.as_tensor(order)
        if indices.dim() != 1 or sorted(indices.tolist()) != list(range(len(indices))) or not len(indices):
            raise ValueError(
                f"expected order as a permutation of 0..D-1, got {indices.tolist()}; each index must stand in it once"
            )
        self.features = len(indices)
        self.register_buffer("order", indices.long(), persistent=False)
        self.register_buffer("places", torch.argsort(indices.long()), persistent=False)
        self._reversed = indices.tolist() == list(range(self.features))[::-1]

    def _take(self, x: Tensor, order: Tensor) -> Tensor:
        # A flip and its gradient take a tenth of the time of an index and its own (256 x 784, one core).
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
        """See `Transform.forward_by_feature`: the terms move with their features."""
        x = prepare(self, x, c)
        return self._take(x, self.order), self._take(total, self.order)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        y, log_det = self.forward(x, c)
        return y, log_det, self._take(score, self.order)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"order": self.order.tolist()}

    def extra_repr(self) -> str:
        """Short for a long order."""
        order = self.order.tolist()
        if self._reversed:
            return f"reversed, features={self.features}"
        return str(order) if self.features <= 8 else f"features={self.features}"


class Standardize(Transform):
    """Shift and scale by constants: y = (x - mean) / std, log_det = -sum(log std).

    mean and std are (D,) and are buffers: saved with the transform, never trained.

    Raises:
        ValueError: mean and std are not two vectors of one length, or a std is not positive and finite.

    Example:
        >>> import torch, counterflow as cf
        >>> y, log_det = cf.Standardize(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))(torch.tensor([3.0, 2.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([1.0, 0.0], -2.0794)
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> None:
        super().__init__()
        mean, std = (torch.as_tensor(v) for v in (mean, std))
        mean, std = (v if v.is_floating_point() else v.float() for v in (mean, std))
        if mean.dim() != 1 or mean.shape != std.shape or not len(mean):
            raise ValueError(f"expected mean and std of one shape (D,), got {tuple(mean.shape)} and {tuple(std.shape)}")
        bad = torch.nonzero(~(torch.isfinite(mean) & torch.isfinite(std) & (std > 0)))[:, 0].tolist()
        if bad:
            raise ValueError(
                f"expected finite means and positive, finite stds, got mean={mean[bad[0]].item()}, "
                f"std={std[bad[0]].item()} at feature {bad[0]}; drop constant columns first"
            )
        self.features = len(mean)
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x - mean) / std and -sum(log std)."""
        x = prepare(self, x, c)
        return (x - self.mean) / self.std, -self.std.log().sum().expand(x.shape[:-1])

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y * std + mean and sum(log std)."""
        y = prepare(self, y, c, "y")
        return y * self.std + self.mean, self.std.log().sum().expand(y.shape[:-1])

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.forward(x, c)[0], total - self.std.log()

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        y, log_det = self.forward(x, c)
        return y, log_det, score * self.std

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def extra_repr(self) -> str:
        """The size."""
        return f"features={self.features}"


class Triangular(Transform):
    """A linear map by a constant triangular matrix: y = mean + L x, log_det = sum_i log L_ii.

    mean (D,) and factor L (D, D), lower triangular with a positive diagonal, are buffers: saved with the transform,
    never trained. It carries N(0, I) to N(mean, L L^T).

    Raises:
        ValueError: shapes that do not agree, numbers that are not finite, or a factor that is not triangular with a
            positive diagonal.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Triangular(torch.tensor([1.0, 0.0]), torch.tensor([[2.0, 0.0], [1.0, 0.5]]))
        >>> y, log_det = t(torch.tensor([1.0, 2.0]))
        >>> y.tolist(), log_det.item()
        ([3.0, 2.0], 0.0)
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor | Sequence[float], factor: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__()
        mean, factor = (torch.as_tensor(v) for v in (mean, factor))
        mean, factor = (v if v.is_floating_point() else v.float() for v in (mean, factor))
        D = len(mean) if mean.dim() == 1 else 0
        if not D or factor.shape != (D, D):
            raise ValueError(f"expected mean (D,) and factor (D, D), got {tuple(mean.shape)} and {tuple(factor.shape)}")
        if not (mean.isfinite().all() and factor.isfinite().all()):
            raise ValueError("expected finite numbers in mean and factor, got a NaN or an infinity")
        if factor.triu(1).any() or not (factor.diagonal() > 0).all():
            raise ValueError(
                "expected factor as a lower triangular matrix with a positive diagonal, such as "
                "torch.linalg.cholesky(covariance)"
            )
        self.features = D
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("factor", factor.detach().clone())

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean + L x and sum(log diag L)."""
        x = prepare(self, x, c)
        return self.mean + x @ self.factor.T, self._log_det(x)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return L^-1 (y - mean) and -sum(log diag L)."""
        y = prepare(self, y, c, "y")
        return self._divide(y - self.mean, self.factor.T), -self._log_det(y)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.forward(x, c)[0], total + self.factor.diagonal().log()

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`: L^-T score."""
        y, log_det = self.forward(x, c)
        return y, log_det, self._divide(score.expand(y.shape), self.factor)

    def _divide(self, v: Tensor, by: Tensor) -> Tensor:
        """v by^-1 for rows v (..., D)."""
        rows = v.reshape(-1, self.features)
        return torch.linalg.solve_triangular(by, rows, upper=by is not self.factor, left=False).reshape(v.shape)

    def _log_det(self, like: Tensor) -> Tensor:
        return self.factor.diagonal().log().sum().expand(like.shape[:-1])

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"mean": self.mean.tolist(), "factor": self.factor.tolist()}

    def extra_repr(self) -> str:
        """The size."""
        return f"features={self.features}"
