"""One run of `counterflow bench`: measure, print the tables, write the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table as PrintedTable

from counterflow import plots
from counterflow.commands import console
from counterflow.commands.bench import report
from counterflow.commands.bench.command import Bench
from counterflow.commands.bench.machine import GIB, describe_machine, total_memory
from counterflow.commands.bench.peers import OURS, PEERS
from counterflow.commands.bench.report import Results, Table
from counterflow.commands.bench.runner import DIRECTIONS, GROWTH_ROWS, Limits, Runner
from counterflow.commands.bench.worker import MEASUREMENTS, Settings, Size
from counterflow.commands.progress import Progress
from counterflow.commands.report.write import write_report
from counterflow.commands.run_folder import new_run_folder, write_config
from counterflow.io.json import write_json

SIZES = ("8/64/256", "64/512/256", "64/512/1024", "256/1024/256", "784/1024/100", "784/2048/256")
GROWTH = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_SIZES = ("8/64/64", "64/256/64")
QUICK_GROWTH = (16, 32, 64)
QUICK_REPEATS = 5
QUICK_BUDGET = 1.0
NOTE = """\
float32, two hidden layers of H relu units, B rows. The parallel direction is one pass, the sequential one its inverse;
"backward" includes the gradients of input and weights. Times are medians of calls that took turns, with the quartiles
in brackets. Memory is the most that a call adds to the resident set; for JAX it is what XLA plans. Where there is no
figure, the reason is given.
"""


def run(options: Bench) -> int:
    """Measure, print the tables and write the run folder; return the exit code."""
    sizes = [_size(text) for text in options.sizes or (QUICK_SIZES if options.quick else SIZES)]
    growth = sorted({*(options.growth or (QUICK_GROWTH if options.quick else GROWTH))})
    threads = torch.get_num_threads() if options.threads is None else options.threads
    _check(options, growth, threads)
    with ExitStack() as locks:
        folder = new_run_folder(options.out, "bench", locks)
        write_config(folder, "bench", {**dataclasses.asdict(options), "threads": threads})
        _measure(options, sizes, growth, threads, folder)
        write_report(folder)
    return 0


def _measure(options: Bench, sizes: Sequence[Size], growth: Sequence[int], threads: int, folder: Path) -> None:
    absent = not_installed(options.peers)
    for name, command in absent.items():
        console.note(f"{name} is not installed; to compare with it: {command}")
    peers = [name for name in PEERS if name in options.peers and name not in absent]
    console.note(f"{len(OURS) + len(peers)} contestants, {threads} threads; run folder {folder}")
    about = {"machine": describe_machine(threads, peers), "not installed": absent}
    steps = len(OURS) + len(peers) + len(MEASUREMENTS) * len(sizes) + len(DIRECTIONS) * len(growth)
    with _runner(options, [*OURS, *peers], threads, steps) as runner:
        runner.warm_up()
        for size in sizes:
            runner.compare(size)
            console.note(report.progress_line(Results(runner.results), size))
            _save(folder, about, runner)
        runner.measure_growth(growth)
        if options.first_calls and not options.quick:
            runner.measure_first_calls(list(OURS))
        _save(folder, about, runner)
    _report(folder, about, runner)


def _check(options: Bench, growth: Sequence[int], threads: int) -> None:
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise ValueError(f"expected peers out of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if growth[0] < 2:
        raise ValueError(f"expected growth of at least 2, got {growth[0]}")
    for name, count in {"threads": threads, "repeats": options.repeats}.items():
        if count < 1:
            raise ValueError(f"expected {name} of at least 1, got {count}")
    for name, value in {"budget": options.budget, "cap": options.cap, "memory": options.memory}.items():
        if value is not None and not value > 0:
            raise ValueError(f"expected {name} above 0, got {value}")


@contextmanager
def _runner(options: Bench, names: Sequence[str], threads: int, steps: int) -> Iterator[Runner]:
    """Yield a runner that shows its progress, and end its processes on exit."""
    limits = Limits(options.repeats, options.budget, options.cap)
    if options.quick:
        limits = Limits(min(options.repeats, QUICK_REPEATS), min(options.budget, QUICK_BUDGET), options.cap)
    settings = Settings(threads, GIB * options.memory if options.memory else total_memory() / 2)
    done = 0
    with Progress("starting", "steps") as progress:

        def on_step() -> None:
            nonlocal done
            done += 1
            progress.update(done, steps)

        runner = Runner(
            names, settings, limits, on_turn=lambda text: progress.update(done, steps, text), on_step=on_step
        )
        try:
            yield runner
        finally:
            runner.close()


def _size(text: str) -> Size:
    numbers = text.split("/")
    valid = len(numbers) == 3 and all(number.isdecimal() and int(number) for number in numbers)
    if not valid or int(numbers[0]) < 2:
        raise ValueError(f"expected sizes D/H/B with D of at least 2, such as 64/512/256, got {text!r}")
    return Size(*map(int, numbers))


def not_installed(peers: Sequence[str]) -> dict[str, str]:
    """Return the libraries that are not installed, and the command that installs each."""
    return {name: f"pip install '{PEERS[name].install}'" for name in peers if not PEERS[name].installed}


def _save(folder: Path, about: dict[str, Any], runner: Runner) -> None:
    """Write the figures so far, which an interrupted run keeps."""
    figures = {
        "failed": runner.failed,
        "measured": [dataclasses.asdict(result) for result in runner.results],
        "growth": [dataclasses.asdict(result) for result in runner.growth],
        "first calls": [dataclasses.asdict(call) for call in runner.first_calls],
    }
    write_json(folder / "bench.json", {**about, **figures})


def _report(folder: Path, about: dict[str, Any], runner: Runner) -> None:
    """Write the summary, the tables and the plots, and print the most important tables."""
    results = Results(runner.results)
    growth = Results(runner.growth)
    goals = report.goals(results)
    summary = {
        "aims": [{**goal._asdict(), "size": str(goal.size), "met": goal.met} for goal in goals],
        "exponents": report.exponents(growth),
        "not installed": about["not installed"],
        "failed": runner.failed,
    }
    write_json(folder / "summary.json", summary)
    printed = [
        report.directions_table(results),
        report.peers_table(results, "sequential", "Sequential direction"),
        report.peers_table(results, "stack backward", "Five layers, parallel direction with gradients"),
        report.goals_table(goals),
    ]
    others = [
        report.growth_table(growth),
        report.first_calls_table(runner.first_calls),
        *(report.all_figures_table(results, size) for size in results.sizes),
    ]
    (folder / "bench.md").write_text(_page(about["machine"], runner.failed, [*printed, *others]))
    for table in printed:
        console.show(_printed(table))
    for name, failure in runner.failed.items():
        console.warn(f"{name} was left out: {failure}")
    _plot(folder / "plots", growth)
    console.say(f"run folder: {folder}  (all figures in {folder / 'bench.md'}, plots in {folder / 'plots'})")


def _page(machine: dict[str, Any], failed: dict[str, str], tables: Sequence[Table]) -> str:
    """Return the text of bench.md."""
    described = ", ".join(f"{name} {value}" for name, value in machine.items() if value != "")
    lines = ["# Both directions of an autoregressive layer\n", f"Written by `counterflow bench`. {described}.\n", NOTE]
    lines += [f"{name} was left out: {failure}\n" for name, failure in failed.items()]
    return "\n".join(lines + [table.markdown() for table in tables if table.rows])


def _printed(table: Table) -> PrintedTable:
    printed = PrintedTable(
        title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for k, name in enumerate(table.header):
        printed.add_column(name, justify="right" if k else "left")
    for row in table.rows:
        printed.add_row(*row)
    return printed


def _plot(folder: Path, growth: Results) -> None:
    """Plot time and peak memory of both directions against D."""
    layer = f"one layer, H = 2 D, {GROWTH_ROWS} rows, float32"
    _plot_growth(folder / "time.png", growth, "seconds", "", 1e-3, "ms", f"Time: {layer}")
    _plot_growth(
        folder / "memory.png", growth, "peak", " backward", 2**20, "MiB", f"Peak memory with gradients: {layer}"
    )


def _plot_growth(path: Path, growth: Results, figure: str, suffix: str, unit: float, label: str, title: str) -> None:
    curves = {}
    for name in growth.contestants:
        sides = [report.series(growth, name, side + suffix, figure) for side in ("parallel", "sequential")]
        curves[name] = plots.DirectionCosts(*((features, [cost / unit for cost in costs]) for features, costs in sides))
    plots.direction_costs(path, curves, label, title)
