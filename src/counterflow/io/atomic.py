"""Atomic writes: a file appears complete under its name, or the old file stays."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".part"  # of temporary files


@contextmanager
def atomic_write(path: Path, suffix: str = SUFFIX) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` when the block ends without an error.

    Readers see the old file or the complete new one, even after a power loss. On an error the temporary file and the
    folders that were created for it are removed.

    Args:
        path: the file; missing folders are created.
        suffix: of the temporary path, for writers that look at it.
    """
    folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):  # it is not empty, or is gone
                folder.rmdir()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(path.parent, os.O_RDONLY)  # writes the new name to disk


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, see `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def check_free_space(folder: Path, size: int) -> None:
    """Raise OSError if a disk has fewer than `size` free bytes, for libraries that crash when a disk is full."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files of `path` that killed processes left behind."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*{SUFFIX}"))


def _sync(path: Path, flags: int) -> None:
    """Write a file's or folder's content to disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
