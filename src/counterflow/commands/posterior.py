"""counterflow posterior: fit the posterior of a model, say how far it can be trusted, and write its draws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from counterflow import plots
from counterflow.commands import console, training
from counterflow.commands.misfit import misfit, noise
from counterflow.commands.model_errors import errors_of_file
from counterflow.commands.model_file import DEFAULT_MODEL, load_target
from counterflow.commands.model_tool import Tool
from counterflow.diagnostics.chains import import_arviz
from counterflow.diagnostics.importance import resample
from counterflow.io.atomic import atomic_write, check_room
from counterflow.io.json import write_json
from counterflow.posterior import posterior as fitting
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.stages import Stage
from counterflow.posterior.summary import Summary
from counterflow.posterior.targets.layout import element_name
from counterflow.posterior.targets.target import Target
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch

ROWS = 40  # of the table that is printed; summary.json has them all
PANELS, PAIRS, SHOWN = 20, 6, 1_500  # marginals, pairs, and points in a scatter plot


@dataclass(frozen=True)
class Posterior:
    """Fit the posterior of a model by an inverse autoregressive flow, and say in words whether it can be trusted.

    MODEL is FILE.py:NAME or FILE.stan. NAME is a PyMC model, a counterflow.targets.Target or a function: of Pyro or
    NumPyro, one that returns a PyMC model or a target, or a log density in torch, theta (B, D) -> (B,), with an
    attribute dim or --dim. Naming a FILE.py runs it, as Python would. Without MODEL the eight schools are fitted.

        counterflow posterior model.py:schools --data schools.json

    The run folder gets posterior.nc (for ArviZ), draws.parquet, summary.json, metrics.jsonl, plots/, and what
    counterflow.Posterior.load reads. A bad verdict is told on stderr as well; the exit code is 0 all the same.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = DEFAULT_MODEL
    """FILE.py:NAME, FILE.stan, or eight-schools, which is bundled"""
    data: Path | None = None
    """JSON file with one object; its entries are the model's arguments by name, lists as arrays"""
    tool: Tool | None = None
    """what a function is written for, where its code does not tell"""
    dim: int | None = None
    """D, for a log density in torch that has no attribute dim"""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4000
    """draws to write to posterior.nc and draws.parquet"""
    folder: training.Place = training.RunFolder()
    """where the run is written"""
    fit: Annotated[PosteriorConfig, tyro.conf.arg(name="")] = PosteriorConfig()
    """how to fit"""

    def run(self) -> int:
        """Fit, judge, write, draw; 130 after Ctrl-C, 143 after SIGTERM, with the results so far."""
        command, run = training.opened(self, "posterior")
        return command._run(run)

    def _run(self, run: Path | None) -> int:
        """A new run, or one to go on with."""
        if self.n < 1:
            raise ValueError(f"expected n of at least 1, got {self.n}")
        if run is None:
            console.check_new(self.folder.out)
        _check_packages()
        with console.err.status("reading the model"):
            target = load_target(self.model, self.data, self.tool, self.dim)
            with errors_of_file(self._file):  # a rehearsal: what is refused is refused before there is a run folder
                target.initial(self.fit.starts, self.fit.seed)
        run = training.begun(self, run, "posterior")
        console.note(f"{self.model}: {target.dim} dimensions ({_listed(target.parameters)}); run folder {run}")
        with training.under_way(run) as stop:
            with errors_of_file(self._file):
                found = self._fit(target, run, stop)
            if Workers.current().rank:  # the first process alone writes and draws
                return 0
            self._write(found, target, run)
        interrupted = found.stages[-1].stopped == "interrupted"
        _tell(found, run, interrupted)
        if interrupted:
            return stop.code
        training.finish(run)
        return 0

    @property
    def _file(self) -> Path:
        return Path(self.model.rpartition(":")[0] or self.model)

    def _fit(self, target: Target, run: Path, stop: training.Stop) -> fitting.Posterior:
        """The fit, told as it goes."""
        with _progress() as bar, training.metrics(run) as write:
            task = bar.add_task("where to start", total=None, elbo="...")
            stages: list[Stage] = []

            def on_step(stage: str, done: int, total: int) -> None:
                bar.update(task, description=stage, completed=done, total=total)

            def on_epoch(stage: str, epoch: Epoch) -> None:
                bar.update(task, elbo=f"{epoch.validation:.2f}")

            def on_stage(stage: Stage) -> None:
                stages.append(stage)
                write(_plain({"stage": len(stages), **dataclasses.asdict(stage)}))
                console.note(f"stage {len(stages)}: {_in_brief(stage)}")

            return fitting.fit_posterior(
                target,
                self.fit,
                on_stage=on_stage,
                on_epoch=on_epoch,
                on_step=stop.after_step(on_step),
                checkpoints=training.checkpoints(run, self.folder),
            )

    def _write(self, found: fitting.Posterior, target: Target, run: Path) -> None:
        """All results; the summary last, so that a folder that has one is whole."""
        torch.manual_seed(self.fit.seed)
        found.save(run)
        data = found.to_arviz(self.n)
        check_room(run, 2 * _size(data) + (1 << 20))  # HDF5 ends the process where it cannot close a file
        with atomic_write(run / "posterior.nc") as path:
            data.to_netcdf(str(path))
        with atomic_write(run / "draws.parquet") as path:
            _write_parquet(path, data, found.values)
        _draw(found, target, run / "plots")
        write_json(run / "summary.json", _plain(_summary(found, self.model)))


def _check_packages() -> None:
    """Raise ImportError before the fit for what would be missed after it."""
    import_arviz()
    for package, extra in (("pyarrow", "data"), ("matplotlib", "plots")):
        try:
            __import__(package)
        except ImportError as error:
            raise ImportError(f"expected {package}; pip install 'counterflow[{extra}]'") from error


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("ELBO {task.fields[elbo]}"),
        TimeElapsedColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,  # a log has the line of each stage
    )


def _in_brief(stage: Stage) -> str:
    ended = "" if stage.stopped == "finished" else f" ({stage.stopped})"
    return (
        f"{stage.steps} steps{ended}, ELBO {stage.elbo:.2f}, k-hat {stage.k_hat:.2f}, "
        f"{stage.verdict_samples:,} draws worth {stage.ess:,.0f}, {stage.seconds:.1f} s"
    )


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _size(data: Any) -> int:
    """The bytes of all groups, as either generation of ArviZ has them."""
    return int(data.nbytes if hasattr(data, "nbytes") else sum(data[group].nbytes for group in data.groups()))


def _write_parquet(path: Path, data: Any, names: Iterable[str]) -> None:
    """One row a draw, one column a number, called as in the summary."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        label: values for name in names for label, values in _columns(name, np.asarray(data["posterior"][name])[0])
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _columns(name: str, draws: plots.Array) -> Iterator[tuple[str, plots.Array]]:
    """name[i,j] and its draws, for draws (S, *shape)."""
    for index in np.ndindex(*draws.shape[1:]):
        yield element_name(name, index), draws[(slice(None), *index)]


def _summary(found: fitting.Posterior, model: str) -> dict[str, Any]:
    rows = found.summary().rows
    names = {"low": "5%", "high": "95%"}
    return {
        "model": model,
        "verdict": found.sentence,
        "trusted": found.trusted,
        "k_hat": found.k_hat,
        "ess": found.ess,
        "samples": found.verdict.samples,
        "elbo": found.elbo,
        "elbo_error": found.verdict.elbo_error,
        "iw_elbo": found.verdict.iw_elbo,
        "missed": found.missed,
        "seconds": round(found.seconds, 2),
        "stages": len(found.stages),
        "stopped": found.stages[-1].stopped,
        "table": [
            {"variable": name, **{names.get(k, k): v for k, v in row._asdict().items()}} for name, row in rows.items()
        ],
    }


def _tell(found: fitting.Posterior, run: Path, interrupted: bool) -> None:
    """The table and the verdict; a bad one on stderr as well, unless it would be seen twice."""
    console.out.print(_table(found.summary()))
    if found.trusted or not (console.out.is_terminal and console.err.is_terminal):
        console.say(found.sentence)
    if not found.trusted:
        console.note(f"counterflow: {found.sentence} The draws are those of the approximation as it is, not corrected.")
    if interrupted:
        console.note(f"interrupted; this is the best stage so far; go on with --resume {run}")
    console.say(f"run folder: {run}  (pictures in {run / 'plots'})")


def _table(summary: Summary) -> Table:
    table = Table()
    for name in ("variable", "mean", "sd", "5%", "95%", "ESS"):
        table.add_column(name, justify="left" if name == "variable" else "right", no_wrap=True)
    rows = list(summary.rows.items())
    for name, row in rows[:ROWS]:
        numbers = [f"{value:.4g}" for value in (row.mean, row.sd, row.low, row.high)]
        table.add_row(name.replace("[", r"\["), *numbers, f"{row.ess:,.0f}")
    if len(rows) > ROWS:
        table.caption = f"{ROWS} of {len(rows)} numbers; all are in summary.json"
    return table


# -- pictures ----------------------------------------------------------------------------------------


def _draw(found: fitting.Posterior, target: Target, folder: Path) -> None:
    weights = found.log_weights.exp().numpy()
    _draw_marginals(found, weights, folder / "marginals.png")
    if target.dim > 1:
        _draw_pairs(found, target, weights, folder / "pairs.png")
    raw = (found.draws.log_p - found.draws.log_q).numpy()
    plots.weight_tail(folder / "weights.png", raw, found.log_weights.numpy(), f"k-hat {found.k_hat:.2f}")
    courses = [
        plots.StageCurve(f"{k}, {stage.estimator.replace('_', ' ')}", stage.steps, stage.elbos, _judged(stage))
        for k, stage in enumerate(found.stages, 1)
    ]
    plots.stage_curves(folder / "elbo.png", courses)


def _judged(stage: Stage) -> str:
    return f"{stage.elbo:.2f}, k-hat {stage.k_hat:.2f}, ESS {100 * stage.ess / stage.verdict_samples:.0f} %"


def _draw_marginals(found: fitting.Posterior, weights: plots.Array, path: Path) -> None:
    """The numbers that differ most between the approximation and the posterior, in the model's order."""
    named = [column for name, value in found.values.items() for column in _columns(name, value.double().numpy())]
    off = misfit(np.stack([draws for _, draws in named], 1), weights).alone
    chosen = sorted(np.argsort(-off, kind="stable")[:PANELS])
    panels = [plots.MarginalPanel(named[i][0], named[i][1], weights, f"{100 * off[i]:.1f} % misplaced") for i in chosen]
    which = f"the {len(panels)} of {len(named)} that fit worst" if len(named) > len(panels) else "all numbers"
    plots.marginals(path, panels, f"marginals, {which}")


def _draw_pairs(found: fitting.Posterior, target: Target, weights: plots.Array, path: Path) -> None:
    """The pairs of unconstrained coordinates, in which the flow works, that differ most."""
    theta = found.draws.theta
    truth = resample(theta, found.log_weights, SHOWN).numpy()
    panels = []
    for i, j, share in misfit(theta.numpy(), weights).pairs[:PAIRS]:
        names = (target.coordinates[i], target.coordinates[j])
        note = f"{100 * share:.1f} % misplaced"
        panels.append(plots.PairPanel(names, theta[:SHOWN, [i, j]].numpy(), truth[:, [i, j]], note))
    title = "pairs of unconstrained coordinates, the worst first"
    plots.posterior_pairs(path, panels, f"{title}\n(noise alone misplaces {100 * noise(weights):.1f} % of the mass)")
