"""Report of a benchmark: ratios, the goals they are compared with, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from counterflow.commands.bench.peers import OURS, PEERS
from counterflow.commands.bench.runner import GROWTH_ROWS, FirstCall, Measured
from counterflow.commands.bench.worker import MEASUREMENTS, Size

MIN_PEAK = 1 << 20  # bytes; smaller peaks are pages of the allocator, and their ratio means nothing
SPEEDUP_GOALS = {64: 20, 256: 100, 784: 300}  # D -> fastest peer's time / our time, in the sequential direction


class Results:
    """Results by contestant, size and measurement."""

    def __init__(self, measured: Iterable[Measured]) -> None:
        self._at = {(result.contestant, result.size, result.measurement): result for result in measured}
        self.contestants = list(dict.fromkeys(name for name, _, _ in self._at))
        self.sizes = list(dict.fromkeys(size for _, size, _ in self._at))

    def at(self, contestant: str, size: Size, measurement: str) -> Measured:
        """Return one result; one that was not requested has neither figures nor a reason."""
        return self._at.get((contestant, size, measurement), Measured(contestant, size, measurement))

    def requested(self, contestant: str, size: Size, measurement: str) -> bool:
        """Return True if the measurement was requested."""
        return (contestant, size, measurement) in self._at

    def seconds(self, contestant: str, size: Size, measurement: str) -> float | None:
        """Return the median time, or None."""
        return self.at(contestant, size, measurement).seconds

    def fastest_peer(self, size: Size, measurement: str) -> float | None:
        """Return the lowest median time of all peers, or None."""
        medians = (self.seconds(name, size, measurement) for name in self.contestants if name in PEERS)
        return min((seconds for seconds in medians if seconds), default=None)


class Goal(NamedTuple):
    """A measured ratio and its goal: an upper bound, or a lower bound if `at_most` is False."""

    what: str
    map: str
    size: Size
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Return True if the ratio keeps to its bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def slack(self) -> float:
        """Return how many times better than its bound the ratio is; below 1 if the goal is missed."""
        return self.bound / self.value if self.at_most else self.value / self.bound


def ratio(above: float | None, below: float | None) -> float | None:
    """Return above / below, or None if one of them is missing."""
    return above / below if above and below else None


def goals(results: Results) -> list[Goal]:
    """Return all ratios that have a goal and both of their figures."""
    found = []
    for size in results.sizes:
        for name in OURS:
            directions = _direction_goals(results, name, size)
            found += [Goal(what, map_of(name), size, value, bound) for what, value, bound in directions if value]
        peers = _peer_goals(results, size)
        found += [Goal(what, "affine", size, value, bound, at_most) for what, value, bound, at_most in peers if value]
    return found


def _direction_goals(results: Results, name: str, size: Size) -> Iterator[tuple[str, float | None, float]]:
    one, one_back, _, solve, solve_back = (results.at(name, size, measurement) for measurement in MEASUREMENTS)
    memory = ratio(significant(solve_back.peak), significant(one_back.peak))
    yield "sequential / parallel", ratio(solve.seconds, one.seconds), 1.5 if map_of(name) == "spline" else 1.2
    yield "sequential / parallel, backward", ratio(solve_back.seconds, one_back.seconds), 1.5
    yield "sequential / parallel, backward, memory", memory, 1.5


def _peer_goals(results: Results, size: Size) -> Iterator[tuple[str, float | None, float, bool]]:
    solve, stack = (results.seconds("counterflow", size, name) for name in ("sequential", "stack backward"))
    if size.D in SPEEDUP_GOALS:
        speedup = ratio(results.fastest_peer(size, "sequential"), solve)
        yield f"sequential, fastest peer / ours, D = {size.D}", speedup, SPEEDUP_GOALS[size.D], False
    peer = results.fastest_peer(size, "stack backward")
    yield "five layers, ours / fastest peer", ratio(stack, peer), 1.05, True
    if size.H >= 1024:
        yield "five layers, fastest peer / ours, H >= 1024", ratio(peer, stack), 1.3, False


def map_of(name: str) -> str:
    """Return the univariate map of one of our contestants."""
    return name.removeprefix("counterflow").strip() or "affine"


def significant(peak: int | None) -> int | None:
    """Return the peak memory if it is large enough for a ratio, else None."""
    return peak if peak and peak >= MIN_PEAK else None


def exponent(features: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the least-squares slope of log(seconds) over log(D); NaN with fewer than two points.

    Example:
        >>> round(exponent([1, 2, 4], [5.0, 20.0, 80.0]), 6)
        2.0
    """
    if len(features) < 2:
        return float("nan")
    return float(np.polyfit(np.log(features), np.log(seconds), 1)[0])


def series(results: Results, contestant: str, measurement: str, figure: str) -> tuple[list[int], list[float]]:
    """Return the D that have a figure ("seconds" or "peak"), and the figures."""
    found = [(size.D, getattr(results.at(contestant, size, measurement), figure)) for size in results.sizes]
    return [D for D, value in found if value], [value for _, value in found if value]


def exponents(results: Results) -> dict[str, dict[str, float]]:
    """Return the exponent of D in the time of each contestant and direction."""
    return {
        name: {side: exponent(*series(results, name, side, "seconds")) for side in ("parallel", "sequential")}
        for name in results.contestants
    }


class Table(NamedTuple):
    """A table of text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as a section of a Markdown page."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def milliseconds(measured: Measured) -> str:
    """Return the median time as text, or the reason why there is none."""
    return measured.failure if measured.seconds is None else _milliseconds(measured.seconds)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def times(value: float | None) -> str:
    """Return a ratio as text."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def mebibytes(measured: Measured) -> str:
    """Return the peak memory as text."""
    if measured.peak is None:
        return ""
    return f"{measured.peak / 2**20:,.1f}" if measured.peak >= MIN_PEAK else "< 1"


def progress_line(results: Results, size: Size) -> str:
    """Return one line about the results at a size."""
    one, solve = (results.at("counterflow", size, measurement) for measurement in ("parallel", "sequential"))
    peer = results.fastest_peer(size, "sequential")
    fastest = f"; the fastest peer {_milliseconds(peer)} ms" if peer else ""
    return f"{size}: one pass {milliseconds(one)} ms, sequential {milliseconds(solve)} ms{fastest}"


def directions_table(results: Results) -> Table:
    """Compare both directions of our layers at all sizes."""
    rows = []
    for size in results.sizes:
        for name in OURS:
            one, one_back, _, solve, solve_back = (results.at(name, size, each) for each in MEASUREMENTS)
            rows.append(
                [
                    str(size),
                    map_of(name),
                    milliseconds(one),
                    milliseconds(solve),
                    times(ratio(solve.seconds, one.seconds)),
                    milliseconds(one_back),
                    milliseconds(solve_back),
                    times(ratio(solve_back.seconds, one_back.seconds)),
                    times(ratio(significant(solve_back.peak), significant(one_back.peak))),
                ]
            )
    header = ["D/H/B", "map", "par.", "seq.", "ratio", "par. +", "seq. +", "ratio", "memory"]
    title = "Counterflow: parallel and sequential direction, ms; + with gradients, and the ratio of their peak memory"
    return Table(title, header, rows)


def peers_table(results: Results, measurement: str, title: str) -> Table:
    """Compare our time with that of each peer, for one measurement at all sizes."""
    peers = [
        name
        for name in results.contestants
        if name in PEERS and any(results.requested(name, size, measurement) for size in results.sizes)
    ]
    rows = []
    for size in results.sizes:
        ours = results.at("counterflow", size, measurement)
        others = [results.at(name, size, measurement) for name in peers]
        factors = [times(ratio(other.seconds, ours.seconds)) or other.failure for other in others]
        rows.append([str(size), milliseconds(ours), *factors])
    return Table(f"{title}: ours in ms, the others as multiples of it", ["D/H/B", "counterflow", *peers], rows)


def all_figures_table(results: Results, size: Size) -> Table:
    """List all figures at one size."""
    header = ["", *MEASUREMENTS, "MiB, parallel backward", "MiB, sequential backward", "round trip", "compiling, s"]
    rows = []
    for name in results.contestants:
        measured = [results.at(name, size, measurement) for measurement in MEASUREMENTS]
        error = results.at(name, size, "sequential").error
        compiling = [f"{result.compile:.1f}" for result in measured if result.compile is not None]
        rows.append(
            [
                name,
                *(_with_quartiles(result) for result in measured),
                mebibytes(results.at(name, size, "parallel backward")),
                mebibytes(results.at(name, size, "sequential backward")),
                "" if error is None else f"{error:.1e}",
                ", ".join(compiling),
            ]
        )
    return Table(f"D = {size.D}, H = {size.H}, B = {size.B}: ms, and the quartiles", header, rows)


def _with_quartiles(measured: Measured) -> str:
    if measured.quartiles is None:
        return measured.failure
    low, high = map(_milliseconds, measured.quartiles)
    return milliseconds(measured) + (" (one call)" if measured.calls == 1 else f" ({low}..{high})")


def goals_table(found: Sequence[Goal]) -> Table:
    """List for each goal the ratio that misses it most, or meets it least."""
    rows = []
    for key in sorted({(goal.what, goal.map) for goal in found}):
        group = [goal for goal in found if (goal.what, goal.map) == key]
        worst = min(group, key=lambda goal: goal.slack)
        bound = f"{'at most' if worst.at_most else 'at least'} {worst.bound:g}"
        met = sum(goal.met for goal in group)
        rows.append([*key, bound, times(worst.value), str(worst.size), f"{met}/{len(group)}"])
    return Table("Ratios and their goals", ["ratio", "map", "goal", "worst", "at", "met"], rows)


def first_calls_table(calls: Sequence[FirstCall]) -> Table:
    """List the first calls, which show the cost of compilation."""
    rows = [
        [call.contestant, call.cache, f"{call.sequential:.1f}", f"{call.sequential_backward:.1f}"] for call in calls
    ]
    header = ["", "cache of compiled code", "sequential", "sequential backward, after it"]
    return Table("First calls of a process, s", header, rows)


def growth_table(results: Results) -> Table:
    """List the time of both directions against D, and the fitted exponents."""
    fitted = exponents(results)
    rows = []
    for name in results.contestants:
        for measurement in ("parallel", "sequential"):
            row = [milliseconds(results.at(name, size, measurement)) for size in results.sizes]
            rows.append([name, measurement, *row, f"{fitted[name][measurement]:.2f}"])
    header = ["", "direction", *(f"D = {size.D}" for size in results.sizes), "exponent"]
    return Table(f"Growth with D at H = 2 D and {GROWTH_ROWS} rows, ms; time = D^exponent", header, rows)
