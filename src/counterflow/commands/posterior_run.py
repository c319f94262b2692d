"""One run of `counterflow posterior`: read the model, fit it, write the draws and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from counterflow import posterior
from counterflow.commands import console, posterior_plots
from counterflow.commands.model_errors import errors_of_file
from counterflow.commands.model_file import load_target
from counterflow.commands.posterior import Posterior
from counterflow.commands.posterior_plots import columns_of
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.run_folder import checkpoints, mark_done, metrics, resolve_run, running
from counterflow.commands.signals import Stop
from counterflow.io.atomic import atomic_write, check_free_space
from counterflow.io.json import read_json, write_json
from counterflow.posterior.config import Refiner
from counterflow.posterior.targets.target import Target
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch
from counterflow.training.tracking import Tracker

MAX_PRINTED = 40  # rows of the printed table; summary.json holds all
CHAINS = 4  # of --refine
MIN_CHAIN = 100  # fewest draws of each chain
MAX_LISTED = 6  # parameters named before the fit


def run(command: Posterior) -> int:
    """Fit, write and plot; return the exit code: 130 after Ctrl-C, 143 after SIGTERM."""
    options, resumed = resolve_run(command, "posterior")
    if options.n < 1:
        raise ValueError(f"expected -n to be at least 1, got {options.n}")
    file = Path(options.model.rpartition(":")[0] or options.model)
    starts = None if options.inits is None else read_json(options.inits, "starting values by variable")
    with Progress("reading the model"):
        target = load_target(options.model, options.data, options.tool, options.dim)
    with running(options, resumed, "posterior") as (folder, stop, tracker):
        with errors_of_file(file):
            fitted = _fit(options, target, starts, folder, stop, tracker)
        if Workers.current().rank:  # rank 0 writes and plots
            return 0
        interrupted = fitted.stages[-1].stopped == "interrupted"
        with stop.at_once(handled=interrupted):
            refined = None if interrupted or options.refine is None else _refine(options.refine, options, fitted)
            with Progress("writing draws and plots"):
                _write(options, fitted, refined, target, folder)
        if not interrupted:
            mark_done(folder)
        _print(fitted, refined, folder, interrupted)
    return stop.code if interrupted else 0


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _fit(
    options: Posterior,
    target: Target,
    starts: Mapping[str, Any] | None,
    folder: Path,
    stop: Stop,
    tracker: Tracker | None,
) -> posterior.Posterior:
    """Fit the posterior and show the progress."""
    facts = ""
    begun: list[str] = []
    stages: list[posterior.Stage] = []

    with Progress("starting points", "steps") as progress, metrics(folder) as write:

        def on_step(task: str, done: int, total: int) -> None:
            if not begun:  # errors in the model precede this line
                listed = _listed(target.parameters)
                console.note(f"{options.model}: {target.dim} dimensions ({listed}); run folder {folder}")
            if task not in begun:
                begun.append(task)
                progress.start_at(done - 1)
            progress.update(done, total, task, facts)

        def on_epoch(task: str, epoch: Epoch) -> None:
            nonlocal facts
            facts = f"ELBO {epoch.validation:.2f}"
            if begun == [task] and epoch.epoch == 1:
                limit = f"within --seconds {options.fit.seconds:g}"
                progress.announce(f"{task}; others follow if its verdict is not good, {limit}")

        def on_stage(stage: posterior.Stage) -> None:
            stages.append(stage)
            write(_finite({"stage": len(stages), **dataclasses.asdict(stage)}))
            flow = f"flow {stage.mode}, " if stage.mode > 1 else ""
            console.note(f"{flow}stage {len(stages)}: {_stage_line(stage)}")

        return posterior.fit_posterior(
            target,
            options.fit,
            starts=starts,
            on_stage=on_stage,
            on_epoch=on_epoch,
            on_step=stop.after_step(on_step),
            checkpoints=checkpoints(folder, options.folder, tracker),
            tracker=tracker,
        )


def _refine(method: Refiner, options: Posterior, fitted: posterior.Posterior) -> posterior.Refined:
    """Run the Markov chains, with as many draws in total as are written of the fit."""
    with Progress(f"drawing by {method}"):
        samples = max(MIN_CHAIN, options.n // CHAINS)
        return fitted.refine(method, chains=CHAINS, samples=samples, seed=options.fit.seed)


def _stage_line(stage: posterior.Stage) -> str:
    stopped = "" if stage.stopped == "finished" else f" ({stage.stopped})"
    return (
        f"{stage.steps} steps{stopped}, ELBO {stage.elbo:.2f}, k-hat {stage.k_hat:.2f}, "
        f"{stage.verdict_samples:,} draws worth {stage.ess:,.0f}, {stage.seconds:.1f} s"
    )


def _write(
    options: Posterior, fitted: posterior.Posterior, refined: posterior.Refined | None, target: Target, folder: Path
) -> None:
    """Write all results; summary.json comes last, as it marks the run as complete."""
    torch.manual_seed(options.fit.seed)
    fitted.save(folder)
    data = fitted.to_xarray(options.n)
    check_free_space(folder, 2 * data.nbytes + (1 << 20))  # HDF5 ends the process if it cannot close a file
    with atomic_write(folder / "posterior.nc") as path:
        data.to_netcdf(str(path), engine="h5netcdf")
    if refined is not None:
        with atomic_write(folder / "refined.nc") as path:
            refined.to_xarray().to_netcdf(str(path), engine="h5netcdf")
    with atomic_write(folder / "draws.parquet") as path:
        _write_parquet(path, data, fitted.values)
    posterior_plots.plot_run(folder / "plots", fitted, target)
    write_json(folder / "summary.json", _finite(_summary(fitted, refined, options.model)))
    write_report(folder)


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _write_parquet(path: Path, data: Any, names: Iterable[str]) -> None:
    """Write one row per draw and one column per number, named as in the summary."""
    import pyarrow
    import pyarrow.parquet

    draws = ((name, np.asarray(data["posterior"][name])[0]) for name in names)
    columns = {label: column for name, values in draws for label, column in columns_of(name, values)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _summary(fitted: posterior.Posterior, refined: posterior.Refined | None, model: str) -> dict[str, Any]:
    names = {"low": "5%", "high": "95%"}
    return {
        "model": model,
        "verdict": fitted.sentence,
        "trusted": fitted.trusted,
        "k_hat": fitted.k_hat,
        "ess": fitted.ess,
        "samples": fitted.verdict.samples,
        "elbo": fitted.elbo,
        "elbo_error": fitted.verdict.elbo_error,
        "iw_elbo": fitted.verdict.iw_elbo,
        "missed": fitted.missed,
        "mode_weights": fitted.mode_weights,
        "unreliable": fitted.verdict.unreliable,
        "seconds": round(fitted.seconds, 2),
        "refined": None if refined is None else _chains_summary(refined.chains),
        "stages": len(fitted.stages),
        "stopped": fitted.stages[-1].stopped,
        "table": [
            {"variable": name, **{names.get(key, key): value for key, value in row._asdict().items()}}
            for name, row in fitted.summary().rows.items()
        ],
    }


def _chains_summary(chains: posterior.Chains) -> dict[str, Any]:
    """Summarise chains by the worst coordinate of unconstrained space."""
    return {
        "sentence": chains.sentence,
        "r_hat": chains.convergence.r_hat.max().item(),
        "ess_bulk": chains.convergence.ess_bulk.min().item(),
        "ess_tail": chains.convergence.ess_tail.min().item(),
        "acceptance": chains.acceptance,
        "divergences": chains.divergences,
        "evaluations": chains.evaluations,
    }


def _print(fitted: posterior.Posterior, refined: posterior.Refined | None, folder: Path, interrupted: bool) -> None:
    """Print the table and the verdict; a bad verdict goes to stderr too, unless both are the same terminal."""
    console.show(_table(fitted.summary()))
    if len(fitted.mode_weights) > 1:
        weights = ", ".join(f"{weight:.2f}" for weight in fitted.mode_weights)
        console.say(f"{len(fitted.mode_weights)} modes, each with a flow of its own, of weights {weights}.")
    if fitted.trusted or not (console.out.is_terminal and console.err.is_terminal):
        console.say(fitted.sentence)
    if not fitted.trusted:
        note = "" if fitted.verdict.usable_weights else " The draws are those of the approximation, not corrected."
        console.warn(f"counterflow: {fitted.sentence}{note}")
    if refined is not None:
        console.say(refined.chains.sentence)
    if interrupted:
        console.warn(f"interrupted; this is the best stage so far; continue with --resume {folder}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")


def _table(summary: posterior.Summary) -> Table:
    table = Table()
    for name in ("variable", "mean", "MCSE", "sd", "MCSE", "5%", "95%", "ESS", "k-hat"):
        table.add_column(name, justify="left" if name == "variable" else "right", no_wrap=True)
    rows = list(summary.rows.items())
    for name, row in rows[:MAX_PRINTED]:
        moments = (f"{row.mean:.4g}", f"{row.mcse_mean:.2g}", f"{row.sd:.4g}", f"{row.mcse_sd:.2g}")
        quantiles = (f"{row.low:.4g}", f"{row.high:.4g}")
        table.add_row(name.replace("[", r"\["), *moments, *quantiles, f"{row.ess:,.0f}", f"{row.k_hat:.2f}")
    if len(rows) > MAX_PRINTED:
        table.caption = f"{MAX_PRINTED} of {len(rows)} numbers; summary.json holds all"
    return table
