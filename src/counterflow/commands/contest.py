"""The turns of a benchmark: every contestant makes a call, or a few, then the next one does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from tempfile import TemporaryDirectory
from typing import NamedTuple

from counterflow.commands.peers import PEERS
from counterflow.commands.trial import MEASUREMENTS, FailedError, Reply, Request, Setting, Size, Trial

WATCHED = 3  # first calls, whose memory is taken; the least counts, since the first one brings more than its own
PAUSE = 0.005  # seconds before a turn, in which torch's idle threads may stop spinning
TURN = 0.05  # seconds of calls that make a turn; slower calls are a turn each
FIRST_CALL = 900.0  # seconds that a first call may take with all that it compiles
REHEARSAL = Size(4, 8, 8)
GROWTH_ROWS = 64
BOTH = tuple(name for name in MEASUREMENTS if not name.startswith("stack"))


@dataclass(frozen=True)
class Measured:
    """What came out for one contestant, size and measurement; without seconds, `failure` says why."""

    contestant: str
    size: Size
    measurement: str
    seconds: float | None = None  # median
    quartiles: tuple[float, float] | None = None  # seconds, lower and upper
    calls: int = 0  # that these are taken over
    compile: float | None = None  # seconds, JAX only
    peak: int | None = None  # bytes that a call adds
    error: float | None = None  # of the round trip, largest of a coordinate
    parameters: int | None = None
    failure: str = ""


@dataclass(frozen=True)
class FirstCall:
    """Seconds of a new process' first solves, with the compiled code that it finds, or compiles."""

    contestant: str
    cache: str  # empty or filled
    sequential: float
    sequential_backward: float  # after the former


class Rules(NamedTuple):
    """How many turns are timed, the seconds of calls after which there is no further turn, those that end a call."""

    repeats: int
    budget: float
    cap: float


@dataclass
class _Entry:
    """One contestant's turns at one measurement."""

    trial: Trial
    size: Size
    measurement: str
    failure: str = ""
    watched: list[Reply] = field(default_factory=list)
    timed: list[float] = field(default_factory=list)
    last: float = 0.0
    spent: float = 0.0

    def due(self, budget: float) -> bool:
        """Whether there is another turn."""
        return not self.failure and (not self.watched or self.spent + self.last <= budget)

    def turn(self, cap: float) -> None:
        """Make the next call, or several short ones of which the first wakes up threads and caches."""
        watched = len(self.watched) < WATCHED
        calls = 1 if watched or self.last > TURN / 2 else 1 + min(20, int(TURN / self.last))
        time.sleep(PAUSE)
        try:
            reply = self.trial.ask(Request(self.size, self.measurement, calls, watched), cap)
        except FailedError as error:
            self.failure = str(error)
            return
        self.last = min(reply.seconds)
        self.spent += sum(reply.seconds)
        if watched:
            self.watched.append(reply)
        else:
            self.timed += reply.seconds[calls > 1 :]

    def measured(self) -> Measured:
        """The medians; where no call was timed, of the watched ones, if possible without the first."""
        if not self.watched:
            return Measured(self.trial.name, self.size, self.measurement, failure=self.failure)
        seconds = self.timed or [reply.seconds[0] for reply in self.watched[1:] or self.watched]
        cuts = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
        first, peaks = self.watched[0], [reply.peak for reply in self.watched if reply.peak is not None]
        return Measured(
            self.trial.name,
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


class Contest:
    """Contestants, what they reached at the sizes, and how their cost grew.

    Args:
        names: of OURS and PEERS.
        setting: of their processes.
        rules: see there.
        on_turn: is told who does what.
        on_step: is called after every measurement, and after every contestant's first call.
    """

    def __init__(
        self,
        names: Iterable[str],
        setting: Setting,
        rules: Rules,
        on_turn: Callable[[str], None],
        on_step: Callable[[], None],
    ) -> None:
        self.trials = [Trial(name, setting) for name in names]
        self.setting, self.rules, self.on_turn, self.on_step = setting, rules, on_turn, on_step
        self.failed: dict[str, str] = {}
        self.results: list[Measured] = []
        self.growth: list[Measured] = []
        self.first: list[FirstCall] = []

    def rehearse(self) -> None:
        """A first call of everything, so that imports and compiled code are there; who cannot make it is left out."""
        for trial in self.trials:
            self.on_turn(f"{trial.name}: first call")
            try:
                trial.ask(Request(REHEARSAL, "sequential backward", 1, watched=False), FIRST_CALL)
            except FailedError as error:
                self.failed[trial.name] = str(error)
            self.on_step()
        self.trials = [trial for trial in self.trials if trial.name not in self.failed]

    def compare(self, size: Size) -> None:
        """All measurements at one size."""
        for measurement in MEASUREMENTS:
            entries = [_Entry(trial, size, measurement) for trial in self.trials if offers(trial.name, measurement)]
            lost = {
                m.contestant: m.failure
                for m in self.results
                if m.failure and (m.size, m.measurement) == (size, "sequential")
            }
            for entry in entries:
                if measurement == "sequential backward" and entry.trial.name in lost:
                    entry.failure = lost[entry.trial.name]
            self.results += self._take_turns(entries)

    def grow(self, features: Sequence[int]) -> None:
        """Affine layers of H = 2 D; who would be over the budget at the next D is not asked."""
        for D in features:
            for measurement in BOTH:
                affine = [trial for trial in self.trials if trial.name == "counterflow" or trial.name in PEERS]
                entries = [_Entry(trial, Size(D, 2 * D, GROWTH_ROWS), measurement) for trial in affine]
                for entry in entries:
                    entry.failure = self._refusal(entry)
                self.growth += self._take_turns(entries)

    def _refusal(self, entry: _Entry) -> str:
        before = [m for m in self.growth if (m.contestant, m.measurement) == (entry.trial.name, entry.measurement)]
        if not before:
            return ""
        last = before[-1]
        passes = entry.trial.name in PEERS and entry.measurement.startswith("sequential")
        if last.seconds and last.seconds * (entry.size.D / last.size.D) ** (3 if passes else 2) <= self.rules.budget:
            return ""
        return last.failure or f"not run: {last.seconds:.1f} s at D = {last.size.D}"

    def _take_turns(self, entries: Sequence[_Entry]) -> list[Measured]:
        for _ in range(WATCHED + self.rules.repeats):
            for entry in entries:
                if entry.due(self.rules.budget):
                    self.on_turn(f"{entry.size}  {entry.measurement}  {entry.trial.name}")
                    entry.turn(self.rules.cap)
        self.on_step()
        return [entry.measured() for entry in entries]

    def call_first(self, names: Sequence[str]) -> None:
        """Solve in new processes, which share a cache of compiled code that is empty at first."""
        with TemporaryDirectory() as folder:
            setting = self.setting._replace(compiled=folder)
            for cache, name in product(("empty", "filled"), names):
                self.on_turn(f"{name}: first call, {cache} cache")
                solves = "sequential", "sequential backward"
                requests = [Request(REHEARSAL, measurement, 1, watched=False) for measurement in solves]
                with closing(Trial(name, setting)) as trial:
                    try:
                        seconds = [trial.ask(request, FIRST_CALL).seconds[0] for request in requests]
                    except FailedError as error:
                        self.failed[f"{name}, {cache} cache"] = str(error)
                    else:
                        self.first.append(FirstCall(name, cache, *seconds))

    def close(self) -> None:
        """End all processes."""
        for trial in self.trials:
            trial.close()


def offers(name: str, measurement: str) -> bool:
    """Stacks are of affine layers in torch alone: they are to show what the parallel direction costs in training."""
    return not measurement.startswith("stack") or name == "counterflow" or (name in PEERS and not PEERS[name].jax)
