"""Output of the commands: results on stdout; progress, notes, warnings and errors on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

MAX_WIDTH = 1000  # characters of a line of a table

out = Console(emoji=False)  # mine.py:banana: is no picture
err = Console(stderr=True, emoji=False)
_silent = {"notes": False}


def set_quiet(quiet: bool) -> None:
    """Leave out notes and progress, as -q asks for, or show them."""
    _silent["notes"] = quiet


def is_quiet() -> bool:
    """Return True if notes and progress are left out."""
    return _silent["notes"] or err.quiet


def say(text: str) -> None:
    """Print a result to stdout, neither coloured nor wrapped."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table to stdout with every digit, also where the output is narrower, such as the 80 columns of a log."""
    width = Measurement.get(out, out.options.update(max_width=MAX_WIDTH), table).maximum
    Console(width=max(out.width, width), quiet=out.quiet, emoji=False).print(table)


def note(text: str) -> None:
    """Print a remark on the progress to stderr, unless -q leaves them out."""
    if not is_quiet():
        warn(text)


def note_all(texts: Iterable[str]) -> None:
    """Print remarks, one line each, as `note` does."""
    for text in texts:
        note(text)


def warn(text: str) -> None:
    """Print a warning or an error to stderr, neither coloured nor wrapped."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def new_file(path: Path) -> Path:
    """Return the path of a file to write.

    Raises:
        FileExistsError: the file exists.
    """
    if path.exists():
        raise FileExistsError(f"expected a new file, got {path}, which exists; give another --out")
    return path
