"""Progress of long work, with the time left: a bar in a terminal, a line now and then in a log or a notebook."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from counterflow.commands import console

FIRST_LINE = 5.0  # seconds of work before the first line in a log; shorter work is over before anybody asks
MAX_PAUSE = 60.0  # seconds between two lines in a log
MIN_ANNOUNCED = 20.0  # seconds of a run whose duration is estimated after the first epoch
SLOWER = 1.5  # factor by which the pause grows from line to line


class Progress:
    """Progress of work; use as a context.

        with Progress("scoring", "rows") as progress:
            progress.update(100, 1000)

    Without a call of `update` it shows the seconds so far, for work that cannot be counted.

    Args:
        task: name of the work, until `update` gives another one.
        unit: what is counted.
    """

    def __init__(self, task: str, unit: str = "") -> None:
        self.task = task
        self.unit = unit
        self._counted = ""
        self._started = time.monotonic()
        self._first = 0.0  # number of steps that a resumed run had done before
        self._done = 0.0
        self._total: float | None = None
        in_terminal = console.err.is_terminal
        self._ended = threading.Event()
        self._lines = None if in_terminal or console.is_quiet() else threading.Thread(target=self._print, daemon=True)
        self._bar = Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            _Numbers(self),
            console=console.err,
            transient=True,
            disable=console.is_quiet() or not in_terminal,
        )
        self._line = self._bar.add_task(task, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bar.stop()
        if self._lines is not None:
            self._lines.join()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds until the end; None if nothing is known about them."""
        if self._total is None or self._done <= self._first:
            return None
        return self.elapsed * (self._total - self._done) / (self._done - self._first)

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
        self._done = done
        self._total = total
        counted = f"{done:,.0f} {self.unit}" if total is None else f"{done:,.0f} of {total:,.0f} {self.unit}"
        left = "" if self.seconds_left is None else f"{duration(self.seconds_left)} left"
        self._counted = ", ".join(filter(None, [counted, facts, left]))
        self._bar.update(self._line, completed=done, total=total, description=self.task)

    def announce(self, work: str, times: int = 1) -> None:
        """Print the estimated duration of a run after its first epoch, if it is worth a remark.

        Args:
            work: description of the run.
            times: number of trainings like this one.
        """
        seconds = times * (self.elapsed + (self.seconds_left or 0.0))
        if seconds >= MIN_ANNOUNCED:
            console.note(f"estimated time: {duration(seconds)} for {work}")

    def describe(self) -> str:
        """Return the numbers of the last update; the seconds so far if there was none."""
        return self._counted or f"{duration(self.elapsed)} so far"

    def _print(self) -> None:
        """Print a line now and then until the work has ended."""
        pause = FIRST_LINE
        while not self._ended.wait(pause):
            console.note(f"{self.task}: {self.describe()}")
            pause = min(MAX_PAUSE, SLOWER * pause)


class _Numbers(ProgressColumn):
    """Column with the numbers of the work."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(self._progress.describe())


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
