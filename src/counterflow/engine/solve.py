"""The choice of a body, and the gradient of the solve.

A body is a module with the two functions of the contract below. `reference` is the definition; every other body
returns the same numbers, faster. Bodies do not use autograd: the gradient of the solve is implemented here, once.

    forward_substitution(system, y, keep=True)            -> Solution
    back_substitution(system, solution, v, w)             -> Adjoints

Source: the solve of MADE flows with gradients by the implicit function theorem is Counterflow's own. Caching
the past of an autoregressive network: Ramachandran et al. 2017, "Fast generation for convolutional
autoregressive models".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as functions_are_transformed
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__
from torch.nn import Parameter

from counterflow.checks import one_of
from counterflow.engine.contract import Body, Layout, Solution, System
from counterflow.made.staircase import Staircase, is_batched, weight_gradient
from counterflow.univariate.base import Univariate

# Largest number of values of the network that a solve without gradients holds at a time: 128 MiB in float32.
MAX_VALUES = 1 << 25
SOLVERS = ("auto", "reference", "sliced", "cpu", "gpu")


def check_solver(name: str) -> str:
    """Return the name of a solver, or raise ValueError if there is none of that name."""
    one_of(name, "solver", SOLVERS)
    return name


def is_transformed() -> bool:
    """Return True where torch must see, and differentiate, every operation.

    That is inside the transforms of torch.func, under torch.jit.trace, and under dispatch modes such as make_fx.
    """
    if torch.compiler.is_compiling():  # the compiler sees one operator: see traced.py
        return False
    return functions_are_transformed() or is_tracing() or torch._C._len_torch_dispatch_stack() > 0


def has_memory(*tensors: Tensor) -> bool:
    """Return True if compiled code can read these tensors: wrapper subclasses and fake tensors have no memory."""
    return all(type(t) in (Tensor, Parameter) and not torch._is_functional_tensor(t) for t in tensors)


def body_for(solver: str, layout: Layout, *tensors: Tensor) -> Body:
    """Return the body of a solver's name; "auto" is `cpu` if it supports both and is compiled, else `sliced`.

    At the sizes of benchmarks/results/bench.md `sliced` takes 2.6 to 9 times as long as `cpu` (EPYC 9004, two cores;
    measured before it had blocks). `gpu` has not been timed, so "auto" is `sliced` on every device but the CPU.
    """
    if torch.compiler.is_compiling():
        from counterflow.engine.traced import Traced

        return Traced(solver)
    if solver == "gpu" and not runs_on_gpu(*tensors):
        raise ValueError(
            f"expected plain tensors on cuda for solver='gpu', got tensors on {tensors[0].device}, or tensors that "
            "torch traces or transforms; use solver='auto'"
        )
    if solver in ("auto", "cpu"):
        # Imported at the first solve, because it imports Numba.
        device = tensors[0].device.type
        readable = has_memory(*tensors) and not is_transformed()
        supported = device == "cpu" and readable and import_module("counterflow.engine.cpu").supports(layout)
        if solver == "cpu" and not supported:
            came = f"{layout.univariate} on {device}" if readable else "tensors that torch traces or transforms"
            raise ValueError(
                f"expected a map of this library on the CPU for solver='cpu', got {came}; use solver='auto'"
            )
        if solver == "auto" and supported:  # "cpu" waits for the compiler
            supported = import_module("counterflow.engine.cpu").is_ready(tensors[0].dtype)
        solver = "cpu" if supported else "sliced"
    return import_module(f"counterflow.engine.{solver}")


def runs_on_gpu(*tensors: Tensor) -> bool:
    """Return True if the kernels of `engine.gpu` can read these tensors."""
    device = tensors[0].device
    return has_memory(*tensors) and not is_transformed() and import_module("counterflow.engine.gpu").runs_on(device)


def univariate_forward(solver: str, univariate: Univariate, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Return univariate.forward(x, params); solver "gpu" has a kernel for splines."""
    if solver != "gpu" or torch.compiler.is_compiling() or not runs_on_gpu(x, params):
        return univariate.forward(x, params)
    if not import_module("counterflow.engine.gpu").fuses(univariate, x):
        return univariate.forward(x, params)
    y, log_slope = import_module("counterflow.engine.gpu.splines").forward(univariate, x, params)
    return y, log_slope


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off; a null context if it is off already, which saves 10 us."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # the meta device has no autocast
        return nullcontext()
    return torch.autocast(device, enabled=False)


def solve(body: Body, system: System, staircases: Sequence[Staircase], y: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with f(x) = y and log|det dx/dy|, differentiable once in y, the weights and the biases.

    The gradient follows from the implicit function theorem. One back substitution gives u = J^-T (...), the gradient
    with respect to y. The gradient of a weight is minus the product of its output's adjoints and its inputs, masked by
    its staircase. Without gradients, a large batch is solved in parts to bound the memory.
    """
    tensors = (*system.biases, *system.weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (y, *tensors)):
        return _Solve.apply(body, system.layout, staircases, y, *tensors)
    values_per_row = sum(len(weight) for weight in system.weights)
    if len(y) * values_per_row <= MAX_VALUES:
        return body.forward_substitution(system, y, keep=False)[:2]
    rows = max(1, MAX_VALUES // values_per_row)
    parts = [body.forward_substitution(*part, keep=False)[:2] for part in _split_rows(system, y, rows)]
    x, log_det = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, log_det


def _split_rows(system: System, y: Tensor, rows: int) -> Iterator[tuple[System, Tensor]]:
    for first in range(0, len(y), rows):
        part = slice(first, first + rows)
        biases = tuple(bias[part] if bias.dim() == 2 else bias for bias in system.biases)
        yield System(system.layout, system.weights, biases), y[part]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: Body, layout: Layout, staircases: Sequence[Staircase], y: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        L = len(layout.ends)
        solution = body.forward_substitution(System(layout, tensors[L:], tensors[:L]), y)
        ctx.body = body
        ctx.layout = layout
        ctx.staircases = staircases
        ctx.save_for_backward(solution.x, solution.log_det, solution.params, *solution.hidden, *tensors)
        return solution.x, solution.log_det

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor, log_det_bar: Tensor) -> tuple[Tensor | None, ...]:
        if is_batched(x_bar) or is_batched(log_det_bar):
            raise RuntimeError(
                "expected one cotangent at a time for the solved direction of an autoregressive map, got "
                "is_grads_batched=True; use torch.func.vmap, torch.func.jacrev, or the one-pass direction"
            )
        needed = ctx.needs_input_grad[4:]
        with without_autocast(x_bar.device.type):
            grads = _SolveBackward.apply(
                ctx.body, ctx.layout, ctx.staircases, needed, x_bar, log_det_bar, *ctx.saved_tensors
            )
        return None, None, None, *grads


class _SolveBackward(torch.autograd.Function):
    """Backward pass as a Function of its own, so that a second derivative raises an error and is not silently zero."""

    @staticmethod
    def forward(
        ctx: Any,
        body: Body,
        layout: Layout,
        staircases: Sequence[Staircase],
        needed: Sequence[bool],
        v: Tensor,
        w: Tensor,
        *saved: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, log_det, params, *rest = saved
        L = len(layout.ends)  # then L - 1 hidden layers, L biases, and L or L + 1 weights
        hidden, biases, weights = rest[: L - 1], rest[L - 1 : 2 * L - 1], rest[2 * L - 1 :]
        system = System(layout, tuple(weights), tuple(biases))
        solution = Solution(x, log_det, params, tuple(hidden))
        # The gradients of weights and biases have the opposite sign, so the system is solved for -v and -w.
        minus = body.back_substitution(system, solution, -v, -w)

        into = (*minus.hidden, minus.params.flatten(1))  # adjoints of each layer's output, with the opposite sign
        grads: list[Tensor | None] = [None] * (L + len(weights))
        for k in range(L):
            if needed[k]:
                grads[k] = into[k] if biases[k].dim() == 2 else into[k].sum(0)
            if needed[L + k]:
                fed = x if k == 0 else layout.output(k - 1, hidden[k - 1])
                grads[L + k] = weight_gradient(staircases[k], into[k], fed)
        if layout.links.skip_to_output and needed[2 * L]:
            grads[2 * L] = weight_gradient(staircases[L], into[-1], x)
        return -minus.u, *grads

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "expected first derivatives of the solved direction of an autoregressive map, got a second one; "
            "build the flow the other way round, so that what you differentiate twice is the one-pass direction"
        )
