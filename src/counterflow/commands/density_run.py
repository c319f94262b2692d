"""One run of `counterflow density`: read the table, fit the flow, test it beside a Gaussian mixture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from counterflow.commands import console, density_plots
from counterflow.commands.density import BUNDLED, Density
from counterflow.commands.gaussian_mixture import mixture_log_density
from counterflow.commands.run_folder import check_new, checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.density.estimator import FlowDensity
from counterflow.io.data.tables import open_table, read_table
from counterflow.io.json import write_json
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch

Array = np.ndarray[Any, Any]
MIN_ROWS = 10  # some are needed for training, some for validation and some for the test


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table: an Arrow table of float64, and the columns to condition on, by name."""

    x: Any
    context: dict[str, Array] | None

    @property
    def array(self) -> Array:
        """Return the table as an array (N, D)."""
        return np.stack([column.to_numpy() for column in self.x.columns], 1)

    def take(self, rows: Array) -> Rows:
        """Return the rows of these numbers."""
        context = {name: values[rows] for name, values in (self.context or {}).items()}
        return Rows(self.x.take(rows), context or None)


def run(command: Density) -> int:
    """Fit, test and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "density")
    if not 0 < options.test < 1:
        raise ValueError(f"expected --test to be in (0, 1), got {options.test}")
    if resumed is None:
        check_new(options.folder.out)
    with console.err.status("reading the table"):
        table = _read(options)
    order = np.random.default_rng(options.seed).permutation(table.x.num_rows)
    held_out = max(1, round(options.test * len(order)))
    test, train = table.take(order[:held_out]), table.take(order[held_out:])
    density = FlowDensity(**dataclasses.asdict(options.fit), random_state=options.seed)
    density.rehearse(train.x, train.context)  # errors should come before there is a run folder
    with running(options, resumed, "density") as (folder, stop):
        given = f", given {', '.join(table.context)}" if table.context else ""
        console.note(
            f"{options.data}: {table.x.num_columns} columns{given}; {train.x.num_rows} rows to train and validate, "
            f"{held_out} to test; run folder {folder}"
        )
        _fit(options, density, train, folder, stop)
        if Workers.current().rank:  # rank 0 tests and plots
            return 0
        density.save(folder)
        with console.err.status("testing, beside Gaussian mixtures"):
            summary = _summary(options, density, train, test)
        density_plots.plot_run(folder / "plots", density, test, options.seed)
        write_json(folder / "summary.json", summary)  # last, as it marks the run as complete
        interrupted = density.records_[-1].stopped == "interrupted"
        if not interrupted:
            mark_done(folder)
        _print(summary, folder, interrupted)
    return stop.code if interrupted else 0


def _read(options: Density) -> Rows:
    """Read the columns, by the names of the table, and those to condition on."""
    import pyarrow

    if options.data == BUNDLED:
        from sklearn.datasets import load_breast_cancer

        bundled = load_breast_cancer()
        columns = dict(zip(bundled.feature_names.tolist(), bundled.data.T, strict=True))
        _check_names(options, list(columns))
        context = {name: columns[name] for name in options.context}
        left_out = (*options.context, *options.drop)
        x = pyarrow.table({name: values for name, values in columns.items() if name not in left_out})
    else:
        source = open_table(Path(options.data), options.key)
        _check_names(options, source.names)
        wanted = [name for name in source.names if name not in (*options.context, *options.drop)]
        x, context = read_table(source, wanted, options.context)
    if x.num_rows < MIN_ROWS:
        raise ValueError(f"expected at least {MIN_ROWS} rows in {options.data}, got {x.num_rows}; provide more data")
    return Rows(x, context)


def _check_names(options: Density, names: Sequence[str]) -> None:
    unknown = [name for name in (*options.context, *options.drop) if name not in names]
    if unknown:
        raise ValueError(f"expected names of columns ({', '.join(names)}), got {', '.join(unknown)}")
    if not {*names} - {*options.context, *options.drop}:
        raise ValueError("expected at least one column besides --context and --drop, got none; remove one of them")


def _fit(options: Density, density: FlowDensity, train: Rows, folder: Path, stop: Stop) -> None:
    with console.progress("rows", "log density") as bar, metrics(folder) as write:
        epochs = options.fit.epochs
        line = bar.add_task("member 1", total=density.trainings * epochs, epoch="1", elbo="...", rate="...")
        tasks: list[str] = []  # so far

        def on_epoch(task: str, epoch: Epoch) -> None:
            write({"task": task, **dataclasses.asdict(epoch)})
            if task not in tasks:
                tasks.append(task)
            bar.update(
                line,
                description=task,
                completed=tasks.index(task) * epochs + epoch.epoch,
                epoch=f"{epoch.epoch}/{epochs}",
                elbo=f"{epoch.validation:.2f}",
                rate=f"{epoch.rows_per_second:,.0f}",
            )

        density.fit(
            train.x,
            context=train.context,
            on_epoch=on_epoch,
            on_step=stop.after_step(lambda *_: None),
            checkpoints=checkpoints(folder, options.folder, write),
        )
    if density.records_[0].best is None:
        if density.records_[0].stopped == "interrupted":
            raise KeyboardInterrupt
        raise ValueError("expected at least one complete epoch of training, got none: no weights are kept")


def _summary(options: Density, density: FlowDensity, train: Rows, test: Rows) -> dict[str, Any]:
    scores = density.score_samples(test.x, test.context)
    summary: dict[str, Any] = {
        "data": options.data,
        "columns": {column.name: column.map for column in density.columns_.columns},
        "context": list(test.context or {}),
        "rows": {"train and validation": train.x.num_rows, "test": test.x.num_rows},
        **_mean_and_error(scores, "test_log_density"),
        "parameters": sum(p.numel() for p in density.flow_.parameters()),
        "seconds": round(sum(history.seconds for history in density.records_), 2),
        "epochs": [len(history.epochs) for history in density.records_],
        "stopped": density.records_[-1].stopped,
        "holds_rows": density.holds_rows_,
    }
    if not test.context:
        others, components = mixture_log_density(
            density.columns_, train.array, test.array, options.fit.cell_points, options.seed
        )
        summary["gaussian_mixture"] = {"components": components, **_mean_and_error(others, "test_log_density")}
        summary["difference"] = _mean_and_error(scores - others, "log_density")
    return summary


def _mean_and_error(values: Array, name: str) -> dict[str, float | None]:
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {name: float(values.mean()), "standard_error": error}


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
        table.add_row(name, f"{line['test_log_density']:.3f}", "" if error is None else f"{error:.3f}")
    console.out.print(table)
    if "difference" in summary:
        difference, error = summary["difference"].values()
        console.say(f"difference, row by row: {difference:+.3f}" + ("" if error is None else f" ± {error:.3f}"))
    if summary["holds_rows"]:
        console.note(
            "kernels at the training rows improved the density: the model contains these rows; to avoid it, give "
            "--no-kernels"
        )
    if interrupted:
        console.note(f"interrupted; these are the best weights so far; continue with --resume {folder}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
