"""Checks of paths that need no import and no work: a mistake in them shows at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from counterflow.commands.folder_lock import LOCK
from counterflow.commands.options import RunFolder

CHECKPOINTS = "checkpoints"  # the folder within the run folder
PARTIAL = ".part"  # suffix of files and folders that are not complete
MIN_FREE = 10 << 20  # bytes that a run folder needs at the least, with its plots


def check_run_folder(options: RunFolder) -> None:
    """Check that the folder of a run can be created, or is there to be resumed, and that its disk has free space.

    Raises:
        OSError: the folder exists, cannot be created or resumed, or the disk is full.
        ImportError: the package of --tracker is not installed.
    """
    if options.tracker is not None:
        from counterflow.commands.requirements import require_packages

        require_packages(options.tracker)
    if options.resume is not None:
        if not options.resume.is_dir():
            raise FileNotFoundError(
                f"expected a run folder to resume, got {options.resume}, {what_is_wrong(options.resume)}"
            )
        check_space(options.resume)
        return
    from counterflow.commands.torchrun import is_torchrun  # imports rich, which printing help should not

    if not is_torchrun():  # torchrun starts a command again in the folder that it was in
        check_new(options.out)
    check_can_create(options.out or Path("runs"))


def check_new(folder: Path | None) -> None:
    """Raise FileExistsError if a run folder exists and is not empty."""
    if folder is None or not folder.exists():
        return
    if folder.is_dir() and all(path.suffix == PARTIAL or path.name == LOCK for path in folder.iterdir()):
        return  # only leftovers of a process that was killed
    resume = f", or continue the run with --resume {folder}" if (folder / CHECKPOINTS).is_dir() else ""
    raise FileExistsError(f"expected a new folder for the run, got {folder}, which exists; give another --out{resume}")


def check_new_file(path: Path | None) -> None:
    """Raise OSError if a file to write exists, or its folder cannot be written to."""
    if path is None:
        return
    if path.is_file():
        raise FileExistsError(f"expected a new file, got {path}, which exists; give another --out")
    check_can_create(path)


def check_new_file_or_parts(path: Path | None) -> None:
    """Raise OSError as `check_new_file`; a path without a suffix is a folder of parts, new or of an earlier command."""
    if path is None or path.suffix:
        if path is not None and path.is_dir():
            raise FileExistsError(
                f"expected --out to be a new file, got {path}, which is a folder; a folder of parts has no suffix"
            )
        check_new_file(path)
        return
    if path.is_file():
        raise FileExistsError(
            f"expected --out without a suffix to be a folder of parts, got {path}, which is a file; give another --out"
        )
    check_can_create(path)


def check_can_create(path: Path) -> None:
    """Raise OSError if a file or folder cannot be created at the path, or the disk is full."""
    folder = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"expected a folder for {path}, got {folder}, which is a file; give another --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"expected permission to write to {folder}, got none; give another --out")
    check_space(folder)


def check_space(folder: Path) -> None:
    """Raise OSError if the disk of a folder is nearly full."""
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE:
        raise OSError(f"expected at least 10 MB of free disk space for {folder}, got {free / 1e6:.1f} MB; free some")


def check_readable(path: Path, what: str) -> None:
    """Raise OSError if a file or folder to read does not exist or may not be read."""
    if not path.exists():
        raise FileNotFoundError(f"expected {what}, got {path}, {what_is_wrong(path)}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"expected permission to read {path}, got none; change its permissions")


def what_is_wrong(path: Path) -> str:
    """Return the reason why a path is of no use, with the closest name beside it if it does not exist."""
    if path.exists():
        return "which is a folder" if path.is_dir() else "which is a file"
    return f"which does not exist{similar(path)}"


def similar(path: Path) -> str:
    """Return "; did you mean NAME?" for the most similar name in the folder of a path that does not exist.

    Example:
        >>> similar(Path("no such folder/table.csv"))
        ''
    """
    import difflib

    try:
        names = os.listdir(path.parent)
    except OSError:
        missing = next((each for each in reversed(path.parents) if not each.exists()), None)
        return "" if missing is None or missing == path.parent else f" (nor does {missing})"
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""
