"""Signals that end a run between two steps."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from counterflow.commands import console


@dataclass
class Stop:
    """The signal that asked a run to end, if any."""

    signal: int | None = None
    holds: bool = False  # a signal waits for the end of a step: from the first step of a training on

    @property
    def code(self) -> int:
        """Return the exit code of a process that was ended by this signal: 130 or 143."""
        return 128 + (self.signal or signal.SIGINT)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal asked for an end. Called between two steps."""
        if self.signal is not None:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self, handled: bool = False) -> Iterator[None]:
        """Let a signal interrupt at once, in work that has no steps, such as the test after a training.

        Args:
            handled: whether a signal that came before has ended the training already, and does not end this work.
        """
        if not handled:
            self.check()
        self.holds = False
        yield

    def after_step(self, on_step: Callable[..., None]) -> Callable[..., None]:
        """Return a callback that calls `on_step`, and then ends the training if a signal asked for it."""

        def callback(*arguments: Any) -> None:
            self.holds = True
            on_step(*arguments)
            self.check()

        return callback


@contextmanager
def stopping() -> Iterator[Stop]:
    """Hold back the first Ctrl-C or SIGTERM of a training until `Stop.check`; a second one interrupts at once.

    Outside of a training, where there is no step to wait for, the first one interrupts at once.
    """
    stop = Stop()

    def handle(number: int, frame: types.FrameType | None) -> None:
        if stop.signal is not None or not stop.holds:
            raise KeyboardInterrupt(number)
        stop.signal = number
        console.warn("stopping after this step; interrupt again to stop at once, without a checkpoint")

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, so that a command cleans up as after Ctrl-C."""

    def handle(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
