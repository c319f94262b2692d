"""One run of `counterflow compare`: read two tables, test whether they differ, print where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from counterflow.commands import console
from counterflow.commands.compare import Compare
from counterflow.commands.density_output import load_density, trained_columns
from counterflow.commands.trained import kind_of_run
from counterflow.density.comparison import FOLDS, classifier_test, column_shifts, in_words
from counterflow.density.model import TableDensity
from counterflow.io.data.tables import open_table
from counterflow.io.table_formats import TableOptions

Array = np.ndarray[Any, Any]
SIGNIFICANT = 0.01  # p-value below which something is said to have moved
MIN_ROWS = 2 * FOLDS


def compare(options: Compare) -> int:
    """Print the comparison; return the exit code."""
    if kind_of_run(options.run_folder) != "density":
        raise ValueError(f"expected a run folder of counterflow density, got {options.run_folder}, of another command")
    density, _ = load_density(options.run_folder, options.device)
    tables = [_read(density, path, options.table.options()) for path in (options.first, options.second)]
    with console.err.status("comparing"):
        (a, scores_a), (b, scores_b) = tables
        test = classifier_test(a, b, options.seed)
        shifts = column_shifts(a, b, density.names, density.categories)
    moved = [shift.name for shift in shifts if shift.p_value < SIGNIFICANT]
    verdict = "has moved" if test.p_value < SIGNIFICANT or moved else "has not moved noticeably"
    console.say(
        f"the distribution {verdict}: rows of {options.first} and {options.second} are {in_words(test.auc)} "
        f"(AUC {test.auc:.3f}, p = {test.p_value:.2g})"
    )
    for path, scores in ((options.first, scores_a), (options.second, scores_b)):
        console.say(f"{path}: {len(scores):,} rows, {_mean(scores)}")
    table = Table(title="columns, the farthest moved first")
    for name in (
        "column",
        "distance",
        "p-value",
        f"middle of {options.first.name}",
        f"middle of {options.second.name}",
    ):
        table.add_column(name, justify="left" if name == "column" else "right")
    for shift in shifts:
        medians = [_middle(density, shift.name, median) for median in shift.medians]
        table.add_row(shift.name, f"{shift.distance:.3f}", f"{shift.p_value:.2g}", *medians)
    console.out.print(table)
    console.say(f"moved: {', '.join(moved) or 'no column by itself'}")
    return 0


def _read(density: TableDensity, path: Path, options: TableOptions) -> tuple[Array, Array]:
    """Return the rows of a table and their log densities."""
    source = open_table(path, options)
    console.note_all(source.notes)
    rows = [(x, density.score(x, c)) for x, c, _ in trained_columns(density, source)]
    count = sum(len(x) for x, _ in rows)
    if count < MIN_ROWS:
        raise ValueError(f"expected at least {MIN_ROWS} rows in {path}, got {count}; add some")
    return np.concatenate([x for x, _ in rows]), np.concatenate([scores for _, scores in rows])


def _middle(density: TableDensity, name: str, value: float) -> str:
    """Return a median, or the most frequent category, as text."""
    category = density.categories.get(name)
    return f"{value:.6g}" if category is None else str(category.decode(np.array([value]))[0])


def _mean(scores: Array) -> str:
    inside = scores[np.isfinite(scores)]
    outside = len(scores) - len(inside)
    mean = f"mean log density {inside.mean():.3f} nats" if len(inside) else "no row in the support"
    return f"{mean}, without {outside:,} rows outside of the support" if outside and len(inside) else mean
