"""Compiles kernels in another process, while torch does their work in this one.

Numba takes 10 to 30 s for the kernels of a flow, once on a machine: machine code is kept on disk. So that nobody waits
for it, `ready` starts a process that compiles what is missing and ends by itself, also when this process ends first.
It has no pipes and no input, it is polite (niceness 10), and it shares only the cache on disk, whose files Numba
replaces atomically. One such process compiles at a time, however many commands were started: the next one waits, and
then finds on disk what it was to compile. When it has ended, this process loads the kernels.

If COUNTERFLOW_COMPILE=foreground is set, the first call compiles and everything waits for it. The results of a seed are
then the same bits on the first run as on every later one; torch adds in another order than the kernels.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from numba.core.caching import FunctionCache

from counterflow.engine.cpu.compilation import address_of, is_on_disk
from counterflow.engine.cpu.maps import activation_kernels, map_kernels
from counterflow.engine.cpu.passes import chain_back, chain_forward, chain_push
from counterflow.engine.cpu.substitution import back_kernel, forward_kernel

Kernels = tuple[str, ...]
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_logger = logging.getLogger("counterflow")
_named: dict[str, Any] = {
    kernel.__name__: kernel for kernel in (forward_kernel, back_kernel, chain_forward, chain_back, chain_push)
}


def chain_kernels(map_codes: set[int], activations: set[str]) -> Kernels:
    """Return the names of all kernels that chains of these maps and activations call."""
    names = ["chain_forward", "chain_back", "chain_push"]
    names += [f"map {code} {k}" for code in sorted(map_codes) for k in range(3)]
    names += [f"activation {name} {k}" for name in sorted(activations) for k in range(2)]
    return tuple(names)


SOLVE_KERNELS: Kernels = ("forward_kernel", "back_kernel")


def _kernel(name: str) -> Callable[[Any], None]:
    """Return the kernel of a name."""
    kind, *rest = name.split()
    found: Callable[[Any], None]
    if kind == "map":
        found = map_kernels(int(rest[0]))[int(rest[1])]
    elif kind == "activation":
        found = activation_kernels(rest[0])[int(rest[1])]
    else:
        found = _named[kind]
    return found


class _Compiler:
    """The one process that compiles for this one, and what is known about its results."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.ready: set[tuple[Kernels, torch.dtype]] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.requested: tuple[Kernels, torch.dtype] | None = None

    def look(self, kernels: Kernels, dtype: torch.dtype) -> bool:
        """Return True if the kernels can be called at once, and see to it that they can be at some time."""
        with self.lock:
            wanted = (kernels, dtype)
            if self.process is not None:
                if self.process.poll() is None:
                    return False
                failed = self.process.returncode != 0 and wanted == self.requested
                self.process = None
                if failed:
                    _logger.warning("the process that compiles kernels failed; compiling them here")
                    self.ready.add(wanted)
            if wanted in self.ready or self._are_on_disk(wanted) or not self._start(wanted):
                self.ready.add(wanted)
            return wanted in self.ready

    @staticmethod
    def _are_on_disk(wanted: tuple[Kernels, torch.dtype]) -> bool:
        kernels, dtype = wanted
        return all(is_on_disk(_kernel(name), dtype) for name in kernels)

    def _start(self, wanted: tuple[Kernels, torch.dtype]) -> bool:
        """Start to compile in another process; return False if there is none."""
        if self.requested == wanted or not sys.executable or getattr(sys, "frozen", False):
            return False  # tried before, or no Python to start
        kernels, dtype = wanted
        name = next(name for name, each in DTYPES.items() if each == dtype)
        command = [sys.executable, "-c", f"from {__name__} import compile_all; compile_all()", name, *kernels]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            return False
        self.requested = wanted
        _logger.warning(
            "compiling for torch.%s in the background; until it is done, torch computes, more slowly. "
            "This happens once, the next process finds the result on disk",
            name,
        )
        return True


_compiler = _Compiler()


def ready(kernels: Kernels, dtype: torch.dtype) -> bool:
    """Return True if the kernels can be called: they are compiled, or compile in the foreground at the first call."""
    if (kernels, dtype) in _compiler.ready:
        return True
    return os.environ.get("COUNTERFLOW_COMPILE") == "foreground" or _compiler.look(kernels, dtype)


def compile_all() -> None:
    """Compile the kernels that the command line names after the dtype, and keep them on disk."""
    if hasattr(os, "nice"):
        os.nice(10)
    dtype = DTYPES[sys.argv[1]]
    with _alone():
        for name in sys.argv[2:]:
            address_of(_kernel(name), dtype)


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other process compiles into this cache; Windows has no such lock."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    folder = Path(FunctionCache(chain_forward).cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "compiling.lock").open("w") as file:  # the system releases the lock when the process ends
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
