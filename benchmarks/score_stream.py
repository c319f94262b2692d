"""Does `counterflow score` keep to flat memory, and what does streaming cost? On a large Parquet file.

    python benchmarks/score_stream.py --gigabytes 5

A density of 20 columns is fitted to a few rows, and its samples, jittered, are written to a Parquet file of float64 in
row groups of a million rows. `counterflow score` adds the log density to it in a process of its own, whose peak
resident memory is read from the system. Before and after each such run a slice of the rows is
scored in memory by `flow_().log_prob`, in chunks of the size that `score_samples` takes, and by a `counterflow score`
of that slice alone, so that its start is known. The files are deleted at the end. Written to results/score_stream.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import counterflow as cf
from counterflow.density.model import CHUNK

HERE = Path(__file__).parent / "results"
D, GROUP, SLICE = 20, 1 << 20, 1 << 19
FLOWS = ("maf", "nsf")  # of the default sizes: affine, under which reading counts more, and the default
# The peak of a process begins with that of the one that starts it, so a small one does.
LAUNCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
NAMES = [f"x{i}" for i in range(D)]


def fit_density(folder: Path, flow: str, seed: int) -> cf.FlowDensity:
    """A run folder, as `counterflow density` leaves it."""
    rng = np.random.default_rng(seed)
    x = np.tanh(rng.normal(size=(5000, 3))) @ rng.normal(size=(3, D)) + 0.3 * rng.standard_t(5, (5000, D))
    density = cf.FlowDensity(flow, members=1, kernels=False, epochs=3, random_state=seed)  # the fastest there is
    density.fit(pa.table(dict(zip(NAMES, x.T, strict=True))))
    density.save(folder)
    (folder / "config.json").write_text(json.dumps({"command": "density"}))
    return density


def write_table(path: Path, density: cf.FlowDensity, rows: int, seed: int) -> None:
    """Samples, each with a little noise of its own, so that no two rows are alike."""
    rng = np.random.default_rng(seed)
    drawn = density.sample(20_000, random_state=seed)
    spread = 0.01 * drawn.std(0)
    schema = pa.schema([(name, pa.float64()) for name in NAMES])
    with pq.ParquetWriter(path, schema, compression="NONE", use_dictionary=False) as writer:
        for first in range(0, rows, GROUP):
            size = min(GROUP, rows - first)
            columns = []
            pick = rng.integers(0, len(drawn), size)
            for i in range(D):
                columns.append(drawn[pick, i] + spread[i] * rng.standard_normal(size))
            writer.write_table(pa.table(columns, schema=schema), row_group_size=size)


def in_memory(density: cf.FlowDensity, x: np.ndarray) -> float:
    """Seconds for the log density of rows that are there already."""
    rows = torch.from_numpy(x)
    flow = density.flow_
    started = time.perf_counter()
    with torch.no_grad():
        for part in rows.split(max(1, CHUNK // D)):
            flow().log_prob(part)
    return time.perf_counter() - started


def command(run: Path, data: Path, out: Path) -> tuple[float, float]:
    """Seconds of `counterflow score`, and its peak resident memory in bytes."""
    out.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "counterflow.cli", "score", str(run), str(data), "--out", str(out)]
    started = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", LAUNCHER, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, int(told.stdout) * (1 if sys.platform == "darwin" else 1024)


def measure(flow: str, gigabytes: float, rounds: int, folder: Path) -> dict[str, float]:
    run, table, small, out = folder / "run", folder / "table.parquet", folder / "slice.parquet", folder / "out.parquet"
    run.mkdir()
    density = fit_density(run, flow, seed=0)
    rows = int(gigabytes * 1e9 / (8 * D))
    write_table(table, density, rows, seed=1)
    with pq.ParquetFile(table, pre_buffer=False) as file:
        batch = next(file.iter_batches(min(SLICE, rows // 2)))
    x = np.stack([column.to_numpy() for column in batch.columns], 1)
    pq.write_table(pa.Table.from_batches([batch]), small)
    memory, whole, streamed, ratios, peak = [], [], [], [], 0.0
    in_memory(density, x)
    for _ in range(rounds):
        before = in_memory(density, x)
        start, _ = command(run, small, out)
        seconds, reached = command(run, table, out)
        memory.append(2 * len(x) / (before + in_memory(density, x)))
        whole.append(rows / seconds)
        streamed.append((rows - len(x)) / (seconds - start))  # the start taken out
        ratios.append(streamed[-1] / memory[-1])
        peak = max(peak, reached)
    scored = pq.read_metadata(out).num_rows
    if scored != rows:
        raise RuntimeError(f"expected {rows} rows, got {scored}")
    first = next(pq.ParquetFile(out).iter_batches(len(x), columns=["log_density"])).column(0).to_numpy()
    with torch.no_grad():
        expected = torch.cat([density.flow_().log_prob(part) for part in torch.from_numpy(x).split(1000)]).numpy()
    return {
        "gigabytes": table.stat().st_size / 1e9,
        "rows": rows,
        "peak": peak / 1e9,
        "streamed": float(np.median(streamed)),
        "whole": float(np.median(whole)),
        "memory": float(np.median(memory)),
        "ratio": float(np.median(ratios)),
        "difference": float(np.abs(first - expected).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flow", choices=FLOWS, nargs="+", default=["maf"])
    parser.add_argument(
        "--folder", type=Path, help="where the files go for a while; the system's temporary folder else"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    lines = [
        "# Scoring a table that is larger than memory should be",
        "",
        f"Made by `python benchmarks/score_stream.py --gigabytes {arguments.gigabytes:g} --rounds {arguments.rounds} "
        f"--flow {' '.join(arguments.flow)}` ({platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, pyarrow {pa.__version__}, Python {platform.python_version()}).",
        f"{D} columns of float64 in Parquet, row groups of {GROUP:,} rows. `streamed` leaves out the start of the "
        "process, `whole` has it; `in memory` is `flow_().log_prob` of rows that are there already. "
        "Medians of the rounds.",
        "",
        "| flow | GB | rows | peak resident GB | streamed, rows/s | whole, rows/s | in memory, rows/s | "
        "streamed / in memory | largest difference, nats |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for flow in arguments.flow:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            m = measure(flow, arguments.gigabytes, arguments.rounds, Path(folder))
        lines.append(
            f"| {flow} | {m['gigabytes']:.2f} | {m['rows']:,} | {m['peak']:.2f} | {m['streamed']:,.0f} | "
            f"{m['whole']:,.0f} | {m['memory']:,.0f} | {m['ratio']:.2f} | {m['difference']:.1e} |"
        )
        print(lines[-1], flush=True)
    HERE.mkdir(exist_ok=True)
    (HERE / "score_stream.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
