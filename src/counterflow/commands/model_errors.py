"""One-line messages for errors that come from a user's model file or from its modelling tool."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from counterflow.commands.model_names import line_of
from counterflow.posterior import targets

EXTRAS = {"pymc": "pymc", "pytensor": "pymc", "pyro": "pyro", "numpyro": "numpyro", "jax": "numpyro"}
PACKAGE_FOLDER = str(Path(targets.__file__).parents[2])


@contextmanager
def errors_of_file(file: Path) -> Iterator[None]:
    """Turn an error from a model's file, or from its modelling tool, into one line that names the file's line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        place = _place(error, file)
        if isinstance(error, OSError) and not place:
            raise  # such as a full disk, to which the run is written
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE_FOLDER):
            raise ValueError(_message(error, file, place)) from error
        if isinstance(error, TypeError) or place:  # raised by this package: the message says what was expected
            raise ValueError(f"{error}{place}") from error
        raise


def _message(error: BaseException, file: Path, place: str) -> str:
    """Return the message for an error raised outside this package."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing:
        package = missing.partition(".")[0]
        source = f"'counterflow[{EXTRAS[package]}]'" if package in EXTRAS else package
        return f"expected {package}, which is not installed; pip install {source}{place}"
    text = ((error.msg if isinstance(error, SyntaxError) else str(error)).strip() or "no message").splitlines()[0]
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    return f"expected {file} to run, got {type(error).__name__}: {text}{notes}{place}"


def _place(error: BaseException, file: Path) -> str:
    """Return the line of the file that an error comes from; "" if none."""
    path = os.path.abspath(file)  # the file name in the code that was compiled from it
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    if not lines or lines[-1] is None:
        return ""
    return line_of(file, lines[-1])
