"""The student: a flow built layer by layer from the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from counterflow.flows.contexts import device_of, draw_contexts
from counterflow.flows.flow import Flow
from counterflow.made.graph import ancestors
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Whiten
from counterflow.univariate.affine import Affine
from counterflow.univariate.base import Univariate
from counterflow.univariate.sinh_arcsinh import SinhArcsinh
from counterflow.univariate.spline import RationalQuadraticSpline

EXTREME = 0.02  # fraction of the teacher's draws, the outermost ones, that the student is not trained on
PILOT = 8192  # draws of the teacher to which the student's linear maps are fitted
# Settings that fit hidden layers of any size.
PLAIN = ("features", "context", "univariate", "degrees", "activation", "adjacency")


def solved_layer(part: Transform) -> Autoregressive | None:
    """Return the autoregressive layer that a part solves, or None."""
    if isinstance(part, Inverse) and isinstance(part.transform, Autoregressive):
        return part.transform
    return None


class Trace(NamedTuple):
    """Inputs and outputs of one part of the teacher for N draws."""

    v: Tensor  # input, (N, D)
    u: Tensor  # output, (N, D)
    params: Tensor | None  # parameters of a solved layer, (N, D, P), with features sorted by degree


@torch.no_grad()
def trace_teacher(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int
) -> tuple[list[Trace], Tensor | None]:
    """Send draws through all parts of the teacher; return the traces and the contexts without the outermost draws."""
    c, shape = draw_contexts(draw, n, device_of(teacher))
    v = teacher(c).base.sample(torch.Size(shape))
    far, traces = v.new_zeros(n), []
    for part in parts:
        given = c if part.context else None
        u, layer = part(v, given)[0], solved_layer(part)
        params = None if layer is None else layer.made(u[..., layer.order], given)
        far = torch.maximum(far, u.abs().amax(1).nan_to_num(math.inf))
        traces.append(Trace(v, u, params))
        v = u
    kept = far <= torch.quantile(far, 1 - EXTREME, interpolation="lower")
    picked = [Trace(v[kept], u[kept], None if params is None else params[kept]) for v, u, params in traces]
    return picked, None if c is None else c[kept]


def mirror(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], hidden: tuple[int, ...]
) -> Flow:
    """Return the teacher with each solved layer replaced by a layer that takes one pass and is close to it."""
    strange = [part for part in parts if solved_layer(part) is None and part.forward_cost != "one pass"]
    if strange:
        raise ValueError(
            f"expected a teacher of autoregressive layers and maps of one pass, got {type(strange[0]).__name__}; give "
            "student=cf.IAF(...)"
        )
    traces, _ = trace_teacher(teacher, parts, draw, PILOT)
    made = [
        copy.deepcopy(part) if (layer := solved_layer(part)) is None else _mirrored(layer, trace, hidden)
        for part, trace in zip(parts, traces, strict=True)
    ]
    return Flow(copy.deepcopy(teacher.base), Compose(made)).requires_grad_()


def _mirrored(layer: Autoregressive, trace: Trace, hidden: tuple[int, ...]) -> Transform:
    """Return a layer that takes one pass from v to u: a linear map if degrees ascend, then an autoregressive layer."""
    config = {**layer.config(), "univariate": _univariate(layer.univariate)}
    if hidden and hidden != layer.hidden:
        config = {k: v for k, v in config.items() if k in PLAIN} | {"hidden": hidden}
    if layer.parents is not None:  # the inverse of a layer depends on all ancestors
        config["adjacency"] = ancestors(layer.parents)
    made = Autoregressive(**config).to(trace.v)
    if made.hidden == layer.hidden and layer.parents is None:
        # The teacher's parameters are linear in its last hidden units, so these are good features of u, and after the
        # linear map the student's input is close to u. The layer that computes the parameters starts afresh.
        last = f"layers.{len(layer.hidden)}."
        anew = (last, "skip_to_output", "context_to_output")
        theirs = {k: v for k, v in layer.made.state_dict().items() if not k.startswith(anew)}
        made.made.load_state_dict(theirs, strict=False)
    if list(layer.degrees) != sorted(layer.degrees):
        return made
    return Compose([_linear(layer, trace), made])


def _univariate(univariate: Univariate) -> Univariate:
    """Return the map of the student's layers: the teacher's if its inverse is of the same kind, else affine."""
    return univariate if isinstance(univariate, Affine | RationalQuadraticSpline | SinhArcsinh) else Affine()


def _linear(layer: Autoregressive, trace: Trace) -> Inverse:
    """Fit u = mean + L v: L_ii is the geometric mean of du_i/dv_i, the rest is least squares on lower degrees."""
    v, u = trace.v.double(), trace.u.double()
    slope = -layer.univariate.forward(trace.u, known_params(trace))[1].double().mean(0)
    ones = torch.cat([v.new_ones(len(v), 1), v], 1)
    gram, rest = ones.T @ ones / len(v), ones.T @ (u - v * slope.exp()) / len(v)
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    mean, factor = torch.zeros_like(slope), torch.diag(slope.exp())
    for i, d in enumerate(layer.degrees):
        seen = 1 + sum(other < d for other in layer.degrees)
        row = torch.linalg.solve(gram[:seen, :seen], rest[:seen, i])
        mean[i], factor[i, : seen - 1] = row[0], row[1:]
    return Inverse(Whiten(mean.to(trace.v), factor.to(trace.v)))


def known_params(trace: Trace) -> Tensor:
    """Return the parameters of a solved layer's trace."""
    if trace.params is None:
        raise ValueError("expected the trace of a solved layer, got one without parameters")
    return trace.params


def check_student(student: Flow, teacher: Flow) -> Flow:
    """Return a copy of the student that was given, or raise ValueError if it does not fit the teacher."""
    if (student.features, student.context) != (teacher.features, teacher.context):
        raise ValueError(
            f"expected a student with features={teacher.features} and context={teacher.context}, got features="
            f"{student.features} and context={student.context}"
        )
    if student.transform.forward_cost != "one pass":
        raise ValueError(f"expected a student that samples in one pass, such as an IAF, got\n{student!r}")
    return copy.deepcopy(student)
