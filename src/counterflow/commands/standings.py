"""What a contest says: ratios, what they should be at most or at least, and tables of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from counterflow.commands.contest import GROWTH_ROWS, FirstCall, Measured
from counterflow.commands.peers import OURS, PEERS
from counterflow.commands.trial import MEASUREMENTS, Size

LEAST_PEAK = 1 << 20  # bytes; below that the allocator's own pages decide, and a ratio would say nothing
FASTER = {64: 20, 256: 100, 784: 300}  # D: how many times as fast as the fastest peer the solve should be


class Results:
    """What was measured, by contestant, size and measurement."""

    def __init__(self, measured: Iterable[Measured]) -> None:
        self._at = {(m.contestant, m.size, m.measurement): m for m in measured}
        self.contestants = list(dict.fromkeys(name for name, _, _ in self._at))
        self.sizes = list(dict.fromkeys(size for _, size, _ in self._at))

    def at(self, contestant: str, size: Size, measurement: str) -> Measured:
        """One of them; what was never asked for is a failure without a reason."""
        empty = Measured(contestant, size, measurement)
        return self._at.get((contestant, size, measurement), empty)

    def asked(self, contestant: str, size: Size, measurement: str) -> bool:
        """Whether it was to be measured."""
        return (contestant, size, measurement) in self._at

    def seconds(self, contestant: str, size: Size, measurement: str) -> float | None:
        """The median, where there is one."""
        return self.at(contestant, size, measurement).seconds

    def fastest_peer(self, size: Size, measurement: str) -> float | None:
        """The least median of all peers."""
        medians = (self.seconds(name, size, measurement) for name in self.contestants if name in PEERS)
        return min((seconds for seconds in medians if seconds), default=None)


class Aim(NamedTuple):
    """A ratio, and what it should be at most, or at least."""

    what: str
    map: str
    size: Size
    value: float
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def slack(self) -> float:
        """How many times better than its bound it is; below 1 where it is missed."""
        return self.bound / self.value if self.at_most else self.value / self.bound


def ratio(above: float | None, below: float | None) -> float | None:
    """A quotient of what may be missing."""
    return above / below if above and below else None


def aims(results: Results) -> list[Aim]:
    """All ratios that have an aim and both of their figures."""
    found = []
    for size in results.sizes:
        for name in OURS:
            between = _between_directions(results, name, size)
            found += [Aim(what, of_map(name), size, value, bound) for what, value, bound in between if value]
        against = _against_peers(results, size)
        found += [Aim(what, "affine", size, value, bound, at_most) for what, value, bound, at_most in against if value]
    return found


def _between_directions(results: Results, name: str, size: Size) -> Iterator[tuple[str, float | None, float]]:
    one, one_back, _, solve, solve_back = (results.at(name, size, measurement) for measurement in MEASUREMENTS)
    yield "sequential / parallel", ratio(solve.seconds, one.seconds), 1.5 if of_map(name) == "spline" else 1.2
    yield "sequential / parallel, backward", ratio(solve_back.seconds, one_back.seconds), 1.5
    yield "sequential / parallel, backward, memory", ratio(enough(solve_back.peak), enough(one_back.peak)), 1.5


def _against_peers(results: Results, size: Size) -> Iterator[tuple[str, float | None, float, bool]]:
    solve, stack = (results.at("counterflow", size, name).seconds for name in ("sequential", "stack backward"))
    if size.D in FASTER:
        lead = ratio(results.fastest_peer(size, "sequential"), solve)
        yield f"sequential, fastest peer / ours, D = {size.D}", lead, FASTER[size.D], False
    peer = results.fastest_peer(size, "stack backward")
    yield "five layers, ours / fastest peer", ratio(stack, peer), 1.05, True
    if size.H >= 1024:
        yield "five layers, fastest peer / ours, H >= 1024", ratio(peer, stack), 1.3, False


def of_map(name: str) -> str:
    """The map of a contestant of ours."""
    return name.removeprefix("counterflow").strip() or "affine"


def enough(peak: int | None) -> int | None:
    """Peak memory, if it is enough to mean something."""
    return peak if peak and peak >= LEAST_PEAK else None


def exponent(features: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log D, by least squares; nan with fewer than two points.

    Example:
        >>> round(exponent([1, 2, 4], [5.0, 20.0, 80.0]), 6)
        2.0
    """
    if len(features) < 2:
        return float("nan")
    return float(np.polyfit(np.log(features), np.log(seconds), 1)[0])


def series(results: Results, contestant: str, measurement: str, figure: str) -> tuple[list[int], list[float]]:
    """D, and the figure ("seconds" or "peak") where there is one."""
    found = [(size.D, getattr(results.at(contestant, size, measurement), figure)) for size in results.sizes]
    return [D for D, value in found if value], [value for _, value in found if value]


def exponents(results: Results) -> dict[str, dict[str, float]]:
    """For each contestant and direction: how its time grows with D."""
    return {
        name: {m: exponent(*series(results, name, m, "seconds")) for m in ("parallel", "sequential")}
        for name in results.contestants
    }


class Sheet(NamedTuple):
    """A table."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as a section of a Markdown page."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def milliseconds(measured: Measured) -> str:
    """The median, or why there is none."""
    return measured.failure if measured.seconds is None else _milliseconds(measured.seconds)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def times(value: float | None) -> str:
    """A ratio."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def mebibytes(measured: Measured) -> str:
    """Peak memory."""
    if measured.peak is None:
        return ""
    return f"{measured.peak / 2**20:,.1f}" if measured.peak >= LEAST_PEAK else "< 1"


def in_brief(results: Results, size: Size) -> str:
    """One line for whoever waits."""
    one, solve = (results.at("counterflow", size, measurement) for measurement in ("parallel", "sequential"))
    peer = results.fastest_peer(size, "sequential")
    beside = f"; the fastest peer {_milliseconds(peer)} ms" if peer else ""
    return f"{size}: one pass {milliseconds(one)} ms, sequential {milliseconds(solve)} ms{beside}"


def directions(results: Results) -> Sheet:
    """Ours at all sizes, direction against direction."""
    rows = []
    for size in results.sizes:
        for name in OURS:
            one, one_back, _, solve, solve_back = (results.at(name, size, m) for m in MEASUREMENTS)
            rows.append(
                [
                    str(size),
                    of_map(name),
                    milliseconds(one),
                    milliseconds(solve),
                    times(ratio(solve.seconds, one.seconds)),
                    milliseconds(one_back),
                    milliseconds(solve_back),
                    times(ratio(solve_back.seconds, one_back.seconds)),
                    times(ratio(enough(solve_back.peak), enough(one_back.peak))),
                ]
            )
    header = ["D/H/B", "map", "par.", "seq.", "ratio", "par. +", "seq. +", "ratio", "memory"]
    title = "Counterflow: parallel and sequential direction, ms; + with gradients, and the ratio of their peak memory"
    return Sheet(title, header, rows)


def against(results: Results, measurement: str, title: str) -> Sheet:
    """One measurement at all sizes: ours, and how many times as long each peer takes."""
    peers = [name for name in results.contestants if name in PEERS]
    asked = [name for name in peers if any(results.asked(name, size, measurement) for size in results.sizes)]
    rows = []
    for size in results.sizes:
        ours = results.at("counterflow", size, measurement)
        beside = [results.at(name, size, measurement) for name in asked]
        factors = [times(ratio(measured.seconds, ours.seconds)) or measured.failure for measured in beside]
        rows.append([str(size), milliseconds(ours), *factors])
    return Sheet(f"{title}: ours in ms, the others as multiples of it", ["D/H/B", "counterflow", *asked], rows)


def everything(results: Results, size: Size) -> Sheet:
    """Everything at one size."""
    header = ["", *MEASUREMENTS, "MiB, parallel backward", "MiB, sequential backward", "round trip", "compiling, s"]
    rows = []
    for name in results.contestants:
        measured = [results.at(name, size, measurement) for measurement in MEASUREMENTS]
        error = measured[3].error
        compiling = [f"{m.compile:.1f}" for m in measured if m.compile is not None]
        rows.append(
            [
                name,
                *(_spread(m) for m in measured),
                mebibytes(measured[1]),
                mebibytes(measured[4]),
                "" if error is None else f"{error:.1e}",
                ", ".join(compiling),
            ]
        )
    return Sheet(f"D = {size.D}, H = {size.H}, B = {size.B}: ms, and the quartiles", header, rows)


def _spread(measured: Measured) -> str:
    if measured.quartiles is None:
        return measured.failure
    low, high = map(_milliseconds, measured.quartiles)
    return milliseconds(measured) + (" (one call)" if measured.calls == 1 else f" ({low}..{high})")


def worst(found: Sequence[Aim]) -> Sheet:
    """For each aim the ratio that is farthest from it, or least above it."""
    rows = []
    for key in sorted({(aim.what, aim.map) for aim in found}):
        group = [aim for aim in found if (aim.what, aim.map) == key]
        least = min(group, key=lambda aim: aim.slack)
        bound = f"{'at most' if least.at_most else 'at least'} {least.bound:g}"
        rows.append([*key, bound, times(least.value), str(least.size), f"{sum(aim.met for aim in group)}/{len(group)}"])
    return Sheet("Ratios and what they should be", ["ratio", "map", "aim", "worst", "at", "met"], rows)


def first_calls(found: Sequence[FirstCall]) -> Sheet:
    """What compiling costs."""
    rows = [[f.contestant, f.cache, f"{f.sequential:.1f}", f"{f.sequential_backward:.1f}"] for f in found]
    header = ["", "cache of compiled code", "sequential", "sequential backward, after it"]
    return Sheet("First calls of a process, s", header, rows)


def growth(results: Results) -> Sheet:
    """The time of both directions against D, and the fitted exponents."""
    fitted, rows = exponents(results), []
    for name in results.contestants:
        for measurement in ("parallel", "sequential"):
            row = [milliseconds(results.at(name, size, measurement)) for size in results.sizes]
            rows.append([name, measurement, *row, f"{fitted[name][measurement]:.2f}"])
    header = ["", "direction", *(f"D = {size.D}" for size in results.sizes), "exponent"]
    return Sheet(f"Growth with D at H = 2 D and {GROWTH_ROWS} rows, ms; time = D^exponent", header, rows)
