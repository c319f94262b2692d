"""Tables that pass through a trained density, batch by batch: their memory does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from counterflow.columns import Context
from counterflow.commands import console
from counterflow.data.streams import Source, check_writable, numbers, open_table, texts, writing
from counterflow.density.estimator import FlowDensity

Array = np.ndarray[Any, Any]
ROWS = 1 << 15  # at a time
ADDED = "log_density"


def score(run: Path, data: Path, key: str | None, device: str, out: Path | None) -> int:
    """Add the log density of each row as a column."""
    density, folder = _trained(run, device)
    source = open_table(data, key)
    arrays = source.path.suffix.lower() in (".npy", ".npz")
    suffix = ".npy" if arrays else source.path.suffix.lower()
    path = console.new_file(out or folder / f"scores{suffix}")
    if path.suffix.lower() not in ({".npy", ".npz"} if arrays else {suffix}):
        raise ValueError(f"expected --out to end in {suffix}, as {data} is such a table, got {path}")
    names, given = _places(density, source)
    if ADDED in source.names:
        raise ValueError(f"expected a table without a column {ADDED!r}, which is to be added, got one in {data}")
    scored, total, total_of_squares = 0, 0.0, 0.0
    with (
        writing(path, source.rows) as write,
        ThreadPoolExecutor(1) as writer,
        console.err.status("scoring") as status,
    ):
        written = None
        for batch in _ahead(source.batches(ROWS)):
            x = numbers(batch, names, source.path, scored)
            scores = density.score_checked(x, _context(density.context_, given, batch, source.path, scored))
            if written is not None:
                written.result()  # one batch is written while the next is scored
            columns, names_out = [*batch.columns, pyarrow.array(scores)], [*batch.schema.names, ADDED]
            written = writer.submit(write, pyarrow.record_batch(columns, names=names_out))
            scored, total = scored + len(scores), total + float(scores.sum())
            total_of_squares += float(np.square(scores).sum())
            status.update(f"scoring: {scored:,} rows")
        if written is None:
            raise ValueError(f"expected at least one row in {data}, got none; add data")
        written.result()
    mean = total / scored
    error = f" ± {((total_of_squares / scored - mean**2) / (scored - 1)) ** 0.5:.3f}" if scored > 1 else ""
    console.say(f"{scored:,} rows: mean log density {mean:.3f}{error} nats; wrote {path}")
    return 0


def sample(run: Path, n: int, context: Path | None, seed: int, device: str, out: Path | None) -> int:
    """Draw n rows, or n for each row of the context."""
    density, folder = _trained(run, device)
    path = console.new_file(out or folder / "samples.csv")
    check_writable(path)
    if (context is None) != (density.context_ is None):
        wanted = "no --context" if density.context_ is None else f"--context FILE with {density.context_.names}"
        raise ValueError(f"expected {wanted}, as this run was trained, got {context or 'none'}")
    drawn, rng = 0, np.random.RandomState(seed)
    source = None if context is None else open_table(context)
    rows = n if source is None else None if source.rows is None else n * source.rows
    if source is not None and rows is None and path.suffix.lower() in (".npy", ".npz"):
        rows = n * sum(batch.num_rows for batch in source.batches(ROWS))  # an array begins with its shape
    with writing(path, rows) as write, console.err.status("drawing") as status:
        for given, carried in _contexts(density, source, n):
            size = min(ROWS, n - drawn) if given is None else len(next(iter(given.values())))
            rows_drawn = density.sample(size, given, rng)
            write(pyarrow.record_batch({**carried, **_named(density, rows_drawn)}))
            drawn += size
            status.update(f"drawing: {drawn:,} rows")
        if not drawn:
            raise ValueError(f"expected at least one row in {context}, got none; add some")
    console.say(f"{drawn:,} rows; wrote {path}")
    return 0


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, the next one read while this one is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _contexts(density: FlowDensity, source: Source | None, n: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What to condition on for each batch of samples, and the same as columns of it."""
    if source is None or density.context_ is None:
        for _ in range(0, n, ROWS):
            yield None, {}
        return
    given = _match(density.context_.names, source)
    first = 0
    for batch in source.batches(max(1, ROWS // n)):
        context = _context(density.context_, given, batch, source.path, first) or {}
        times = pyarrow.array(np.repeat(np.arange(batch.num_rows), n))
        carried = {
            name: batch.column(place).take(times) for name, place in zip(density.context_.names, given, strict=True)
        }
        yield {name: np.repeat(values, n) for name, values in context.items()}, carried
        first += batch.num_rows


def _trained(run: Path, device: str) -> tuple[FlowDensity, Path]:
    folder = run if run.is_dir() else run.parent
    return FlowDensity.load(folder, device), folder


def _named(density: FlowDensity, x: Array) -> dict[str, Array]:
    return {name: np.ascontiguousarray(part) for name, part in zip(density.get_feature_names_out(), x.T, strict=True)}


def _places(density: FlowDensity, source: Source) -> tuple[list[str], list[str]]:
    """What the trained columns and those to condition on are called in the file."""
    trained = density.get_feature_names_out().tolist()
    others = [] if density.context_ is None else density.context_.names
    places = _match([*trained, *others], source)
    return places[: len(trained)], places[len(trained) :]


def _match(wanted: Sequence[str], source: Source) -> list[str]:
    """By name; by position where the file names no columns and has as many."""
    if not source.named and len(source.names) == len(wanted):
        return list(source.names)
    missing = [name for name in wanted if name not in source.names]
    if missing:
        surplus = [name for name in source.names if name not in wanted]
        raise ValueError(
            f"expected the columns that were trained on in {source.path}, got none called {', '.join(missing)}; "
            f"columns that were not trained on: {', '.join(surplus) or 'none'}"
        )
    return list(wanted)


def _context(
    context: Context | None, places: Sequence[str], batch: Any, path: Path, first: int
) -> dict[str, Array] | None:
    """The columns to condition on, by the names of training; rows are told as those of the file."""
    if context is None:
        return None
    table = {
        name: numbers(batch, [place], path, first)[:, 0] if categories is None else texts(batch, place)
        for (name, categories, _, _), place in zip(context.columns, places, strict=True)
    }
    context.encode(table, first)  # whose errors know the row of the file
    return table
