"""Limits on untrusted files: checkpoints, run folders, tables, arrays and images that anybody may have written.

Threat model. Whoever wrote the file knows this code. The file may

* hold a pickle, or name a class or function that should be called;
* declare sizes that it does not hold: tensors, arrays, pages or images of terabytes;
* unpack to far more than its size: gzip, zip and PNG, and the dictionaries and prefixes in Parquet;
* describe a module that takes far more memory or time to build than its tensors: huge, repeated or nested layers;
* make a parser recurse without end, or make a native library end the process;
* be cut off, or have any byte changed.

Guaranteed, for `cf.load`, `cf.data.load`, run folders and the tables of the commands:

* No code of the file runs. Nothing is unpickled, arrays of Python objects are refused, and only the classes listed in
  `counterflow.io.serialization` are built.
* Memory is bounded by about 1 GB, or by a multiple of the file's size where that is more (`FREE_BYTES`, `MAX_RATIO`).
* A file that is refused raises ValueError with a message of one line that names the file.
* Nothing is written, and no name in an archive is used as a path.

Not guaranteed:

* that the numbers are right: a well-formed file may hold any weights and any rows;
* a limit on time, beyond what the limit on memory implies;
* freedom from bugs in Arrow, Pillow, safetensors, NumPy and zlib: keep them up to date, and read files of unknown
  origin in a process without privileges;
* anything about files that are programs: the Python and Stan models that `counterflow posterior` runs, and what other
  libraries unpickle.

The modules below hold the limits of one kind of file each; the readers call them before they allocate memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from counterflow.io.json import MAX_QUOTED

FREE_BYTES = 1 << 28  # every file may take this much memory; readers hold up to three copies, together under 1 GB
MAX_RATIO = 100  # bytes of memory for each stored byte beyond that; numbers and images are compressed 2 to 20 times


def check_memory(path: Path, what: str, needed: int, stored: int, todo: str) -> None:
    """Raise ValueError if a file needs more memory than its stored bytes account for; call this before allocating.

    Args:
        path: the file.
        what: what needs the memory, for the error.
        needed: bytes of memory.
        stored: bytes of the file.
        todo: advice to whoever wrote the file in good faith.
    """
    if needed > FREE_BYTES and needed > MAX_RATIO * stored:
        raise ValueError(
            f"expected {path} to take at most {FREE_BYTES >> 20} MiB of memory, or {MAX_RATIO} times its {stored:,} "
            f"bytes, got {needed:,} bytes for {what}; {todo}"
        )


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, cut at MAX_QUOTED characters: it may quote as much as a file holds."""
    return (" ".join(str(error).split()) or type(error).__name__)[:MAX_QUOTED]


@contextmanager
def decoding(path: Path, kind: str) -> Iterator[None]:
    """Turn every error of a decoder into one ValueError that names the file.

    Args:
        path: the file.
        kind: the expected format, such as "a Parquet file".
    """
    try:
        yield
    except Exception as error:  # zlib.error, BadZipFile, EOFError, ArrowInvalid, SyntaxError, ..
        raise ValueError(
            f"expected {path} to be {kind}, but it does not read: {one_line(error)}; check that it is one and complete"
        ) from error
