"""A training that is killed at any moment ends as if nothing had happened: how often.

    pip install -c constraints.txt -e ".[all]" && python benchmarks/kills.py [--times 50] [--commands vae density ...]

For each command that trains, a run that is left alone is timed. Then, so many times, the same command is started and
ended by SIGKILL at a moment drawn uniformly from that time, start-up, tests and pictures included; then
`--resume` (or the command itself, where there is no run yet) is started, and killed again with a chance of one half,
until it ends by itself. A run that ends before it is killed does not count, and shortens the time. Counted is how often
the weights, the draws and what the metrics and the summary say (but for the seconds) are the same bits as those of the
run that was left alone.

    python benchmarks/kills.py --ranks [--times 10]

does it with two processes under torchrun, one of which is killed while they train; torchrun starts both again, and they
go on by themselves. The last validation objective is compared with that of two processes that were left alone.

    python benchmarks/kills.py --launcher [--times 10]

kills torchrun itself, waits until its processes have ended as well, and gives the same line again. All of them write to
results/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from reliability import machine, write_section

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COUNTERFLOW = [sys.executable, "-m", "counterflow"]
SMALL = ["--latent", "4", "--hidden", "64", "--iaf-layers", "2", "--iaf-hidden", "32"]
VAE = ["vae", *SMALL, "--epochs", "12", "--test-samples", "20", "--save-every", "0.3"]
COMMANDS = {
    "vae": VAE,
    "density": ["density", "--epochs", "15", "--layers", "2", "--hidden", "32", "--save-every", "0.3"],
    "posterior": ["posterior", "--steps", "300", "--seconds", "1000", "--save-every", "0.3"],
    "distill": [
        "distill",
        "TEACHER",
        "--samples",
        "1000",
        "--layer-steps",
        "200",
        "--flow-steps",
        "200",
        "--save-every",
        "0.3",
    ],
}
TEACHER = ["density", "--epochs", "3", "--members", "1", "--no-kernels"]
TEACHER += ["--flow", "maf", "--layers", "2", "--hidden", "32"]
DEADLINE = 600  # seconds for one process


def command(name: str, folder: Path) -> list[str]:
    return [*COUNTERFLOW, *(str(folder / "teacher") if word == "TEACHER" else word for word in COMMANDS[name])]


def run(words: list[str], killed_after: float | None = None) -> tuple[int, str]:
    """Exit code and stderr; -9 where it was killed."""
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=killed_after or DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    return process.returncode, errors


def outcome(folder: Path) -> dict[str, Any]:
    """All that two runs must have in common."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [_timeless(line) for line in lines]
    found["summary"] = _timeless(json.loads((folder / "summary.json").read_text()))
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "rows_per_second")}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def survive(words: list[str], out: Path, seconds: float, rng: random.Random) -> tuple[dict[str, Any] | None, str, int]:
    """Run a command and kill it repeatedly: its results, progress at the first kill and number of kills."""
    kills, stage, killing = 0, "", True
    while True:
        begun = (out / "config.json").is_file()
        again = [*words[:4], "--resume", str(out)] if begun else [*words, "--out", str(out)]
        code, errors = run(again, rng.uniform(0.05, seconds) if killing else None)
        if code == 0 or (code == 2 and "which is finished" in errors):
            return outcome(out), stage, kills
        if code != -signal.SIGKILL:
            print(errors, flush=True)
            return None, stage, kills
        kills += 1
        stage = stage or where(out)
        killing = rng.random() < 0.5


def where(out: Path) -> str:
    """Return the progress of a killed run."""
    if not (out / "config.json").is_file():
        return "before the run folder"
    if not any((out / "checkpoints").rglob("*.safetensors")):
        return "after the end" if (out / "summary.json").is_file() else "before the first state"
    return "with a summary" if (out / "summary.json").is_file() else "with states"


def kills(names: list[str], times: int) -> list[str]:
    lines = ["| command | seconds alone | runs | the same bits | kills | where the first kill fell |"]
    lines += ["|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "distill" in names:
            assert run([*COUNTERFLOW, *TEACHER, "--out", str(folder / "teacher")])[0] == 0
        for name in names:
            words, rng = command(name, folder), random.Random(0)
            begun = time.perf_counter()
            code, errors = run([*words, "--out", str(folder / "alone")])
            assert code == 0, errors
            seconds, expected = time.perf_counter() - begun, outcome(folder / "alone")
            same, total, places = 0, 0, Counter[str]()
            while sum(places.values()) < times:
                out, begun = folder / f"{name}-{sum(places.values())}", time.perf_counter()
                came, place, killed = survive(words, out, seconds, rng)
                if not killed:
                    seconds = min(seconds, time.perf_counter() - begun)
                    shutil.rmtree(out)
                    continue
                differ = (
                    ["did not end"] if came is None else [key for key in expected if came.get(key) != expected[key]]
                )
                same, total = same + (not differ), total + killed
                places[place] += 1
                print(f"{name} {out.name}: {place}, {killed} kills, differs in {differ}", flush=True)
                shutil.rmtree(out)
            fell = ", ".join(f"{count} {place}" for place, count in places.most_common())
            lines.append(f"| {name} | {seconds:.0f} | {times} | {same} | {total} | {fell} |")
            shutil.rmtree(folder / "alone")
    return lines


# -- two ranks ---------------------------------------------------------------------------------------


def torchrun(out: Path, restarts: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, "--max-restarts", str(restarts), "-m", "counterflow", *VAE, "--out", str(out)]


def workers(of: int) -> list[int]:
    """The processes that torchrun has started, the first rank first."""
    children = Path(f"/proc/{of}/task/{of}/children").read_text().split()
    return [int(child) for child in children]


def last_objectives(out: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["posterior"]: line["validation"] for line in lines}


def started(out: Path, log: Path, restarts: int) -> subprocess.Popen[str]:
    with log.open("a") as errors:
        return subprocess.Popen(
            torchrun(out, restarts), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=errors, text=True
        )


def until_gone(pids: list[int]) -> float:
    """Seconds until none of these processes is there."""
    begun = time.perf_counter()
    while any(Path(f"/proc/{pid}/exe").exists() for pid in pids):  # which a process that has ended has not
        assert time.perf_counter() - begun < DEADLINE, f"{pids} are still there"
        time.sleep(0.02)
    return time.perf_counter() - begun


def ranks(times: int, launcher: bool) -> list[str]:
    rng, ended, worst, killed, lived = random.Random(0), 0, 0.0, [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code, errors = run(torchrun(folder / "alone", 0))
        assert code == 0, errors
        expected = last_objectives(folder / "alone")
        for k in range(times):
            out, log = folder / str(k), folder / f"{k}.log"
            process = started(out, log, 0 if launcher else 3)
            while not any((out / "checkpoints").rglob("*.safetensors")):
                assert process.poll() is None
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 4))
            both = workers(process.pid)
            if launcher:
                process.kill()
                process.wait()
                lived.append(until_gone(both))
                process = started(out, log, 0)
            else:
                killed.append(rng.randrange(2))
                os.kill(both[killed[-1]], signal.SIGKILL)
            code = process.wait(DEADLINE)
            told = log.read_text()
            came = last_objectives(out) if code == 0 else {}
            off = max((abs(came[m] / expected[m] - 1) for m in expected), default=1.0) if came else 1.0
            went_on = "going on from step" in told
            ended, worst = ended + (code == 0 and went_on), max(worst, off)
            print(f"{k}: exit code {code}, went on {went_on}, relative difference {off:.1e}", flush=True)
            if code:
                print(told, flush=True)
            shutil.rmtree(out)
    if launcher:
        how = f"when the line was given again (all processes had ended by themselves after {max(lived):.1f} s at most)"
    else:
        how = f"by themselves and ended (rank 0 was killed {killed.count(0)} times, rank 1 {killed.count(1)} times)"
    return [
        f"{ended} of {times} went on {how}; the largest relative difference of a last validation objective from that "
        f"of two processes left alone is {worst:.1e}."
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int)
    parser.add_argument("--ranks", action="store_true")
    parser.add_argument("--launcher", action="store_true")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    made = f"Made by `python {' '.join(sys.argv)}` ({machine()})."
    if options.ranks or options.launcher:
        title = "Killed launchers" if options.launcher else "Killed ranks"
        write_section(title, [made, "", *ranks(options.times or 10, options.launcher)])
    else:
        title = f"Killed runs: {', '.join(options.commands)}"
        write_section(title, [made, "", *kills(options.commands, options.times or 50)])


if __name__ == "__main__":
    main()
