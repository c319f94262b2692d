"""A folder of parts, written by any number of torchrun processes together and completed by a later run.

    FOLDER/part-00000.parquet, ..    each part is either complete or absent
    FOLDER/_about.json               inputs of the parts: the model, the data, the options
    FOLDER/_sums/00000.json, ..      sums over a part, written before the part
    FOLDER/_summary.json             sums over all parts, written when all are there

Readers of such a folder as one table ignore files whose names start with an underscore.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from counterflow.commands import console
from counterflow.commands.folder_lock import LOCK, locked
from counterflow.commands.progress import Progress
from counterflow.io.atomic import atomic_write, leftovers
from counterflow.io.json import read_json, write_json
from counterflow.training.distributed import Workers

POLL_SECONDS = 0.1  # between two checks for a part of another process
Piece = TypeVar("Piece")
Report = Callable[[float], None]  # called with the number of rows done
Sums = dict[str, float]


def shard_folder(out: Path | None) -> Path | None:
    """Return `out` if it is a folder of parts, a name without a suffix; None if it is a file.

    Raises:
        ValueError: it is a file, and there are several processes.
    """
    if out is not None and not out.suffix:
        return out
    if Workers.current().size > 1:
        raise ValueError(
            "expected --out under torchrun to be a folder, a name without a suffix, where each process writes its own "
            f"parts, got {out or 'none'}"
        )
    return None


def portions(rows: int, max_rows: int) -> Iterator[int]:
    """Yield the sizes of portions of at most max_rows that add up to rows."""
    return (min(max_rows, rows - first) for first in range(0, rows, max_rows))


def seed_of_part(seed: int, number: int) -> int:
    """Return the 32-bit seed of a part, which depends only on the command's seed and the number of the part."""
    return (int(np.random.SeedSequence(seed).generate_state(1)[0]) + number) % 2**32


def inputs(command: str, model: list[Path], data: Path | None, **options: Any) -> dict[str, Any]:
    """Return the inputs of the parts as JSON: model files by content, data files by size and time, and options."""
    described = {
        "command": command,
        "model": {file.name: _sha256(file) for file in model},
        "data": None if data is None else _sizes_and_times(data),
        **options,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(described))  # a tuple is a list where it is read again
    return as_read


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes_and_times(data: Path) -> dict[str, list[int]] | str:
    files = [data] if data.is_file() else sorted(file for file in data.rglob("*") if file.is_file())
    stats = [(file.relative_to(data) if file != data else file.name, file.stat()) for file in files]
    return {str(name): [stat.st_size, stat.st_mtime_ns] for name, stat in stats} or str(data)


@dataclass(frozen=True)
class ShardedOutput:
    """A folder of parts, and the suffix of their names."""

    folder: Path
    suffix: str

    def write(
        self,
        about: dict[str, Any],
        pieces: Iterable[Piece],
        write_part: Callable[[int, Piece, Path, Report], Sums],
        describe: Callable[[Sums], str],
        progress: Progress,
        rows: int | None,
    ) -> int:
        """Write one part per piece of work, without those that exist, and print a description of the whole.

        Args:
            about: the inputs, which must equal those of a folder that exists.
            pieces: of work, in order.
            write_part: called with the number of a part, its piece, the file to write and a function that reports
                the rows done; returns the sums over the part, among them "rows".
            describe: returns a line of text about the sums over all parts.
            progress: shows the progress of this process.
            rows: of all parts, about; None if unknown.

        Returns:
            The exit code, 0.

        Raises:
            ValueError: there are no pieces, the folder has other inputs, or another command is writing to it.
        """
        coming = iter(pieces)
        first = next(coming, None)
        if first is None:
            raise ValueError("expected at least one row, got none; add some")
        with ExitStack() as locks:  # of rank 0
            if not self._begin(about, locks):
                with _errors_of_any_rank():
                    count = self._write_mine(itertools.chain([first], coming), write_part, progress, rows)
                if Workers.current().rank == 0:
                    self._finish(count)
        if Workers.current().rank == 0:
            summary = read_json(self._summary, "a summary that counterflow wrote")
            parts = "1 part" if summary["parts"] == 1 else f"{summary['parts']} parts"
            console.say(f"{describe(summary['sums'])}; {parts} in {self.folder}")
        return 0

    def _begin(self, about: dict[str, Any], locks: ExitStack) -> bool:
        """Create the folder or reopen it, on rank 0; return True if all parts are there."""
        done: bool = Workers.current().broadcast_result(lambda: self._open(about, locks))
        with _errors_of_any_rank():
            if not self._about.is_file():
                raise ValueError(
                    f"expected --out to be on a disk that all processes share, got {self.folder}, which is not"
                )
        if done:
            console.note(f"{self.folder}: all parts are there, nothing is left to do")
        return done

    def _open(self, about: dict[str, Any], locks: ExitStack) -> bool:
        wanted = "expected --out to be a new folder, or one that this command started"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{wanted}, got {self.folder}, which is a file; give another --out")
        if not self._about.is_file() and self._holds_other_files():
            raise ValueError(f"{wanted}, got {self.folder}, which holds other files; give another --out")
        locks.enter_context(locked(self.folder))
        if not self._about.is_file():
            _remove_leftovers(self._about)
            write_json(self._about, about)
            return False
        started = read_json(self._about, "what counterflow wrote about a folder of parts")
        different = [name for name in {**about, **started} if about.get(name) != started.get(name)]
        if different:
            raise ValueError(
                f"{wanted}, got {self.folder}, started with another {', '.join(different)}; give another --out"
            )
        return self._is_done()

    def _holds_other_files(self) -> bool:
        known = {*leftovers(self._about), self.folder / LOCK}
        return self.folder.exists() and any(path not in known for path in self.folder.iterdir())

    def _is_done(self) -> bool:
        if not self._summary.is_file():
            return False
        count = read_json(self._summary, "a summary that counterflow wrote")["parts"]
        return all(self._part(number).exists() for number in range(count))

    def _write_mine(
        self,
        pieces: Iterable[Piece],
        write_part: Callable[[int, Piece, Path, Report], Sums],
        progress: Progress,
        rows: int | None,
    ) -> int:
        """Write the parts of this process; return the number of all parts."""
        workers = Workers.current()
        total = rows and rows / workers.size
        count = 0
        done = 0.0
        with progress:
            for number, piece in enumerate(pieces):
                count = number + 1
                if number % workers.size != workers.rank:
                    continue
                part = self._part(number)
                if part.exists():
                    done += read_json(self._sums(number), "the sums over a part")["rows"]
                    progress.start_at(done)
                    continue

                def report(rows_of_part: float, before: float = done, name: str = part.name) -> None:
                    progress.update(before + rows_of_part, total, name)

                _remove_leftovers(part, self._sums(number))
                with atomic_write(part) as temporary:
                    sums = write_part(number, piece, temporary, report)
                    write_json(self._sums(number), sums)
                done += sums["rows"]
        return count

    def _finish(self, count: int) -> None:
        """Wait for the parts of all processes, and write the sums over all of them."""
        total: Sums = {}
        with Progress("waiting for the parts of other processes", "parts") as progress:
            for number in range(count):
                while not self._part(number).exists():  # if another process fails, torchrun ends this one too
                    time.sleep(POLL_SECONDS)
                for name, value in read_json(self._sums(number), "the sums over a part").items():
                    total[name] = total.get(name, 0) + value
                progress.update(number + 1, count)
        write_json(self._summary, {"parts": count, "sums": total})

    @property
    def _about(self) -> Path:
        return self.folder / "_about.json"

    @property
    def _summary(self) -> Path:
        return self.folder / "_summary.json"

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05}{self.suffix}"

    def _sums(self, number: int) -> Path:
        return self.folder / "_sums" / f"{number:05}.json"


def _remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files of killed processes that were writing these files."""
    for path in paths:
        for file in leftovers(path):
            file.unlink()


@contextmanager
def _errors_of_any_rank() -> Iterator[None]:
    """Let a process that fails print its own error, although only rank 0 prints otherwise."""
    try:
        yield
    except Exception:
        console.err.quiet = False
        raise
