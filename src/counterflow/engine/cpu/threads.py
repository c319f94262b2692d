"""Runs a compiled function on several threads at once."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch


def run_on_threads(function: Callable[[int], None], job: int, threads: int) -> None:
    """Call function(job) once on each of several threads, and return when all calls have returned."""
    openmp = openmp_parallel()
    if threads == 1:
        function(job)
    elif openmp is not None:
        openmp(function, ctypes.c_void_p(job), threads, 0)
    else:
        # A pool of Python threads and not Numba's own: Numba's threads abort the process when two callers meet.
        for call in [_pool().submit(function, job) for _ in range(threads)]:
            call.result()


@cache
def openmp_parallel() -> Any:
    """Return the function of torch's OpenMP runtime that runs a function on its threads, or None without OpenMP.

    torch's threads wait for their next work in a loop that keeps their cores busy, so threads of our own would have to
    share these cores with them. At D, H, B = 64, 512, 1024 on two threads, our own pool takes 1.8 times as long.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            parallel = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
            if parallel is not None:
                parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                parallel.restype = None
                return parallel
    return None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "counterflow")


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of its parent's threads
