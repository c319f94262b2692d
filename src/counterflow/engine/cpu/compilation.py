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
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from threading import Timer
from types import FunctionType
from typing import Any

import torch
from llvmlite import binding
from numba import njit, types
from numba.core import sigutils
from numba.core.ccallback import CFunc

AVX512 = bool(binding.get_host_cpu_features().get("avx512f"))
VECTOR_BYTES = 64 if AVX512 else 32


def compiled(function: Any, *, inlined: bool = False) -> Any:
    """Declare a function that kernels call; inlined wherever it is called, whatever its size.

    A loop becomes vector code only if everything that it calls is inlined. Without entries from Python the function
    compiles faster.
    """
    # contract: a * b + c is one operation
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": inlined}
    return njit(fastmath={"contract"}, error_model="numpy", **options)(function)


inlined = partial(compiled, inlined=True)


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


_function: Any = None  # global of each entry, in place of this one


def entry(name: str, function: Any) -> Any:
    """Make a kernel of that name, which calls a compiled function.

    The function is a global of the entry: in a closure it would give the entry another key on disk in every process.
    """
    sources = SOURCES

    def template(pointer):  # type: ignore[no-untyped-def]  # Numba infers its types
        _ = sources
        _function(pointer)

    made = FunctionType(template.__code__, globals() | {"_function": function}, name, None, template.__closure__)
    made.__qualname__ = name
    return made


class _Kernel(CFunc):
    """A kernel from disk, or compiled if that is allowed."""

    may_compile = True

    def _compile_uncached(self) -> Any:
        if not self.may_compile:
            raise LookupError
        return super()._compile_uncached()  # type: ignore[misc]  # Numba's stubs leave it out


_kernels: dict[tuple[Callable[[Any], None], torch.dtype], _Kernel] = {}  # keeps the machine code alive


def is_on_disk(kernel: Callable[[Any], None], dtype: torch.dtype) -> bool:
    """Return True if the kernel needs no compilation: it is loaded, or has just been loaded from disk."""
    try:
        _load(kernel, dtype, may_compile=False)
    except LookupError:
        return False
    return True


@cache
def machine_code(kernel: Callable[[Any], None], dtype: torch.dtype) -> Callable[[int], None]:
    """Return the kernel for a dtype as a C function of the address of its job."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address_of(kernel, dtype))


def address_of(kernel: Callable[[Any], None], dtype: torch.dtype) -> int:
    """Return the address of the kernel for a dtype; load it from disk, or compile it."""
    return int(_load(kernel, dtype, may_compile=True).address or 0)


def _load(kernel: Callable[[Any], None], dtype: torch.dtype, *, may_compile: bool) -> _Kernel:
    """Load the kernel, which must be closed over SOURCES, or compile it; raise LookupError if it may not compile."""
    found = _kernels.get((kernel, dtype))
    if found is None:
        signature = types.void(types.CPointer(types.float32 if dtype == torch.float32 else types.float64))
        options = {"fastmath": {"contract"}, "error_model": "numpy"}
        found = _Kernel(kernel, sigutils.normalize_signature(signature), locals={}, options=options)
        found.enable_caching()
        found.may_compile = may_compile
        with _announced(dtype):
            found.compile()
        _kernels[kernel, dtype] = found
    return found


_announced_for: set[torch.dtype] = set()


@contextmanager
def _announced(dtype: torch.dtype) -> Iterator[None]:
    """Log a warning when compilation has taken two seconds, once for each dtype."""

    def announce() -> None:
        if dtype not in _announced_for:
            _announced_for.add(dtype)
            logging.getLogger("counterflow").warning(
                "compiling kernels for %s; this happens once, the next process finds them on disk", dtype
            )

    timer = Timer(2.0, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
