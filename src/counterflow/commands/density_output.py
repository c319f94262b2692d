"""Tables scored by a trained density or drawn from it, in batches: memory does not grow with the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from counterflow.commands import console
from counterflow.commands.progress import Progress
from counterflow.commands.sharded_output import (
    Report,
    ShardedOutput,
    Sums,
    inputs,
    portions,
    seed_of_part,
    shard_folder,
)
from counterflow.commands.table_streams import input_table, is_stream, output_table
from counterflow.density.categories import unseen_in
from counterflow.density.config import CATEGORIES, DESCRIPTION, MODEL
from counterflow.density.context import ContextEncoder
from counterflow.density.missing import MaskedTableDensity
from counterflow.density.model import TableDensity
from counterflow.io.data.cells import check_cells, numbers, to_texts
from counterflow.io.data.source import TablePart, TableSource, located_batches
from counterflow.io.data.tables import open_table
from counterflow.io.data.writers import WRITTEN, append_batches, check_writable, table_writer
from counterflow.io.table_formats import TableOptions, format_of, suffix_of

Array = np.ndarray[Any, Any]
ROWS_PER_PART = 1 << 18  # seconds to minutes of work, which is all that a kill can lose
BATCH = 1 << 15  # rows in memory at a time
SAMPLED = 1 << 20  # bytes of a CSV file from which the number of its rows is estimated
ADDED = "log_density"  # name of the column
ARRAYS = ("npy", "npz")  # formats without names and types
TABLES = ("csv", "parquet", "feather")  # formats that the rows of a sheet or database are written to


def score_table(run: Path, data: str, options: TableOptions, device: str, out: Path | None) -> int:
    """Write a table with the log density of each row as a column, to a file or a folder of parts; return the exit code.

    Args:
        run: run folder of counterflow density, or one of its files.
        data: table, folder of Parquet files, or "-" for a table on standard input.
        options: of reading the table.
        device: to score on.
        out: file or folder to write, or "-" for standard output; a file in the run folder if None.
    """
    with input_table(data) as path:
        return _score_table(run, path, options, device, out)


def _score_table(run: Path, data: Path, options: TableOptions, device: str, out: Path | None) -> int:
    shards = None if is_stream(out) else shard_folder(out)
    density, folder = load_density(run, device)
    source = open_table(data, options)
    rows = _expected_rows(source)
    kind = ".parquet" if data.is_dir() else suffix_of(data)
    is_array = format_of(kind) in ARRAYS
    suffix = ".npy" if is_array else kind if format_of(kind) in WRITTEN else ".csv"
    _column_names(density, source)  # errors should come before there is a file
    if ADDED in source.names:
        raise ValueError(f"expected a table without a column {ADDED!r}, which is added, got one in {data}")
    console.note_all(source.notes)
    if shards is not None:

        def write_part(number: int, part: TablePart, path: Path, report: Report) -> Sums:
            with append_batches(path, suffix, part.rows) as write:
                return _score(density, source, [part], write, report)

        about = inputs("score", _files(folder), data, options=asdict(options), rows=ROWS_PER_PART)
        pieces = source.parts(ROWS_PER_PART)
        progress = Progress("scoring", "rows")
        return ShardedOutput(shards, suffix).write(about, pieces, write_part, _describe, progress, rows)
    path = console.new_file(out or folder / f"scores{suffix}")
    same = format_of(suffix_of(path)) in ARRAYS if is_array else suffix_of(path) == suffix
    if not (same or is_stream(path) or (suffix != kind and format_of(suffix_of(path)) in TABLES)):
        raise ValueError(
            f"expected --out to end in {suffix}, as {data} is such a table, or to be a name without a suffix, for a "
            f"folder of parts, got {path}"
        )
    with (
        output_table(path, suffix) as file,
        table_writer(file, source.rows) as write,
        Progress("scoring", "rows") as progress,
    ):
        sums = _score(density, source, source.parts(None), write, lambda done: progress.update(done, rows))
        if not sums["rows"]:
            raise ValueError(f"expected at least one row in {data}, got none; add data")
    _say_written(_describe(sums), path)
    return 0


def _say_written(result: str, path: Path) -> None:
    """Print what was written where; to stderr if the table itself went to stdout."""
    if is_stream(path):
        console.note(result)
    else:
        console.say(f"{result}; wrote {path}")


def _score(
    density: TableDensity,
    source: TableSource,
    pieces: Iterable[TablePart],
    write: Callable[[Any], None],
    report: Report,
) -> Sums:
    """Write parts of a table with their log densities; return the sums over the rows."""
    sums = {"rows": 0, "rows_outside": 0, ADDED: 0.0, f"{ADDED}_squared": 0.0}
    with ThreadPoolExecutor(1) as writer:
        written = None
        reported: set[str] = set()
        for x, encoded, batch in trained_columns(density, source, pieces):
            for name in {*unseen_in(x[:, density.category_places], density.category_names)} - reported:
                console.note(f"column {name!r} has categories that training did not see; such rows have -inf")
                reported.add(name)
            scores = density.score(x, encoded)
            if written is not None:
                written.result()  # one batch is written while the next one is scored
            columns = [*batch.columns, pyarrow.array(scores)]
            table = pyarrow.record_batch(columns, names=[*batch.schema.names, ADDED], metadata=batch.schema.metadata)
            written = writer.submit(write, table)
            inside = scores[np.isfinite(scores)]
            sums["rows"] += len(scores)
            sums["rows_outside"] += len(scores) - len(inside)
            sums[ADDED] += float(inside.sum())
            sums[f"{ADDED}_squared"] += float(np.square(inside).sum())
            report(sums["rows"])
        if written is not None:
            written.result()
    return sums


def _describe(sums: Sums) -> str:
    """Return a line with the mean log density and its standard error."""
    rows, outside = int(sums["rows"]), int(sums["rows_outside"])
    inside = rows - outside
    if not inside:
        return f"{rows:,} rows: all outside of the support, with log density -inf"
    mean = sums[ADDED] / inside
    variance = max(0.0, sums[f"{ADDED}_squared"] / inside - mean**2)
    error = f" ± {(variance / (inside - 1)) ** 0.5:.3f}" if inside > 1 else ""
    text = f"{rows:,} rows: mean log density {mean:.3f}{error} nats"
    return f"{text} without {outside:,} rows outside of the support, which have -inf" if outside else text


def sample_table(run: Path, n: int, context: Path | None, seed: int, device: str, out: Path | None) -> int:
    """Write n draws, or n for each row of a context, to a file or a folder of parts; return the exit code.

    Args:
        run: run folder of counterflow density, or one of its files.
        n: number of draws.
        context: table of the columns to condition on.
        seed: of the draws.
        device: to draw on.
        out: file or folder to write, or "-" for CSV on standard output; a file in the run folder if None.
    """
    shards = None if is_stream(out) else shard_folder(out)
    density, folder = load_density(run, device)
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
        progress = Progress("drawing", "rows")
        output = ShardedOutput(shards, ".parquet")
        return output.write(about, pieces, write_part, lambda sums: f"{sums['rows']:,} rows", progress, rows)
    path = console.new_file(out or folder / "samples.csv")
    if not is_stream(path):
        check_writable(path)
    with (
        output_table(path, ".csv") as file,
        table_writer(file, _rows_to_draw(source, n, path)) as write,
        Progress("drawing", "rows") as progress,
    ):
        torch.manual_seed(seed)
        every = source.parts(None) if source else [n]
        typed = format_of(suffix_of(file)) not in ARRAYS
        drawn = _sample(density, batches(every), write, lambda done: progress.update(done, rows), typed)
        if not drawn:
            raise ValueError(f"expected at least one row in {context}, got none; add some")
    _say_written(f"{drawn:,} rows", path)
    return 0


def _expected_rows(source: TableSource) -> int:
    """Return the number of rows; an estimate from the first lines of a CSV file, which does not say it."""
    if source.rows is not None:
        return source.rows
    codec = {".gz": "gzip", ".zst": "zstd"}.get(source.path.suffix)
    with source.path.open("rb") as file:
        stream = file if codec is None else pyarrow.CompressedInputStream(pyarrow.PythonFile(file), codec)
        lines = stream.read(SAMPLED).count(b"\n")
        read = file.tell()  # bytes of the file, compressed or not
    return max(1, round(source.path.stat().st_size / max(1, read) * lines) - source.named)


def _rows_to_draw(source: TableSource | None, n: int, path: Path) -> int | None:
    """Return the number of rows to draw; None if it is unknown, and not needed for the format of the file."""
    if source is None:
        return n
    if source.rows is not None:
        return n * source.rows
    if format_of(suffix_of(path)) in ARRAYS:  # an array starts with its shape
        return n * sum(batch.num_rows for batch in source.batches(BATCH))
    return None


def _sample(
    density: TableDensity, batches: Iterable[Any], write: Callable[[Any], None], report: Report, typed: bool = True
) -> int:
    """Draw batch by batch, in the recorded types if `typed`; return the number of rows."""
    drawn = 0
    for size, context, carried in batches:
        rows = density.sample(size, context)
        write(pyarrow.RecordBatch.from_pydict({**carried, **density.to_arrow(rows, typed)}))
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
    return [path for path in (folder / MODEL, folder / DESCRIPTION, folder / CATEGORIES) if path.is_file()]


def load_density(run: Path, device: str) -> tuple[TableDensity, Path]:
    """Return the density of a run folder, or of one of its files, and the folder."""
    folder = run if run.is_dir() else run.parent
    return TableDensity.load(folder, device), folder


def trained_columns(
    density: TableDensity, source: TableSource, pieces: Iterable[TablePart] | None = None
) -> Iterator[tuple[Array, Array | None, Any]]:
    """Yield (rows of the trained columns, encoded context, Arrow batch) for batches of a table, read ahead."""
    names, context_names = _column_names(density, source)
    places, coded = density.number_places, density.category_places
    types = [density.types.get(density.names[i]) for i in places]
    context = density.context
    for path, first, batch in _read_ahead(located_batches(source.parts(None) if pieces is None else pieces, BATCH)):
        encoded = None if context is None else _encode(context, context_names, batch, path, first)
        x = np.empty((batch.num_rows, len(names)))
        keep = isinstance(density, MaskedTableDensity)
        x[:, places] = numbers(batch, [names[i] for i in places], path, first, types, keep)
        for i in coded:
            category = density.categories[density.names[i]]
            x[:, i] = category.encode(category.cells(batch.column(names[i]), path, first))
        if not keep:
            check_cells(x, names, path, first)
        yield x, encoded, batch


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
