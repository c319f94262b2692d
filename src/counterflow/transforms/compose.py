"""Composition and inverse of transforms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import Tensor, nn

from counterflow.engine.chain import Stage
from counterflow.transforms import chain
from counterflow.transforms.base import Cost, Transform, prepare
from counterflow.transforms.constant import Permute


class Compose(Transform):
    """Transforms applied one after the other.

        y = f_n(... f_2(f_1(x))),    log_det = the sum of the log_det of all

    It has a length, and is indexed like a list: t[0] is the first transform, t[:2] composes the first two.

    Args:
        transforms: f_1 to f_n, which agree on features; those with a context agree on its size.

    Raises:
        ValueError: no transforms, or transforms that do not agree.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Compose([cf.Permute([1, 0]), cf.Standardize(torch.zeros(2), torch.full((2,), 2.0))])
        >>> y, log_det = t(torch.tensor([1.0, 3.0]))
        >>> y.tolist(), round(log_det.item(), 4)
        ([1.5, 0.5], -1.3863)
        >>> len(t), t[0]
        (2, Permute(reversed, features=2))
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

    def __iter__(self) -> Iterator[Transform]:
        return iter(self._parts())

    def _parts(self) -> list[Transform]:
        """Return the transforms; unlike list(self), torch.compile of torch 2.4 follows it."""
        return list(self.transforms)  # type: ignore[arg-type]  # a ModuleList does not state the type of its entries

    def __len__(self) -> int:
        return len(self.transforms)

    @overload
    def __getitem__(self, index: int) -> Transform: ...

    @overload
    def __getitem__(self, index: slice) -> Compose: ...

    def __getitem__(self, index: int | slice) -> Transform:
        """Return one transform, or the composition of a slice."""
        found = list(self)[index]
        return Compose(found) if isinstance(found, list) else found

    def flattened(self) -> list[Transform]:
        """See `Transform.flattened`."""
        return [part for t in self for part in t.flattened()]

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        return chain.forward(self._steps(False), prepare(self, x, c), c)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|, undoing the transforms from the last to the first."""
        return chain.forward(self._steps(True), prepare(self, y, c, "y"), c)

    def _steps(self, inverse: bool) -> list[chain.Step]:
        """Return the transforms in the order in which a direction runs them."""
        transforms = self._parts()
        return [(t, inverse) for t in (reversed(transforms) if inverse else transforms)]

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`."""
        stages: list[Stage] = []
        tensors: list[Tensor] = []
        for t, inverted in self._steps(inverse):
            described = t.stages(inverted)
            if described is None:
                return None
            stages += described[0]
            tensors += described[1]
        return stages, tensors

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return chain.by_feature(self._steps(False), prepare(self, x, c), total, c)

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        return chain.by_feature(self._steps(True), prepare(self, y, c, "y"), total, c)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`; one back substitution per layer."""
        return chain.push_score(self._steps(False), prepare(self, x, c), score, c)

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`."""
        return chain.push_score(self._steps(True), prepare(self, y, c, "y"), score, c)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"transforms": list(self)}

    def __repr__(self) -> str:
        return "\n  ".join(["Compose(", *(repr(t).replace("\n", "\n  ") for t in self)]) + "\n)"


def _joint_costs(costs: list[tuple[Cost, Cost]]) -> tuple[Cost, Cost]:
    """Return the costs of a chain; layers without a network, one pass in both directions, do not count."""
    counted = [pair for pair in costs if pair != ("one pass", "one pass")] or costs
    return _joint_cost({forward for forward, _ in counted}), _joint_cost({inverse for _, inverse in counted})


def _joint_cost(costs: set[Cost]) -> Cost:
    return costs.pop() if len(costs) == 1 else "mixed"


class Inverse(Transform):
    """Inverse of a transform t: forward is t.inverse, and inverse is t.forward.

    Args:
        transform: t.

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

    def flattened(self) -> list[Transform]:
        """See `Transform.flattened`."""
        return [_inverse_of(t) for t in reversed(self.transform.flattened())]

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`."""
        return self.transform.stages(not inverse)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return t^-1(x) and its log-determinant."""
        return self.transform.inverse(x, c)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return t(y) and its log-determinant."""
        return self.transform(y, c)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        return self.transform.inverse_by_feature(x, total, c)

    def inverse_by_feature(self, y: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.inverse_by_feature`."""
        return self.transform.forward_by_feature(y, total, c)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        return self.transform.pull_score(x, score, c)

    def pull_score(self, y: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.pull_score`."""
        return self.transform.push_score(y, score, c)

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"transform": self.transform}

    def __repr__(self) -> str:
        return f"Inverse({self.transform!r})"


def _inverse_of(t: Transform) -> Transform:
    """Return the inverse of a transform that is no composition, without a double Inverse."""
    if isinstance(t, Inverse):
        return t.transform
    if isinstance(t, Permute):
        return Permute(t.places)
    return Inverse(t)
