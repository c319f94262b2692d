"""Composition and inverse of transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from counterflow.transforms.base import Cost, Transform, prepare
from counterflow.transforms.constant import Permute


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

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`."""
        y = prepare(self, y, c, "y")
        total = y.new_zeros(y.shape[:-1])
        for t in reversed(list(self)):
            y, log_det, score = t.pull_score(y, score, c if t.context else None)
            total = total + log_det
        return y, total, score

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

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.transform.inverse_by_feature(x, total, c)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        return self.transform.pull_score(x, score, c)

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`."""
        return self.transform.push_score(y, score, c)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"transform": self.transform}

    def __repr__(self) -> str:
        return f"Inverse({self.transform!r})"


def flatten(transform: Transform) -> list[Transform]:
    """Return the single transforms of a chain in the order of forward. Only single transforms stay inverted.

    An inverted permutation becomes the permutation that undoes it, so that reading the chain needs no case for it.

    Example:
        >>> import counterflow as cf
        >>> from counterflow.transforms.compose import flatten
        >>> turn, scale = cf.Permute([1, 2, 0]), cf.Standardize([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
        >>> flatten(cf.Inverse(cf.Compose([turn, scale])))
        [Inverse(Standardize(features=3)), Permute([2, 0, 1])]
    """
    if isinstance(transform, Compose):
        return [single for part in transform for single in flatten(part)]
    if isinstance(transform, Inverse) and isinstance(transform.transform, Compose):
        return [single for part in reversed(list(transform.transform)) for single in flatten(Inverse(part))]
    if isinstance(transform, Inverse) and isinstance(transform.transform, Inverse):
        return flatten(transform.transform.transform)
    if isinstance(transform, Inverse) and isinstance(transform.transform, Permute):
        return [Permute(transform.transform.places)]
    return [transform]
