"""One contestant of the benchmark in a process of its own: it can be timed, watched, and stopped.

A process answers one request at a time: calls of one measurement at one size. Its flow is built anew whenever either
changes. The clock stands around the call alone, in the process that makes it.

Peak memory is what a call adds to the resident set at most: freed memory is first handed back to the system, and the
system's own high-water mark (VmHWM of /proc/self/status) is reset. That sees every allocator, and Linux alone has it.
JAX keeps small blocks, which hides them: there the figure is what XLA plans for the call, temporaries and results.
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

from counterflow.commands.peers import OURS, PEERS, Contestant, JaxFlow, TorchFlow

STACK = 5  # layers of "stack backward"
MEASUREMENTS = ("parallel", "parallel backward", "stack backward", "sequential", "sequential backward")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Size(NamedTuple):
    """Features, units in each of two hidden layers, rows."""

    D: int
    H: int
    B: int

    def __str__(self) -> str:
        return f"{self.D}/{self.H}/{self.B}"


class Request(NamedTuple):
    """How many calls of which measurement at which size; one that is watched tells its peak memory."""

    size: Size
    measurement: str
    calls: int
    watched: bool


class Reply(NamedTuple):
    """Seconds of each call; peak and round-trip error of the last one, where they were asked for."""

    seconds: list[float]
    peak: int | None  # bytes
    error: float | None
    compile: float | None  # seconds, where compiling is a step of its own: in JAX
    parameters: int


class FailedError(Exception):
    """Why there is no figure."""


class Setting(NamedTuple):
    """What holds for every request."""

    threads: int
    memory: float  # bytes that a call may take
    compiled: str | None = None  # folder of Numba's compiled code; its own choice when None


class Trial:
    """A contestant, and the process that it has once it is asked something. A process that fails is not used again."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self._setting = name, setting
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, request: Request, seconds: float) -> Reply:
        """Put a request and wait for the answer.

        Raises:
            FailedError: there is none after so many seconds, memory ran out, or the library raised an error.
        """
        if self._process is None:
            self._start()
        reply = self._reply(request, seconds)
        if isinstance(reply, FailedError):
            self.close()
            raise reply
        return reply

    def _reply(self, request: Request, seconds: float) -> Reply | FailedError:
        try:
            self._pipe.send(request)
            return self._pipe.recv() if self._pipe.poll(seconds) else FailedError(f"over {seconds:g} s")
        except (EOFError, OSError):  # the process is gone
            self._process.join(5)
            return FailedError(f"its process ended with code {self._process.exitcode}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.name, self._setting), daemon=True)
        process.start()
        theirs.close()
        self._process, self._pipe = process, ours

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


class Prepared(NamedTuple):
    """A measurement that is ready to be called."""

    call: Callable[[], Any]
    parameters: int
    error: Callable[[Any], float] | None  # of the round trip, from what a call returned
    compile: float | None = None
    planned: int | None = None  # bytes, where the library plans its memory


def _serve(pipe: Connection, name: str, setting: Setting) -> None:
    """The life of a process: answer requests until it is killed, or until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends this process
    _be_silent()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if setting.compiled is not None:
        os.environ["NUMBA_CACHE_DIR"] = setting.compiled
    if sys.platform == "linux":  # JAX takes a thread for each core that it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: setting.threads])
    torch.set_num_threads(setting.threads)
    contestant = (OURS | PEERS)[name]
    prepared, ready = None, None
    while True:
        try:
            request: Request = pipe.recv()
        except EOFError:
            return
        try:
            if prepared is None or ready != request[:2]:
                prepared = None  # first, so that there is never more than one
                prepared, ready = prepare(contestant, request.size, request.measurement), request[:2]
            _limit_memory(setting.memory)
            pipe.send(answer(prepared, request))
        except Exception as error:
            pipe.send(FailedError(_words(error, setting.memory)))


def _be_silent() -> None:
    """What the libraries log would break the parent's progress bar; what goes wrong goes through the pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def prepare(contestant: Contestant, size: Size, measurement: str) -> Prepared:
    """Build the flow, and what a call needs."""
    if contestant.jax:
        return _prepare_jax(contestant.build(size.D, size.H), size, measurement)
    torch.manual_seed(0)
    layers = STACK if measurement.startswith("stack") else 1
    return _prepare_torch(contestant.build(size.D, size.H, layers), size, measurement)


def _prepare_torch(flow: TorchFlow, size: Size, measurement: str) -> Prepared:
    x, run = torch.randn(size.B, size.D), flow.parallel
    start, weights = x, list(flow.module.parameters())
    if measurement.startswith("sequential"):
        run = flow.sequential
        with torch.no_grad():
            start = flow.parallel(x)[0]

    def alone() -> Any:
        with torch.no_grad():
            return run(start)

    def backward() -> Any:
        value, log_det = run(start)
        return torch.autograd.grad(value.square().sum() + log_det.sum(), [start, *weights])

    start.requires_grad_(measurement.endswith("backward"))
    error = (lambda back: (back[0] - x).abs().max().item()) if measurement == "sequential" else None
    call = backward if measurement.endswith("backward") else alone
    return Prepared(call, sum(weight.numel() for weight in weights), error)


def _prepare_jax(flow: JaxFlow, size: Size, measurement: str) -> Prepared:
    import jax
    import jax.numpy as jnp

    start = x = jax.random.normal(jax.random.key(0), (size.B, size.D))
    run: Callable[[Any, Any], Any] = flow.parallel
    if measurement.startswith("sequential"):
        start, run = jax.jit(flow.parallel)(flow.weights, x)[0], flow.sequential

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
    """Make the calls."""
    resident = _mark() if request.watched else None
    seconds = []
    for _ in range(request.calls):
        begun = time.perf_counter()
        result = prepared.call()
        seconds.append(time.perf_counter() - begun)
    peak = None if resident is None else max(0, memory("VmHWM") - resident)
    error = prepared.error(result) if prepared.error and request.watched else None
    return Reply(seconds, prepared.planned or peak, error, prepared.compile, prepared.parameters)


def _mark() -> int | None:
    """Hand freed memory back, reset the high-water mark, and return what is resident; None where that is not known."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
        return memory("VmRSS")
    except (OSError, AttributeError, TypeError, StopIteration):  # not Linux, not glibc, or a kernel that refuses
        return None


def memory(field: str) -> int:
    """A figure of this process' status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) << 10


def _limit_memory(more: float) -> None:
    """Let this process have so many bytes more than it has; without this the system would choose whom to end."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        with suppress(OSError, StopIteration, ValueError):  # there is a lower limit already, or no such figure
            resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + int(more), hard))


def _words(error: Exception, memory: float) -> str:
    """One line; the ways in which Python, torch and JAX say that memory ran out are brought to one."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory (over {memory / 2**30:.3g} GiB)"
    return f"{type(error).__name__}: {text[:200]}"
