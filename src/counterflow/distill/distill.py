"""Distillation: train a student that samples in one pass, such as an IAF, to follow a teacher that does not.

The teacher maps eps to x through layers that are solved, v -> u with v_i = g(u_i; theta_i(u_j, j < i)). The map
v -> u is itself triangular, in the same order, so one pass of a student layer from v to u can equal it.

    layers    each student layer learns its teacher layer on the teacher's own draws, all layers at once
    flow      the student as one flow: KL(student || teacher), by the path gradient
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

from counterflow.distill.config import EPOCH, DistillConfig
from counterflow.distill.losses import flow_objective, layer_objective
from counterflow.distill.student import check_student, mirror, solved_layer
from counterflow.flows.contexts import Contexts, contexts_of, device_of
from counterflow.flows.flow import Flow
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import History, OnEpoch, OnStep
from counterflow.training.tracking import Tracker, tracked

Task = Literal["layers", "flow"]
EVALUATIONS = 8  # batches of draws in each evaluation


class Distilled(NamedTuple):
    """A student and the history of each of its trainings."""

    student: Flow
    histories: dict[Task, History]


def distill(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    tracker: Tracker | None = None,
) -> Flow:
    """Train a flow that samples in one pass to follow the teacher's distribution: for a `MAF` an `IAF`.

        KL(student || teacher) = E[log q(z | c) - log p(z | c)],  z ~ q        plus forward_kl_weight times
        KL(teacher || student) = E[log p(x | c) - log q(x | c)],  x ~ p

    in nats, averaged over the contexts. Both densities are exact and cost about one pass, so no data are needed. The
    student has the teacher's layers, orders, base and constant maps. Each layer that the teacher solves, v -> u,
    becomes a linear map fitted to the teacher's draws, followed by an autoregressive layer with the teacher's hidden
    weights. The layer steps train these layers by

        E sum_i ((w_i - v_i)^2 + (log dw_i/dv_i)^2) / 2,    w_i = g(u'_i; theta_i(u_j, j < i))

    where u' is the student's output and g, theta are the teacher's layer. For a normal v this is the layer's KL to
    second order, and its gradient has no noise where the student is exact; a square root bounds the pull of each draw.

    Where the teacher's scale is tiny or its draws explode, as those of a MAF sometimes do, the variance of a Monte
    Carlo KL is unbounded: Parallel WaveNet met this problem, and ClariNet answered it with a regularised KL. Here the
    log scales of both flows are softly bounded, the path gradient has no noise where the student is exact, the
    outermost two per cent of the teacher's draws are left out of the layer steps and of the forward KL, and the norm of
    the gradient is clipped.

    Args:
        teacher: a flow of this library; it is not changed.
        contexts: c (N, C), whose rows are drawn at random, or a function n -> (n, C); None where C = 0.
        config: how to distill.
        student: a flow of another architecture that samples in one pass; a copy of it takes the flow steps only.
        on_epoch: called as on_epoch(task, epoch) every 50 steps; the tasks are "layers" and "flow".
        on_step: called as on_step(task, done, total) after each step.
        checkpoints: where to save the training, so that the same call resumes it, as in `cf.fit`; each task has a
            subfolder.
        tracker: client of an experiment tracker, which logs the configuration and every epoch.

    Returns:
        The student, on the teacher's device.

    Raises:
        ValueError: contexts that are missing, not expected or not finite; a student of another size, or one whose
            samples are solved; a teacher with an unknown transform, and no student.

    Source: van den Oord et al. 2018, "Parallel WaveNet: Fast High-Fidelity Speech Synthesis", section 4, for the
    distillation; Ping et al. 2019, "ClariNet", section 3.2, for the unbounded variance; Vaitl et al. 2024 for the path
    gradient. The layer steps are ours.

    Example:
        >>> import torch, counterflow as cf
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> student = cf.distill(teacher, config=cf.DistillConfig(layer_steps=50, flow_steps=50))
        >>> student.transform.forward_cost, student().rsample((5,)).shape
        ('one pass', torch.Size([5, 3]))
    """
    return distill_with_history(
        teacher,
        contexts,
        config,
        student=student,
        on_epoch=on_epoch,
        on_step=on_step,
        checkpoints=checkpoints,
        tracker=tracker,
    ).student


class _Training(NamedTuple):
    """One of the two trainings of a student."""

    task: Task
    steps: int
    rate: float  # times the learning rate
    objective: Callable[..., Tensor]


def distill_with_history(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: OnEpoch | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    tracker: Tracker | None = None,
) -> Distilled:
    """Return the student of `distill` with its training histories. An interrupted training is the last one."""
    draw = contexts_of(teacher, contexts)
    on_epoch = tracked(tracker, config, on_epoch)
    device = device_of(teacher)
    teacher = copy.deepcopy(teacher).to(config.device).eval().requires_grad_(False)
    parts = teacher.transform.flattened()
    samples = Workers.current().share(config.samples, "samples")  # each process draws its own
    with seeded(config.seed, cuda=True):
        made = mirror(teacher, parts, draw, config.hidden) if student is None else check_student(student, teacher)
    made.to(config.device)
    trainings: list[_Training] = []
    solves = any(solved_layer(part) is not None for part in parts)  # otherwise the student is a copy and exact
    if student is None and solves and config.layer_steps:
        trainings.append(_Training("layers", config.layer_steps, 1.0, layer_objective(teacher, parts, draw, samples)))
    if (student is not None or solves) and config.flow_steps:
        objective = flow_objective(teacher, parts, draw, samples, config.forward_kl_weight)
        trainings.append(_Training("flow", config.flow_steps, 0.5, objective))
    histories: dict[Task, History] = {}
    for training in trainings:
        histories[training.task] = fit(
            made,
            training.objective,
            min(training.steps, EPOCH),
            EVALUATIONS,
            config.fit_config(training.steps, training.rate),
            on_step=on_step,
            on_epoch=on_epoch,
            checkpoints=None if checkpoints is None else checkpoints.for_task(training.task),
            task=training.task,
        )
        if histories[training.task].stopped == "interrupted":
            break
    return Distilled(made.to(device).eval(), histories)
