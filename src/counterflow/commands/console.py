"""What the commands share: the console, the run folder, the progress bar."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """A result, on stdout: as it is, neither coloured nor wrapped."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """What is going on or went wrong, on stderr."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def new_run(folder: Path | None, kind: str) -> Path:
    """Make the run folder; one that exists is never written into.

    Raises:
        FileExistsError: the folder exists and holds something.
    """
    if folder is None:
        folder = Path("runs") / time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_new(folder: Path | None) -> None:
    """Raise FileExistsError for a run folder that exists and holds something."""
    if folder is not None and folder.exists() and (not folder.is_dir() or any(map(_counts, folder.iterdir()))):
        more = f", or go on with it by --resume {folder}" if (folder / "checkpoints").is_dir() else ""
        raise FileExistsError(
            f"expected a new folder for the run, got {folder}, which exists; give another --out{more}"
        )


def _counts(path: Path) -> bool:
    return path.suffix != ".part"  # which a killed process leaves


def new_file(path: Path) -> Path:
    """Make sure that a file to write is not there yet.

    Raises:
        FileExistsError: it is.
    """
    if path.exists():
        raise FileExistsError(f"expected a new file, got {path}, which exists; give another --out")
    return path


def progress(kind: str, reached: str = "ELBO") -> Progress:
    """A bar over training steps: which model, epoch, what is reached, rows per second, time left."""
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(
            "epoch {task.fields[epoch]}  " + reached + " {task.fields[elbo]}  {task.fields[rate]} " + kind + "/s"
        ),
        TimeRemainingColumn(compact=True),
        console=err,
    )
