"""The history of a training: its epochs and why it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

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
