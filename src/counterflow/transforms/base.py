"""Base class of the transforms, and the checks of their arguments.

Six letters are used everywhere: B batch, S samples, D features, C context, H hidden units, P parameters per feature. A
value is (..., D), a context (..., C), and log_det (...), in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.distributions.transforms import Transform as TorchTransform

from counterflow.engine.chain import Stage

Cost = Literal["one pass", "forward substitution", "mixed"]


class Transform(nn.Module, ABC):
    """Invertible map of D features that may depend on a context of C numbers.

    Each direction returns its value and its log-determinant together. Calling a transform calls `forward`. Batch shapes
    are arbitrary; those of the value and of the context broadcast against each other.

    Attributes:
        features: D, the size of the last axis of x and y.
        context: C, the size of the last axis of c; if it is 0, c must be None.
        forward_cost: cost of `forward`: "one pass" through the network; "forward substitution", which solves a
            triangular system and costs about as much; or "mixed" for a chain with layers of both kinds.
        inverse_cost: cost of `inverse`, in the same words.
    """

    features: int
    context: int = 0
    forward_cost: Cost = "one pass"
    inverse_cost: Cost = "one pass"

    if TYPE_CHECKING:  # the call of a torch module returns Any otherwise

        def __call__(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y = f(x; c) and log|det df/dx|."""

    @abstractmethod
    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x with f(x; c) = y, and log|det dx/dy|, the log-determinant of the inverse map."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments, from which `cf.load` builds a saved transform."""

    def flattened(self) -> list[Transform]:
        """Return the transforms that `forward` applies, in order, without nested Compose.

        The inverse of a composition becomes the inverses of its transforms.
        """
        return [self]

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """Return the stages of one direction and their tensors, as `engine.chain` takes them; None if it cannot."""
        return None

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y, and `total` plus the log-determinant split into one term per feature, both (..., D).

        The terms sum to log_det. A permutation moves each term along with its feature, as required by the free bits of
        Kingma et al. 2016.

        Raises:
            TypeError: the transform has no log-determinant per feature.
        """
        raise _no_terms(type(self).__name__)

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x, and `total` plus the terms of the inverse's log-determinant; see `forward_by_feature`."""
        raise _no_terms("Inverse")

    def as_torch(self, c: Tensor | None = None) -> TorchTransform:
        """Return this transform at a context c (..., C) as a `torch.distributions.transforms.Transform`."""
        from counterflow.transforms.as_torch import AsTorch

        return AsTorch(self, c)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Carry a score through the map.

            score_y = J^-T (score_x - d log_det / dx),     score_x = d log q_x(x) / dx,  J = dy/dx

        Args:
            x: (..., D).
            score: gradient of log q_x at x, (..., D).
            c: (..., C) or None.

        Returns:
            y (..., D), log_det (...), and the gradient of log q_y at y, (..., D), which is not differentiable.

        Source: Vaitl et al. 2024, "Fast and unified path gradient estimators for normalizing flows".
        """
        return _carry_score(self.forward, self.inverse, x, score, c)

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Carry a score through the inverse map; return x, its log_det and the gradient of log q_x at x.

        See `push_score`.
        """
        return _carry_score(self.inverse, self.forward, y, score, c)


def _no_terms(kind: str) -> TypeError:
    return TypeError(
        f"expected a transform with a log-determinant per feature, got {kind}; free bits need a flow that samples in "
        "one pass, such as an IAF"
    )


Direction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _carry_score(
    f: Direction, f_inverse: Direction, x: Tensor, score: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return f(x), its log_det, and the score at f(x): the vector-Jacobian product of f_inverse with (score, 1)."""
    y, log_det = f(x, c)
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        back, inverse_log_det = f_inverse(leaf, None if c is None else c.detach())
        (score_y,) = torch.autograd.grad((back * score).sum() + inverse_log_det.sum(), leaf)
    return y, log_det, score_y


def prepare(transform: Transform, x: Tensor, c: Tensor | None, name: str = "x", kind: str | None = None) -> Tensor:
    """Check x (..., D) and c (..., C) against the transform and expand x to their common batch shape.

    Args:
        transform: the transform that is called.
        x: its first argument.
        c: its context.
        name: name of x in error messages.
        kind: name of the transform in error messages; its class when not given.

    Raises:
        TypeError: x or c is not a floating-point tensor.
        ValueError: a wrong number of features, or a context that is missing, not expected or of a wrong shape.
    """
    kind = kind or type(transform).__name__
    D = transform.features
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
    """Raise TypeError or ValueError unless c is a tensor (..., context), or None for context=0."""
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
        raise TypeError(f"expected {name} to be a floating-point tensor, got {came}; convert it with {how}")


def rank(x: Tensor, edges: Tensor) -> Tensor:
    """Return, for each x (..., N), the number of ascending edges (..., K) that are at most x, (..., N)."""
    if is_compiling():  # ONNX has no searchsorted
        return (x[..., None] >= edges[..., None, :]).sum(-1)
    return torch.searchsorted(edges.contiguous(), x.contiguous(), right=True)
