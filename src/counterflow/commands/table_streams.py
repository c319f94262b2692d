"""Tables on standard input and standard output, which "-" stands for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from counterflow.io.table_formats import STREAM

MAGIC = {  # first bytes -> suffix; everything else is read as CSV
    b"PAR1": ".parquet",
    b"ARROW1": ".feather",
    b"\x1f\x8b": ".csv.gz",
    b"\x28\xb5\x2f\xfd": ".csv.zst",
    b"PK\x03\x04": ".xlsx",
    b"SQLite format 3": ".sqlite",
    b"\x93NUMPY": ".npy",
}


def is_stream(path: Path | None) -> bool:
    """Return True for the path that stands for standard input or output."""
    return path == Path(STREAM)


@contextmanager
def input_table(data: str) -> Iterator[Path]:
    """Yield the path of a table. Standard input is copied to a temporary file first: some formats are not streams."""
    if data != STREAM:
        yield Path(data)
        return
    with TemporaryDirectory(prefix="counterflow-") as folder:
        copy = Path(folder) / "standard-input"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with copy.open("rb") as file:
            start = file.read(16)
        suffix = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), ".csv")
        yield copy.rename(copy.with_suffix(suffix))


@contextmanager
def output_table(path: Path, suffix: str) -> Iterator[Path]:
    """Yield the path to write a table to. What goes to standard output is copied there when it is complete."""
    if not is_stream(path):
        yield path
        return
    with TemporaryDirectory(prefix="counterflow-") as folder:
        copy = Path(folder) / f"standard-output{suffix}"
        yield copy
        with copy.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
