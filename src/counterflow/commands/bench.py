"""counterflow bench: both directions of an autoregressive layer, against the libraries that are installed."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from counterflow import __version__, plots
from counterflow.commands import console, standings
from counterflow.commands.contest import BOTH, GROWTH_ROWS, Contest, Rules
from counterflow.commands.peers import OURS, PEERS
from counterflow.commands.standings import Results, Sheet
from counterflow.commands.trial import MEASUREMENTS, Setting, Size
from counterflow.io.json import write_json

FORMAT = 1  # of the run folder
GIB = 2**30
SIZES = ("8/64/256", "64/512/256", "64/512/1024", "256/1024/256", "784/1024/100", "784/2048/256")
GROWTH = (64, 128, 256, 512, 1024, 2048, 4096)
QUICK_SIZES = ("8/64/64", "64/256/64")
QUICK_GROWTH = (16, 32, 64)
QUICK_REPEATS, QUICK_BUDGET = 5, 1.0
NOTE = """\
float32, two hidden layers of H relu units, B rows. The parallel direction is one pass, the sequential one its inverse;
"backward" is with the gradients of input and weights. Medians of calls that took turns, quartiles in brackets. Memory
is what a call adds to the resident set at most, for JAX what XLA plans. Where there is no figure it says why.
"""


@dataclass(frozen=True)
class Bench:
    """Time both directions of an autoregressive layer in Counterflow and in the libraries that are installed.

    Each contestant has a process, and they take turns call by call. Timed are the direction of one pass ("parallel")
    and the other one ("sequential"), alone and with the gradients of input and weights ("backward"), and five layers of
    the parallel direction with gradients ("stack backward"). float32, relu, two hidden layers.
    """

    sizes: tuple[str, ...] = ()
    """D/H/B: features, units in each hidden layer, rows; six from 8/64/256 to 784/2048/256 when not given"""
    growth: tuple[int, ...] = ()
    """D of the layers with H = 2 D and 64 rows whose cost is drawn against D; 64, 128, ... 4096 when not given"""
    peers: tuple[str, ...] = tuple(PEERS)
    """whom to compare with; who is not installed is named and left out"""
    threads: int = field(default_factory=torch.get_num_threads)
    """of each contestant; as many as torch takes when not given"""
    repeats: int = 11
    """turns that are timed, of which the median is taken; with the six sizes 16 minutes on two cores"""
    budget: float = 6.0
    """seconds of calls after which a contestant's turns at a measurement end, so that slow ones are called once"""
    cap: float = 90.0
    """seconds after which a call is stopped and reported so: the slowest peer took 33 at 784/2048/256 on two cores"""
    memory: float | None = None
    """GiB that a call may take before it is reported as out of memory; half of the machine's when not given"""
    first_calls: bool = True
    """also time Counterflow's first calls, with an empty and with a filled cache of compiled code"""
    quick: bool = False
    """small sizes when none are given, at most 5 turns and 1 s, no first calls: under two minutes on two cores"""
    out: Path | None = None
    """run folder, which must be new; runs/bench-DATE-TIME when not given"""

    def run(self) -> int:
        """Measure, print, draw."""
        sizes = [_size(text) for text in self.sizes or (QUICK_SIZES if self.quick else SIZES)]
        growth = sorted({*(self.growth or (QUICK_GROWTH if self.quick else GROWTH))})
        self._check(growth)
        run = console.new_run(self.out, "bench")
        config = {"format": FORMAT, "command": "bench", "version": __version__, **dataclasses.asdict(self)}
        write_json(run / "config.json", config)

        absent = not_installed(self.peers)
        for name, command in absent.items():
            console.note(f"{name} is not installed; to compare with it: {command}")
        peers = [name for name in PEERS if name in self.peers and name not in absent]
        console.note(f"{len(OURS) + len(peers)} contestants, {self.threads} threads; run folder {run}")
        report = {"machine": machine(self.threads, peers), "not installed": absent}
        steps = len(OURS) + len(peers) + len(MEASUREMENTS) * len(sizes) + len(BOTH) * len(growth)
        with self._contest([*OURS, *peers], steps) as contest:
            contest.rehearse()
            for size in sizes:
                contest.compare(size)
                console.note(standings.in_brief(Results(contest.results), size))
                _save(run, report, contest)
            contest.grow(growth)
            if self.first_calls and not self.quick:
                contest.call_first(list(OURS))
            _save(run, report, contest)
        return _finish(run, report, contest)

    def _check(self, growth: Sequence[int]) -> None:
        strangers = [name for name in self.peers if name not in PEERS]
        if strangers:
            raise ValueError(f"expected peers out of {', '.join(PEERS)}, got {', '.join(strangers)}")
        if growth[0] < 2:
            raise ValueError(f"expected growth of at least 2, got {growth[0]}")
        for name in ("threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("budget", "cap", "memory"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"expected {name} above 0, got {value}")

    @contextmanager
    def _contest(self, names: Sequence[str], steps: int) -> Iterator[Contest]:
        """A contest that shows how far it is, and leaves no process behind."""
        rules = Rules(self.repeats, self.budget, self.cap)
        if self.quick:
            rules = Rules(min(self.repeats, QUICK_REPEATS), min(self.budget, QUICK_BUDGET), self.cap)
        setting = Setting(self.threads, GIB * self.memory if self.memory else memory_of_machine() / 2)
        columns = BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}")
        with Progress(*columns, console=console.err) as bar:
            task = bar.add_task("", total=steps)
            contest = Contest(
                names,
                setting,
                rules,
                on_turn=lambda text: bar.update(task, description=text),
                on_step=lambda: bar.advance(task),
            )
            try:
                yield contest
            finally:
                contest.close()


def _size(text: str) -> Size:
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[0]) < 2:
        raise ValueError(f"expected sizes as D/H/B with D of at least 2, such as 64/512/256, got {text!r}")
    return Size(*map(int, parts))


def not_installed(peers: Sequence[str]) -> dict[str, str]:
    """Which of them, and what installs each."""
    return {name: f"pip install '{PEERS[name].install}'" for name in peers if not PEERS[name].installed}


def machine(threads: int, peers: Sequence[str]) -> dict[str, Any]:
    """Where this was measured: processor, cores, memory, threads, versions."""
    packages = ["torch", "numba", "numpy", *(["jax"] if any(PEERS[name].jax for name in peers) else [])]
    return {
        "processor": processor(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_of_machine() / GIB, 1),
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "python": platform.python_version(),
        "counterflow": __version__,
        **{package: _version(package) for package in [*packages, *(PEERS[name].package for name in peers)]},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not a package"


def processor() -> str:
    """Its name, as Linux and macOS tell it in different places."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_of_machine() -> float:
    """Bytes; infinite where the system does not tell (Windows), so that there is no limit."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError):
        return float("inf")


def _save(run: Path, report: dict[str, Any], contest: Contest) -> None:
    """What is there so far: an interrupted run keeps it."""
    figures = {
        "failed": contest.failed,
        "measured": [dataclasses.asdict(m) for m in contest.results],
        "growth": [dataclasses.asdict(m) for m in contest.growth],
        "first calls": [dataclasses.asdict(f) for f in contest.first],
    }
    write_json(run / "bench.json", {**report, **figures})


def _finish(run: Path, report: dict[str, Any], contest: Contest) -> int:
    """Summary, tables, pictures."""
    results, growth = Results(contest.results), Results(contest.growth)
    found = standings.aims(results)
    summary = {
        "aims": [{**aim._asdict(), "size": str(aim.size), "met": aim.met} for aim in found],
        "exponents": standings.exponents(growth),
        "not installed": report["not installed"],
        "failed": contest.failed,
    }
    write_json(run / "summary.json", summary)
    sheets = [
        standings.directions(results),
        standings.against(results, "sequential", "Sequential direction"),
        standings.against(results, "stack backward", "Five layers, parallel direction with gradients"),
        standings.worst(found),
    ]
    more = [
        standings.growth(growth),
        standings.first_calls(contest.first),
        *(standings.everything(results, size) for size in results.sizes),
    ]
    (run / "bench.md").write_text(_page(report["machine"], contest.failed, [*sheets, *more]))
    for sheet in sheets:
        console.out.print(_table(sheet))
    for name, failure in contest.failed.items():
        console.note(f"{name} was left out: {failure}")
    _draw(run / "plots", growth)
    console.say(f"run folder: {run}  (all figures in {run / 'bench.md'}, pictures in {run / 'plots'})")
    return 0


def _page(machine: dict[str, Any], failed: dict[str, str], sheets: Sequence[Sheet]) -> str:
    """bench.md."""
    where = ", ".join(f"{name} {value}" for name, value in machine.items() if value != "")
    lines = ["# Both directions of an autoregressive layer\n", f"Made by `counterflow bench`. {where}.\n", NOTE]
    lines += [f"{name} was left out: {failure}\n" for name, failure in failed.items()]
    return "\n".join(lines + [sheet.markdown() for sheet in sheets if sheet.rows])


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for k, name in enumerate(sheet.header):
        table.add_column(name, justify="right" if k else "left")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _draw(folder: Path, growth: Results) -> None:
    """Time, and the memory of a call with gradients, of both directions against D."""
    for file, figure, suffix, unit, label, title in (
        ("time.png", "seconds", "", 1e-3, "ms", "Time"),
        ("memory.png", "peak", " backward", 2**20, "MiB", "Peak memory with gradients"),
    ):
        lines = {}
        for name in growth.contestants:
            both = [standings.series(growth, name, side + suffix, figure) for side in ("parallel", "sequential")]
            lines[name] = plots.Directions(*((x, [value / unit for value in y]) for x, y in both))
        plots.directions(folder / file, lines, label, f"{title}: one layer, H = 2 D, {GROWTH_ROWS} rows, float32")
