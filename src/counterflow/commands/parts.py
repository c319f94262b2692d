"""A folder of parts, which any number of processes write together, and which a later run completes.

    FOLDER/part-00000.parquet, ..    each is there as a whole or not at all
    FOLDER/_about.json               what the parts are made of: the model, the data, the options
    FOLDER/_sums/00000.json, ..      the sums over a part, there before the part is
    FOLDER/_summary.json             the sums over all, there when nothing is left to do

What begins with _ is left out by those who read such a folder as one table.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.status import Status

from counterflow.commands import console
from counterflow.io.atomic import atomic_write, leftovers
from counterflow.io.json import read_json, write_json
from counterflow.training.distributed import Workers

ROWS = 1 << 18  # of a part: seconds to minutes of work, and so much is done again after a kill
PATIENCE = 0.1  # seconds between two looks for a part of another process
Piece = TypeVar("Piece")
Show = Callable[[str], None]
Sums = dict[str, float]


def folder(out: Path | None) -> Path | None:
    """--out where it is a folder of parts, which is a name without a suffix; None where it is a file.

    Raises:
        ValueError: it is a file, and there are several processes.
    """
    if out is not None and not out.suffix:
        return out
    if Workers.current().size > 1:
        raise ValueError(
            f"expected --out under torchrun as a folder, a name without a suffix, where each process writes its own "
            f"parts, got {out or 'none'}"
        )
    return None


def sizes(rows: int, most: int) -> Iterator[int]:
    """So many rows in portions of at most so many."""
    return (min(most, rows - first) for first in range(0, rows, most))


def seed_of(seed: int, number: int) -> int:
    """What torch is seeded by for the draws of a part, whichever process makes it.

    Parts have different ones, of the 32 bits that its generator takes; those of another seed lie elsewhere.
    """
    return (int(np.random.SeedSequence(seed).generate_state(1)[0]) + number) % 2**32


def about(command: str, model: list[Path], data: Path | None, **options: Any) -> dict[str, Any]:
    """What the parts are made of, as JSON will have it: files of a model by content, those of data by size and time."""
    return {
        "command": command,
        "model": {file.name: _sha256(file) for file in model},
        "data": None if data is None else _listed(data),
        **options,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(data: Path) -> dict[str, list[int]] | str:
    files = [data] if data.is_file() else sorted(file for file in data.rglob("*") if file.is_file())
    told = [(file.relative_to(data) if file != data else file.name, file.stat()) for file in files]
    return {str(name): [stat.st_size, stat.st_mtime_ns] for name, stat in told} or str(data)


@dataclass(frozen=True)
class Parts:
    """The parts of a folder, whether they are there or not."""

    folder: Path
    suffix: str

    def write(
        self,
        made_of: dict[str, Any],
        pieces: Iterable[Piece],
        do: Callable[[int, Piece, Path, Show], Sums],
        tell: Callable[[Sums], str],
    ) -> int:
        """Make of each piece of work a part: those of this process, save for those that are there.

        `do` is given a number, its piece, the file to write and somewhere to say how it goes, and returns the sums over
        what it wrote; `tell` says what they come to over all parts.

        Raises:
            ValueError: there are no pieces, or the folder is of something else.
        """
        coming = iter(pieces)
        first = next(coming, None)
        if first is None:
            raise ValueError("expected at least one row, got none; add some")
        if not self._begin(made_of):
            with _heard():
                count = self._write_mine(itertools.chain([first], coming), do)
            if Workers.current().rank == 0:
                self._finish(count)
        if Workers.current().rank == 0:
            summary = read_json(self._summary, "a summary that counterflow wrote")
            parts = "1 part" if summary["parts"] == 1 else f"{summary['parts']} parts"
            console.say(f"{tell(summary['sums'])}; {parts} in {self.folder}")
        return 0

    def _begin(self, made_of: dict[str, Any]) -> bool:
        """Make the folder, or find it again; whether nothing is left to do. The first process decides for all."""
        done: bool = Workers.current().broadcast_result(lambda: self._open(made_of))
        with _heard():
            if not self._about.is_file():
                raise ValueError(f"expected --out on a disk that all processes share, got {self.folder}, which is not")
        if done:
            console.note(f"{self.folder}: all parts are there, nothing is left to do")
        return done

    def _open(self, made_of: dict[str, Any]) -> bool:
        wish = "expected --out as a new folder, or one that this command began"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{wish}, got {self.folder}, which is a file; give another --out")
        if not self._about.is_file():
            _clear(self._about)
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"{wish}, got {self.folder}, which holds something else; give another --out")
            write_json(self._about, made_of)
            return False
        began = read_json(self._about, "what counterflow wrote of a folder of parts")
        other = [name for name in {**made_of, **began} if made_of.get(name) != began.get(name)]
        if other:
            raise ValueError(f"{wish}, got {self.folder}, begun with another {', '.join(other)}; give another --out")
        return self._is_done()

    def _is_done(self) -> bool:
        if not self._summary.is_file():
            return False
        count = read_json(self._summary, "a summary that counterflow wrote")["parts"]
        return all(self._part(number).exists() for number in range(count))

    def _write_mine(self, pieces: Iterable[Piece], do: Callable[[int, Piece, Path, Show], Sums]) -> int:
        """The number of all parts, of which those of this process are there now."""
        group, count = Workers.current(), 0
        with console.err.status("looking for what is left to do") as status:
            for number, piece in enumerate(pieces):
                count = number + 1
                part = self._part(number)
                if number % group.size != group.rank or part.exists():
                    continue
                _clear(part, self._sums(number))
                with atomic_write(part) as temporary:
                    sums = do(number, piece, temporary, partial(_show, status, part.name))
                    write_json(self._sums(number), sums)
        return count

    def _finish(self, count: int) -> None:
        """Wait for the parts of all processes, and write what they come to."""
        total: Sums = {}
        with console.err.status("waiting for the parts of other processes"):
            for number in range(count):
                while not self._part(number).exists():  # where another process fails, torchrun ends this one, too
                    time.sleep(PATIENCE)
                for name, value in read_json(self._sums(number), "the sums over a part").items():
                    total[name] = total.get(name, 0) + value
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


def _clear(*paths: Path) -> None:
    """Remove what processes that were killed have left of these files."""
    for path in paths:
        for file in leftovers(path):
            file.unlink()


def _show(status: Status, name: str, how: str) -> None:
    status.update(f"{name}: {how}")


@contextmanager
def _heard() -> Iterator[None]:
    """What goes wrong is told by the process that it happens to, also where only the first one speaks."""
    try:
        yield
    except Exception:
        console.err.quiet = False
        raise
