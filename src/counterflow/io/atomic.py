"""Files that are there as a whole or not at all, and JSON that may be anybody's."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Another path to write to, which becomes this file at the end: it is there as a whole or as it was before.

    So it is after a loss of power as well. Where the writing fails, the folders that were made for it go too.
    """
    folders = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        _to_disk(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        for folder in folders:
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _to_disk(path.parent, os.O_RDONLY)  # the new name, too


def check_room(folder: Path, size: int) -> None:
    """Raise OSError unless a disk has room for so many bytes: not every library survives it when it has not."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed have left of this file."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.part"))


def _to_disk(path: Path, mode: int) -> None:
    opened = os.open(path, mode)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes) -> None:
    """A file that is there as a whole or as it was before, also after a loss of power."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
