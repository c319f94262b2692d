"""Objectives of distillation: layer by layer, and the flow as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from counterflow.distill.student import Trace, known_params, solved_layer, trace_teacher
from counterflow.flows.contexts import device_of, draw_contexts
from counterflow.flows.flow import Flow
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform


def layer_objective(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int
) -> Callable[[Flow, None], Tensor]:
    """All layers at once, each fed by the teacher: minus the sum of their losses, (N,), in nats near the end."""

    def objective(student: Flow, _: None) -> Tensor:
        traces, c = trace_teacher(teacher, parts, draw, n)
        total = traces[0].v.new_zeros(len(traces[0].v))
        # the student's transform is a chain of as many parts
        for part, ours, trace in zip(parts, student.transform, traces, strict=True):  # type: ignore[call-overload]
            if (layer := solved_layer(part)) is not None:
                total = total - _layer_loss(layer, ours, trace, c)
        return total

    return objective


def _layer_loss(layer: Autoregressive, ours: Transform, trace: Trace, c: Tensor | None) -> Tensor:
    """How far the teacher's layer takes the student's u' from v: sqrt(1 + 2 e) - 1, e as in `distill`, (N,)."""
    v = trace.v
    u, ours_slope = ours.forward_by_feature(v, torch.zeros_like(v), c if ours.context else None)
    w, slope = layer.univariate.forward(u[..., layer.order], known_params(trace))
    squares = (w - v[..., layer.order]).square() + (slope + ours_slope[..., layer.order]).square()
    return torch.sqrt(1 + squares.sum(-1)) - 1


def flow_objective(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int, forward: float
) -> Callable[[Flow, None], Tensor]:
    """One term: -KL(student || teacher), with the path gradient, less forward times KL(teacher || student)."""

    def objective(student: Flow, _: None) -> Tensor:
        c, shape = draw_contexts(draw, n, device_of(teacher))
        z, log_q = student(c).rsample_and_path_log_prob(shape)
        terms = (teacher(c).log_prob(z) - log_q).mean()
        if forward:
            traces, c = trace_teacher(teacher, parts, draw, n)
            x = traces[-1].u
            terms = terms + forward * (student(c).log_prob(x) - teacher(c).log_prob(x)).mean()
        return terms

    return objective
