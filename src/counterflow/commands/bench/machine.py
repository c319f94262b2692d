"""Description of the machine that a benchmark runs on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from counterflow import __version__
from counterflow.commands.bench.peers import PEERS

GIB = 2**30


def describe_machine(threads: int, peers: Sequence[str]) -> dict[str, Any]:
    """Return the processor, cores, memory, threads and versions for the report."""
    packages = ["torch", "numba", "numpy", *(["jax"] if any(PEERS[name].jax for name in peers) else [])]
    return {
        "processor": processor(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(total_memory() / GIB, 1),
        "threads": threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", ""),
        "python": platform.python_version(),
        "counterflow": __version__,
        **{package: _version(package) for package in [*packages, *(PEERS[name].package for name in peers)]},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not a package"


def processor() -> str:
    """Return the name of the processor; Linux and macOS report it in different places."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def total_memory() -> float:
    """Return the bytes of memory; infinity on systems that do not report it (Windows), which sets no limit."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError):
        return float("inf")
