"""counterflow density: fit the density of a table, compare it with a Gaussian mixture, and draw what came out."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.table import Table
from torch import Tensor

from counterflow import plots
from counterflow.checks import require
from counterflow.commands import console, training
from counterflow.density.config import DensityConfig
from counterflow.flows.mixture import FlowMixture
from counterflow.io.data.streams import open_table, read_table
from counterflow.io.json import write_json
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch
from counterflow.transforms.constant import Permute
from counterflow.transforms.table.table import TableTransform

if TYPE_CHECKING:  # scikit-learn takes seconds to import, which no other command should wait for
    from counterflow.density.estimator import FlowDensity

Array = np.ndarray[Any, Any]
BUNDLED = "breast-cancer"
FEWEST = 10  # rows, of which one part is tested and one validates
COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the mixtures that BIC chooses from
MIXED = 20_000  # rows at most that they are fitted to
SHOWN = 2_000  # rows in a picture


@dataclass(frozen=True)
class Density:
    """Fit the density of the rows of a table by a normalizing flow.

    DATA is a .csv (with or without a line of names), .parquet, .npy or .npz file; without it, the 569 x 30 table of
    breast tumours that scikit-learn ships. A part of the rows, by the seed, is kept apart and scored at the end,
    beside scikit-learn's GaussianMixture with the number of components that BIC chooses.

        counterflow density table.csv --context country --out run
        counterflow score run more.csv --out scores.csv
        counterflow sample run -n 1000 --out samples.csv

    The run folder gets model.safetensors and density.json (for counterflow.FlowDensity.load), metrics.jsonl,
    summary.json and plots/.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")] = BUNDLED
    """.csv, .parquet, .npy, .npz, or breast-cancer"""
    key: str | None = None
    """which array of an .npz"""
    context: tuple[str, ...] = ()
    """columns to condition on, numbers or categories"""
    drop: tuple[str, ...] = ()
    """columns to leave out"""
    test: float = 0.2
    """part of the rows that is kept apart for the test"""
    seed: int = 0
    """of the parts, initial weights, batches and noise"""
    folder: training.Place = training.RunFolder()
    """where the run is written"""
    fit: Annotated[DensityConfig, tyro.conf.arg(name="")] = DensityConfig()  # noqa: RUF009  # frozen
    """the flow and its training"""

    def run(self) -> int:
        """Read, fit, test, draw; 130 after Ctrl-C, 143 after SIGTERM, with the results so far."""
        command, run = training.opened(self, "density")
        return command._run(run)

    def _run(self, run: Path | None) -> int:
        """A new run, or one to go on with."""
        from counterflow.density.estimator import FlowDensity

        if not 0 < self.test < 1:
            raise ValueError(f"expected test in (0, 1), got {self.test}")
        if run is None:
            console.check_new(self.folder.out)
        require("matplotlib", "plots", "plots")
        with console.err.status("reading the table"):
            x, context = self._read()
        order = np.random.default_rng(self.seed).permutation(len(x))
        held_out = max(1, round(self.test * len(x)))
        test, train = (_Part(*_rows(x, context, rows)) for rows in (order[:held_out], order[held_out:]))
        density = FlowDensity(**dataclasses.asdict(self.fit), random_state=self.seed)
        density.rehearse(train.x, train.context)  # what is refused is refused before there is a run folder
        run = training.begun(self, run, "density")
        given = f", given {', '.join(context)}" if context else ""
        console.note(
            f"{self.data}: {x.num_columns} columns{given}; {train.x.num_rows} rows to train and validate, "
            f"{held_out} to test; run folder {run}"
        )
        with training.under_way(run) as stop:
            self._fit(density, train, run, stop)
            if Workers.current().rank:  # the first process alone tests and draws
                return 0
            density.save(run)
            with console.err.status("testing, beside Gaussian mixtures"):
                summary = self._summary(density, train, test)
            _draw(density, test, run / "plots", self.seed)
            write_json(run / "summary.json", summary)  # the last of all: a folder that has one is whole
        _tell(summary, run)
        if density.records_[-1].stopped == "interrupted":
            return stop.code
        training.finish(run)
        return 0

    def _read(self) -> tuple[Any, dict[str, Array]]:
        """The columns as an Arrow table, whose names scikit-learn takes over, and those to condition on."""
        import pyarrow
        from sklearn.datasets import load_breast_cancer

        if self.data == BUNDLED:
            bundled = load_breast_cancer()
            read = dict(zip(bundled.feature_names.tolist(), bundled.data.T, strict=True))
            self._check_names(list(read))
            context = {name: read[name] for name in self.context}
            x = pyarrow.table({name: read[name] for name in read if name not in (*self.context, *self.drop)})
        else:
            source = open_table(Path(self.data), self.key)
            self._check_names(source.names)
            x, context = read_table(
                source, [n for n in source.names if n not in (*self.context, *self.drop)], self.context
            )
        if x.num_rows < FEWEST:
            raise ValueError(f"expected at least {FEWEST} rows in {self.data}, got {x.num_rows}; bring more data")
        return x, context

    def _check_names(self, names: Sequence[str]) -> None:
        strangers = [name for name in (*self.context, *self.drop) if name not in names]
        if strangers:
            raise ValueError(f"expected names of columns ({', '.join(names)}), got {', '.join(strangers)}")
        if not {*names} - {*self.context, *self.drop}:
            raise ValueError("expected a column that is neither --context nor --drop, got none; leave one out of them")

    def _fit(self, density: FlowDensity, train: _Part, run: Path, stop: training.Stop) -> None:
        with console.progress("rows", "log density") as bar, training.metrics(run) as write:
            epochs = self.fit.epochs
            line = bar.add_task("member 1", total=density.trainings * epochs, epoch="1", elbo="...", rate="...")
            tasks: list[str] = []  # so far

            def on_epoch(task: str, epoch: Epoch) -> None:
                write({"task": task, **dataclasses.asdict(epoch)})
                if task not in tasks:
                    tasks.append(task)
                shown, rate = f"{epoch.epoch}/{epochs}", f"{epoch.rows_per_second:,.0f}"
                completed, reached = tasks.index(task) * epochs + epoch.epoch, f"{epoch.validation:.2f}"
                bar.update(line, description=task, completed=completed, epoch=shown, elbo=reached, rate=rate)

            checkpoints = training.checkpoints(run, self.folder, write)
            on_step = stop.after_step(lambda *_: None)
            density.fit(train.x, context=train.context, on_epoch=on_epoch, on_step=on_step, checkpoints=checkpoints)
        if density.records_[0].best is None:
            if density.records_[0].stopped == "interrupted":
                raise KeyboardInterrupt
            raise ValueError("expected at least one whole epoch of training, got none: no weights are kept")

    def _summary(self, density: FlowDensity, train: _Part, test: _Part) -> dict[str, Any]:
        scores = density.score_samples(test.x, test.context)
        summary: dict[str, Any] = {
            "data": self.data,
            "columns": {column.name: column.map for column in density.columns_.columns},
            "context": list(test.context or {}),
            "rows": {"train and validation": train.x.num_rows, "test": test.x.num_rows},
            "test_log_density": float(scores.mean()),
            "standard_error": _standard_error(scores),
            "parameters": sum(p.numel() for p in density.flow_.parameters()),
            "seconds": round(sum(record.seconds for record in density.records_), 2),
            "epochs": [len(record.epochs) for record in density.records_],
            "stopped": density.records_[-1].stopped,
            "holds_rows": density.holds_rows_,
        }
        if not test.context:
            others, components = mixture_scores(
                density.columns_, train.array, test.array, self.fit.cell_points, self.seed
            )
            summary["gaussian_mixture"] = {
                "components": components,
                "test_log_density": float(others.mean()),
                "standard_error": _standard_error(others),
            }
            summary["difference"] = {
                "log_density": float((scores - others).mean()),
                "standard_error": _standard_error(scores - others),
            }
        return summary


class _Part(NamedTuple):
    """Some rows of the table."""

    x: Any  # an Arrow table of float64
    context: dict[str, Array] | None

    @property
    def array(self) -> Array:
        """(N, D)."""
        return np.stack([column.to_numpy() for column in self.x.columns], 1)


def _rows(x: Any, context: dict[str, Array], rows: Array) -> tuple[Any, dict[str, Array] | None]:
    return x.take(rows), {name: values[rows] for name, values in context.items()} or None


def _standard_error(values: Array) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def mixture_scores(
    columns: TableTransform, train: Array, test: Array, cell_points: int, seed: int
) -> tuple[Array, str]:
    """log p of test rows (N, D) under the Gaussian mixture that BIC chooses, (N,), and its components in words.

    Recorded numbers are put within their cells, in training and, `cell_points` times, in the test, as for the flow: a
    mixture on the plain numbers would find the density without bound of those that repeat.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(seed)

    def noisy(x: Array) -> tuple[Array, Tensor]:
        start, width = columns.cells(torch.from_numpy(x))
        return (start + width * torch.from_numpy(rng.random(x.shape))).numpy(), width

    rows, _ = noisy(train[rng.permutation(len(train))[:MIXED]])
    mean, std = rows.mean(0), rows.std(0)
    rows = (rows - mean) / std
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = [
            GaussianMixture(k, covariance_type=kind, random_state=seed).fit(rows)
            for kind, numbers in (("full", rows.shape[1] + 3), ("diag", 4))  # of a component, for each column
            for k in COMPONENTS
            if k * numbers <= len(rows)
        ]
    best = min(fitted, key=lambda mixture: mixture.bic(rows))
    times = cell_points if columns.quantized else 1
    drawn = [noisy(test) for _ in range(times)]
    scores = torch.stack([torch.from_numpy(best.score_samples((x - mean) / std)) for x, _ in drawn])
    log_p = torch.logsumexp(scores, 0) - math.log(times) - float(np.log(std).sum()) + columns.log_mass(drawn[0][1])
    return log_p.numpy(), f"{best.n_components} {best.covariance_type}"


def _tell(summary: dict[str, Any], run: Path) -> None:
    table = Table(title=f"log density of {summary['rows']['test']} test rows, nats a row")
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
        console.note("kernels at the training rows did better: the model holds these rows; --no-kernels forbids it")
    if summary["stopped"] == "interrupted":
        console.note(f"interrupted; these are the best weights so far; go on with --resume {run}")
    console.say(f"run folder: {run}  (pictures in {run / 'plots'})")


# -- pictures ----------------------------------------------------------------------------------------


def _draw(density: FlowDensity, test: _Part, folder: Path, seed: int) -> None:
    import pyarrow

    names = density.get_feature_names_out().tolist()
    curve = {
        f"flow {k + 1}": ([e.train for e in record.epochs], [e.validation for e in record.epochs])
        for k, record in enumerate(density.records_)
    }
    plots.learning_curves(folder / "learning_curve.png", curve, "log density, nats a row")
    shown = _Part(*_rows(test.x, test.context or {}, np.arange(min(SHOWN, test.x.num_rows))))
    context, drawn = shown.context, shown.x.num_rows if shown.context else SHOWN
    samples = density.sample(drawn, context, seed)
    tables = {"held-out rows": shown.array, "samples": samples[: len(shown.array)]}
    plots.pairs(folder / "pairs.png", tables, "held-out rows and samples", names=names)
    scores = {
        "held-out rows": density.score_samples(shown.x, context),
        "samples": density.score_samples(pyarrow.table(dict(zip(names, samples.T, strict=True))), context),
    }
    plots.histograms(folder / "scores.png", scores, "log density, nats", "log density of held-out rows and of samples")
    u = torch.special.ndtr(torch.from_numpy(density.noise(shown.x, context, seed))).numpy()
    title = "held-out rows carried to noise: uniform where the density is right"
    plots.uniform_histograms(folder / "calibration.png", u, _arrival(density, names), title)


def _arrival(density: FlowDensity, names: list[str]) -> list[str]:
    """Which column each number of the noise was, as the permutations on the way have it, in all members alike."""
    order = torch.arange(len(names))[None].double()
    first: Any = density.flow_.flows[0] if isinstance(density.flow_, FlowMixture) else density.flow_
    for transform in reversed(first.transform.flattened()):
        if isinstance(transform, Permute):
            order = transform.inverse(order)[0]
    return [names[int(i)] for i in order[0]]
