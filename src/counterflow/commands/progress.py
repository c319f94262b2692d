"""Progress of long work, with the time left: a bar in a terminal, a line now and then in a log or a notebook."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from counterflow.commands import console

FIRST_LINE = 5.0  # seconds of work before the first line in a log; shorter work is over before anybody asks
MAX_PAUSE = 60.0  # seconds between two lines in a log
MIN_ANNOUNCED = 20.0  # seconds of a run whose duration is estimated after the first epoch
SLOWER = 1.5  # factor by which the pause grows from line to line


class Tracker:
    """Progress of work in steps; use as a context.

        with Tracker("scoring", "rows") as tracker:
            tracker.update(100, 1000)

    Args:
        task: name of the work, until `update` gives another one.
        unit: what is counted.
    """

    def __init__(self, task: str, unit: str) -> None:
        self.task = task
        self.unit = unit
        self._started = time.monotonic()
        self._first = 0.0  # number of steps that a resumed run had done before
        self._in_terminal = console.err.is_terminal
        self._pause = FIRST_LINE
        self._last_line = self._started
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            console=console.err,
            transient=True,
            disable=console.is_quiet() or not self._in_terminal,
        )
        self._line = self._bar.add_task(task, total=None, numbers="")

    def __enter__(self) -> Tracker:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start_at(self, done: float) -> None:
        """Take `done` steps as those of an earlier run, which say nothing about the speed of this one."""
        self._first = done
        self._started = time.monotonic()

    def update(self, done: float, total: float | None = None, task: str | None = None, facts: str = "") -> None:
        """Show how far the work is.

        Args:
            done: steps done.
            total: steps in all; None if unknown.
            task: new name of the work.
            facts: further numbers, such as the objective.
        """
        self.task = task or self.task
        numbers = self._numbers(done, total, facts)
        self._bar.update(self._line, completed=done, total=total, description=self.task, numbers=numbers)
        now = time.monotonic()
        if not self._in_terminal and now - self._last_line >= self._pause:
            console.note(f"{self.task}: {numbers}")
            self._pause = min(MAX_PAUSE, SLOWER * self._pause)
            self._last_line = now

    def _numbers(self, done: float, total: float | None, facts: str) -> str:
        counted = f"{done:,.0f} {self.unit}" if total is None else f"{done:,.0f} of {total:,.0f} {self.unit}"
        left = self._seconds_left(done, total)
        return ", ".join(filter(None, [counted, facts, left and f"{left} left"]))

    def _seconds_left(self, done: float, total: float | None) -> str:
        if total is None or done <= self._first:
            return ""
        return duration((time.monotonic() - self._started) * (total - done) / (done - self._first))


def announce_duration(first_epoch: float, epochs: int, trainings: int) -> None:
    """Print an estimate of the duration of all trainings, after the first epoch, if it is worth a remark."""
    whole = first_epoch * epochs * trainings
    if whole >= MIN_ANNOUNCED:
        several = f" of {trainings} trainings" if trainings > 1 else ""
        console.note(f"an epoch takes {duration(first_epoch)}: at most {duration(whole)} for {epochs} epochs{several}")


def duration(seconds: float) -> str:
    """Return a duration in words, with two units at most.

    Example:
        >>> duration(0.3), duration(42), duration(125), duration(11_880)
        ('under 1 s', '42 s', '2 min 5 s', '3 h 18 min')
    """
    whole = round(seconds)
    if whole < 1:
        return "under 1 s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h" + (f" {minutes} min" if minutes else "")
