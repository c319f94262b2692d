"""The formats that load accepts, and how every reader says that a file does not decode or a package is missing."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from counterflow.io.json import MAX_QUOTED

ACCEPTED = (
    '"digits", a folder of MNIST-style IDX files (train-images-idx3-ubyte, gz or not), a folder of PNG or '
    "JPEG images, an IDX file, or a .npy, .npz, .csv or .parquet file"
)


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn all that a decoder raises into one error that names the file; our own are raised outside of it."""
    try:
        yield
    except Exception as error:  # zlib.error, BadZipFile, EOFError, ArrowInvalid, SyntaxError, ..
        came = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"expected {path} to be {kind}, but it does not read: {came[:MAX_QUOTED]}; check that it is one and complete"
        ) from error


def needs(module: str, package: str, purpose: str) -> Any:
    """The module; where it is missing, an ImportError that names the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"expected {package} for {purpose}, got: {error}; pip install {package}") from error
