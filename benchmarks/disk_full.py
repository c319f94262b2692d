"""A disk that is full, at any write: what is said, what is left, and whether it goes on.

    pip install -c constraints.txt -e ".[all,export]" && python benchmarks/disk_full.py [--sizes 12]

Needs Linux and the right to mount. Each command runs once on a tmpfs with room for everything, where the largest use of
the disk is noted; then on tmpfs of so many sizes, from nothing up to that, so that the disk is full at another write
each time. Asked for is: exit code 2 and one line on stderr that says so, no traceback, no file that is half there. Of
a run that left a state, the newest reads, and with a larger disk `--resume` ends with the same bits as the run that
had room. Written to results/reliability.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kills import COUNTERFLOW, TEACHER, command, outcome, run
from reliability import machine, write_section

import counterflow as cf

TRAININGS = ("vae", "density", "posterior", "distill")
OTHERS = {
    "score": ["score", "TEACHER", "TABLE", "--out", "OUT/scores.csv"],
    "sample": ["sample", "TEACHER", "-n", "20000", "--out", "OUT/samples.parquet"],
    "export": ["export", "TEACHER", "OUT/model.onnx"],
}
ROOM = 256 << 20  # bytes
LEAST = 16 << 10


@contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The largest use of the disk so far."""
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], shutil.disk_usage(folder).used)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def complaints(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("counterflow:")]


def wrong(code: int, errors: str, out: Path) -> str:
    """List the faults of a command whose disk was full."""
    told = complaints(errors)
    if code != 2 or "Traceback" in errors or len(told) != 1 or "expected free space on the disk" not in told[0]:
        return f"exit code {code}, {errors[-600:]}"
    parts = [str(path.relative_to(out)) for path in out.rglob("*.part")]
    return f"left {', '.join(parts)}" if parts else ""


def training(name: str, folder: Path, sizes: int) -> str:
    words, mount = command(name, folder), folder / "disk"
    with disk(mount, ROOM), watched(mount) as most:
        code, errors = run([*words, "--out", str(mount / "run")])
        assert code == 0, errors
        expected = outcome(mount / "run")
    fates: Counter[str] = Counter()
    for k in range(sizes):
        size = max(LEAST, most[0] * k // sizes)
        with disk(mount, size):
            code, errors = run([*words, "--out", str(mount / "run")])
            if code == 0:
                fates["had room enough"] += 1
                continue
            fault = wrong(code, errors, mount)
            checkpoints = [p.parent for p in (mount / "run").glob("checkpoints/*/*.safetensors")]
            left = bool(checkpoints)
            if not fault and any(cf.Checkpoints(folder).load() is None for folder in checkpoints):
                fault = "a state that does not read"
            subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(mount)], check=True)
            if not fault:
                again = ["--resume", str(mount / "run")] if (mount / "run" / "config.json").exists() else words[4:]
                more = [] if again[0] == "--resume" else ["--out", str(mount / "run")]
                code, errors = run([*words[:4], *again, *more])
                if code or outcome(mount / "run") != expected:
                    fault = f"went on to another end: {errors[-600:]}"
        fates[fault or ("went on from its state" if left else "began anew")] += 1
        print(name, size, fault or ("went on" if left else "began anew"), flush=True)
    told = "; ".join(f"{count} {fate}" for fate, count in fates.items())
    return f"| {name} | {most[0] / 2**20:.1f} | {sizes} | {told} |"


def other(name: str, folder: Path, sizes: int) -> str:
    mount, places = folder / "disk", {"TEACHER": folder / "teacher", "TABLE": folder / "table.csv"}
    words = [
        *COUNTERFLOW,
        *(str(places.get(word, word)).replace("OUT", str(mount)) for word in OTHERS[name]),
    ]
    with disk(mount, ROOM), watched(mount) as most:
        code, errors = run(words)
        assert code == 0, errors
    fates: Counter[str] = Counter()
    for k in range(sizes):
        with disk(mount, max(LEAST, most[0] * k // sizes)):
            code, errors = run(words)
            fault = "" if code == 0 else wrong(code, errors, mount)
            if code and not fault and any(mount.iterdir()):
                fault = f"left {[p.name for p in mount.iterdir()]}"
        fates["had room enough" if code == 0 else fault or "one line, no file"] += 1
        print(name, k, fault, flush=True)
    told = "; ".join(f"{count} {fate}" for fate, count in fates.items())
    return f"| {name} | {most[0] / 2**20:.1f} | {sizes} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, default=12)
    parser.add_argument("--commands", nargs="+", default=[*TRAININGS, *OTHERS])
    options = parser.parse_args()
    lines = ["| command | MiB at most | sizes | what became of them |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "disk").mkdir()
        code, errors = run([*COUNTERFLOW, *TEACHER, "--out", str(folder / "teacher")])
        assert code == 0, errors
        density = cf.FlowDensity.load(folder / "teacher")
        rows = density.sample(5000, random_state=0)
        header = ",".join(density.get_feature_names_out())
        (folder / "table.csv").write_text(header + "\n" + "\n".join(",".join(map(repr, row)) for row in rows.tolist()))
        for name in options.commands:
            lines.append((training if name in TRAININGS else other)(name, folder, options.sizes))
            print(lines[-1], flush=True)
            write_section("Full disks", [f"Made by `python {' '.join(sys.argv)}` ({machine()}).", "", *lines])


if __name__ == "__main__":
    main()
