"""The formats that load accepts, and how every reader says that a file does not decode or a package is missing."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.files import TOLD

ACCEPTED = (
    '"digits", a folder of MNIST-style IDX files (train-images-idx3-ubyte, gz or not), a folder of PNG or '
    "JPEG images, an IDX file, or a .npy, .npz, .csv or .parquet file"
)

# What a few bytes can be unpacked to is bounded by nothing but their own word.
ALWAYS = 1 << 28  # bytes of memory that every file may take; readers hold up to three copies, which come to 1 GB
RATIO = 100  # beyond them, for each stored byte; numbers and images are packed 2 to 20 times


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn all that a decoder raises into one error that names the file; our own are raised outside of it."""
    try:
        yield
    except Exception as error:  # zlib.error, BadZipFile, EOFError, ArrowInvalid, SyntaxError, ..
        came = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"expected {path} to be {kind}, but it does not read: {came[:TOLD]}; check that it is one and complete"
        ) from error


def needs(module: str, package: str, purpose: str) -> Any:
    """The module; where it is missing, an ImportError that names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"expected {package} for {purpose}, got: {error}; pip install {package}") from error


def check_taken(path: Path, what: str, taken: int, stored: int, todo: str) -> None:
    """Raise ValueError where a file would take more memory than its stored bytes account for, before it is taken."""
    if taken > ALWAYS and taken > RATIO * stored:
        raise ValueError(
            f"expected {path} to take at most {ALWAYS >> 20} MiB of memory, or {RATIO} times its {stored:,} bytes, got "
            f"{taken:,} bytes for {what}; {todo}"
        )
