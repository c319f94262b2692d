"""Simulation-based calibration by `counterflow posterior --calibrate`: fits of simulated data in parallel processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from counterflow import plots
from counterflow.commands import console
from counterflow.commands.model_errors import errors_of_file
from counterflow.commands.model_file import load_target
from counterflow.commands.model_tool import Tool
from counterflow.commands.posterior import Posterior
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.run_folder import metrics, running
from counterflow.diagnostics.calibration import Calibration, calibration, randomized_ranks
from counterflow.io.atomic import atomic_write
from counterflow.io.json import read_json, write_json
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.fit import fit_posterior
from counterflow.posterior.targets.layout import element_names
from counterflow.posterior.targets.target import Target
from counterflow.random import seeded

DRAWS = 1000  # of each posterior, among which the truth is ranked
MIN_P = 0.01  # smallest p-value of all numbers, times their count, that counts as calibrated
MAX_PRINTED = 40  # rows of the printed table; summary.json holds all


@dataclass(frozen=True)
class Job:
    """One data set to simulate and fit, as it travels to a process."""

    model: str
    data: Path | None
    tool: Tool | None
    dim: int | None
    inits: Path | None
    config: PosteriorConfig
    seed: int


@dataclass(frozen=True)
class Replication:
    """Ranks of the true parameters of one data set in its posterior, and the verdict on the fit."""

    ranks: dict[str, float]  # by element, in (0, 1)
    k_hat: float
    trusted: bool
    seconds: float


def calibrate(options: Posterior, replications: int) -> int:
    """Simulate and fit data sets, test their ranks for uniformity, and write the run folder; return the exit code."""
    file = Path(options.model.rpartition(":")[0] or options.model)
    with Progress("reading the model"), errors_of_file(file):
        _simulate_once(options)
    jobs = [
        Job(options.model, options.data, options.tool, options.dim, options.inits, options.fit, options.fit.seed + k)
        for k in range(replications)
    ]
    processes = min(options.processes or os.cpu_count() or 1, replications)
    with running(options, None, "posterior") as (folder, _, _):
        console.note(f"{options.model}: {replications} data sets in {processes} processes; run folder {folder}")
        begun = time.perf_counter()
        with (
            Progress("calibrating", "fits") as progress,
            metrics(folder) as write,
            _finished(jobs, processes) as results,
        ):
            found: dict[int, Replication] = {}
            for number, replication in results:
                found[number] = replication
                write({"fit": number, **_facts(replication)})
                progress.update(len(found), replications)
                if len(found) == processes:
                    progress.announce("all fits")
        ordered = [found[number] for number in sorted(found)]
        names = list(ordered[0].ranks)
        ranks = torch.tensor([[each.ranks[name] for name in names] for each in ordered], dtype=torch.float64)
        summary = _summary(options.model, names, calibration(ranks), ordered, time.perf_counter() - begun)
        _write(folder, names, ranks.numpy(), summary)
    _print(summary, folder)
    return 0


def _simulate_once(options: Posterior) -> None:
    """Draw from the model once, so that an error shows before the processes start."""
    _target(options.model, options.data, options.tool, options.dim).simulate(options.fit.seed)


@cache
def _target(model: str, data: Path | None, tool: Tool | None, dim: int | None) -> Target:
    return load_target(model, data, tool, dim)


@contextmanager
def _finished(jobs: list[Job], processes: int) -> Iterator[Iterator[tuple[int, Replication]]]:
    """Yield the numbers and results of the jobs as they finish; an error or an interrupt ends the processes."""
    if processes == 1:
        yield ((number, replicate(job)) for number, job in enumerate(jobs, 1))
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_prepare_process)
    try:
        futures = {pool.submit(replicate, job): number for number, job in enumerate(jobs, 1)}
        yield ((futures[future], future.result()) for future in as_completed(futures))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _prepare_process() -> None:
    """Leave the cores to the other processes, and Ctrl-C to the command, which then ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def replicate(job: Job) -> Replication:
    """Draw parameters and data, fit the data, and rank the parameters among draws of the posterior."""
    begun = time.perf_counter()
    truth, target = _target(job.model, job.data, job.tool, job.dim).simulate(job.seed)
    starts = None if job.inits is None else read_json(job.inits, "starting values by variable")
    posterior = fit_posterior(target, replace(job.config, seed=job.seed), starts=starts)
    ranks: dict[str, float] = {}
    with seeded(job.seed):
        draws = posterior.sample(DRAWS)
        for name in target.parameters:
            labels = element_names(name, truth[name].shape)
            values = randomized_ranks(truth[name].reshape(-1).double(), draws[name].reshape(DRAWS, -1).double())
            ranks |= dict(zip(labels, values.tolist(), strict=True))
    return Replication(ranks, posterior.k_hat, posterior.trusted, time.perf_counter() - begun)


def _facts(replication: Replication) -> dict[str, Any]:
    k_hat = replication.k_hat if np.isfinite(replication.k_hat) else None
    return {"k_hat": k_hat, "trusted": replication.trusted, "seconds": round(replication.seconds, 2)}


def _summary(
    model: str, names: list[str], found: Calibration, fits: list[Replication], seconds: float
) -> dict[str, Any]:
    trusted = sum(fit.trusted for fit in fits)
    table = [
        {"variable": name, "mean_rank": mean, "bias": bias, "spread": spread}
        for name, mean, bias, spread in zip(
            names, found.probabilities.mean(0).tolist(), found.bias.tolist(), found.spread.tolist(), strict=True
        )
    ]
    smallest = min(1.0, 2 * len(names) * min(min(row["bias"], row["spread"]) for row in table))
    return {
        "model": model,
        "calibration": _sentence(smallest, len(fits), trusted),
        "calibrated": smallest >= MIN_P,
        "p_value": smallest,
        "replications": len(fits),
        "trusted_fits": trusted,
        "seconds": round(seconds, 2),
        "table": table,
    }


def _sentence(p_value: float, replications: int, trusted: int) -> str:
    """Say in words if the ranks are uniform; the p-value is the smallest one, times the number of tests."""
    verdicts = f"{trusted} of {replications} fits are trusted by their own verdicts"
    tests = f"the smallest p-value, times the number of tests, is {p_value:.2g}"
    if p_value >= MIN_P:
        return f"No fault of the procedure is found in {replications} simulated data sets: {tests}; {verdicts}."
    return (
        f"The posteriors are not calibrated in {replications} simulated data sets: {tests}; {verdicts}. A small "
        "p-value of bias means posteriors to one side of the truth, one of spread posteriors of a wrong width."
    )


def _write(folder: Path, names: list[str], ranks: plots.Array, summary: dict[str, Any]) -> None:
    """Write all results; summary.json comes last, as it marks the run as complete."""
    import pyarrow
    import pyarrow.parquet

    with atomic_write(folder / "ranks.parquet") as path:
        columns = {name: ranks[:, column] for column, name in enumerate(names)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    title = f"ranks of the true parameters in the posteriors of {len(ranks)} simulated data sets"
    plots.uniform_histograms(folder / "plots" / "ranks.png", ranks, names, title, "data sets")
    write_json(folder / "summary.json", summary)
    write_report(folder)


def _print(summary: dict[str, Any], folder: Path) -> None:
    table = Table()
    for name in ("variable", "mean rank", "p of bias", "p of spread"):
        table.add_column(name, justify="left" if name == "variable" else "right", no_wrap=True)
    for row in summary["table"][:MAX_PRINTED]:
        label = row["variable"].replace("[", r"\[")
        table.add_row(label, f"{row['mean_rank']:.3f}", f"{row['bias']:.2g}", f"{row['spread']:.2g}")
    if len(summary["table"]) > MAX_PRINTED:
        table.caption = f"{MAX_PRINTED} of {len(summary['table'])} numbers; summary.json holds all"
    console.show(table)
    console.say(summary["calibration"])
    if not summary["calibrated"] and not (console.out.is_terminal and console.err.is_terminal):
        console.warn(f"counterflow: {summary['calibration']}")
    console.say(f"run folder: {folder}  (plots in {folder / 'plots'})")
