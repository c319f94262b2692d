"""Turns of a benchmark: each contestant makes one call or a few short ones, then the next contestant does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from tempfile import TemporaryDirectory
from typing import NamedTuple

from counterflow.commands.bench.peers import PEERS
from counterflow.commands.bench.worker import MEASUREMENTS, MeasurementError, Reply, Request, Settings, Size, Worker

WATCHED = 3  # first calls, whose peak memory is measured; the lowest is reported, as the first call allocates caches
PAUSE = 0.005  # seconds before a turn, so that idle threads of torch stop spinning
TURN = 0.05  # seconds of calls in one turn; a slower call is a turn by itself
FIRST_CALL = 900.0  # seconds that a first call may take, compilation included
WARM_UP_SIZE = Size(4, 8, 8)
GROWTH_ROWS = 64
DIRECTIONS = tuple(name for name in MEASUREMENTS if not name.startswith("stack"))


@dataclass(frozen=True)
class Measured:
    """Figures of one contestant at one size and measurement; where there are none, `failure` gives the reason."""

    contestant: str
    size: Size
    measurement: str
    seconds: float | None = None  # median
    quartiles: tuple[float, float] | None = None  # seconds, lower and upper
    calls: int = 0  # timed calls behind the median
    compile: float | None = None  # seconds, JAX only
    peak: int | None = None  # bytes that a call adds
    error: float | None = None  # of the round trip, the largest over all coordinates
    parameters: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class FirstCall:
    """Seconds of the first two solves of a new process, compilation or loading of compiled code included."""

    contestant: str
    cache: str  # of compiled code: empty or filled
    sequential: float
    sequential_backward: float  # called second


class Limits(NamedTuple):
    """Limits of a measurement: timed turns, seconds of calls after which no turn follows, seconds that end a call."""

    repeats: int
    budget: float
    cap: float


@dataclass
class _Entry:
    """Turns of one contestant at one measurement."""

    worker: Worker
    size: Size
    measurement: str
    failure: str = ""
    watched: list[Reply] = field(default_factory=list)
    timed: list[float] = field(default_factory=list)
    last: float = 0.0
    spent: float = 0.0

    def is_due(self, budget: float) -> bool:
        """Return True if another turn follows."""
        return not self.failure and (not self.watched or self.spent + self.last <= budget)

    def take_turn(self, cap: float) -> None:
        """Make the next call, or several short ones; the first of several wakes threads and caches and is not timed."""
        watched = len(self.watched) < WATCHED
        calls = 1 if watched or self.last > TURN / 2 else 1 + min(20, int(TURN / self.last))
        time.sleep(PAUSE)
        try:
            reply = self.worker.ask(Request(self.size, self.measurement, calls, watched), cap)
        except MeasurementError as error:
            self.failure = str(error)
            return
        self.last = min(reply.seconds)
        self.spent += sum(reply.seconds)
        if watched:
            self.watched.append(reply)
        else:
            self.timed += reply.seconds[calls > 1 :]

    def result(self) -> Measured:
        """Return the medians; if no call was timed, those of the watched calls, without the first where possible."""
        if not self.watched:
            return Measured(self.worker.name, self.size, self.measurement, failure=self.failure)
        seconds = self.timed or [reply.seconds[0] for reply in self.watched[1:] or self.watched]
        cuts = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
        first = self.watched[0]
        peaks = [reply.peak for reply in self.watched if reply.peak is not None]
        return Measured(
            self.worker.name,
            self.size,
            self.measurement,
            seconds=cuts[1],
            quartiles=(cuts[0], cuts[2]),
            calls=len(seconds),
            compile=first.compile,
            peak=min(peaks, default=None),
            error=first.error,
            parameters=first.parameters,
        )


class Runner:
    """Contestants of a benchmark, each in a process of its own, and their results so far.

    Args:
        names: keys of OURS and PEERS.
        settings: of the contestants' processes.
        limits: of each measurement.
        on_turn: called with a description of each turn before it starts.
        on_step: called after every measurement, and after every contestant's first call.
    """

    def __init__(
        self,
        names: Iterable[str],
        settings: Settings,
        limits: Limits,
        on_turn: Callable[[str], None],
        on_step: Callable[[], None],
    ) -> None:
        self.workers = [Worker(name, settings) for name in names]
        self.settings = settings
        self.limits = limits
        self.on_turn = on_turn
        self.on_step = on_step
        self.failed: dict[str, str] = {}
        self.results: list[Measured] = []
        self.growth: list[Measured] = []
        self.first_calls: list[FirstCall] = []

    def warm_up(self) -> None:
        """Make a first call of every contestant, which imports and compiles; leave out those that fail."""
        for worker in self.workers:
            self.on_turn(f"{worker.name}: first call")
            try:
                worker.ask(Request(WARM_UP_SIZE, "sequential backward", 1, watched=False), FIRST_CALL)
            except MeasurementError as error:
                self.failed[worker.name] = str(error)
            self.on_step()
        self.workers = [worker for worker in self.workers if worker.name not in self.failed]

    def compare(self, size: Size) -> None:
        """Take all measurements at one size."""
        for measurement in MEASUREMENTS:
            entries = [_Entry(worker, size, measurement) for worker in self.workers if offers(worker.name, measurement)]
            failures = {
                result.contestant: result.failure
                for result in self.results
                if result.failure and (result.size, result.measurement) == (size, "sequential")
            }
            for entry in entries:
                if measurement == "sequential backward" and entry.worker.name in failures:
                    entry.failure = failures[entry.worker.name]
            self.results += self._take_turns(entries)

    def measure_growth(self, features: Sequence[int]) -> None:
        """Measure affine layers of H = 2 D at each D; skip contestants that would exceed the budget at the next D."""
        for D in features:
            for measurement in DIRECTIONS:
                affine = [worker for worker in self.workers if worker.name == "counterflow" or worker.name in PEERS]
                entries = [_Entry(worker, Size(D, 2 * D, GROWTH_ROWS), measurement) for worker in affine]
                for entry in entries:
                    entry.failure = self._reason_to_skip(entry)
                self.growth += self._take_turns(entries)

    def _reason_to_skip(self, entry: _Entry) -> str:
        key = (entry.worker.name, entry.measurement)
        before = [result for result in self.growth if (result.contestant, result.measurement) == key]
        if not before:
            return ""
        last = before[-1]
        takes_d_passes = entry.worker.name in PEERS and entry.measurement.startswith("sequential")
        power = 3 if takes_d_passes else 2
        if last.seconds and last.seconds * (entry.size.D / last.size.D) ** power <= self.limits.budget:
            return ""
        return last.failure or f"not run: {last.seconds:.1f} s at D = {last.size.D}"

    def _take_turns(self, entries: Sequence[_Entry]) -> list[Measured]:
        for _ in range(WATCHED + self.limits.repeats):
            for entry in entries:
                if entry.is_due(self.limits.budget):
                    self.on_turn(f"{entry.size}  {entry.measurement}  {entry.worker.name}")
                    entry.take_turn(self.limits.cap)
        self.on_step()
        return [entry.result() for entry in entries]

    def measure_first_calls(self, names: Sequence[str]) -> None:
        """Time the first solves of new processes that share a cache of compiled code, empty at first."""
        with TemporaryDirectory() as folder:
            settings = self.settings._replace(compiled=folder)
            for cache, name in product(("empty", "filled"), names):
                self.on_turn(f"{name}: first call, {cache} cache")
                solves = ("sequential", "sequential backward")
                requests = [Request(WARM_UP_SIZE, measurement, 1, watched=False) for measurement in solves]
                with closing(Worker(name, settings)) as worker:
                    try:
                        seconds = [worker.ask(request, FIRST_CALL).seconds[0] for request in requests]
                    except MeasurementError as error:
                        self.failed[f"{name}, {cache} cache"] = str(error)
                    else:
                        self.first_calls.append(FirstCall(name, cache, *seconds))

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers:
            worker.close()


def offers(name: str, measurement: str) -> bool:
    """Return True if a contestant takes part in a measurement.

    Stacks are measured for affine layers in torch only: they show the cost of training in the parallel direction.
    """
    return not measurement.startswith("stack") or name == "counterflow" or (name in PEERS and not PEERS[name].jax)
