"""Objectives of distillation: all layers separately, and the flow as a whole."""

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
    """Return the objective of the layer steps: minus the sum of the layers' losses, (N,), each fed by the teacher.

    The sum approaches nats as the student becomes exact.
    """

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
    """Return the loss of one layer, sqrt(1 + 2 e) - 1 with e the term of `distill`, (N,)."""
    v = trace.v
    u, ours_slope = ours.forward_by_feature(v, torch.zeros_like(v), c if ours.context else None)
    w, slope = layer.univariate.forward(u[..., layer.order], known_params(trace))
    squares = (w - v[..., layer.order]).square() + (slope + ours_slope[..., layer.order]).square()
    return torch.sqrt(1 + squares.sum(-1)) - 1


def flow_objective(
    teacher: Flow, parts: list[Transform], draw: Callable[[int], Tensor | None], n: int, forward_kl_weight: float
) -> Callable[[Flow, None], Tensor]:
    """Return the objective of the flow steps: -KL(student || teacher) - forward_kl_weight KL(teacher || student).

    The first has the path gradient; the result is one number.
    """

    def objective(student: Flow, _: None) -> Tensor:
        c, shape = draw_contexts(draw, n, device_of(teacher))
        z, log_q = student(c).rsample_and_path_log_prob(shape)
        terms = (teacher(c).log_prob(z) - log_q).mean()
        if forward_kl_weight:
            traces, c = trace_teacher(teacher, parts, draw, n)
            x = traces[-1].u
            terms = terms + forward_kl_weight * (student(c).log_prob(x) - teacher(c).log_prob(x)).mean()
        return terms

    return objective
