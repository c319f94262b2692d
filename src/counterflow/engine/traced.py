"""The body for torch.compile: each substitution is one custom operator, opaque to the compiler.

Inside the operators runs the body that the layer's solver selects. They return contiguous copies, as a compiled graph
expects of an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from counterflow.engine.contract import LAYOUTS, Adjoints, Solution, System
from counterflow.engine.solve import body_for


@dataclass(frozen=True)
class Traced:
    """Both substitutions as operators, computed by the solver of that name."""

    solver: str

    def forward_substitution(self, system: System, y: Tensor, *, keep: bool = True) -> Solution:
        """Solve f(x) = y; see `Body`."""
        x, log_det, *kept = torch.ops.counterflow.forward_substitution(
            self.solver, system.layout.name, y, list(system.biases), list(system.weights), keep
        )
        return Solution(x, log_det, kept[0], tuple(kept[1:])) if keep else Solution(x, log_det, x, ())

    def back_substitution(self, system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
        """Solve J^T u = v - w dlog_det/dx; see `Body`."""
        known = [solution.x, solution.log_det, solution.params, *solution.hidden]
        u, params, *hidden = torch.ops.counterflow.back_substitution(
            self.solver, system.layout.name, known, list(system.biases), list(system.weights), v, w
        )
        return Adjoints(u, params, tuple(hidden))


def _contiguous_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone(memory_format=torch.contiguous_format) for t in tensors]


@torch.library.custom_op(
    "counterflow::forward_substitution",
    mutates_args=(),
    schema="(str solver, str layout, Tensor y, Tensor[] biases, Tensor[] weights, bool keep) -> Tensor[]",
)
def _forward(
    solver: str, layout: str, y: Tensor, biases: Sequence[Tensor], weights: Sequence[Tensor], keep: bool
) -> list[Tensor]:
    system = System(LAYOUTS[layout], tuple(weights), tuple(biases))
    solution = body_for(solver, system.layout, y).forward_substitution(system, y, keep=keep)
    kept = [solution.params, *solution.hidden] if keep else []
    return _contiguous_copies([solution.x, solution.log_det, *kept])


@_forward.register_fake
def _(
    solver: str, layout: str, y: Tensor, biases: Sequence[Tensor], weights: Sequence[Tensor], keep: bool
) -> list[Tensor]:
    N, D = y.shape
    *hidden, params = (bias.shape[-1] for bias in biases)
    kept = [(N, D, params // D), *((N, size) for size in hidden)] if keep else []
    return [y.new_empty(shape) for shape in [(N, D), (N,), *kept]]


@torch.library.custom_op(
    "counterflow::back_substitution",
    mutates_args=(),
    schema="(str solver, str layout, Tensor[] known, Tensor[] biases, Tensor[] weights, Tensor v, Tensor w)"
    " -> Tensor[]",
)
def _back(
    solver: str,
    layout: str,
    known: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    v: Tensor,
    w: Tensor,
) -> list[Tensor]:
    system = System(LAYOUTS[layout], tuple(weights), tuple(biases))
    x, log_det, params, *hidden = known
    solution = Solution(x, log_det, params, tuple(hidden))
    adjoints = body_for(solver, system.layout, v).back_substitution(system, solution, v, w)
    return _contiguous_copies([adjoints.u, adjoints.params, *adjoints.hidden])


@_back.register_fake
def _(
    solver: str,
    layout: str,
    known: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    v: Tensor,
    w: Tensor,
) -> list[Tensor]:
    x, _, *others = known
    return [x.new_empty(t.shape) for t in (x, *others)]
