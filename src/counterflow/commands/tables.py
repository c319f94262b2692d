"""Tables that pass through a trained density, batch by batch: their memory does not grow with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch

from counterflow.commands import console, parts
from counterflow.density.config import DESCRIPTION, MODEL
from counterflow.density.context import Context
from counterflow.io.data.cells import numbers, to_texts
from counterflow.io.data.source import Part, Source, located
from counterflow.io.data.streams import appending, check_writable, open_table, writing

if TYPE_CHECKING:  # scikit-learn takes seconds to import, which no other command should wait for
    from counterflow.density.estimator import FlowDensity

Array = np.ndarray[Any, Any]
ROWS = 1 << 15  # at a time
ADDED = "log_density"


def score(run: Path, data: Path, key: str | None, device: str, out: Path | None) -> int:
    """Add the log density of each row as a column, in one file or in a folder of parts."""
    into = parts.folder(out)
    density, folder = _trained(run, device)
    source = open_table(data, key)
    kind = ".parquet" if data.is_dir() else data.suffix.lower()
    arrays = kind in (".npy", ".npz")
    suffix = ".npy" if arrays else kind
    names, given = _places(density, source)
    if ADDED in source.names:
        raise ValueError(f"expected a table without a column {ADDED!r}, which is to be added, got one in {data}")
    if into is not None:

        def do(number: int, part: Part, path: Path, show: parts.Show) -> parts.Sums:
            with appending(path, suffix, part.rows) as write:
                return _score(density, names, given, [part], write, show)

        made_of = parts.about("score", _files(folder), data, key=key, rows=parts.ROWS)
        return parts.Parts(into, suffix).write(made_of, source.parts(parts.ROWS), do, _told)
    path = console.new_file(out or folder / f"scores{suffix}")
    if path.suffix.lower() not in ({".npy", ".npz"} if arrays else {suffix}):
        raise ValueError(
            f"expected --out to end in {suffix}, as {data} is such a table, or to be a name without a suffix, for a "
            f"folder of parts, got {path}"
        )
    with writing(path, source.rows) as write, console.err.status("scoring") as status:
        sums = _score(density, names, given, source.parts(None), write, lambda how: status.update(f"scoring: {how}"))
        if not sums["rows"]:
            raise ValueError(f"expected at least one row in {data}, got none; add data")
    console.say(f"{_told(sums)}; wrote {path}")
    return 0


def _score(
    density: FlowDensity,
    names: Sequence[str],
    given: Sequence[str],
    pieces: Iterable[Part],
    write: Callable[[Any], None],
    show: parts.Show,
) -> parts.Sums:
    """Write these parts of a table with their log densities; the sums over the rows."""
    sums = {"rows": 0, ADDED: 0.0, f"{ADDED}_squared": 0.0}
    with ThreadPoolExecutor(1) as writer:
        written = None
        for path, first, batch in _ahead(located(pieces, ROWS)):
            x = numbers(batch, names, path, first)
            scores = density.score_checked(x, _context(density.context_, given, batch, path, first))
            if written is not None:
                written.result()  # one batch is written while the next is scored
            columns, names_out = [*batch.columns, pyarrow.array(scores)], [*batch.schema.names, ADDED]
            written = writer.submit(write, pyarrow.record_batch(columns, names=names_out))
            sums["rows"] += len(scores)
            sums[ADDED] += float(scores.sum())
            sums[f"{ADDED}_squared"] += float(np.square(scores).sum())
            show(f"{sums['rows']:,} rows")
        if written is not None:
            written.result()
    return sums


def _told(sums: parts.Sums) -> str:
    """The mean log density and its standard error."""
    rows, mean = int(sums["rows"]), sums[ADDED] / sums["rows"]
    variance = max(0.0, sums[f"{ADDED}_squared"] / rows - mean**2)
    error = f" ± {(variance / (rows - 1)) ** 0.5:.3f}" if rows > 1 else ""
    return f"{rows:,} rows: mean log density {mean:.3f}{error} nats"


def sample(run: Path, n: int, context: Path | None, seed: int, device: str, out: Path | None) -> int:
    """Draw n rows, or n for each row of the context, to one file or to a folder of parts."""
    into = parts.folder(out)
    density, folder = _trained(run, device)
    if (context is None) != (density.context_ is None):
        wanted = "no --context" if density.context_ is None else f"--context FILE with {density.context_.names}"
        raise ValueError(f"expected {wanted}, as this run was trained, got {context or 'none'}")
    source = None if context is None else open_table(context)
    asked = _asked(density, source, n)
    if into is not None:

        def do(number: int, piece: Any, path: Path, show: parts.Show) -> parts.Sums:
            torch.manual_seed(parts.seed_of(seed, number))
            with appending(path, ".parquet") as write:
                return {"rows": _sample(density, asked([piece]), write, show)}

        made_of = parts.about("sample", _files(folder), context, n=n, seed=seed, rows=parts.ROWS)
        pieces: Iterable[Any] = source.parts(max(1, parts.ROWS // n)) if source else parts.sizes(n, parts.ROWS)
        return parts.Parts(into, ".parquet").write(made_of, pieces, do, lambda sums: f"{sums['rows']:,} rows")
    path = console.new_file(out or folder / "samples.csv")
    check_writable(path)
    rows = n if source is None else None if source.rows is None else n * source.rows
    if source is not None and rows is None and path.suffix.lower() in (".npy", ".npz"):
        rows = n * sum(batch.num_rows for batch in source.batches(ROWS))  # an array begins with its shape
    with writing(path, rows) as write, console.err.status("drawing") as status:
        every = source.parts(None) if source else [n]
        torch.manual_seed(seed)
        drawn = _sample(density, asked(every), write, lambda how: status.update(f"drawing: {how}"))
        if not drawn:
            raise ValueError(f"expected at least one row in {context}, got none; add some")
    console.say(f"{drawn:,} rows; wrote {path}")
    return 0


def _sample(density: FlowDensity, asked: Iterable[Any], write: Callable[[Any], None], show: parts.Show) -> int:
    """Draw what is asked for, batch by batch; how many rows that were."""
    drawn = 0
    for size, given, carried in asked:
        rows = density.draw(size, given)
        write(pyarrow.record_batch({**carried, **_named(density, rows)}))
        drawn += size
        show(f"{drawn:,} rows")
    return drawn


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, the next one read while this one is in use."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _asked(density: FlowDensity, source: Source | None, n: int) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """For pieces of the work, each batch to draw: how many rows, what to condition on, and the same as columns of it.

    A piece is a number of rows, or a part of the table of context, of whose rows each is drawn n times.
    """
    context = density.context_
    if source is None or context is None:
        return lambda sizes: ((size, None, {}) for whole in sizes for size in parts.sizes(whole, ROWS))
    places = _match(context.names, source)

    def asked(pieces: Iterable[Part]) -> Iterator[Any]:
        for path, first, batch in located(pieces, max(1, ROWS // n)):
            table = _context(context, places, batch, path, first) or {}
            times = pyarrow.array(np.repeat(np.arange(batch.num_rows), n))
            carried = {name: batch.column(place).take(times) for name, place in zip(context.names, places, strict=True)}
            yield n * batch.num_rows, {name: np.repeat(values, n) for name, values in table.items()}, carried

    return asked


def _files(folder: Path) -> list[Path]:
    return [folder / MODEL, folder / DESCRIPTION]


def _trained(run: Path, device: str) -> tuple[FlowDensity, Path]:
    folder = run if run.is_dir() else run.parent
    from counterflow.density.estimator import FlowDensity

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
        name: numbers(batch, [place], path, first)[:, 0] if categories is None else to_texts(batch.column(place))
        for (name, categories, _, _), place in zip(context.columns, places, strict=True)
    }
    context.encode(table, first)  # whose errors know the row of the file
    return table
