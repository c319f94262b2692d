"""Contexts at which a conditional flow is sampled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from counterflow.checks import check_finite
from counterflow.flows.flow import Flow

Contexts = Tensor | Callable[[int], Tensor]  # rows (N, C) to choose from, or a function n -> (n, C)


def contexts_of(teacher: Flow, contexts: Contexts | None) -> Callable[[int], Tensor | None]:
    """Return a function that draws n contexts (n, C), or None for a teacher without a context.

    Args:
        teacher: the conditional flow.
        contexts: rows, of which each draw takes random ones, or a function that draws them; None without a context.

    Raises:
        ValueError: contexts that are missing, not expected, of a wrong shape or not finite.
    """
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
    draw_rows = contexts

    def draw(n: int) -> Tensor:
        c = draw_rows(n)
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
    """Return contexts (n, C) on the device, or None, and the sample shape with which a flow then draws n rows."""
    c = draw(n)
    return (None, (n,)) if c is None else (c.to(device), ())


def device_of(flow: Flow) -> torch.device:
    """Return the device of the flow's first parameter or buffer."""
    return next(chain(flow.parameters(), flow.buffers())).device
