"""An exclusive lock on a folder, so that two processes never write to the same run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # the file in the folder; the lock itself is the system's, which releases it when a process dies


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder, which is created if it does not exist.

    Raises:
        FileExistsError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor) or not _is_same_file(descriptor, path):
            raise FileExistsError(
                f"expected a folder that no other command is writing to, got {folder}, which one is; give another "
                "--out, or wait for that command to end"
            )
        try:
            yield
        finally:
            with suppress(OSError):  # a failed run has removed the folder; Windows does not remove open files
                path.unlink()
    finally:
        os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Return False if the file was removed, by a process that held the lock, after this process opened it."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _try_lock(descriptor: int) -> bool:
    """Lock an open file without waiting; return False if another process has locked it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks, where nothing can be said
        return True
    return True
