"""Accuracy of fitted posteriors: 19 posteriors of posteriordb with 10,000 reference draws each, and several seeds.

    python benchmarks/posteriordb.py --data PATH/TO/posteriordb

Every posterior is a PyMC model in posteriordb_models/, fitted with the default configuration; --methods names other
tools, which get the same models. Each run is a process of its own with a time limit. Finished runs are kept in
results/posteriordb.json at once and not done again, so that the command can be given again after an interruption, or
beside another one with other --methods; --again forgets the runs that the arguments name. The report is
results/posteriordb.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from posteriordb_models import NAMES, load_data, load_draws, stack_draws

HERE = Path(__file__).parent / "results"
METHODS = {  # in the order of the report
    "counterflow": "Counterflow",
    "fullrank_advi": "full-rank ADVI",
    "auto_iaf_normal": "AutoIAFNormal",
    "pathfinder": "Pathfinder",
}
PACKAGES = ("counterflow", "torch", "pymc", "pytensor", "pymc-extras", "numpyro", "jax", "arviz", "numpy")
Run = dict[str, Any]
Key = tuple[str, str, int]  # method, posterior, seed


def measure(method: str, name: str, seed: int, folder: Path) -> Run:
    """Fit one posterior and compare with its reference draws."""
    from posteriordb_models import methods, pymc_models

    model = getattr(pymc_models, name.partition("-")[2])(load_data(folder, name))
    fit = getattr(methods, method)(model, seed)
    reference = stack_draws(load_draws(folder, name))
    run: Run = {
        "k_hat": fit.k_hat,
        "trusted": bool(fit.trusted),
        **errors(fit.draws, reference),
        "seconds": fit.seconds,
        "cpu_seconds": fit.cpu_seconds,
        "build_seconds": fit.build_seconds,
        "stages": fit.stages,
    }
    if fit.log_weights is not None:
        resampled = errors(importance_resampled(fit.draws, fit.log_weights, seed), reference)
        run |= {f"resampled_{key}": value for key, value in resampled.items()}
    return run


def errors(draws: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> Run:
    """The worst over all reported scalars: of the means in reference sds, of the sds relative to the reference."""
    a = np.concatenate([np.reshape(draws[name], (len(draws[name]), -1)) for name in reference], 1)
    b = np.concatenate([np.reshape(value, (len(value), -1)) for value in reference.values()], 1)
    mean_error = np.abs(a.mean(0) - b.mean(0)) / b.std(0)
    sd_error = np.abs(a.std(0) / b.std(0) - 1)
    return {"mean_error": float(mean_error.max()), "sd_error": float(sd_error.max())}


def importance_resampled(draws: dict[str, np.ndarray], log_weights: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Resample as many draws in proportion to their weights; draws of weight zero are never picked."""
    log_weights = np.where(np.isnan(log_weights), -np.inf, log_weights)
    weights = np.exp(log_weights - log_weights.max())
    picked = np.random.default_rng(seed).choice(len(weights), len(weights), p=weights / weights.sum())
    return {name: value[picked] for name, value in draws.items()}


def in_own_process(key: Key, args: argparse.Namespace) -> Run:
    """Measure in a process with --threads threads; one that fails or takes over --limit seconds is reported as such."""
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore", __file__, "--data", str(args.data), "--one", *map(str, key)]
    try:
        ran = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {args.limit} s"}
    if ran.returncode:
        return {"failed": ran.stderr.strip().splitlines()[-1][:200]}
    return json.loads(ran.stdout.splitlines()[-1])


class Results:
    """The runs that are finished, in a file that is read again before each change: two commands may share it."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, Lock()

    def read(self) -> dict[Key, Run]:
        runs = json.loads(self.path.read_text("utf-8"))["runs"] if self.path.exists() else []
        return {(run["method"], run["posterior"], run["seed"]): run for run in runs}

    def change(self, new: dict[Key, Run], dropped: frozenset[Key] = frozenset()) -> None:
        with self.lock:
            runs = {key: run for key, run in (self.read() | new).items() if key not in dropped}
            text = json.dumps({"runs": [runs[key] for key in sorted(runs)]}, indent=1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(f".{os.getpid()}")
            unfinished.write_text(text + "\n", "utf-8")
            unfinished.replace(self.path)
            self.path.with_suffix(".md").write_text(report(list(runs.values())), "utf-8")


def report(runs: list[Run]) -> str:
    """The marks, every run, and the comparison, in Markdown."""
    ours = [run for run in runs if run["method"] == "counterflow"]
    return "\n".join([*head(runs), *(marks(ours) if ours else ()), *table(ours), *comparison(runs)]) + "\n"


def head(runs: list[Run]) -> Iterator[str]:
    yield "# Posteriors of posteriordb against their reference draws"
    yield ""
    yield "Made by `python benchmarks/posteriordb.py --data PATH`, one process a run:"
    for made in sorted({run["machine"] for run in runs}):
        yield f"* {made}"
    yield ""
    yield (
        "Mean error: the worst |mean - reference mean| / reference sd over all reported scalars. Sd error: the worst "
        "|sd / reference sd - 1|. Both sides have 10,000 draws, which alone leaves about 0.02 to 0.03 in the worst of "
        "ten means. Seconds on the wall and of CPU, without the compilation of the model. Flagged: the library says "
        "not to trust the result (Pareto k-hat not below 0.7, or a mode left out), or the run failed."
    )
    yield ""


def flagged(run: Run) -> bool:
    """Return true if the library warns of the result, or if the run failed."""
    return not run.get("trusted", False)


def marks(runs: list[Run]) -> Iterator[str]:
    """Count the posteriors that pass; a posterior passes if all its seeds do."""
    by_name = [[run for run in runs if run["posterior"] == name] for name in NAMES]
    by_name = [group for group in by_name if group]
    n, seeds = len(by_name), ", ".join(map(str, sorted({run["seed"] for run in runs})))
    good = [run for run in runs if run.get("k_hat", math.inf) < 0.7]
    trusted = sum(all(run in good for run in group) for group in by_name)
    exact = sum(
        all(run.get("mean_error", 9) < 0.1 and run.get("sd_error", 9) < 0.1 for run in group) for group in by_name
    )
    false = [run for run in good if not run["mean_error"] <= 0.25]
    seconds = [run.get("seconds", math.inf) for run in runs]
    cpu_seconds = [run.get("cpu_seconds", math.inf) for run in runs]
    silent = sum(not flagged(run) for run in runs if run not in good)
    yield f"{len(runs)} runs: {n} posteriors, seeds {seeds}. A posterior counts when every seed does."
    yield ""
    yield "| mark | wanted | found |"
    yield "|---|---|---|"
    yield f"| Pareto k-hat below 0.7 | 17 of 19 | {trusted} of {n} |"
    yield f"| runs that are not below 0.7 and not flagged | 0 | {silent} |"
    yield f"| every mean within 0.1 reference sd and every sd within 10% | 17 of 19 | {exact} of {n} |"
    yield f"| runs with k-hat below 0.7 and a mean off by more than 0.25 sd | 0 | {len(false)} |"
    yield f"| seconds, median (of CPU) | 60 | {statistics.median(seconds):.0f} ({statistics.median(cpu_seconds):.0f}) |"
    yield f"| seconds, longest (of CPU) | 300 | {max(seconds):.0f} ({max(cpu_seconds):.0f}) |"
    yield ""


def table(runs: list[Run]) -> Iterator[str]:
    if not runs:
        return
    yield "| posterior | seed | k-hat | flagged | mean error | sd error | seconds | of CPU | compiling | stages |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for run in sorted(runs, key=lambda run: (NAMES.index(run["posterior"]), run["seed"])):
        if "failed" in run:
            yield f"| {run['posterior']} | {run['seed']} | | yes | | | | | | {run['failed']} |"
            continue
        yield (
            f"| {run['posterior']} | {run['seed']} | {run['k_hat']:.2f} | {'yes' if flagged(run) else ''} "
            f"| {run['mean_error']:.3f} | {run['sd_error']:.3f} | {run['seconds']:.1f} | {run['cpu_seconds']:.1f} "
            f"| {run['build_seconds']:.1f} | {'; '.join(run['stages'])} |"
        )
    yield ""


def comparison(runs: list[Run]) -> Iterator[str]:
    """Worst mean error, k-hat and seconds of all methods: medians over the seeds that each has."""
    peers = [method for method in METHODS if any(run["method"] == method for run in runs)]
    if peers in ([], ["counterflow"]):
        return
    cells = {(method, name): summary(runs, method, name) for method in peers for name in NAMES}
    yield "## Other tools on the same log densities"
    yield ""
    yield (
        "Each cell: mean error, after importance resampling in brackets where the tool leaves that to its user; k-hat; "
        "seconds of CPU time. Medians over the seeds; a failed run counts as an infinite error."
    )
    yield ""
    for method in peers:
        seeds = sorted({run["seed"] for run in runs if run["method"] == method})
        yield f"* {METHODS[method]}: {SETTINGS[method]}; seeds {', '.join(map(str, seeds))}"
    yield ""
    yield f"| posterior | {' | '.join(METHODS[method] for method in peers)} |"
    yield "|---" * (len(peers) + 1) + "|"
    for name in NAMES:
        yield f"| {name} | {' | '.join(cell(cells[method, name]) for method in peers)} |"
    yield ""
    if peers[0] == "counterflow":
        yield from scores(cells, peers[1:])


SETTINGS = {
    "counterflow": "default configuration, draws resampled by importance",
    "fullrank_advi": "`pymc.FullRankADVI`, defaults but for 40,000 iterations (default 10,000)",
    "auto_iaf_normal": "`numpyro.infer.autoguide.AutoIAFNormal`, defaults, Adam 1e-3, 20,000 steps of one particle; "
    "`stable_update` skips steps that are not finite; seconds include XLA's compilation",
    "pathfinder": "`pymc_extras.fit_pathfinder`, defaults (4 paths, PSIS) but for 10,000 draws (default 1,000)",
}


def summary(runs: list[Run], method: str, name: str) -> dict[str, float]:
    """Medians over the seeds, empty where there is no run."""
    chosen = [run for run in runs if (run["method"], run["posterior"]) == (method, name)]
    keys = ("mean_error", "k_hat", "cpu_seconds", "resampled_mean_error")
    present = [key for key in keys if key != keys[-1] or any(key in run for run in chosen)]
    return {key: statistics.median(run.get(key, math.inf) for run in chosen) for key in present} if chosen else {}


def cell(found: dict[str, float]) -> str:
    if not found:
        return ""
    if found["mean_error"] == math.inf:
        return "diverged or failed"
    resampled = f" ({found['resampled_mean_error']:.3f})" if "resampled_mean_error" in found else ""
    return f"{found['mean_error']:.3f}{resampled}; {found['k_hat']:.2f}; {found['cpu_seconds']:.0f} s"


def scores(cells: dict[tuple[str, str], dict[str, float]], peers: list[str]) -> Iterator[str]:
    """On how many posteriors Counterflow has the smaller error."""
    names = [name for name in NAMES if cells["counterflow", name] and all(cells[peer, name] for peer in peers)]

    def better(name: str, rivals: list[str], key: str) -> bool:
        theirs = [cells[peer, name].get(key, cells[peer, name]["mean_error"]) for peer in rivals]
        return cells["counterflow", name]["mean_error"] < min(theirs)

    yield f"Posteriors of {len(names)} on which Counterflow's mean error is the smaller (wanted against all: 15 of 19):"
    yield ""
    yield "| against | draws as delivered | the peers' draws resampled by importance |"
    yield "|---|---|---|"
    for label, rivals in [*((METHODS[peer], [peer]) for peer in peers), ("all of them", peers)]:
        counts = [sum(better(name, rivals, key) for name in names) for key in ("mean_error", "resampled_mean_error")]
        yield f"| {label} | {counts[0]} | {counts[1]} |"
    yield ""


def machine(threads: int) -> str:
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    cores = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s) a run"
    return f"{cores}, Python {platform.python_version()}, {packages}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with NAME.data.json and NAME.draws.npz")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="posteriors whose names hold a PART")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["counterflow"], choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument(
        "--limit", type=float, default=600, help="seconds after which a run is stopped, compiling included"
    )
    parser.add_argument("--again", action="store_true", help="forget the finished runs that the arguments name")
    parser.add_argument("--out", type=Path, default=HERE / "posteriordb.json")
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "NAME", "SEED"), help="do one run and print it as JSON")
    args = parser.parse_args()
    if not (args.data / f"{NAMES[0]}.data.json").is_file():
        parser.error(f"expected posteriordb's NAME.data.json and NAME.draws.npz in --data, got {args.data}")
    return args


def main() -> None:
    args = arguments()
    if args.one:
        method, name, seed = args.one
        print(json.dumps(measure(method, name, int(seed), args.data)))
        return
    results = Results(args.out)
    names = [name for name in NAMES if any(part in name for part in args.only)]
    wanted = [(method, name, seed) for method in args.methods for seed in args.seeds for name in names]
    if args.again:
        results.change({}, dropped=frozenset(wanted))
    made = machine(args.threads)

    def work(key: Key) -> None:
        run = in_own_process(key, args)
        results.change({key: dict(zip(("method", "posterior", "seed"), key, strict=True)) | run | {"machine": made}})
        print(*key, {k: round(v, 3) if isinstance(v, float) else v for k, v in run.items()}, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, [key for key in wanted if key not in results.read()]))


if __name__ == "__main__":
    main()
