"""Output of the commands: results on stdout, progress and errors on stderr."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Print a result to stdout, neither coloured nor wrapped."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print progress or an error to stderr, neither coloured nor wrapped."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def new_file(path: Path) -> Path:
    """Return the path of a file to write.

    Raises:
        FileExistsError: the file exists.
    """
    if path.exists():
        raise FileExistsError(f"expected a new file, got {path}, which exists; give another --out")
    return path


def progress(unit: str, objective: str = "ELBO") -> Progress:
    """Return a progress bar over training steps: task, epoch, objective, units per second, time left."""
    numbers = "epoch {task.fields[epoch]}  " + objective + " {task.fields[elbo]}  {task.fields[rate]} " + unit + "/s"
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(numbers),
        TimeRemainingColumn(compact=True),
        console=err,
    )
