"""One run of `counterflow density`: read the table, fit the flow, test it beside a Gaussian mixture."""

from __future__ import annotations

import dataclasses
import math
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from counterflow.commands import console, density_plots
from counterflow.commands.density import BUNDLED, Density
from counterflow.commands.density_facts import column_cards, unusual_rows
from counterflow.commands.gaussian_mixture import mixture_log_density
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.run_folder import checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.commands.table_streams import input_table
from counterflow.density.categories import CategoryColumn
from counterflow.density.comparison import classifier_test, in_words
from counterflow.density.context import ContextEncoder
from counterflow.density.detection import Bounds
from counterflow.density.fitting import DensityTrainer, build_flow
from counterflow.density.model import TableDensity
from counterflow.density.periods import Period, periods
from counterflow.density.split import split_rows
from counterflow.io.data.cells import is_number
from counterflow.io.data.faults import Faults, TableFaultsError
from counterflow.io.data.tables import ReadTable, open_table, read_table
from counterflow.io.json import write_json
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch, History
from counterflow.training.tracking import Tracker

Array = np.ndarray[Any, Any]
MIN_ROWS = 10  # some are needed for training, some for validation and some for the test


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table, and the columns to condition on, by name."""

    x: Array  # (N, D) float64
    names: list[str]
    context: dict[str, Array] | None
    types: dict[str, str] = dataclasses.field(default_factory=dict)  # recorded types of the columns
    categories: dict[str, CategoryColumn] = dataclasses.field(default_factory=dict)  # columns of codes, by name

    def select(self, columns: Sequence[int]) -> Rows:
        """Return the rows with the columns of these numbers."""
        return dataclasses.replace(self, x=self.x[:, list(columns)], names=[self.names[i] for i in columns])

    @property
    def texts(self) -> dict[str, Array]:
        """Columns of categories, those to condition on included, as texts by name."""
        coded = {name: self.x[:, self.names.index(name)].astype(str) for name in self.categories}  # also "nan"
        return {**(self.context or {}), **coded}

    def take(self, rows: Array) -> Rows:
        """Return the rows of these numbers."""
        context = self.context and {name: values[rows] for name, values in self.context.items()}
        return dataclasses.replace(self, x=self.x[rows], context=context)


def run(command: Density) -> int:
    """Fit, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "density")
    if not 0 < options.test < 1:
        raise ValueError(f"expected --test to be in (0, 1), got {options.test}")
    build_flow(options.fit, features=2, context=0, seed=0)  # refuses settings before the table is read
    bounds, circular = _bounds(options.bounds), _circular(options.circular)
    with Progress("reading the table"):
        table = _read(options)
    if table.context is not None:  # errors should come before there is a run folder
        ContextEncoder.from_table(table.context)
    train_rows, test_rows = split_rows(len(table.x), options.test, options.seed, table.texts)
    train = table.take(train_rows)
    test = table.take(test_rows)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        trainer = DensityTrainer(
            train.x,
            train.names,
            train.context,
            config=options.fit,
            kinds=dict.fromkeys(options.ordinal, "ordinal") or "auto",
            bounds=bounds or None,
            circular=circular or None,
            types=train.types,
            categories=list(train.categories.values()),
            seed=options.seed,
        )
    for warning in raised:
        console.warn(str(warning.message))
    with running(options, resumed, "density") as (folder, stop, tracker):
        given = f", given {', '.join(table.context)}" if table.context else ""
        console.note(
            f"{options.data}: {len(table.names)} columns{given}; {len(train.x)} rows to train and validate, "
            f"{len(test.x)} to test; run folder {folder}"
        )
        density = _fit(options, trainer, folder, stop, tracker)
        if Workers.current().rank:  # rank 0 tests and plots
            return 0
        train, test = train.select(density.kept), test.select(density.kept)
        density.save(folder)  # now: an error in the test must not lose the training
        interrupted = trainer.histories[-1].stopped == "interrupted"
        with stop.at_once(handled=interrupted), Progress("testing", "Gaussian mixtures") as progress:
            context = density.encode(test.context)
            scores = density.score(test.x, context)
            draws = len(test.x) if context is not None else max(len(test.x), density_plots.SHOWN)
            samples = density.sample(draws, context, options.seed)
            summary = _summary(options, density, trainer.histories, train, test, scores, samples, progress)
            summary["column_cards"] = column_cards(density, test, samples[: len(test.x)])
            summary["unusual_rows"] = unusual_rows(density, scores, test, test_rows, train.x)
            density_plots.plot_run(folder / "plots", density, trainer, test, scores, samples, options.seed)
        write_json(folder / "summary.json", summary)  # last, as it marks the run as complete
        write_report(folder)
        if not interrupted:
            mark_done(folder)
        _print(summary, folder, interrupted)
    return stop.code if interrupted else 0


def _read(options: Density) -> Rows:
    """Read the columns, and those to condition on."""
    if options.data == BUNDLED:
        from sklearn.datasets import load_breast_cancer

        bundled = load_breast_cancer()
        columns = dict(zip(bundled.feature_names.tolist(), bundled.data.T, strict=True))
        names = _column_names(options, list(columns))
        if options.categories:
            raise ValueError(f"expected no --categories of {BUNDLED}, whose columns are all real; leave it out")
        context = {name: columns[name] for name in options.context}
        rows = Rows(np.stack([columns[name] for name in names], 1), names, context or None)
    else:
        with input_table(options.data) as path:
            rows = _read_file(options, path)
    if len(rows.x) < MIN_ROWS:
        raise ValueError(f"expected at least {MIN_ROWS} rows in {options.data}, got {len(rows.x)}; provide more data")
    return rows


def _read_file(options: Density, path: Path) -> Rows:
    """Read a table. Its columns of text are categories, which are known as such only after a first reading."""
    source = open_table(path, options.table.options())
    console.note_all(source.notes)
    names = _column_names(options, source.names)
    missing = _missing(options)
    texts: dict[str, str] = {}

    def read(categories: Sequence[str]) -> ReadTable:
        numbers = [name for name in names if name not in categories]
        return read_table(source, numbers, [*categories, *options.context], missing)

    try:
        table = read(options.categories)
    except TableFaultsError as error:
        texts = dict(error.faults.text)
        if not texts:
            raise ValueError(f"{error}; {_advice(error)}") from None
        try:
            table = read([*options.categories, *texts])
        except TableFaultsError as others:
            _categories(others.others, texts, others.faults)
            raise ValueError(f"{others.faults.describe(path)}; {_advice(others)}") from None
    stated = {name: CategoryColumn.from_cells(name, table.others[name], stated=True) for name in options.categories}
    faults = Faults()
    categories = stated | _categories(table.others, texts, faults)
    if faults.text:
        raise ValueError(
            f"{faults.describe(path)}; {_advice(TableFaultsError(path, faults, 0, len(table.columns), {}))}"
        )
    columns = {name: column.to_numpy() for name, column in zip(table.columns.column_names, table.columns, strict=True)}
    columns |= {name: category.encode(table.others[name]) for name, category in categories.items()}
    context = {name: table.others[name] for name in options.context}
    types = table.types | {name: "string" for name, category in categories.items() if category.is_text}
    return Rows(np.stack([columns[name] for name in names], 1), names, context or None, types, categories)


def _missing(options: Density) -> Literal["error", "drop", "keep"]:
    """Return what is done with missing cells."""
    if options.drop_missing:
        return "drop"
    return "keep" if options.fit.missing == "model" else "error"


def _categories(columns: dict[str, Array], texts: dict[str, str], faults: Faults) -> dict[str, CategoryColumn]:
    """Return the categories of columns of text; those that are none stay in the faults, with the first of their texts.

    Args:
        columns: columns by name.
        texts: the first text of each column of text.
        faults: its columns of text become those that are no categories.
    """
    found = {}
    faults.text.clear()
    for name, first in texts.items():
        try:
            found[name] = CategoryColumn.from_cells(name, columns[name])
        except ValueError:
            faults.text[name] = first
    return found


def _column_names(options: Density, names: Sequence[str]) -> list[str]:
    """Return the names of the columns that are neither dropped nor conditioned on."""
    stated = (*options.context, *options.drop, *options.categories, *options.ordinal, *_bounds(options.bounds))
    stated = (*stated, *_circular(options.circular))
    unknown = [name for name in stated if name not in names]
    if unknown:
        raise ValueError(f"expected names of columns ({', '.join(names)}), got {', '.join(unknown)}")
    kept = [name for name in names if name not in (*options.context, *options.drop)]
    if not kept:
        raise ValueError("expected at least one column besides --context and --drop, got none; remove one of them")
    return kept


def _bounds(texts: Sequence[str]) -> dict[str, Bounds]:
    """Return the bounds by column of texts like share=0:1 and income=0:."""
    bounds: dict[str, Bounds] = {}
    for text in texts:
        name, _, ends = text.rpartition("=")
        low, colon, high = ends.partition(":")
        if not name or not colon or not all(end == "" or is_number(end) for end in (low, high)):
            raise ValueError(f"expected --bounds COLUMN=LOW:HIGH, such as share=0:1 or income=0:, got {text}")
        bounds[name] = (float(low) if low else None, float(high) if high else None)
    return bounds


def _circular(texts: Sequence[str]) -> dict[str, Period]:
    """Return the periods by column of texts like hour=24 and sold=day."""
    circular: dict[str, Period] = {}
    for text in texts:
        name, _, period = text.rpartition("=")
        if not name or not period:
            raise ValueError(f"expected --circular COLUMN=PERIOD, such as hour=24 or sold=day, got {text}")
        circular[name] = float(period) if is_number(period) else period
    periods(circular)  # refuses texts that are no periods before the table is read
    return circular


def _advice(error: TableFaultsError) -> str:
    """Return the options that settle all faults of a table."""
    text, infinite = list(error.faults.text), list(error.faults.infinite)
    parts = []
    if text:
        parts.append(f"texts that hardly repeat, or stand among numbers, are no categories ({', '.join(text)})")
    if error.incomplete:
        parts.append(
            f"--missing model models the other cells, --drop-missing leaves out {error.incomplete:,} of "
            f"{error.rows:,} rows"
        )
    dropped = [*text, *infinite]
    flags = [f"--drop {shlex.join(dropped)}"] if dropped else []
    flags += ["--drop-missing"] if error.incomplete else []
    return "; ".join([*parts, f"try {' '.join(flags)}"])


def _fit(options: Density, trainer: DensityTrainer, folder: Path, stop: Stop, tracker: Tracker | None) -> TableDensity:
    epochs = options.fit.epochs
    total = len(trainer.tasks) * epochs
    with Progress("member 1", "epochs") as progress, metrics(folder) as write:
        progress.update(0, total)

        def on_epoch(task: str, epoch: Epoch) -> None:
            write({"task": task, **dataclasses.asdict(epoch)})
            facts = f"log density {epoch.validation:.2f}, {epoch.rows_per_second:,.0f} rows/s"
            progress.update(trainer.tasks.index(task) * epochs + epoch.epoch, total, task, facts)
            if task == trainer.tasks[0] and epoch.epoch == 1:
                trainings = "trainings" if len(trainer.tasks) > 1 else "training"
                progress.announce(f"{len(trainer.tasks)} {trainings} of at most {epochs} epochs")

        density = trainer.fit(
            on_epoch=on_epoch,
            on_step=stop.after_step(lambda *_: None),
            checkpoints=checkpoints(folder, options.folder, tracker, write),
            tracker=tracker,
        )
    first = trainer.histories[0]
    if first.best is None:
        if first.stopped == "interrupted":
            raise KeyboardInterrupt
        raise ValueError("expected at least one complete epoch of training, got none: no weights are kept")
    return density


def _summary(
    options: Density,
    density: TableDensity,
    histories: Sequence[History],
    train: Rows,
    test: Rows,
    scores: Array,
    samples: Array,
    progress: Progress,
) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "data": options.data,
        "columns": density.kinds,
        "context": list(test.context or {}),
        "rows": {"train and validation": len(train.x), "test": len(test.x)},
        **_mean_and_error(scores, "test_log_density"),
        "parameters": sum(p.numel() for p in density.flow.parameters()),
        "seconds": round(sum(history.seconds for history in histories), 2),
        "epochs": [len(history.epochs) for history in histories],
        "stopped": histories[-1].stopped,
        "holds_rows": density.holds_rows,
    }
    complete = ~np.isnan(test.x).any(1)
    if not test.context and density.network is None and not np.isnan(train.x).any():
        cell_points = options.fit.cell_points
        others, components = mixture_log_density(
            density.columns, train.x, test.x, cell_points, options.seed, progress.update
        )
        summary["gaussian_mixture"] = {"components": components, **_mean_and_error(others, "test_log_density")}
        summary["difference"] = _mean_and_error(scores - others, "log_density")
    if complete.sum() >= MIN_ROWS:
        rows, drawn = test.x[complete], samples[: len(test.x)][complete]
        summary["two_sample_test"] = classifier_test(rows, drawn, options.seed)._asdict()
    return summary


def _mean_and_error(values: Array, name: str) -> dict[str, float | None]:
    """Return the mean of the finite values, its standard error and, if there are any, the number of the others."""
    inside = values[np.isfinite(values)]
    error = float(inside.std(ddof=1) / math.sqrt(len(inside))) if len(inside) > 1 else None
    found = {name: float(inside.mean()) if len(inside) else None, "standard_error": error}
    return found if len(inside) == len(values) else {**found, "rows_outside": len(values) - len(inside)}


def _print(summary: dict[str, Any], folder: Path, interrupted: bool) -> None:
    table = Table(title=f"log density of {summary['rows']['test']} test rows, nats per row")
    for name in ("model", "log density", "standard error"):
        table.add_column(name, justify="left" if name == "model" else "right")
    lines = [("flow", summary)]
    if "gaussian_mixture" in summary:
        components = summary["gaussian_mixture"]["components"]
        lines.append((f"Gaussian mixture, {components} by BIC", summary["gaussian_mixture"]))
    for name, line in lines:
        error = line["standard_error"]
        mean = line["test_log_density"]
        table.add_row(name, "-inf" if mean is None else f"{mean:.3f}", "" if error is None else f"{error:.3f}")
    console.show(table)
    for name, line in lines:
        if "rows_outside" in line:
            console.say(f"{name}: {line['rows_outside']} test rows are outside of the support and left out of the mean")
    difference = summary.get("difference", {"log_density": None})
    if difference["log_density"] is not None:
        error = difference["standard_error"]
        console.say(
            f"difference, row by row: {difference['log_density']:+.3f}" + ("" if error is None else f" ± {error:.3f}")
        )
    test = summary.get("two_sample_test")
    if test is not None:
        console.say(f"samples and test rows are {in_words(test['auc'])} by a classifier (AUC {test['auc']:.2f})")
    if summary["holds_rows"]:
        console.note(
            "kernels at the training rows improved the density: the model contains these rows; to avoid it, give "
            "--no-kernels"
        )
    if interrupted:
        console.warn(f"interrupted; these are the best weights so far; continue with --resume {folder}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
