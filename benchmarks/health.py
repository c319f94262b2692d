"""Does a long run stay healthy? Memory, threads, open files and live tensors over long trainings and many solves.

    python benchmarks/health.py

Every line is a process of its own, on one thread unless it is about threads: each training for 10,000 steps, with a
checkpoint every second where the call takes checkpoints; 40 whole trainings one after another; and 1,000 calls of
both substitutions (t.inverse, and its gradient) by every body, with batches of many sizes, from many Python threads,
with other numbers of threads, and of the path gradient. At some forty points, after a garbage collection and after the
allocator has given back what is free, it notes the resident memory, the threads, the open descriptors, the tensors and
all objects that Python has made since the imports.

Growth is counted from the point at a fifth to the last one; the slope is that of least squares over these points, with
its standard error. A line is flat where

    growth < 2 MB,    slope < 0.1 MB per 1,000 steps or calls, or within 2 standard errors of 0,
    and no thread, descriptor or tensor more than at a fifth

It takes about half an hour on a machine that does nothing else. Written to results/reliability.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reliability import machine, write_section
from torch import Tensor

import counterflow as cf
from counterflow.commands.vae_data import to_likelihood_scale
from counterflow.io.data import load, split
from counterflow.posterior.stages import TargetModel

TITLE = "Long-run health"
STEPS, CALLS, TRAININGS, POINTS = 10_000, 1_000, 40, 40
GROWTH, SLOPE = 2.0, 0.1  # MB, and MB per 1,000: below them it is flat
PAGE = os.sysconf("SC_PAGE_SIZE")
SOLVERS = {"affine": cf.Affine(), "gated": cf.Gated(), "spline": cf.RationalQuadraticSpline(bins=5)}


class Point(NamedTuple):
    """The process after so many steps or calls."""

    done: int
    megabytes: float  # resident
    threads: int
    descriptors: int
    tensors: int  # that Python knows
    objects: int


def look(done: int) -> Point:
    """The process as it stands, without what is only waiting to be freed."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    descriptors = len(os.listdir("/proc/self/fd"))
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), Tensor) for o in objects)
    return Point(done, pages * PAGE / 1e6, threads, descriptors, tensors, len(objects))


class Watch:
    """Looks at the process some forty times on the way to the end; a point is kept for each."""

    def __init__(self, last: int) -> None:
        self.every, self.points = max(1, last // POINTS), [look(0)]
        gc.freeze()  # what the imports have left is counted no more, and takes no more time

    def __call__(self, done: int) -> None:
        if done // self.every > self.points[-1].done // self.every:
            self.points.append(look(done))


# -- trainings ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def states_for(function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The keyword that keeps checkpoints every second, where the function takes it."""
    with tempfile.TemporaryDirectory() as folder:
        takes = "checkpoints" in inspect.signature(function).parameters
        yield {"checkpoints": cf.Checkpoints(Path(folder), every=1.0)} if takes else {}


def rows(n: int = 600, D: int = 4) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)).cumsum(1).tanh()


def flow(recipe: Callable[..., cf.Flow], layers: int = 2) -> cf.Flow:
    return recipe(4, layers=layers, hidden=(16, 16), activation="elu", seed=0)


def banana(theta: Tensor) -> Tensor:
    x, y, *_ = theta.unbind(-1)
    return -(theta[..., 2:].square().sum(-1) + x.square() + (y - x.square()).square()) / 2


def train_vae(steps: int, watch: Callable[[int], None]) -> None:
    """Train a VAE as `counterflow vae` does."""
    digits = split(to_likelihood_scale(load("digits"), "bernoulli"), seed=0)
    torch.manual_seed(0)
    vae = cf.VAE((1, 8, 8), 4, "iaf", hidden=(32,), context=16, posterior_layers=2, posterior_hidden=(16,))
    epochs = math.ceil(steps / (len(digits.train) // 64))

    def objective(model: cf.VAE, x: Tensor, beta: float = 1.0) -> Tensor:
        return cf.objectives.elbo(model, model.likelihood.observe(x), beta=beta)

    fit_with_states(
        vae,
        objective,
        digits.train,
        digits.validation,
        cf.FitConfig(epochs=epochs, batch_size=64),
        watch,
        anneal=lambda epoch: {"beta": cf.objectives.warm_up(epoch, 0.4 * epochs)},
    )


def fit_with_states(
    model: Any,
    objective: Any,
    train: Any,
    validation: Any,
    config: cf.FitConfig,
    watch: Callable[[int], None],
    **more: Any,
) -> None:
    with states_for(cf.fit) as checkpoints:
        on_step = lambda _, done, total: watch(done)  # noqa: E731
        cf.fit(model, objective, train, validation, config, on_step=on_step, **more, **checkpoints)


def train_flow(recipe: Callable[..., cf.Flow], steps: int, watch: Callable[[int], None]) -> None:
    """Train by the log-likelihood, for which an IAF has to be solved."""
    config = cf.FitConfig(epochs=math.ceil(steps / 50), batch_size=10)
    fit_with_states(flow(recipe), cf.log_likelihood, rows(500), rows(100), config, watch)


def train_bf16(steps: int, watch: Callable[[int], None]) -> None:
    config = cf.FitConfig(epochs=math.ceil(steps / 50), batch_size=10, precision="bf16", optimizer="adamw", ema=0)
    fit_with_states(flow(cf.IAF), cf.log_likelihood, rows(500), rows(100), config, watch)


def train_density(steps: int, watch: Callable[[int], None]) -> None:
    """The second of its trainings, by when the first one's flow is kept."""
    density = cf.FlowDensity(members=1, layers=2, hidden=(16,), epochs=steps // 20, batch_size=32, patience=0)
    each = 20 if steps >= 20 else steps

    def on_epoch(task: str, epoch: cf.training.Epoch) -> None:
        if task == "member 1 without correlations":
            watch(each * epoch.epoch)

    with states_for(cf.FlowDensity.fit) as checkpoints:
        density.set_params(random_state=0).fit(rows(700).double().numpy(), on_epoch=on_epoch, **checkpoints)


def train_posterior(estimator: str, steps: int, watch: Callable[[int], None]) -> None:
    config = cf.PosteriorConfig(
        layers=2, hidden=(16,), samples=32, steps=steps, stages=1, verdict_samples=1000, estimator=estimator
    )
    with states_for(cf.fit_posterior) as checkpoints:
        cf.fit_posterior(banana, config, dim=4, on_step=lambda _, done, total: watch(done), **checkpoints)


def train_on_target(steps: int, watch: Callable[[int], None]) -> None:
    """The training within `fit_posterior`, through `fit` itself."""

    def objective(flow: cf.Flow, _: None) -> Tensor:
        return cf.objectives.path_elbo(TargetModel(flow, banana), None, 32)

    fit_with_states(flow(cf.IAF).double(), objective, 50, 4, cf.FitConfig(epochs=math.ceil(steps / 50)), watch)


def train_student(field: str, steps: int, watch: Callable[[int], None]) -> None:
    counts = {"layer_steps": 0, "flow_steps": 0} | {field: steps}
    config = cf.DistillConfig(**counts, samples=32)
    with states_for(cf.distill) as checkpoints:
        told = lambda _, epoch: watch(50 * epoch.epoch)  # noqa: E731
        cf.distill(flow(cf.MAF), config=config, on_epoch=told, **checkpoints)


def one_after_another(train: Callable[..., None], each: int, times: int, watch: Callable[[int], None]) -> None:
    for k in range(times):
        train(each, lambda done: None)
        watch(each * (k + 1))


def ended_early(each: int, watch: Callable[[int], None]) -> None:
    """A training that Ctrl-C ends half-way, or faults do."""

    def interrupt(task: str, done: int, total: int) -> None:
        if done == each // 2:
            raise KeyboardInterrupt

    def faulty(flow: cf.Flow, x: Tensor) -> Tensor:
        return flow().log_prob(x) * math.nan

    config = cf.FitConfig(epochs=math.ceil(each / 10), batch_size=50, max_skipped=5)
    with warnings.catch_warnings(), states_for(cf.fit) as checkpoints:
        warnings.simplefilter("ignore")
        cf.fit(flow(cf.MAF), cf.log_likelihood, rows(500), rows(100), config, on_step=interrupt, **checkpoints)
        cf.fit(flow(cf.MAF), faulty, rows(500), rows(100), config)


# -- substitutions -----------------------------------------------------------------------------------


def layer(univariate: cf.transforms.Univariate, solver: str = "auto", D: int = 6, H: int = 20) -> cf.Autoregressive:
    torch.manual_seed(0)
    t = cf.Autoregressive(D, 2, (H, H), univariate, activation="elu")
    t.solver = solver
    return t


def both(t: cf.transforms.Transform, n: int = 32, dtype: torch.dtype = torch.float32) -> None:
    """Forward substitution, and back substitution for the gradient of all there is."""
    y, c = (torch.randn(n, size, dtype=dtype, requires_grad=True) for size in (t.features, t.context))
    x, log_det = t.inverse(y, c)
    (x.sum() + log_det.sum()).backward()
    for p in t.parameters():
        p.grad = None


def solve(univariate: str, solver: str, calls: int, watch: Callable[[int], None]) -> None:
    t = layer(SOLVERS[univariate], solver)
    for k in range(calls):
        both(t)
        watch(k + 1)


def solve_without_gradients(calls: int, watch: Callable[[int], None]) -> None:
    t = layer(cf.Affine())
    for k in range(calls):
        with torch.no_grad():
            t.inverse(torch.randn(32, 6), torch.randn(32, 2))
        watch(k + 1)


def solve_sizes(solver: str, calls: int, watch: Callable[[int], None]) -> None:
    """Batches of 0 to 300 rows, float32 and float64 in turn."""
    kinds = [(t.to(dtype), dtype) for dtype in (torch.float32, torch.float64) for t in [layer(cf.Affine(), solver)]]
    sizes = cycle([1, 32, 300, 7, 0, 128, 2, 64, 33, 200, 17])
    for k, n in enumerate(islice(sizes, calls)):
        both(kinds[k % 2][0], n, kinds[k % 2][1])
        watch(k + 1)


def solve_shapes(calls: int, watch: Callable[[int], None]) -> None:
    """A new layer for every call, 60 shapes in turn: what is kept for a shape has an end."""
    for k in range(calls):
        both(layer(cf.Affine(), D=2 + k % 30, H=5 + k % 20))
        watch(k + 1)


def path_gradients(calls: int, watch: Callable[[int], None]) -> None:
    q = flow(cf.IAF)
    for k in range(calls):
        z, log_q = q().rsample_and_path_log_prob((32,))
        (log_q - banana(z)).mean().backward()
        q.zero_grad()
        watch(k + 1)


def in_threads(solver: str, calls: int, watch: Callable[[int], None]) -> None:
    """Pools of eight Python threads that call at once, each pool for 25 calls; torch may take two threads."""
    torch.set_num_threads(2)
    layers = [layer(cf.Affine(), solver, 16, 64) for _ in range(8)]
    for k in range(0, calls, 25):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(both, n=256), islice(cycle(layers), 25)))
        watch(k + 25)


def other_threads(calls: int, watch: Callable[[int], None]) -> None:
    """1, 2, 4 and 3 threads in turn, and points where it is 1."""
    t = layer(cf.Affine(), "cpu", 16, 64)
    for k in range(calls):
        torch.set_num_threads((1, 2, 4, 3)[k % 4])
        both(t, 512)
        if k % 4 == 0:
            watch(k + 1)


# -- all lines ---------------------------------------------------------------------------------------

Subject = Callable[[Callable[[int], None]], None]
TRAINED: dict[str, Callable[..., None]] = {
    "VAE, `fit` with checkpoints": train_vae,
    "density: MAF, `fit` with checkpoints": partial(train_flow, cf.MAF),
    "density: NSF, `fit` with checkpoints": partial(train_flow, cf.NSF),
    "density: IAF, which is solved, `fit` with checkpoints": partial(train_flow, cf.IAF),
    "density: IAF in bf16, `fit` with checkpoints": train_bf16,
    "density: `FlowDensity`": train_density,
    "posterior: `fit_posterior`": partial(train_posterior, "path"),
    "posterior: `fit_posterior` by the forward KL": partial(train_posterior, "forward_kl"),
    "posterior: `fit` with checkpoints": train_on_target,
    "distillation: `distill`, layer by layer": partial(train_student, "layer_steps"),
    "distillation: `distill`, as a whole": partial(train_student, "flow_steps"),
}
REPEATED: dict[str, Callable[..., None]] = {
    "MAF, `fit` with checkpoints": partial(train_flow, cf.MAF),
    "`fit`, ended by Ctrl-C and by faults": ended_early,
    "`FlowDensity`": train_density,
    "`fit_posterior`": partial(train_posterior, "path"),
    "`distill`": partial(train_student, "flow_steps"),
}
CALLED: dict[str, Callable[..., None]] = {
    **{
        f"`{solver}`, {univariate}": partial(solve, univariate, solver)
        for solver in ("reference", "sliced", "cpu")
        for univariate in SOLVERS
    },
    "`sliced`, other batch sizes and dtypes": partial(solve_sizes, "sliced"),
    "`cpu`, other batch sizes and dtypes": partial(solve_sizes, "cpu"),
    "`cpu`, 60 shapes of a layer": solve_shapes,
    "`cpu`, without gradients": solve_without_gradients,
    "path gradients": path_gradients,
    "`sliced` in 8 Python threads at once": partial(in_threads, "sliced"),
    "`cpu` in 8 Python threads at once": partial(in_threads, "cpu"),
    "`cpu` after `torch.set_num_threads`": other_threads,
}


def subjects(steps: int, calls: int, times: int) -> dict[str, dict[str, tuple[int, Subject]]]:
    """Heading -> line -> (how many, what does them)."""
    trained = {name: (steps, partial(train, steps)) for name, train in TRAINED.items()}
    repeated = {name: (40 * times, partial(one_after_another, train, 40, times)) for name, train in REPEATED.items()}
    called = {name: (calls, partial(each, calls)) for name, each in CALLED.items()}
    return {
        f"{steps:,} steps of a training": trained,
        f"{times} trainings of 40 steps, one after another": repeated,
        f"{calls:,} calls of both substitutions": called,
    }


# -- what they come to -------------------------------------------------------------------------------


class Trend(NamedTuple):
    """From the point at a fifth to the last one."""

    growth: float  # MB
    slope: float  # MB per 1,000
    error: float  # its standard error
    threads: int
    descriptors: int
    tensors: int
    objects: int

    @property
    def flat(self) -> bool:
        level = self.slope < SLOPE or self.slope < 2 * self.error
        return self.growth < GROWTH and level and max(self.threads, self.descriptors, self.tensors) <= 0


def trend(points: list[Point]) -> Trend:
    last = points[-1]
    kept = [p for p in points if p.done >= last.done / 5]
    done, memory = (torch.tensor([p[k] for p in kept], dtype=torch.float64) for k in (0, 1))
    centred = done - done.mean()
    squares = centred.square().sum()
    slope = (centred * memory).sum() / squares
    left = memory - memory.mean() - slope * centred
    error = (left.square().sum() / max(len(kept) - 2, 1) / squares).sqrt()
    first = kept[0]
    return Trend(
        last.megabytes - first.megabytes,
        1000 * slope.item(),
        1000 * error.item(),
        *(getattr(last, name) - getattr(first, name) for name in ("threads", "descriptors", "tensors", "objects")),
    )


def in_child(arguments: argparse.Namespace, heading: str, name: str) -> tuple[list[Point], float]:
    """The points of one line, and the seconds that it took."""
    sizes = ["--steps", arguments.steps, "--calls", arguments.calls, "--trainings", arguments.trainings]
    command = [sys.executable, __file__, "--line", heading, name, *map(str, sizes)]
    begun = time.perf_counter()
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    points = [Point(*each) for each in json.loads(ran.stdout.splitlines()[-1])]
    return points, time.perf_counter() - begun


HEADS = ("", "flat", "MB at a fifth", "growth, MB", "MB per 1,000", "threads", "descriptors", "tensors", "objects")


def line_of(name: str, points: list[Point]) -> str:
    t = trend(points)
    first = next(p for p in points if p.done >= points[-1].done / 5)
    more = (f"{first.threads} {t.threads:+d}", f"{first.descriptors} {t.descriptors:+d}")
    cells = (
        "flat" if t.flat else "**not flat**",
        f"{first.megabytes:.0f}",
        f"{t.growth:+.2f}",
        f"{t.slope:+.3f} ± {t.error:.3f}",
        *more,
        f"{first.tensors} {t.tensors:+d}",
        f"{t.objects:+d}",
    )
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--trainings", type=int, default=TRAININGS)
    parser.add_argument("--only", nargs="+", default=[""], help="lines whose names begin so")
    parser.add_argument("--line", nargs=2, metavar=("HEADING", "NAME"), help="only this one, its points as JSON")
    arguments = parser.parse_args()
    lines = subjects(arguments.steps, arguments.calls, arguments.trainings)
    if arguments.line:
        heading, name = arguments.line
        count, subject = lines[heading][name]
        watch = Watch(count)
        subject(watch)
        print(json.dumps(watch.points))
        return
    text = [
        f"Made by `{shlex.join(['python', *sys.argv])}` ({machine()}). Each line is a process of its own, looked at "
        f"{POINTS} times after a garbage collection and `malloc_trim`. All counts are of what was there after a fifth, "
        f"and + what came by the end; MB is resident memory, its slope by least squares ± standard error. Flat: "
        f"growth below {GROWTH:g} MB, a slope below {SLOPE:g} MB per 1,000 or within two standard errors of 0, and "
        "no thread, descriptor or tensor more. Trainings write a checkpoint every second if they take "
        "`checkpoints`. What grows is the history of a training: 0.3 KB for each epoch, and 2 KB where checkpoints are "
        "written, which hold it.",
    ]
    for heading, every in lines.items():
        each = [name for name in every if name.startswith(tuple(arguments.only))]
        if not each:
            continue
        text += ["", f"### {heading[0].upper() + heading[1:]}", ""]
        text += ["| " + " | ".join(HEADS) + " |", "|---|" + "---|" * (len(HEADS) - 1)]
        for name in each:
            points, seconds = in_child(arguments, heading, name)
            text.append(line_of(name, points))
            print(f"{text[-1]} {seconds:.0f} s", flush=True)
            write_section(TITLE, text)  # after each line: it takes long, and may be ended


if __name__ == "__main__":
    main()
