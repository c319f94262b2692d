"""The one training loop: every training of the library is this function with another objective."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import nn

from counterflow.random import seeded
from counterflow.training.batches import Batch, check_rows, fingerprint_of, in_order, moved
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.history import History, OnEpoch, OnStep
from counterflow.training.trainer import NotFiniteError, Objective, Trainer, mean_term


def fit(
    model: nn.Module,
    objective: Objective,
    train: Batch | int,
    validation: Batch | int,
    config: FitConfig = FitConfig(),
    *,
    validate: Objective | None = None,
    anneal: Callable[[float], dict[str, float]] | None = None,
    on_step: OnStep | None = None,
    on_epoch: OnEpoch | None = None,
    checkpoints: Checkpoints | None = None,
    task: str = "training",
) -> History:
    """Maximise the mean of an objective's terms; the model ends with the weights that validated best.

    A step whose loss or gradient is not finite never reaches the weights: it is skipped and counted, and
    max_skipped of them in a row end the run with a RuntimeWarning. Ctrl-C ends it as well. However it ends, the
    best weights so far are restored and `History.stopped` says why.

    Where torch.distributed has a process group, all its processes call this with the same arguments, and come to the
    same weights by DistributedDataParallel: each takes its share of every batch, with noise of its own, and of the
    validation rows. What an objective draws without data is drawn by each. on_epoch is called on rank 0
    only.

    Args:
        model: trained in place, and moved to the config's device.
        objective: (model, batch, **annealed) -> terms.
        train, validation: tensors of N rows, or tuples of such tensors (data and context); finite. An objective that
            needs no data takes two numbers instead, the steps of an epoch and the evaluations of a validation: its
            batch is None.
        config: how to train.
        validate: the objective of the validation rows, objective itself when not given. Its noise is the same
            in every epoch.
        anneal: epoch (a float) -> keywords for the objective, such as beta for a warm-up of the KL.
        on_step: called as on_step(task, done, total) after each step. A KeyboardInterrupt that it raises ends the
            training between two steps, so no step is lost. Of several processes, all end after their next step.
        on_epoch: called as on_epoch(task, epoch) after each epoch, on rank 0 only.
        checkpoints: where to keep what it takes to go on from between two steps, and to look for it: a training
            that was ended goes on bit for bit when model, data and config are the same. One is written every so many
            seconds, after an interruption by on_step, and at the end.
        task: the name of this training, the first argument of the callbacks.

    Raises:
        ValueError: fewer rows than a batch, data that hold a NaN or an infinity, a model without weights or terms
            without a gradient, or a state of another training.

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.MAF(features=2, layers=1, hidden=(8,), seed=0)
        >>> rows = 3 + torch.randn(400, 2)
        >>> history = cf.fit(flow, cf.log_likelihood, rows[:300], rows[300:], cf.FitConfig(epochs=3, batch_size=50))
        >>> len(history.epochs), history.stopped
        (3, 'finished')
    """
    steps_per_epoch = check_rows(train, "the training data", config.batch_size) // config.batch_size
    check_rows(validation, "the validation data", 1)
    device, group = torch.device(config.device), Workers.current()
    group.share(config.batch_size, "batch_size")
    fingerprint = "" if checkpoints is None else fingerprint_of((train, validation))
    training = Trainer(model.to(device), objective, config, steps_per_epoch, fingerprint, group)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    started = saved = time.perf_counter()
    with seeded(group.rank_seed(config.seed), cuda=True):
        if checkpoints is not None:
            _resume(training, checkpoints, task)
        before = training.history.seconds

        def keep() -> None:
            nonlocal saved
            training.history.seconds = before + time.perf_counter() - started
            if checkpoints is not None:
                checkpoints.save(training.state())
            saved = time.perf_counter()

        due = ended = False  # whether this process wants a state to be kept, and an end
        try:
            while training.goes_on:
                model.train()
                begun = time.perf_counter()
                for batch in training.batches(train):
                    annealed = {} if anneal is None else anneal(training.progress)
                    with autocast:
                        loss = training.loss(moved(batch, device), annealed, (due, ended))
                    heard = training.step(loss)
                    ended = _interrupted(on_step, task, training.steps, steps_per_epoch * config.epochs)
                    due = checkpoints is not None and time.perf_counter() - saved > checkpoints.every
                    keeps, ends = heard if group.size > 1 else (due, ended)
                    if keeps or ends:
                        keep()
                        due = False
                    if ends:
                        raise KeyboardInterrupt
                seconds = time.perf_counter() - begun
                reached = _validate(training.evaluated, validate or objective, validation, config, autocast, group)
                row = training.end_epoch(reached, seconds)
                if on_epoch is not None and group.rank == 0:
                    on_epoch(task, row)
            keep()
        except KeyboardInterrupt:
            training.history.stopped = "interrupted"
        except NotFiniteError:
            training.history.stopped = "not finite"
    history = training.history
    if training.best_weights:
        model.load_state_dict(training.best_weights)
    model.eval()
    history.seconds = before + time.perf_counter() - started
    if history.stopped == "not finite":
        warnings.warn(
            f"training ended: {config.max_skipped} steps in a row had a loss or gradient that is not finite; the "
            "best weights so far are kept. Try a smaller learning_rate, a smaller clip_norm, or data on a scale near 1",
            RuntimeWarning,
            stacklevel=2,
        )
    return history


def _resume(training: Trainer, checkpoints: Checkpoints, task: str) -> None:
    """From the newest state, if there is one."""
    state = checkpoints.load()
    if state is None:
        return
    try:
        training.restore(state)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        came = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"expected a complete checkpoint of this training in {checkpoints.folder}, got {came}"
        ) from None
    if checkpoints.on_resume is not None:
        checkpoints.on_resume(task, state)


def _interrupted(on_step: OnStep | None, task: str, done: int, total: int) -> bool:
    """Whether on_step asked for an end."""
    try:
        if on_step is not None:
            on_step(task, done, total)
    except KeyboardInterrupt:
        return True
    return False


@torch.no_grad()
def _validate(
    model: nn.Module, objective: Objective, data: Batch | int, config: FitConfig, autocast: Any, group: Workers
) -> float:
    """The mean term over all rows, with the same noise at every call; every process takes its share of the batches."""
    model.eval()
    device = torch.device(config.device)
    total, rows = 0.0, 0.0
    with seeded(group.rank_seed(config.seed), cuda=True):
        for batch, size in islice(in_order(data, config.batch_size), group.rank, None, group.size):
            with autocast:
                terms = objective(model, moved(batch, device))
            total, rows = total + mean_term(terms).item() * size, rows + size
    total, rows = group.sum(total, rows)
    return total / rows
