"""The history of a training: its epochs and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Stopped = Literal["finished", "patience", "interrupted", "not finite"]


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. Objectives are mean terms in nats: higher is better."""

    epoch: int
    train: float
    validation: float
    best: bool  # whether this validation objective is the highest so far
    learning_rate: float
    seconds: float
    rows_per_second: float
    skipped: int  # non-finite steps


OnEpoch = Callable[[str, Epoch], None]  # on_epoch(task, epoch), after each epoch, on rank 0
OnStep = Callable[[str, int, int], None]  # on_step(task, done, total), after each step


@dataclass
class History:
    """The course of a training."""

    epochs: list[Epoch] = field(default_factory=list)
    stopped: Stopped = "finished"
    seconds: float = 0.0

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept."""
        return next((e for e in reversed(self.epochs) if e.best), None)
