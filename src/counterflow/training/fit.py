"""The training loop: every training of the library is this function with another objective."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import closing

import torch
from torch import nn

from counterflow.random import seeded
from counterflow.training.batches import Batch, as_batch, check_rows, fingerprint_of, placed
from counterflow.training.checkpoints import Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.history import History, OnEpoch, OnStep
from counterflow.training.tracking import Tracker, tracked
from counterflow.training.trainer import NotFiniteError, Objective, Trainer


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
    tracker: Tracker | None = None,
    task: str = "training",
) -> History:
    """Maximize the mean of an objective's terms; the model ends with the weights that validated best.

    A step whose loss or gradient is not finite never reaches the weights: it is skipped and counted, and max_skipped
    such steps in a row end the training with a RuntimeWarning. Ctrl-C ends it as well. However it ends, the best
    weights so far are loaded into the model, and `History.stopped` gives the reason.

    If torch.distributed has a process group, all of its processes call this with the same arguments, and
    DistributedDataParallel keeps their weights equal. Each process takes its share of every batch and of the validation
    rows, with its own noise. An objective without data draws as much in each process.

    Args:
        model: trained in place, and moved to the device of the config.
        objective: (model, batch, **annealed) -> terms in nats; the loss is their negative mean.
        train: training data, a tensor of N finite rows or a tuple of such tensors (data and context). NumPy arrays,
            lists and data frames of numbers are converted to the dtype of the model. For an objective
            without data an int, the steps per epoch; its batch is None.
        validation: validation data of the same form, or for an objective without data an int, the number of
            evaluations.
        config: how to train.
        validate: objective of the validation rows, evaluated with the averaged weights and the same noise in every
            epoch; the training objective by default.
        anneal: position in epochs, a float -> keywords for the objective, such as beta for a warm-up of the KL.
        on_step: called as on_step(task, done, total) after each step. A KeyboardInterrupt that it raises ends the
            training between two steps, so no step is lost. Of several processes, all end after their next step.
        on_epoch: called as on_epoch(task, epoch) after each epoch, on rank 0 only.
        checkpoints: where to write checkpoints and to look for one. The same call with the same model, data and config
            resumes bit for bit. One is written every `checkpoints.every` seconds, after an interruption by on_step and
            at the end.
        tracker: client of an experiment tracker, which logs the configuration and every epoch.
        task: the name of this training, the first argument of the callbacks.

    Returns:
        The history: one entry per epoch, and why the training stopped.

    Raises:
        ValueError: fewer rows than a batch, data with a NaN or an infinity, a model without weights, terms without a
            gradient, or a checkpoint of another training.

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.MAF(features=2, layers=1, hidden=(8,), seed=0)
        >>> rows = 3 + torch.randn(400, 2)
        >>> history = cf.fit(flow, cf.log_likelihood, rows[:300], rows[300:], cf.FitConfig(epochs=3, batch_size=50))
        >>> len(history.epochs), history.stopped
        (3, 'finished')
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    train = as_batch(train, "the training data", dtype)
    validation = as_batch(validation, "the validation data", dtype)
    steps_per_epoch = check_rows(train, "the training data", config.batch_size) // config.batch_size
    check_rows(validation, "the validation data", 1)
    workers = Workers.current()
    workers.share(config.batch_size, "batch_size")
    fingerprint = "" if checkpoints is None else fingerprint_of((train, validation))
    on_epoch = tracked(tracker, config, on_epoch)
    model.to(config.device)
    train, validation = (placed(data, torch.device(config.device)) for data in (train, validation))
    trainer = Trainer(model, objective, config, steps_per_epoch, workers, task, checkpoints, fingerprint)
    with seeded(workers.rank_seed(config.seed), cuda=True), closing(trainer):
        trainer.resume()
        try:
            while trainer.has_epochs_left:
                for batch in trainer.batches(train):
                    trainer.step(batch, {} if anneal is None else anneal(trainer.epochs_done))
                    trainer.notify(on_step)
                    trainer.checkpoint_if_due()
                epoch = trainer.end_epoch(trainer.validate(validate or objective, validation))
                if on_epoch is not None and workers.rank == 0:
                    on_epoch(task, epoch)
            trainer.save()
        except KeyboardInterrupt:
            trainer.history.stopped = "interrupted"
        except NotFiniteError:
            trainer.history.stopped = "not finite"
        trainer.finish()
    if trainer.history.stopped == "not finite":
        warnings.warn(
            f"training ended: {config.max_skipped} steps in a row had a loss or gradient that is not finite; the "
            "best weights so far are kept. Try a smaller learning_rate, a smaller clip_norm, or data on a scale near 1",
            RuntimeWarning,
            stacklevel=2,
        )
    return trainer.history
