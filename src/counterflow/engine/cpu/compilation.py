"""Compiles kernels with Numba and keeps the machine code on disk.

Numba recompiles a function that it finds on disk when the file of that function has changed, and does not look at the
functions that it calls. So each kernel is closed over SOURCES, a digest of all files of this folder: Numba compares the
values of a closure, and a change in any file of the folder compiles the kernels again.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from llvmlite import binding  # type: ignore[import-untyped]
from numba import cfunc, njit, types

AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
VECTOR_BYTES = 64 if AVX512 else 32

compiled = njit(fastmath={"contract"}, error_model="numpy")  # contract: a * b + c is one operation


def named(name: str, function: Any) -> Any:
    """Compile a function under a name of its own.

    Needed for functions that are created more than once: Numba links functions by their names, also those that were
    compiled by another process and come from disk, and would mix up two of the same name and type.
    """
    function.__name__ = function.__qualname__ = name
    return compiled(function)


def sources_digest(folder: Path) -> int:
    """Return a 60-bit digest of the Python files of a folder."""
    joined = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return int(sha256(joined).hexdigest()[:15], 16)


SOURCES = sources_digest(Path(__file__).parent)


@cache
def machine_code(kernel: Callable[[Any], None], dtype: torch.dtype) -> Callable[[int], None]:
    """Return the kernel for a dtype as a C function of the address of its job."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_compile(kernel, dtype).address)


@cache  # keeps the machine code alive
def _compile(kernel: Callable[[Any], None], dtype: torch.dtype) -> Any:
    """Compile the kernel, or load it from disk. The kernel must be closed over SOURCES."""
    signature = types.void(types.CPointer(types.float32 if dtype == torch.float32 else types.float64))
    with _announced(dtype):
        return cfunc(signature, cache=True, fastmath={"contract"}, error_model="numpy")(kernel)


@contextmanager
def _announced(dtype: torch.dtype) -> Iterator[None]:
    """Log a warning when compilation has taken two seconds."""
    text = "compiling substitution for %s; this happens once, the next process finds it on disk"
    timer = Timer(2.0, logging.getLogger("counterflow").warning, (text, dtype))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
