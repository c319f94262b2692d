"""Distillation: a student that samples in one pass, such as an IAF, learns the distribution of a teacher that does not.

The teacher carries eps to x through layers that are solved, v -> u with v_i = g(u_i; theta_i(u_j, j < i)). Each of
these maps is itself triangular, in the same order: so a layer of the student, one pass from v to u, can equal it.

    start    every layer of the student learns its layer of the teacher, on the teacher's own draws, all at once
    finish   the student as a whole: KL(student || teacher), by the path gradient
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from counterflow.distill.config import EPOCH, DistillConfig
from counterflow.distill.losses import flow_objective, layer_objective
from counterflow.distill.student import check_student, flatten, mirror, solved_layer
from counterflow.flows.contexts import Contexts, contexts_of, device_of
from counterflow.flows.flow import Flow
from counterflow.random import seeded
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.fit import fit
from counterflow.training.history import Epoch, History

Stage = Literal["start", "finish"]
EVALUATIONS = 8  # batches of draws in each of them


class Distilled(NamedTuple):
    """A student, and how its stages went."""

    student: Flow
    records: dict[Stage, History]


def distill(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: Callable[[Stage, Epoch], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Flow:
    """A flow that samples in one pass and has the teacher's distribution, or nearly: for a `MAF` an `IAF`.

        KL(student || teacher) = E[log q(z | c) - log p(z | c)],  z ~ q        plus forward times
        KL(teacher || student) = E[log p(x | c) - log q(x | c)],  x ~ p

    in nats, over the contexts. Both densities are exact and about one pass, so no data are needed. The student has the
    teacher's layers, orders, base and constant maps. Where the teacher solves v -> u, it has a linear map fitted to
    the teacher's draws and an autoregressive layer with the teacher's hidden weights, and these first learn

        E sum_i ((w_i - v_i)^2 + (log dw_i/dv_i)^2) / 2,    w_i = g(u'_i; theta_i(u_j, j < i))

    where u' is the student's output and g, theta are the teacher's layer. For a normal v this is the layer's KL to
    second order, and has no noise where the student is exact; a square root bounds the pull of a single draw.

    Where the teacher's scale is tiny or its draws explode, as a MAF's do now and then, a Monte Carlo KL has a
    variance without bound: the trap of Parallel WaveNet, which ClariNet meets with a regularised KL. Here the log
    scales of both flows are softly bounded; the path gradient has no noise where the student is exact; the two
    in a hundred draws of the teacher that lie farthest out are left out of the start and of the forward KL; and the
    gradient's norm is clipped.

    Args:
        teacher: a flow of this library; it is not changed.
        contexts: c (N, C), whose rows are picked at random, or a function n -> (n, C); None where C = 0.
        config: how to distil.
        student: a flow that samples in one pass, of another make; trained as a whole from where it stands, on a copy.
        on_epoch: called with the stage and the epoch.
        checkpoints: where to keep what it takes to go on after a kill, as `cf.fit` does: a folder for each stage.

    Raises:
        ValueError: contexts that are missing, not wanted or not finite; a student of other sizes, or one whose samples
            are solved; a teacher with a part of an unknown make and without a student.

    Source: van den Oord et al. 2018, "Parallel WaveNet: Fast High-Fidelity Speech Synthesis", section 4, for the
    distillation; Ping et al. 2019, "ClariNet", section 3.2, for its trap; Vaitl et al. 2024 for the path gradient.
    The start is ours.

    Example:
        >>> import torch, counterflow as cf
        >>> teacher = cf.MAF(features=3, layers=2, hidden=(16,), seed=0)
        >>> student = cf.distill(teacher, config=cf.DistillConfig(start=50, steps=50))
        >>> student.transform.forward_cost, student().rsample((5,)).shape
        ('one pass', torch.Size([5, 3]))
    """
    return distilled(teacher, contexts, config, student=student, on_epoch=on_epoch, checkpoints=checkpoints).student


def distilled(
    teacher: Flow,
    contexts: Contexts | None = None,
    config: DistillConfig = DistillConfig(),
    *,
    student: Flow | None = None,
    on_epoch: Callable[[Stage, Epoch], None] | None = None,
    on_step: Callable[[Stage, int, int], None] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Distilled:
    """What `distill` does, with the records of its stages. An interrupted stage is the last one."""
    draw = contexts_of(teacher, contexts)
    home = device_of(teacher)
    teacher = copy.deepcopy(teacher).to(config.device).eval().requires_grad_(False)
    parts = flatten(teacher.transform)
    share = Workers.here().share(config.draws, "draws")  # of each process, with noise of its own
    with seeded(config.seed, cuda=True):
        made = mirror(teacher, parts, draw, config.hidden) if student is None else check_student(student, teacher)
    made.to(config.device)
    stages: list[tuple[Stage, int, float, Callable[..., Tensor]]] = []
    learns = student is not None or any(solved_layer(part) is not None for part in parts)  # else it is a copy
    if learns and student is None and config.start:
        stages.append(("start", config.start, 1.0, layer_objective(teacher, parts, draw, share)))
    if learns and config.steps:
        stages.append(("finish", config.steps, 0.5, flow_objective(teacher, parts, draw, share, config.forward)))
    records: dict[Stage, History] = {}
    for stage, steps, rate, objective in stages:

        def told(row: Epoch, _: nn.Module, stage: Stage = stage) -> None:
            if on_epoch is not None:
                on_epoch(stage, row)

        def stepped(done: int, steps: int, stage: Stage = stage) -> None:
            if on_step is not None:
                on_step(stage, done, steps)

        records[stage] = fit(
            made,
            objective,
            min(steps, EPOCH),
            EVALUATIONS,
            config.fit(steps, rate),
            on_step=stepped,
            on_epoch=told,
            checkpoints=None if checkpoints is None else checkpoints.of(stage),
        )
        if records[stage].stopped == "interrupted":
            break
    return Distilled(made.to(home).eval(), records)
