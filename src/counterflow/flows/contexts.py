"""Contexts for draws from a conditional flow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from counterflow.checks import check_finite
from counterflow.flows.flow import Flow

Contexts = Tensor | Callable[[int], Tensor]  # (N, C) rows to pick from, or n -> (n, C)


def contexts_of(teacher: Flow, contexts: Contexts | None) -> Callable[[int], Tensor | None]:
    """N -> (n, C) on the teacher's device, or None for a teacher without a context."""
    if (contexts is None) != (teacher.context == 0):
        wanted = f"contexts (N, {teacher.context})" if teacher.context else "no contexts"
        came = "none" if contexts is None else "some"
        raise ValueError(f"expected {wanted}, got {came}; the teacher was built with context={teacher.context}")
    if contexts is None:
        return lambda n: None
    if isinstance(contexts, Tensor):
        _check(contexts, teacher)
        rows = contexts
        return lambda n: rows[torch.randint(len(rows), (n,))]
    drawn = contexts

    def draw(n: int) -> Tensor:
        c = drawn(n)
        _check(c, teacher, n)
        return c

    return draw


def _check(c: Tensor, teacher: Flow, rows: int | None = None) -> None:
    if c.dim() != 2 or c.shape[1] != teacher.context or not len(c) or rows not in (None, len(c)):
        raise ValueError(f"expected contexts ({rows or 'N'}, {teacher.context}), got {tuple(c.shape)}")
    check_finite(c, "the contexts")


def draw_contexts(
    draw: Callable[[int], Tensor | None], n: int, device: torch.device
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Contexts of n draws on the device, and the sample shape that makes n draws with them."""
    c = draw(n)
    return (None, (n,)) if c is None else (c.to(device), ())


def device_of(flow: Flow) -> torch.device:
    """Return the device of the flow's first parameter or buffer."""
    return next(chain(flow.parameters(), flow.buffers())).device
