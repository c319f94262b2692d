"""Experiment trackers: the methods that `tracker=` of every training calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch, OnEpoch

LOGGED = ("train", "validation", "learning_rate", "seconds", "rows_per_second", "skipped")  # of an epoch


class Tracker(Protocol):
    """Client of an experiment tracker, the argument `tracker=` of every training.

    A training logs its configuration by log_params, its epochs by log_metrics, with the number of the epoch as the step
    and names such as "training/validation" (task, then field of `Epoch`), and calls flush after each epoch. The
    commands also log their plots and the numbers of summary.json. With several processes, rank 0 logs.

    `counterflow.interop.trackers` has clients of TensorBoard, Weights & Biases and MLflow. sbi's trackers have these
    methods too.

    Example:
        >>> import torch, counterflow as cf
        >>> class Printer:
        ...     def log_metric(self, name, value, step=None): self.log_metrics({name: value}, step)
        ...     def log_metrics(self, metrics, step=None): print(step, *list(metrics)[:2])
        ...     def log_params(self, params): print(f"epochs: {params['epochs']}")
        ...     def add_figure(self, name, figure, step=None): print(name)
        ...     def flush(self): pass
        >>> flow, rows = cf.MAF(features=2, layers=1, hidden=(8,)), torch.randn(60, 2)
        >>> config = cf.FitConfig(epochs=2, batch_size=50)
        >>> history = cf.fit(flow, cf.log_likelihood, rows[:50], rows[50:], config, tracker=Printer())
        epochs: 2
        1 training/train training/validation
        2 training/train training/validation
    """

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Log a number."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Log settings by name."""

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of Matplotlib."""

    def flush(self) -> None:
        """Write what is held back."""


class Guarded:
    """A tracker whose first failure is a warning and ends the tracking: it should not cost a training.

    Args:
        tracker: the client.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker: Tracker | None = tracker

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Log a number."""
        self._call(lambda tracker: tracker.log_metric(name, value, step))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log several numbers of one step."""
        self._call(lambda tracker: tracker.log_metrics(metrics, step))

    def log_params(self, params: dict[str, Any]) -> None:
        """Log settings by name."""
        self._call(lambda tracker: tracker.log_params(params))

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of Matplotlib."""
        self._call(lambda tracker: tracker.add_figure(name, figure, step))

    def flush(self) -> None:
        """Write what is held back."""
        self._call(lambda tracker: tracker.flush())

    def _call(self, log: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            log(self.tracker)
        except Exception as error:
            name = type(self.tracker).__name__
            self.tracker = None
            warnings.warn(
                f"{name} failed ({type(error).__name__}: {error}); the training goes on without it",
                RuntimeWarning,
                stacklevel=3,
            )


def log_epoch(tracker: Tracker, task: str, epoch: Epoch) -> None:
    """Log the results of an epoch, as TASK/FIELD."""
    tracker.log_metrics({f"{task}/{name}": float(getattr(epoch, name)) for name in LOGGED}, epoch.epoch)
    tracker.flush()


def tracked(tracker: Tracker | None, config: Any, on_epoch: OnEpoch | None) -> OnEpoch | None:
    """Log the configuration of a training, and return its callback, which also logs each epoch.

    Args:
        tracker: the client; None returns on_epoch.
        config: a dataclass of settings; those of nested dataclasses stand beside its own.
        on_epoch: called after the log of each epoch.
    """
    tracker = of_rank_0(tracker)
    if tracker is None:
        return on_epoch
    tracker.log_params(settings_of(config))

    def log(task: str, epoch: Epoch) -> None:
        log_epoch(tracker, task, epoch)
        if on_epoch is not None:
            on_epoch(task, epoch)

    return log


def of_rank_0(tracker: Tracker | None) -> Guarded | None:
    """Return the tracker, guarded against its failures, in the process that logs; None in the others."""
    if tracker is None or Workers.current().rank:
        return None
    return tracker if isinstance(tracker, Guarded) else Guarded(tracker)


def settings_of(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, those of nested ones beside its own.

    Example:
        >>> from counterflow.training.config import FitConfig
        >>> settings_of(FitConfig(epochs=7))["epochs"]
        7
    """
    found: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= settings_of(value) if is_dataclass(value) else {field.name: value}
    return found
