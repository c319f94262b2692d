"""Every reader of files, fed with broken ones: what it says of them, how long it takes and how much memory.

    python benchmarks/fuzz.py [--examples 20000] [--readers idx npy ..]

Each reader runs in a process of its own, which may take 1 GiB more than it has when it has read its valid files; one
file may take 5 s. Files come from `tests/hostile.py` by Hypothesis, the same ones in every run. A failure is any
exception that the command line does not turn into one line, memory that ran out on the way to a message, a hang, and a
crash of the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile import READERS, Files, batches, outcome, write
from hypothesis import HealthCheck, Phase, given, settings
from reliability import machine, section, write_section

SECONDS, MEMORY = 5.0, 1 << 30
BATCH = 20
TITLE = "Hostile files"
COMMAND = "python benchmarks/fuzz.py"


class Hang(BaseException):
    """A file that takes longer than it may."""


def child(name: str, count: int) -> dict[str, Any]:
    """Results of one reader over many broken files."""
    reader, said, failures, slowest = READERS[name], Counter[str](), list[str](), 0.0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        folder = Path(place)
        for files in reader.valid():
            _only(folder, files)
            if (came := outcome(reader, folder)) != "read":
                failures.append(f"valid files: {came}")
        _limit()
        before = _peak()

        def judge(files: Files) -> None:
            nonlocal slowest
            _only(folder, files)
            begun = time.perf_counter()
            try:
                said[_kind(_within(lambda: outcome(reader, folder)))] += 1
            except (Exception, Hang) as error:
                said["failure"] += 1
                failures.append("".join(traceback.format_exception(error)[-3:])[-1500:])
            slowest = max(slowest, time.perf_counter() - begun)

        @settings(
            max_examples=-(-count // BATCH),
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(batches(name, BATCH))
        def run(batch: Iterator[Files]) -> None:
            for files in batch:
                judge(files)

        run()
        return {"said": said, "failures": failures[:5], "slowest": slowest, "memory": _peak() - before}


def _only(folder: Path, files: Files) -> None:
    for path in folder.iterdir():
        path.unlink()
    write(folder, files)


def _limit() -> None:
    """1 GiB more than the process has now."""
    status = Path("/proc/self/status").read_text()
    has = int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (has + MEMORY, has + MEMORY))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _within(read: Any) -> str:
    """Call a function with a limit in seconds; if native code does not return in time, the process ends."""

    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {SECONDS:g} s")

    signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(SECONDS + 1, exit=True)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return str(read())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def _kind(said: str) -> str:
    """The class of a message: its first words, without what it quotes."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\.\./\S+|[\d.,]*\d", "..", said)
    return " ".join(text.split()[:12]).replace("|", "/")


def _started(name: str, count: int, limit: float) -> dict[str, Any]:
    """The report of a child; where it ended otherwise, that is the failure."""
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, __file__, "--child", name, "--examples", str(count)]
    begun = time.perf_counter()
    try:
        ran = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=limit)
        report = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else None
        ended = f"exit status {ran.returncode}: {ran.stderr[-1500:]}"
    except subprocess.TimeoutExpired:
        report, ended = None, f"not finished after {limit:g} s"
    report = report or {"said": {}, "failures": [ended], "slowest": 0.0, "memory": 0}
    return report | {"name": name, "seconds": time.perf_counter() - begun}


def _row(report: dict[str, Any]) -> str:
    said, total = Counter(report["said"]), sum(report["said"].values())
    read, failed = said.pop("read", 0), said.pop("failure", 0)
    often = "; ".join(f"{count / total:.0%} {kind}" for kind, count in said.most_common(2))
    return (
        f"| {report['name']} | {total:,} | {read / max(total, 1):.1%} | {1 - (read + failed) / max(total, 1):.1%} | "
        f"{len(report['failures'])} | {report['slowest']:.2f} | {report['memory'] >> 20} | {len(said)} | {often} |"
    )


def _kept(names: list[str]) -> dict[str, str]:
    """The rows of other readers, from earlier runs."""
    found = {line.split("|")[1].strip(): line for line in section(TITLE) if line.startswith("|")}
    return {name: row for name, row in found.items() if name in READERS and name not in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds of one reader")
    parser.add_argument("--child")
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child, asked.examples)))
        return 0
    with ThreadPoolExecutor(asked.jobs) as pool:
        reports = []
        for report in pool.map(lambda name: _started(name, asked.examples, asked.limit), asked.readers):
            print(_row(report), f"{report['seconds']:.0f} s", *report["failures"], flush=True)
            reports.append(report)
    rows = _kept(asked.readers) | {report["name"]: _row(report) for report in reports}
    lines = [
        f"Broken files, {asked.examples:,} for each reader, by `{COMMAND} --examples {asked.examples}`. A process may",
        f"take {MEMORY >> 30} GiB more than before, a file {SECONDS:g} s. Kinds are messages without names and",
        "numbers.",
        "",
        f"{machine()}.",
        "",
        "| reader | files | read | refused | failures | slowest, s | memory, MiB | kinds | most often |",
        "|---|---|---|---|---|---|---|---|---|",
        *(rows[name] for name in READERS if name in rows),
    ]
    write_section(TITLE, lines)
    return 1 if any(report["failures"] for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
