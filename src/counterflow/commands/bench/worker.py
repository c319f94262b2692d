"""One contestant of the benchmark in a process of its own, so that its calls can be timed, watched and stopped.

The process answers one request at a time: calls of one measurement at one size. It builds its flow anew whenever either
changes. The time of a call is measured in the process that makes it.

Peak memory is the most that a call adds to the resident set. Freed memory is first returned to the system, and the
system's high-water mark (VmHWM in /proc/self/status, Linux only) is reset; this includes every allocator. JAX keeps
small blocks, which hides them from the mark: its figure is what XLA plans for the call, temporaries and results.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from counterflow.commands.bench.peers import OURS, PEERS, Contestant, JaxFlow, TorchFlow

STACK = 5  # layers of the measurement "stack backward"
MEASUREMENTS = ("parallel", "parallel backward", "stack backward", "sequential", "sequential backward")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the high-water mark of the resident set


class Size(NamedTuple):
    """Size of a measurement: features, units in each of two hidden layers, rows."""

    D: int
    H: int
    B: int

    def __str__(self) -> str:
        return f"{self.D}/{self.H}/{self.B}"


class Request(NamedTuple):
    """A number of calls of one measurement at one size; peak memory and error are measured if they are watched."""

    size: Size
    measurement: str
    calls: int
    watched: bool


class Reply(NamedTuple):
    """Seconds of each call, and, for a watched request, peak memory and round-trip error of the last call."""

    seconds: list[float]
    peak: int | None  # bytes
    error: float | None
    compile: float | None  # seconds, for JAX, which compiles in a step of its own
    parameters: int


class MeasurementError(Exception):
    """A measurement that gave no figure, and the reason."""


class Settings(NamedTuple):
    """Settings of a contestant's process."""

    threads: int
    memory: float  # bytes that a call may use
    compiled: str | None = None  # folder of Numba's compiled code; Numba's own default if None


class Worker:
    """A contestant and its process, which starts with the first request and, after a failure, with the next one."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self._settings = settings
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, request: Request, seconds: float) -> Reply:
        """Send a request and return the reply.

        Raises:
            MeasurementError: no reply came within `seconds`, memory ran out, or the library raised an error.
        """
        if self._process is None:
            self._start()
        reply = self._reply(request, seconds)
        if isinstance(reply, MeasurementError):
            self.close()
            raise reply
        return reply

    def _reply(self, request: Request, seconds: float) -> Reply | MeasurementError:
        try:
            self._pipe.send(request)
            return self._pipe.recv() if self._pipe.poll(seconds) else MeasurementError(f"over {seconds:g} s")
        except (EOFError, OSError):  # the process has ended
            self._process.join(5)
            return MeasurementError(f"its process ended with code {self._process.exitcode}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process would inherit torch's threads half alive
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.name, self._settings), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


class Prepared(NamedTuple):
    """A measurement that is ready to be timed: the flow is built and has its input."""

    call: Callable[[], Any]
    parameters: int
    error: Callable[[Any], float] | None  # the result of a call -> its round-trip error
    compile: float | None = None
    planned: int | None = None  # bytes, for a library that plans its memory


def _serve(pipe: Connection, name: str, settings: Settings) -> None:
    """Answer requests until this process is killed or the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and then ends this process
    _discard_output()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["COUNTERFLOW_COMPILE"] = "foreground"
    if settings.compiled is not None:
        os.environ["NUMBA_CACHE_DIR"] = settings.compiled
    if sys.platform == "linux":  # JAX starts a thread for each core that it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    torch.set_num_threads(settings.threads)
    contestant = (OURS | PEERS)[name]
    prepared: Prepared | None = None
    prepared_for: tuple[Any, ...] | None = None
    while True:
        try:
            request: Request = pipe.recv()
        except EOFError:
            return
        try:
            if prepared is None or prepared_for != request[:2]:
                prepared = None  # free the flow before the next one is built
                prepared = prepare(contestant, request.size, request.measurement)
                prepared_for = request[:2]
            _limit_memory(settings.memory)
            pipe.send(answer(prepared, request))
        except Exception as error:
            pipe.send(MeasurementError(_describe(error, settings.memory)))


def _discard_output() -> None:
    """Discard stdout and stderr: logs of the libraries would break the parent's progress bar; errors use the pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def prepare(contestant: Contestant, size: Size, measurement: str) -> Prepared:
    """Build the flow and the input of a measurement."""
    if contestant.jax:
        return _prepare_jax(contestant.build(size.D, size.H), size, measurement)
    torch.manual_seed(0)
    layers = STACK if measurement.startswith("stack") else 1
    return _prepare_torch(contestant.build(size.D, size.H, layers), size, measurement)


def _prepare_torch(flow: TorchFlow, size: Size, measurement: str) -> Prepared:
    x = start = torch.randn(size.B, size.D)
    run = flow.parallel
    weights = list(flow.module.parameters())
    if measurement.startswith("sequential"):
        run = flow.sequential
        with torch.no_grad():
            start = flow.parallel(x)[0]

    def values() -> Any:
        with torch.no_grad():
            return run(start)

    def backward() -> Any:
        value, log_det = run(start)
        return torch.autograd.grad(value.square().sum() + log_det.sum(), [start, *weights])

    start.requires_grad_(measurement.endswith("backward"))
    error = (lambda back: (back[0] - x).abs().max().item()) if measurement == "sequential" else None
    call = backward if measurement.endswith("backward") else values
    return Prepared(call, sum(weight.numel() for weight in weights), error)


def _prepare_jax(flow: JaxFlow, size: Size, measurement: str) -> Prepared:
    import jax
    import jax.numpy as jnp

    x = start = jax.random.normal(jax.random.key(0), (size.B, size.D))
    run: Callable[[Any, Any], Any] = flow.parallel
    if measurement.startswith("sequential"):
        start = jax.jit(flow.parallel)(flow.weights, x)[0]
        run = flow.sequential

    def loss(weights: Any, start: Any) -> Any:
        value, log_det = run(weights, start)
        return jnp.square(value).sum() + log_det.sum()

    function = jax.grad(loss, (0, 1)) if measurement.endswith("backward") else run
    begun = time.perf_counter()
    compiled = jax.jit(function).lower(flow.weights, start).compile()
    seconds = time.perf_counter() - begun
    plan = compiled.memory_analysis()
    return Prepared(
        lambda: jax.block_until_ready(compiled(flow.weights, start)),
        sum(leaf.size for leaf in jax.tree.leaves(flow.weights)),
        (lambda back: jnp.abs(back[0] - x).max().item()) if measurement == "sequential" else None,
        seconds,
        plan.temp_size_in_bytes + plan.output_size_in_bytes,
    )


def answer(prepared: Prepared, request: Request) -> Reply:
    """Make the calls of a request."""
    resident = _reset_high_water_mark() if request.watched else None
    seconds = []
    for _ in range(request.calls):
        begun = time.perf_counter()
        result = prepared.call()
        seconds.append(time.perf_counter() - begun)
    peak = None if resident is None else max(0, memory("VmHWM") - resident)
    error = prepared.error(result) if prepared.error and request.watched else None
    return Reply(seconds, prepared.planned or peak, error, prepared.compile, prepared.parameters)


def _reset_high_water_mark() -> int | None:
    """Return freed memory to the system, reset the high-water mark and return the resident bytes; None if unknown."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
        return memory("VmRSS")
    except (OSError, AttributeError, TypeError, StopIteration):  # not Linux, not glibc, or a kernel that refuses
        return None


def memory(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _limit_memory(more: float) -> None:
    """Limit this process to `more` bytes beyond its present size; otherwise the system would kill some process."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        with suppress(OSError, StopIteration, ValueError):  # a lower limit is set already, or the field is missing
            resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + int(more), hard))


def _describe(error: Exception, memory: float) -> str:
    """Return one line about an error, with the same words for the out-of-memory errors of Python, torch and JAX."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory (over {memory / 2**30:.3g} GiB)"
    return f"{type(error).__name__}: {text[:200]}"
