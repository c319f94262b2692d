"""Stan programs as compiled libraries, built here with httpstan's copy of Stan or by BridgeStan."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from counterflow.posterior.targets.target import Array

INTERFACE = Path(__file__).with_name("stan.cpp")

# The flags with which httpstan compiles its models. The libraries that it ships have the ABI of manylinux2014.
FLAGS = ("-shared", "-fPIC", "-O3", "-std=c++17", "-w", "-D_GLIBCXX_USE_CXX11_ABI=0")
DEFINES = ("-DSTAN_THREADS", "-D_REENTRANT", "-DBOOST_DISABLE_ASSERTS", "-DBOOST_PHOENIX_NO_VARIADIC_EXPRESSION")
LIBRARIES = ("-lsundials_cvodes", "-lsundials_idas", "-lsundials_nvecserial", "-ltbb")

Points = np.ctypeslib.ndpointer(np.float64, flags="C_CONTIGUOUS")
Size, Handle, Text = ctypes.c_long, ctypes.c_void_p, ctypes.c_char_p
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "open": (Text, ctypes.c_uint, ctypes.POINTER(Handle)),
    "names": (Handle, ctypes.c_int),
    "density": (Handle, Points, Size, Size, Points, Points),
    "reason": (Handle, Points, Size),
    "constrain": (Handle, Points, Size, Size, Size, ctypes.c_uint, Points),
    "unconstrain": (Handle, Points, Size, Size, Size, Points),
}


class StanLibrary(Protocol):
    """Compiled Stan program with its data.

    Attributes:
        coordinates: Stan's names of the D unconstrained coordinates: "theta.1" is the first element of theta.
        parameters: Stan's names of the elements of the parameters.
        names: Stan's names of the elements of all variables that the program computes, the parameters first.
    """

    coordinates: list[str]
    parameters: list[str]
    names: list[str]

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        """Return log p (B,) with Jacobian and constants at theta (B, D), and its gradient (B, D).

        A point that the program rejects has log p = -inf and a gradient of 0.
        """

    def constrain(self, theta: Array) -> Array:
        """Return all variables that the program computes at theta (S, D): (S, len(names))."""

    def unconstrain(self, values: Array) -> Array:
        """Return theta (S, D) of parameters (S, len(parameters))."""

    def rejection_reason(self, theta: Array) -> str:
        """Return Stan's message if the program rejects theta (1, D), else an empty string."""


def open_library(code: str, data: str) -> StanLibrary:
    """Return the library of a Stan program with its data, compiling it unless the cache holds it.

    Args:
        code: the program.
        data: the data, as JSON.

    Raises:
        ImportError: neither httpstan nor BridgeStan is installed, or there is no C++ compiler.
        ValueError: the program does not compile, or the data do not fit it.
    """
    if importlib.util.find_spec("bridgestan") and _bridgestan_sources().is_dir():
        return BridgeStan(code, data)
    if importlib.util.find_spec("httpstan"):
        return HttpStan(code, data)
    raise ImportError("expected httpstan for Stan programs, got no such package; pip install 'counterflow[stan]'")


class HttpStan:
    """Library built here from the program and the interface in stan.cpp."""

    def __init__(self, code: str, data: str) -> None:
        # Load this environment's libtbb first: the cached library may come from an environment that is gone.
        ctypes.CDLL(str(_httpstan_path("lib/libtbb.so.2")))
        library = ctypes.CDLL(str(compile_program(code)))
        self._functions = {name: library[f"counterflow_{name}"] for name in SIGNATURES}
        for name, function in self._functions.items():
            function.argtypes, function.restype = SIGNATURES[name], Text
        self._model = Handle()
        message = self._functions["open"](data.encode(), 0, self._model)
        _raise_if(message, f"data that fit the program, got {', '.join(json.loads(data)) or 'none'}")
        close = library.counterflow_close
        close.argtypes = (Handle,)
        weakref.finalize(self, close, self._model)
        self.coordinates = self._names(0)
        self.parameters = self._names(1)
        self.names = self._names(2)
        self._pool = ThreadPoolExecutor(os.cpu_count())

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        value = np.empty(len(theta))
        gradient = np.empty(theta.shape)
        parts = min(torch.get_num_threads(), len(theta))
        batches = [np.array_split(array, parts) for array in (theta, value, gradient)]
        for message in (self._pool.map if parts > 1 else map)(self._density, *batches):
            _raise_if(message, "a density at every point")
        return value, gradient

    def constrain(self, theta: Array) -> Array:
        values = np.empty((len(theta), len(self.names)))
        message = self._functions["constrain"](self._model, theta, *theta.shape, values.shape[1], 0, values)
        _raise_if(message, "generated quantities at every point")
        return values

    def unconstrain(self, values: Array) -> Array:
        theta = np.empty((len(values), len(self.coordinates)))
        message = self._functions["unconstrain"](self._model, values, *theta.shape, values.shape[1], theta)
        _raise_if(message, "values within their constraints")
        return theta

    def rejection_reason(self, theta: Array) -> str:
        message: bytes | None = self._functions["reason"](self._model, theta, theta.size)
        return _decode(message) if message else ""

    def _density(self, theta: Array, value: Array, gradient: Array) -> bytes | None:
        return self._functions["density"](self._model, theta, *theta.shape, value, gradient)

    def _names(self, kind: int) -> list[str]:
        """Return names of coordinates (kind 0), parameters (1) or all variables (2)."""
        return self._functions["names"](self._model, kind).decode().splitlines()


class BridgeStan:
    """Library built by BridgeStan (Roualdes et al. 2023), with one call for each point."""

    def __init__(self, code: str, data: str) -> None:
        import bridgestan

        source = _cache() / f"bridgestan-{_digest(code)}.stan"  # BridgeStan writes the library beside it
        source.write_text(code, "utf-8")
        try:
            self._model = bridgestan.StanModel(str(source), data, make_args=["STAN_THREADS=True"])
        except RuntimeError as error:
            raise ValueError(f"expected a Stan program and data that fit it, got {error}") from error
        self.coordinates = self._model.param_unc_names()
        self.parameters = self._model.param_names()
        self.names = self._model.param_names(include_tp=True, include_gq=True)

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        results = [self._density(row) for row in theta]
        return np.array([value for value, _ in results]), np.stack([gradient for _, gradient in results])

    def constrain(self, theta: Array) -> Array:
        random = self._model.new_rng(0)
        rows = [self._model.param_constrain(row, include_tp=True, include_gq=True, rng=random) for row in theta]
        return np.stack(rows)

    def unconstrain(self, values: Array) -> Array:
        return np.stack([self._model.param_unconstrain(row) for row in values])

    def rejection_reason(self, theta: Array) -> str:
        try:
            self._model.log_density(theta[0], propto=False)
        except RuntimeError as error:
            return str(error)
        return ""

    def _density(self, theta: Array) -> tuple[float, Array]:
        try:
            return self._model.log_density_gradient(theta, propto=False)
        except RuntimeError:  # the program rejects the point
            return -np.inf, np.zeros(len(theta))


def compile_program(code: str) -> Path:
    """Return the path of a Stan program's library, compiling it unless the cache holds it.

    The file is named by a digest of everything that it depends on.

    Raises:
        ImportError: there is no C++ compiler.
        ValueError: the program does not compile.
    """
    library = _cache() / f"{_digest(code)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _build(code, library.stem, Path(folder)).replace(library)
    return library


def _build(code: str, digest: str, folder: Path) -> Path:
    (folder / "program.stan").write_text(code, "utf-8")
    stanc = [str(_httpstan_path("stanc")), "--name", f"model_{digest}", "--print-cpp", "program.stan"]
    cpp = _run(stanc, folder, "a Stan program")
    (folder / "program.cpp").write_text(cpp + INTERFACE.read_text("utf-8"), "utf-8")
    paths = [f"-I{_httpstan_path('include')}", f"-L{_httpstan_path('lib')}"]
    compiler = [_compiler(), *FLAGS, *DEFINES, "program.cpp", "-o", "program.so", *paths, *LIBRARIES]
    _run(compiler, folder, "C++ that compiles")
    return folder / "program.so"


def _run(command: list[str], folder: Path, expected: str) -> str:
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if completed.returncode:
        raise ValueError(f"expected {expected}, got\n{completed.stderr.strip()[-2000:]}")
    return completed.stdout


def _httpstan_path(part: str) -> Path:
    """Return the path of a file or folder inside the httpstan package."""
    return Path(importlib.util.find_spec("httpstan").submodule_search_locations[0], part)  # type: ignore[union-attr, index]


def _compiler() -> str:
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        raise ImportError(
            f"expected a C++ compiler, which Stan needs, got none called {name}; install g++, or set the environment "
            "variable CXX to another one"
        )
    return name


def _raise_if(message: bytes | None, expected: str) -> None:
    if message:
        raise ValueError(f"expected {expected}: {_decode(message)}")


def _decode(message: bytes) -> str:
    return message.decode().removeprefix("Exception: ")


def _digest(code: str) -> str:
    parts = [code, INTERFACE.read_text("utf-8"), sys.platform, platform.machine(), *FLAGS, *DEFINES, *LIBRARIES]
    if importlib.util.find_spec("httpstan"):
        parts.append(importlib.metadata.version("httpstan"))
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=10).hexdigest()


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "counterflow"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _bridgestan_sources() -> Path:
    version = importlib.metadata.version("bridgestan")
    return Path(os.environ.get("BRIDGESTAN") or Path.home() / ".bridgestan" / f"bridgestan-{version}")
