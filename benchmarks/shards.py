"""Speed-up and memory of scoring and drawing with two processes instead of one, and the work that a restart repeats.

    python benchmarks/shards.py --rounds 3

A density of 8 columns (a MAF of the default sizes) is fitted to a few rows, and a data set of Parquet files is
written in row groups of 65,536 rows. `counterflow score` and `sample` write folders of parts, in one process and in two
under torchrun, each process on one thread, in turns. The clock runs from the first file that is begun to the last part,
so the start of the processes, which is the same for any number of rows, is left out and told beside it. The peak of a
process is what the system says of its resident memory. At last a process of two is killed in the midst, and then all
are, and it is counted which parts are written after that. Written to results/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from reliability import machine, write_section

import counterflow as cf

D, FILES, GROUP = 8, 8, 1 << 16
NAMES = [f"x{i}" for i in range(D)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "counterflow"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
TWO += ["--nproc-per-node", "2", "-m", "counterflow"]


def prepare(folder: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, D))

    def draw(size: int) -> pa.Table:
        x = np.tanh(rng.normal(size=(size, 3))) @ mix + 0.3 * rng.standard_t(5, (size, D))
        return pa.table(dict(zip(NAMES, x.T, strict=True)))

    density = cf.FlowDensity("maf", members=1, kernels=False, epochs=3, random_state=0)
    density.fit(draw(5000)).save(folder / "run")
    (folder / "run" / "config.json").write_text(json.dumps({"command": "density"}))
    (folder / "data").mkdir()
    for k in range(FILES):
        pq.write_table(draw(rows // FILES), folder / "data" / f"{k}.parquet", row_group_size=GROUP)


@dataclass
class Watched:
    """Observations of a folder while a command writes to it."""

    begun: float = 0.0  # seconds from the start to the first file
    work: float = 0.0  # and from there to the last part
    peak: dict[int, int] = field(default_factory=dict)  # process -> bytes
    killed: float = 0.0


def watch(folder: Path, command: list[str], out: str, kill: str = "") -> Watched:
    """Run a command that writes parts to `out`; kill one process of it, or all, when two parts are there."""
    seen, path, started = Watched(), folder / out, time.perf_counter()
    process = subprocess.Popen([*command, "--out", out], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        at_work = {int(part.name.split(".")[-2]) for part in path.glob(".part-*.part")}
        if at_work and not seen.begun:
            seen.begun = time.perf_counter() - started
        for pid in at_work | set(seen.peak):
            seen.peak[pid] = max(seen.peak.get(pid, 0), peak_of(pid))
        if kill and not seen.killed and at_work and len(list(path.glob("part-*"))) >= 2:
            for pid in [max(at_work)] if kill == "one" else [process.pid, *at_work]:
                os.kill(pid, signal.SIGKILL)
            seen.killed = time.time()
        time.sleep(0.02)
    if process.returncode and kill != "all":
        raise RuntimeError(f"expected exit code 0, got {process.returncode}")
    seen.work = time.perf_counter() - started - seen.begun
    last = max(part.stat().st_mtime for part in path.glob("part-*"))
    seen.work -= max(0.0, time.time() - last)  # what the processes took to leave
    return seen


def peak_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return 1024 * int(line.split()[1])


def compare(folder: Path, work: list[str], rows: int, rounds: int) -> str:
    """A line of the table: rows per second in one process and in two, and their ratio."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    starts: list[float] = []
    peak = 0
    for _ in range(rounds):
        for size, command in ((1, COMMAND), (2, TWO)):
            shutil.rmtree(folder / "out", ignore_errors=True)
            seen = watch(folder, [*command, *work], "out")
            rates[size].append(rows / seen.work)
            starts.append(seen.begun)
            peak = max(peak, *seen.peak.values())
    ratios = np.array(rates[2]) / np.array(rates[1])
    return (
        f"| {work[0]} | {rows:,} | {np.median(rates[1]):,.0f} | {np.median(rates[2]):,.0f} | {np.median(ratios):.2f} "
        f"({ratios.min():.2f} to {ratios.max():.2f}) | {peak / 1e6:,.0f} | {np.median(starts):.0f} |"
    )


def after_a_kill(folder: Path, work: list[str], kill: str) -> str:
    """A line that says what was written again."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    seen = watch(folder, [*TWO, *work], "out", kill)
    out = folder / "out"
    there = [part for part in out.glob("part-*") if part.stat().st_mtime < seen.killed]
    kept = {part: part.stat().st_mtime_ns for part in there}
    if kill == "all":
        watch(folder, [*COMMAND, *work], "out")
    total = len(list(out.glob("part-*")))
    again = sum(part.stat().st_mtime_ns != stamp for part, stamp in kept.items())
    came = pq.read_table(out, columns=["log_density"]).num_rows
    return f"| {kill} | {len(kept)} of {total} | {again} | {total - len(kept)} | {came:,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default="nothing else", help="what else was running, for the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), arguments.rows // FILES * FILES
        prepare(folder, rows)
        score, draw = ["score", "run", "data"], ["sample", "run", "-n", str(rows)]
        size = sum(file.stat().st_size for file in (folder / "data").iterdir()) / 1e9
        lines = [
            f"Made by `python benchmarks/shards.py --rows {arguments.rows} --rounds {arguments.rounds}` ({machine()}; "
            f"beside it ran {arguments.beside}, load {os.getloadavg()[0]:.1f} at the start). {FILES} Parquet files of "
            f"{D} columns, row groups of {GROUP:,} rows, {size:.2f} GB; a MAF of the default sizes; one thread a "
            "process; medians of rounds in which one and two processes take turns. The start of a process is left out.",
            "",
            "| command | rows | one process, rows/s | two, rows/s | two / one | peak of a process, MB | start, s |",
            "|---|---|---|---|---|---|---|",
        ]
        for work in (score, draw):
            lines.append(compare(folder, work, rows, arguments.rounds))
            print(lines[-1], flush=True)
        lines += [
            "",
            "Two processes score, and are killed when two parts are there: one of them, and torchrun starts both "
            "again; or all, and one process completes the folder.",
            "",
            "| killed | parts that were there | of these written again | written after it | rows in the end |",
            "|---|---|---|---|---|",
        ]
        for kill in ("one", "all"):
            lines.append(after_a_kill(folder, score, kill))
            print(lines[-1], flush=True)
    write_section("Sharded score and sample", lines)


if __name__ == "__main__":
    main()
