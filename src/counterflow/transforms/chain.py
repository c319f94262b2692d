"""Sequences of transforms, in which neighbours that the engine can compute together are one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from counterflow.engine import chain
from counterflow.transforms.base import Transform


@dataclass(frozen=True)
class _One:
    """One direction of a transform."""

    transform: Transform
    inverse: bool

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the value and log_det."""
        t = self.transform
        c = c if t.context else None
        result: tuple[Tensor, Tensor] = t.inverse(x, c) if self.inverse else t(x, c)
        return result

    def by_feature(self, x: Tensor, total: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        t = self.transform
        return (t.inverse_by_feature if self.inverse else t.forward_by_feature)(x, total, c if t.context else None)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        t = self.transform
        return (t.pull_score if self.inverse else t.push_score)(x, score, c if t.context else None)


@dataclass(frozen=True)
class Joined:
    """Neighbours that the engine can compute together.

    Args:
        stages: their stages.
        tensors: the tensors of the stages.
        context: C; 0 where none of them takes a context.
    """

    stages: tuple[chain.Stage, ...]
    tensors: Sequence[Tensor]
    context: int

    def runs(self, x: Tensor, c: Tensor | None) -> bool:
        """Return True if compiled code can run here and now."""
        return (
            any(isinstance(stage, chain.Pass) for stage in self.stages)
            and chain.accepts(x, c if self.context else None, self.tensors)
            and not _global_hooks_exist()
            and chain.is_ready(self.stages, x.dtype)
        )

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return y (..., D) and log_det (...) at x (..., D) and c (..., C)."""
        y, log_det, _ = self._run(x, c)
        return y, log_det

    def by_feature(self, x: Tensor, total: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        y, terms, _ = self._run(x, c, by_feature=True)
        for stage in self.stages:
            if isinstance(stage, chain.Permutation):
                total = total[..., list(stage.order)]
        return y, total + terms

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`."""
        return self._run(x, c, score=score)  # type: ignore[return-value]  # a score goes in, so one comes out

    def _run(
        self, x: Tensor, c: Tensor | None, score: Tensor | None = None, by_feature: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        c = c if self.context else None
        if c is not None and x.shape[:-1] != c.shape[:-1]:
            c = c.expand(*x.shape[:-1], c.shape[-1])
        if score is not None:
            score = score.detach().expand(x.shape).reshape(-1, x.shape[-1])
        if x.dim() == 2:
            return chain.run(self.stages, self.tensors, x, c, score=score, by_feature=by_feature)
        flat = x.reshape(-1, x.shape[-1])
        flat_c = None if c is None else c.reshape(-1, c.shape[-1])
        y, log_det, score = chain.run(self.stages, self.tensors, flat, flat_c, score=score, by_feature=by_feature)
        log_det = log_det.reshape(x.shape if by_feature else x.shape[:-1])
        return y.reshape(x.shape), log_det, None if score is None else score.reshape(x.shape)


Step = tuple[Transform, bool]  # a transform, and True to run its inverse


def joined(t: Transform, x: Tensor, c: Tensor | None) -> Joined | None:
    """Return the forward direction of one transform as compiled code, or None where that cannot run here and now."""
    described = None if is_compiling() else t.stages(False)
    if described is None:
        return None
    found = Joined(tuple(described[0]), described[1], t.context)
    return found if found.runs(x, c) else None


def forward(steps: Sequence[Step], x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the value and log_det of steps in turn, at x (..., D) that has been checked."""
    total = x.new_zeros(x.shape[:-1])
    if is_compiling():  # in a form that torch.compile of torch 2.4 follows
        for t, inverse in steps:
            own = c if t.context else None
            x, log_det = t.inverse(x, own) if inverse else t(x, own)
            total = total + log_det
        return x, total
    for group in _groups(steps):
        for part in _bodies(group, x, c):
            x, log_det = part.forward(x, c)
            total = total + log_det
    return x, total


def by_feature(steps: Sequence[Step], x: Tensor, total: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the value and the terms of log_det of steps in turn; see `Transform.forward_by_feature`."""
    for group in _groups(steps):
        for part in _bodies(group, x, c):
            x, total = part.by_feature(x, total, c)
    return x, total


def push_score(steps: Sequence[Step], x: Tensor, score: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Carry a score through steps in turn; see `Transform.push_score`."""
    total = x.new_zeros(x.shape[:-1])
    for group in _groups(steps):
        for part in _bodies(group, x, c):
            x, log_det, score = part.push_score(x, score, c)
            total = total + log_det
    return x, total, score


def _groups(steps: Sequence[Step]) -> list[tuple[Joined | None, list[_One]]]:
    """Return neighbours that can be joined, together and one by one, and each other step alone."""
    groups: list[tuple[Joined | None, list[_One]]] = []
    stages: list[chain.Stage] = []
    tensors: list[Tensor] = []
    members: list[_One] = []
    for t, inverse in steps:
        described = None if is_compiling() else t.stages(inverse)
        if described is not None:
            stages += described[0]
            tensors += described[1]
            members.append(_One(t, inverse))
            continue
        if members:
            groups.append((_join(stages, tensors, members), members))
        groups.append((None, [_One(t, inverse)]))
        stages, tensors, members = [], [], []
    if members:
        groups.append((_join(stages, tensors, members), members))
    return groups


def _join(stages: list[chain.Stage], tensors: list[Tensor], members: list[_One]) -> Joined:
    return Joined(tuple(stages), tensors, max(one.transform.context for one in members))


def _bodies(group: tuple[Joined | None, list[_One]], x: Tensor, c: Tensor | None) -> Sequence[Joined | _One]:
    together, members = group
    return (together,) if together is not None and together.runs(x, c) else members


def _global_hooks_exist() -> bool:
    """Return True if a hook is registered for the calls of all modules, whose layers are then called one by one."""
    m = torch_module
    return bool(
        m._global_forward_pre_hooks
        or m._global_forward_hooks
        or m._global_backward_pre_hooks
        or m._global_backward_hooks
    )
