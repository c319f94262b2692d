"""Options of `counterflow bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from counterflow.commands.options import optional

PEERS = ("nflows", "normflows", "zuko", "pyro", "flowjax", "numpyro", "tfp")  # the libraries that peers.py builds


@dataclass(frozen=True)
class Bench:
    """Time both directions of an autoregressive layer, here and in other libraries.

    "parallel" is the direction that takes one pass through the network, "sequential" is its inverse. Each is timed by
    itself and with the gradients of input and weights ("backward"). "stack backward" is the parallel direction of five
    layers with gradients. All layers are float32 with two hidden layers of relu units. Every library runs in a process
    of its own, and the processes take turns.
    """

    sizes: Annotated[tuple[str, ...], optional("D/H/B [D/H/B ...]")] = ()
    """sizes D/H/B: features, units in each hidden layer, rows; by default six from 8/64/256 to 784/2048/256"""
    growth: Annotated[tuple[int, ...], optional("D [D ...]")] = ()
    """numbers of features D at which the growth of the cost is measured, H = 2 D, 64 rows; by default 64 to 4096"""
    peers: tuple[str, ...] = PEERS
    """libraries to compare with; those that are not installed are reported and left out"""
    threads: Annotated[int | None, optional("INT")] = None
    """threads of each library; by default as many as torch uses"""
    repeats: int = 11
    """timed turns, of which the median is reported; the six default sizes take 16 minutes on two cores"""
    budget: float = 6.0
    """seconds of calls after which a library gets no further turn at a measurement; slow libraries are called once"""
    cap: float = 90.0
    """seconds after which a call is stopped and reported as such; the slowest peer took 33 s at 784/2048/256"""
    memory: Annotated[float | None, optional("GIB")] = None
    """GiB that a call may use before it is reported as out of memory; by default half of the machine's memory"""
    first_calls: bool = True
    """also time Counterflow's first calls, with an empty and with a filled cache of compiled code"""
    quick: bool = False
    """small default sizes, at most 5 turns and 1 s, no first calls: under two minutes on two cores"""
    out: Annotated[Path | None, optional("FOLDER")] = None
    """new run folder; by default runs/bench-DATE-TIME"""

    def run(self) -> int:
        """Measure, print the tables and write the run folder; return the exit code."""
        from counterflow.commands.requirements import require_packages

        require_packages("matplotlib")
        from counterflow.commands.bench.session import run

        return run(self)
