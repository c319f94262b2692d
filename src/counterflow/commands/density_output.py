"""Tables scored by a trained density or drawn from it, in batches: memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from counterflow.commands import console
from counterflow.commands.progress import Tracker
from counterflow.commands.sharded_output import (
    Report,
    ShardedOutput,
    Sums,
    inputs,
    portions,
    seed_of_part,
    shard_folder,
)
from counterflow.density.config import DESCRIPTION, MODEL
from counterflow.density.context import ContextEncoder
from counterflow.density.model import TableDensity
from counterflow.io.data.cells import numbers, to_texts
from counterflow.io.data.source import TablePart, TableSource, located_batches
from counterflow.io.data.tables import open_table
from counterflow.io.data.writers import append_batches, check_writable, table_writer

Array = np.ndarray[Any, Any]
ROWS_PER_PART = 1 << 18  # seconds to minutes of work, which is all that a kill can lose
BATCH = 1 << 15  # rows in memory at a time
SAMPLED = 1 << 20  # bytes of a CSV file from which the number of its rows is estimated
ADDED = "log_density"  # name of the column


def score_table(run: Path, data: Path, key: str | None, device: str, out: Path | None) -> int:
    """Write a table with the log density of each row as a column, to a file or a folder of parts; return the exit code.

    Args:
        run: run folder of counterflow density, or one of its files.
        data: table, or folder of Parquet files.
        key: array of an .npz file.
        device: to score on.
        out: file or folder to write; a file in the run folder if None.
    """
    shards = shard_folder(out)
    density, folder = _load(run, device)
    source = open_table(data, key)
    rows = _expected_rows(source)
    kind = ".parquet" if data.is_dir() else data.suffix.lower()
    is_array = kind in (".npy", ".npz")
    suffix = ".npy" if is_array else kind
    names, context_names = _column_names(density, source)
    if ADDED in source.names:
        raise ValueError(f"expected a table without a column {ADDED!r}, which is added, got one in {data}")
    if shards is not None:

        def write_part(number: int, part: TablePart, path: Path, report: Report) -> Sums:
            with append_batches(path, suffix, part.rows) as write:
                return _score(density, names, context_names, [part], write, report)

        about = inputs("score", _files(folder), data, key=key, rows=ROWS_PER_PART)
        pieces = source.parts(ROWS_PER_PART)
        tracker = Tracker("scoring", "rows")
        return ShardedOutput(shards, suffix).write(about, pieces, write_part, _describe, tracker, rows)
    path = console.new_file(out or folder / f"scores{suffix}")
    if path.suffix.lower() not in ({".npy", ".npz"} if is_array else {suffix}):
        raise ValueError(
            f"expected --out to end in {suffix}, as {data} is such a table, or to be a name without a suffix, for a "
            f"folder of parts, got {path}"
        )
    with table_writer(path, source.rows) as write, Tracker("scoring", "rows") as tracker:
        sums = _score(density, names, context_names, source.parts(None), write, lambda done: tracker.update(done, rows))
        if not sums["rows"]:
            raise ValueError(f"expected at least one row in {data}, got none; add data")
    console.say(f"{_describe(sums)}; wrote {path}")
    return 0


def _score(
    density: TableDensity,
    names: Sequence[str],
    context_names: Sequence[str],
    pieces: Iterable[TablePart],
    write: Callable[[Any], None],
    report: Report,
) -> Sums:
    """Write parts of a table with their log densities; return the sums over the rows."""
    sums = {"rows": 0, ADDED: 0.0, f"{ADDED}_squared": 0.0}
    with ThreadPoolExecutor(1) as writer:
        written = None
        for path, first, batch in _read_ahead(located_batches(pieces, BATCH)):
            x = numbers(batch, names, path, first)
            context = density.context
            encoded = None if context is None else _encode(context, context_names, batch, path, first)
            scores = density.score(x, encoded)
            if written is not None:
                written.result()  # one batch is written while the next one is scored
            columns = [*batch.columns, pyarrow.array(scores)]
            table = pyarrow.record_batch(columns, names=[*batch.schema.names, ADDED])
            written = writer.submit(write, table)
            sums["rows"] += len(scores)
            sums[ADDED] += float(scores.sum())
            sums[f"{ADDED}_squared"] += float(np.square(scores).sum())
            report(sums["rows"])
        if written is not None:
            written.result()
    return sums


def _describe(sums: Sums) -> str:
    """Return a line with the mean log density and its standard error."""
    rows = int(sums["rows"])
    mean = sums[ADDED] / rows
    variance = max(0.0, sums[f"{ADDED}_squared"] / rows - mean**2)
    error = f" ± {(variance / (rows - 1)) ** 0.5:.3f}" if rows > 1 else ""
    return f"{rows:,} rows: mean log density {mean:.3f}{error} nats"


def sample_table(run: Path, n: int, context: Path | None, seed: int, device: str, out: Path | None) -> int:
    """Write n draws, or n for each row of a context, to a file or a folder of parts; return the exit code.

    Args:
        run: run folder of counterflow density, or one of its files.
        n: number of draws.
        context: table of the columns to condition on.
        seed: of the draws.
        device: to draw on.
        out: file or folder to write; a file in the run folder if None.
    """
    shards = shard_folder(out)
    density, folder = _load(run, device)
    if (context is None) != (density.context is None):
        wanted = "no --context" if density.context is None else f"--context FILE with {density.context.names}"
        raise ValueError(f"expected {wanted}, as this run was trained, got {context or 'none'}")
    source = None if context is None else open_table(context)
    rows = n
    if source is not None:
        rows *= _expected_rows(source)
    batches = _batches_to_draw(density, source, n)
    if shards is not None:

        def write_part(number: int, piece: Any, path: Path, report: Report) -> Sums:
            torch.manual_seed(seed_of_part(seed, number))
            with append_batches(path, ".parquet") as write:
                return {"rows": _sample(density, batches([piece]), write, report)}

        about = inputs("sample", _files(folder), context, n=n, seed=seed, rows=ROWS_PER_PART)
        pieces: Iterable[Any] = source.parts(max(1, ROWS_PER_PART // n)) if source else portions(n, ROWS_PER_PART)
        tracker = Tracker("drawing", "rows")
        output = ShardedOutput(shards, ".parquet")
        return output.write(about, pieces, write_part, lambda sums: f"{sums['rows']:,} rows", tracker, rows)
    path = console.new_file(out or folder / "samples.csv")
    check_writable(path)
    with (
        table_writer(path, _rows_to_draw(source, n, path)) as write,
        Tracker("drawing", "rows") as tracker,
    ):
        torch.manual_seed(seed)
        every = source.parts(None) if source else [n]
        drawn = _sample(density, batches(every), write, lambda done: tracker.update(done, rows))
        if not drawn:
            raise ValueError(f"expected at least one row in {context}, got none; add some")
    console.say(f"{drawn:,} rows; wrote {path}")
    return 0


def _expected_rows(source: TableSource) -> int:
    """Return the number of rows; an estimate from the first lines of a CSV file, which does not say it."""
    if source.rows is not None:
        return source.rows
    with source.path.open("rb") as file:
        start = file.read(SAMPLED)
    return max(1, round(source.path.stat().st_size / max(1, len(start)) * start.count(b"\n")) - source.named)


def _rows_to_draw(source: TableSource | None, n: int, path: Path) -> int | None:
    """Return the number of rows to draw; None if it is unknown, and not needed for the format of the file."""
    if source is None:
        return n
    if source.rows is not None:
        return n * source.rows
    if path.suffix.lower() in (".npy", ".npz"):  # an array starts with its shape
        return n * sum(batch.num_rows for batch in source.batches(BATCH))
    return None


def _sample(density: TableDensity, batches: Iterable[Any], write: Callable[[Any], None], report: Report) -> int:
    """Draw batch by batch; return the number of rows."""
    drawn = 0
    for size, context, carried in batches:
        rows = density.sample(size, context)
        write(pyarrow.RecordBatch.from_pydict({**carried, **_by_name(density, rows)}))
        drawn += size
        report(drawn)
    return drawn


def _read_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the same batches; the next one is read while one is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _batches_to_draw(
    density: TableDensity, source: TableSource | None, n: int
) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Return a function that turns pieces of work into batches (rows, encoded context, context columns to copy).

    A piece is a number of rows or, with a context, a part of its table, for each row of which n rows are drawn.
    """
    context = density.context
    if source is None or context is None:
        return lambda pieces: ((size, None, {}) for piece in pieces for size in portions(piece, BATCH))
    names = _match(context.names, source)

    def batches(pieces: Iterable[TablePart]) -> Iterator[Any]:
        for path, first, batch in located_batches(pieces, max(1, BATCH // n)):
            encoded = _encode(context, names, batch, path, first)
            times = pyarrow.array(np.repeat(np.arange(batch.num_rows), n))
            carried = {
                trained: batch.column(name).take(times) for trained, name in zip(context.names, names, strict=True)
            }
            yield n * batch.num_rows, np.repeat(encoded, n, 0), carried

    return batches


def _files(folder: Path) -> list[Path]:
    return [folder / MODEL, folder / DESCRIPTION]


def _load(run: Path, device: str) -> tuple[TableDensity, Path]:
    folder = run if run.is_dir() else run.parent
    return TableDensity.load(folder, device), folder


def _by_name(density: TableDensity, x: Array) -> dict[str, Array]:
    return {name: np.ascontiguousarray(column) for name, column in zip(density.names, x.T, strict=True)}


def _column_names(density: TableDensity, source: TableSource) -> tuple[list[str], list[str]]:
    """Return the names, in the file, of the trained columns and of those to condition on."""
    context = [] if density.context is None else density.context.names
    names = _match([*density.names, *context], source)
    return names[: len(density.names)], names[len(density.names) :]


def _match(wanted: Sequence[str], source: TableSource) -> list[str]:
    """Match columns by name; by position if the file has no names and as many columns."""
    if not source.named and len(source.names) == len(wanted):
        return list(source.names)
    missing = [name for name in wanted if name not in source.names]
    if missing:
        surplus = [name for name in source.names if name not in wanted]
        raise ValueError(
            f"expected the trained columns in {source.path}, got none called {', '.join(missing)}; columns that were "
            f"not trained on: {', '.join(surplus) or 'none'}"
        )
    return list(wanted)


def _encode(context: ContextEncoder, names: Sequence[str], batch: Any, path: Path, first: int) -> Array:
    """Encode the columns to condition on, (N, C); errors name the rows of the file."""
    table = {
        trained: numbers(batch, [name], path, first)[:, 0] if categories is None else to_texts(batch.column(name))
        for (trained, categories, _, _), name in zip(context.columns, names, strict=True)
    }
    return context.encode(table, first)
