"""Forward and back substitution on the CPU, compiled with Numba for float32 and float64.

`supports` lists what is compiled; `forward_substitution` and `back_substitution` are the two functions of the contract.

The rows of a batch are independent. So one tile of rows is solved from the first degree to the last while everything
that the network computes for it stays in cache, and threads take tiles from a common counter. Buffers are
feature-major, (units, rows): each weight multiplies a vector of rows.

The files of this folder:

    jobs          the table of numbers and addresses that a kernel reads
    threads       runs a kernel on torch's threads
    compilation   compiles a kernel once and keeps it on disk
    arrays        matrices at an address, and the product of two
    elementary    exp, tanh and the like, written so that LLVM vectorises them; the activations
    affine        affine and gated maps
    spline        rational-quadratic splines
    sinh_arcsinh  sinh-arcsinh maps
    substitution  the two kernels

and for the one-pass direction of a chain of layers:

    fields        named positions in the job of a chain
    chain         the job of a chain
    panels        products of packed weights
    maps          the affine maps and splines of all features, by address
    passes        the three kernels: value, pullback, push of a score

    background    compiles kernels in another process
"""

from __future__ import annotations

import torch
from torch import Tensor

from counterflow.engine.contract import Adjoints, Layout, Solution, System
from counterflow.engine.cpu.background import SOLVE_KERNELS, ready
from counterflow.engine.cpu.elementary import ACTIVATION_CODES
from counterflow.engine.cpu.jobs import MAP_TYPES, padded_rows, plan_for, run
from counterflow.engine.cpu.substitution import back_kernel, forward_kernel


def supports(layout: Layout) -> bool:
    """Return True if the activation and the univariate map are compiled."""
    return layout.activation in ACTIVATION_CODES and type(layout.univariate) in MAP_TYPES


def is_ready(dtype: torch.dtype) -> bool:
    """Return True if both substitutions can run at once; False while another process compiles them."""
    return ready(SOLVE_KERNELS, dtype)


def forward_substitution(system: System, y: Tensor, *, keep: bool = True) -> Solution:
    """Solve f(x) = y tile by tile; see `Body.forward_substitution`."""
    plan = plan_for(system.layout, y.dtype)
    N, D = y.shape
    padded = padded_rows(y)
    x = y.new_empty(D, padded)
    log_det = y.new_empty(1, padded)
    record = y.new_empty(plan.recorded if keep else 0, padded)
    run(forward_kernel, plan, system.weights, (y, *system.biases), (x, record, log_det), N)
    params, hidden = plan.split(record[:, :N]) if keep else (record, ())
    return Solution(x[:, :N].T, log_det[0, :N], params, hidden)


def back_substitution(system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
    """Solve J^T u = v - w dlog_det/dx tile by tile; see `Body.back_substitution`."""
    plan = plan_for(system.layout, v.dtype)
    N, D = v.shape
    padded = padded_rows(v)
    u = v.new_empty(D, padded)
    record = v.new_empty(plan.recorded, padded)
    inputs = (solution.x, *solution.hidden, solution.params.flatten(1), v, w[:, None])
    run(back_kernel, plan, system.weights, inputs, (u, record), N)
    return Adjoints(u[:, :N].T, *plan.split(record[:, :N]))
