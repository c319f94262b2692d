"""Both substitutions on a GPU.

Plain networks with affine, gated and spline maps have Triton kernels, for float32. Everything else is `sliced`, degree
by degree, in a CUDA graph. With TRITON_INTERPRET=1 Triton runs the kernels on a CPU; that is how they are tested.

    maps          the univariate maps and activations
    substitution  the two kernels
    splines       the rational-quadratic spline in the one-pass direction, with its gradient
    graphs        CUDA graphs, kept by shape
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from counterflow.engine import sliced
from counterflow.engine.contract import Adjoints, Layout, Solution, System
from counterflow.engine.gpu.graphs import Graphs
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline

_graphs = Graphs()


def runs_on(device: torch.device) -> bool:
    """Return True for CUDA, and for a CPU where Triton interprets the kernels."""
    return device.type == "cuda" or (device.type == "cpu" and is_interpreted())


def is_interpreted() -> bool:
    """Return True if Triton is installed and its interpreter is on."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(layout: Layout, dtype: torch.dtype) -> bool:
    """Return True if Triton kernels solve this layout; the interpreter also knows float64."""
    if not _has_triton() or not (dtype == torch.float32 or is_interpreted()):
        return False
    return bool(import_module("counterflow.engine.gpu.substitution").supports(layout))


def fuses(univariate: Univariate, x: Tensor) -> bool:
    """Return True if `splines` computes this map at x in the one-pass direction."""
    if not isinstance(univariate, RationalQuadraticSpline) or not runs_on(x.device) or not _has_triton():
        return False
    return not univariate.clipped and (x.dtype == torch.float32 or is_interpreted())


def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """See `Body`."""
    if has_kernels(system.layout, y.dtype):
        with torch.cuda.device_of(y):  # Triton launches on the current device
            return _kernels().forward_substitution(system, y, keep=keep)

    def run(tensors: Any) -> list[Tensor]:
        found = sliced.forward_substitution(_system(system.layout, tensors[1:]), tensors[0], iterate=False)
        return [found.x, found.log_det, found.params, *found.hidden]

    tensors = [y, *system.biases, *system.weights]
    x, log_det, params, *hidden = _replay(("forward", system.layout), run, tensors)
    return Solution(x, log_det, params, tuple(hidden))


def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """See `Body`."""
    if has_kernels(system.layout, v.dtype):
        with torch.cuda.device_of(v):
            return _kernels().back_substitution(system, solution, v, w)
    layers = len(system.layout.ends)

    def run(tensors: Any) -> list[Tensor]:
        v, w, x, log_det, params, *rest = tensors
        at = Solution(x, log_det, params, tuple(rest[: layers - 1]))
        found = sliced.back_substitution(_system(system.layout, rest[layers - 1 :]), at, v, w, iterate=False)
        return [found.u, found.params, *found.hidden]

    known = [v, w, solution.x, solution.log_det, solution.params, *solution.hidden]
    u, params, *hidden = _replay(("back", system.layout), run, [*known, *system.biases, *system.weights])
    return Adjoints(u, params, tuple(hidden))


def _replay(name: Any, run: Any, tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return run(tensors)
    with torch.cuda.device_of(tensors[0]):
        return _graphs((*name, torch.cuda.current_stream()), run, tensors)


def _system(layout: Layout, tensors: list[Tensor]) -> System:
    """Return the system of biases and weights, in that order."""
    layers = len(layout.ends)
    return System(layout, tuple(tensors[layers:]), tuple(tensors[:layers]))


def _kernels() -> Any:
    return import_module("counterflow.engine.gpu.substitution")
