"""Long runs stay healthy: what calls leave behind does not grow, and a real Ctrl-C in the midst of a step does no harm.

`benchmarks/health.py` measures memory over 10,000 steps; here live tensors, threads and open files are counted exactly.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from registry import UNIVARIATES, over
from torch import Tensor

import counterflow as cf
from counterflow.posterior.plans import ESTIMATORS
from counterflow.posterior.stages import TargetModel
from counterflow.training.checkpoints import Checkpoint
from counterflow.training.optimizers import Optimizer

COUNTED = Path("/proc/self/fd").exists()
SOLVED = {
    f"{solver}, {univariate}": (solver, univariate)
    for solver in ("reference", "sliced", "cpu")
    for univariate in UNIVARIATES
    if (solver, univariate) != ("cpu", "sinh-arcsinh")
}


@pytest.fixture(autouse=True)
def only_what_the_test_makes():
    """The collector looks at nothing older, which takes it a third of a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Count(NamedTuple):
    tensors: int
    threads: int
    descriptors: int


def count() -> Count:
    gc.collect()
    tensors = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    return Count(tensors, *(len(os.listdir(f"/proc/self/{each}")) if COUNTED else 0 for each in ("task", "fd")))


def differs(before: Count, now: Count) -> bool:
    """Return true if anything differs, except for threads that have ended: a pool may shrink."""
    return now.threads > before.threads or now != before._replace(threads=now.threads)


def comes_to(before: Count) -> bool:
    """The count, now or within five seconds: a thread that was joined may take a while to end."""
    ended = time.monotonic() + 5
    while differs(before, count()):
        if time.monotonic() > ended:
            return False
        time.sleep(0.02)
    return True


def leaves_nothing(act, times: int) -> None:
    """Expect no more tensors, threads and files after twice as many calls."""
    for _ in range(times):
        act()
    first = count()
    for _ in range(times):
        act()
    assert comes_to(first)


# -- substitutions -----------------------------------------------------------------------------------


def layer(univariate: str = "affine", solver: str = "auto", D: int = 5, H: int = 8) -> cf.Autoregressive:
    t = cf.Autoregressive(D, 2, (H, H), UNIVARIATES[univariate], activation="elu")
    t.solver = solver
    return t


def both(t: cf.Autoregressive, n: int = 9) -> None:
    """Forward substitution, and back substitution for its gradient."""
    dtype = next(t.parameters()).dtype
    y, c = (torch.randn(n, size, dtype=dtype, requires_grad=True) for size in (t.features, t.context))
    x, log_det = t.inverse(y, c)
    (x.sum() + log_det.sum()).backward()


@over(SOLVED)
def test_both_substitutions_leave_nothing_behind(name):
    solver, univariate = SOLVED[name]
    leaves_nothing(partial(both, layer(univariate, solver)), 20)


@over(["sliced", "cpu"], "solver")
def test_batches_of_other_sizes_and_dtypes(solver):
    layers = [layer(solver=solver), layer(solver=solver).double()]

    def act():
        for n in (0, 1, 33, 300, 2):
            for t in layers:
                both(t, n)

    leaves_nothing(act, 3)


def test_created_and_deleted_layers_leave_nothing_behind():
    """Cache each shape once."""
    leaves_nothing(lambda: [both(layer(D=D, H=H)) for D in (1, 3, 4) for H in (6, 9)], 3)


def test_path_gradients_leave_nothing_behind():
    flow = cf.IAF(3, layers=2, hidden=(8,), activation="elu", seed=0)

    def act():
        z, log_q = flow().rsample_and_path_log_prob((9,))
        (log_q + z.square().sum(-1)).mean().backward()

    leaves_nothing(act, 20)


@over(["sliced", "cpu"], "solver")
def test_threads_that_call_at_once_do_not_pile_up(solver):
    """Each Python thread that solves on two threads of torch has one more beside it, which ends with it."""
    torch.set_num_threads(2)
    layers = [layer(solver=solver, D=16, H=64) for _ in range(6)]

    def act():
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(partial(both, n=200), layers * 2))

    act()
    time.sleep(0.3)
    first = count()
    for _ in range(5):
        act()
    assert comes_to(first)


def test_other_numbers_of_threads_do_not_pile_up():
    t = layer(solver="cpu", D=16, H=64)

    def act():
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            both(t, 200)

    leaves_nothing(act, 3)


# -- trainings ---------------------------------------------------------------------------------------

ROWS = torch.randn(120, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)


def train(model, objective, data, epochs: int, precision: str = "float32", **more) -> cf.training.History:
    config = cf.FitConfig(epochs=epochs, batch_size=20, warm_up_steps=5, ema=0.9, precision=precision)
    return cf.fit(model, objective, data, data if isinstance(data, int) else ROWS[:20], config, **more)


def vae() -> cf.VAE:
    return cf.VAE((3,), 2, "iaf", "gaussian", hidden=(8,), context=4, posterior_layers=1, posterior_hidden=(8,))


def flow(recipe) -> cf.Flow:
    return recipe(3, layers=2, hidden=(8,), activation="elu", seed=0)


TRAINED = {
    "VAE": (vae, cf.objectives.elbo, "float32"),
    "MAF": (partial(flow, cf.MAF), cf.log_likelihood, "float32"),
    "NSF": (partial(flow, cf.NSF), cf.log_likelihood, "float32"),
    "IAF": (partial(flow, cf.IAF), cf.log_likelihood, "float32"),
    "IAF in bf16": (partial(flow, cf.IAF), cf.log_likelihood, "bf16"),
}


@over(TRAINED)
def test_steps_leave_nothing_behind(name, tmp_path):
    """Counted in the midst of one training, whose checkpoints are written ten times a second."""
    build, objective, precision = TRAINED[name]
    counts = {}

    def on_step(task, done, total):
        if done in (40, 70, 100):
            counts[done] = count()

    checkpoints = cf.Checkpoints(tmp_path, every=0.1)
    train(build(), objective, ROWS, 20, precision, on_step=on_step, checkpoints=checkpoints)
    early, middle, late = counts.values()
    assert not differs(early, middle) and not differs(early, late)
    assert len(list(tmp_path.iterdir())) == 2


def banana(theta: Tensor) -> Tensor:
    x, y = theta.unbind(-1)
    return -(x.square() + (y - x.square()).square()) / 2


@over(ESTIMATORS)
def test_steps_of_a_posterior_leave_nothing_behind(name):
    counts = {}

    def objective(q, _):
        return ESTIMATORS[name](TargetModel(q, banana), None, 16)

    def on_step(task, done, total):
        if done in (25, 45, 60):
            counts[done] = count()

    train(cf.IAF(2, layers=1, hidden=(8,), activation="elu", seed=0).double(), objective, 20, 3, on_step=on_step)
    early, middle, late = counts.values()
    assert not differs(early, middle) and not differs(early, late)


def interrupted() -> None:
    def on_step(task, done, total):
        if done == 10:
            raise KeyboardInterrupt

    train(flow(cf.MAF), cf.log_likelihood, ROWS, 3, on_step=on_step)


def not_finite() -> None:
    with pytest.warns(RuntimeWarning, match="20 steps in a row"):
        train(flow(cf.MAF), lambda model, x: cf.log_likelihood(model, x) * float("nan"), ROWS, 9)


ONE_AFTER_ANOTHER = {
    "fit": lambda: train(flow(cf.MAF), cf.log_likelihood, ROWS, 3),
    "fit that is interrupted": interrupted,
    "fit of faults": not_finite,
    "distill": lambda: cf.distill(flow(cf.MAF), config=cf.DistillConfig(layer_steps=5, flow_steps=5, samples=16)),
    "FlowDensity": lambda: cf.FlowDensity(layers=1, hidden=(8,), epochs=2, random_state=0).fit(ROWS.double().numpy()),
}


@over(ONE_AFTER_ANOTHER)
def test_whole_trainings_leave_nothing_behind(name):
    leaves_nothing(ONE_AFTER_ANOTHER[name], 2)


def test_checkpoints_of_a_long_training_leave_nothing_behind(tmp_path):
    """The course of a training grows, and ctypes keeps a type for every length that an array is seen with."""
    checkpoints, weights = cf.Checkpoints(tmp_path), {"w": torch.zeros(3)}

    def types_after(first: int) -> int:
        for k in range(first, first + 40):
            checkpoints.save(Checkpoint(weights, {"steps": k, "history": list(range(k))}))
        return len(ctypes._pointer_type_cache)

    before = types_after(1000)
    assert types_after(1040) <= before + 1
    assert checkpoints.load().numbers == {"steps": 1079, "history": list(range(1079))}


# -- a real Ctrl-C in the midst of a step ------------------------------------------------------------


def strike() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def course(folder: Path, place: str | None = None, at: int = 21) -> tuple[cf.training.History, dict, list[dict]]:
    """Train with a checkpoint at every step; step `at` gets a SIGINT. Return the history and the weights."""
    model, evaluated, weights, step = flow(cf.IAF), {}, [], 0

    def objective(q, x):
        nonlocal step
        step += q.training
        here = step == at and q.training
        if here and place == "forward pass":
            strike()
        if place == "validation" and not q.training and step >= at:
            strike()
        z = x + 0.1 * torch.randn_like(x)
        if here and place == "backward pass":
            z.requires_grad_().register_hook(lambda grad: strike())
        return q().log_prob(z)

    update = Optimizer.step

    def struck(*arguments):
        if place == "optimizer" and step == at:
            strike()
        update(*arguments)

    def validate(q, x):
        evaluated.update({k: v.clone() for k, v in q.state_dict().items()})
        return objective(q, x)

    def on_epoch(task, epoch):
        weights.append(dict(evaluated))

    real = os.fsync

    def fsync(descriptor):
        if place == "state that is being written" and step == at:
            strike()
        real(descriptor)

    Optimizer.step = struck
    os.fsync = fsync
    try:
        checkpoints = cf.Checkpoints(folder, every=0.0)
        record = train(model, objective, ROWS, 6, validate=validate, on_epoch=on_epoch, checkpoints=checkpoints)
    finally:
        os.fsync = real
        Optimizer.step = update
    return record, model.state_dict(), weights


PLACES = ("forward pass", "backward pass", "optimizer", "validation", "state that is being written")


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def strike_and_go_on(folder: str) -> None:
    """Press Ctrl-C at any point of a step, in a process of its own: the best weights are kept; training resumes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    whole, expected, _ = course(Path(folder) / "whole")
    assert whole.stopped == "finished"
    for place in PLACES:
        record, weights, kept = course(Path(folder) / place, place)
        last = {"validation": 24}.get(place, 20)  # steps that are done, 6 to an epoch
        assert record.stopped == "interrupted" and len(record.epochs) == 3, (place, record)
        assert same(weights, kept[record.best.epoch - 1]), place
        files = sorted(path.name for path in (Path(folder) / place).iterdir())
        assert files == [f"{k:012d}.safetensors" for k in (last - 1, last)], (place, files)
        record, weights, _ = course(Path(folder) / place)
        assert record.stopped == "finished" and same(weights, expected), place
        assert [e.validation for e in record.epochs] == [e.validation for e in whole.epochs], place


def test_ctrl_c_during_a_step(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=strike_and_go_on, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
