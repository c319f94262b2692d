"""The history of a training: its epochs and why it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from counterflow.notebook import html_table

MAX_SHOWN = 20  # epochs in a notebook

# finished: all epochs are done. patience: too many epochs without a better validation. interrupted: Ctrl-C, or a
# KeyboardInterrupt of a callback. not finite: too many steps in a row had a loss or gradient that was not finite.
Stopped = Literal["finished", "patience", "interrupted", "not finite"]


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch. Objectives are mean terms in nats: higher is better."""

    epoch: int
    """number of the epoch, from 1"""
    train: float
    """mean training objective over the steps that were not skipped, nats"""
    validation: float
    """validation objective of the evaluated weights, nats"""
    best: bool
    """True if this validation objective is the highest so far"""
    learning_rate: float
    """learning rate of the next step"""
    seconds: float
    """duration of the training steps, without validation"""
    rows_per_second: float
    """training rows per second"""
    skipped: int
    """steps skipped because the loss or the gradient was not finite"""


OnEpoch = Callable[[str, Epoch], None]  # on_epoch(task, epoch), called after each epoch on rank 0
OnStep = Callable[[str, int, int], None]  # on_step(task, done, total), called after each step


@dataclass
class History:
    """The epochs of a training and why it stopped."""

    epochs: list[Epoch] = field(default_factory=list)
    """results of each epoch"""
    stopped: Stopped = "finished"
    """finished, patience, interrupted or not finite"""
    seconds: float = 0.0
    """duration of the training with validation, over all resumed runs"""

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept; None if no epoch ended with a finite validation objective."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.best), None)

    def _repr_html_(self) -> str:
        """Return the epochs as a table, for notebooks."""
        best = self.best
        rows: list[tuple[str, ...]] = [
            (
                f"{epoch.epoch}{' (best)' if epoch is best else ''}",
                f"{epoch.train:.4f}",
                f"{epoch.validation:.4f}",
                f"{epoch.learning_rate:.2g}",
                f"{epoch.seconds:.2f}",
                f"{epoch.rows_per_second:,.0f}",
            )
            for epoch in self.epochs
        ]
        header = ("epoch", "training, nats", "validation, nats", "learning rate", "s", "rows/s")
        title = f"{len(rows)} epochs in {self.seconds:.1f} s, {self.stopped}"
        if best is not None:
            title += f"; best validation {best.validation:.4f} nats, in epoch {best.epoch}"
        if len(rows) > MAX_SHOWN:
            half = MAX_SHOWN // 2
            rows = [*rows[:half], ("...",) * len(header), *rows[-half:]]
        return html_table(header, rows, title)
