"""The state of a training between two steps, and what advances it: a step, a validation, the end of an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from inspect import signature
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.random import seeded
from counterflow.training.batches import Batch, in_order, moved, picked, tensors_of
from counterflow.training.checkpoints import Checkpoint, Checkpoints
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Mailbox, Workers
from counterflow.training.flat import FlatParameters, WeightAverage, clip_norm
from counterflow.training.history import Epoch, History, OnStep
from counterflow.training.optimizers import Optimizer

Objective = Callable[..., Tensor]  # (model, batch, **annealed) -> terms in nats; the loss is their negative mean

# Attributes of a Trainer that a checkpoint keeps as numbers.
POSITION = ("steps", "objective_sum", "steps_summed", "skipped", "skipped_in_a_row", "epochs_since_best", "best")


class NotFiniteError(Exception):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class Trainer:
    """A training between two steps.

    Args:
        model: trained in place, on the device of the config.
        objective: (model, batch, **annealed) -> terms.
        config: how to train.
        steps_per_epoch: steps between two validations.
        workers: the processes that train together.
        task: the first argument of callbacks.
        checkpoints: where to write the state, or None.
        fingerprint: a checksum of the data, which a checkpoint must match.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: FitConfig,
        steps_per_epoch: int,
        workers: Workers,
        task: str,
        checkpoints: Checkpoints | None,
        fingerprint: str,
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"expected a model with weights to train, got {type(model).__name__} without any")
        self.model = model
        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self.workers = workers
        self.task = task
        self.checkpoints = checkpoints
        self.fingerprint = fingerprint
        self.device = torch.device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.weights = FlatParameters(trained)
        self.optimizer = Optimizer(config.optimizer, self.weights.vectors, config.weight_decay)
        self.average = WeightAverage(model, self.weights, config.ema) if config.ema else None
        self.evaluated = model if self.average is None else self.average.model
        self.mailbox = Mailbox(3, trained[0], workers)
        self.loss = _parallel(_Loss(model, objective, self.mailbox), workers)
        self.requests = (False, False)  # of this process: write a checkpoint, stop
        self.shared_requests = (False, False)  # of any process, as sent with the last step
        self.shuffle = torch.Generator().manual_seed(config.seed)  # the same order of rows in all processes
        self.order: Tensor | None = None  # of the rows in this epoch
        self.history = History()
        self.steps = 0  # over all epochs
        self.objective_sum = 0.0  # over the steps of this epoch that were not skipped
        self.steps_summed = 0
        self.skipped = 0  # in this epoch
        self.skipped_in_a_row = 0
        self.epochs_since_best = 0
        self.best = -math.inf  # the highest validation objective
        self.best_weights: dict[str, Tensor] = {}
        self.seconds_before = 0.0  # of the runs that this one resumes
        self.started = self.saved = time.perf_counter()
        self.epoch_seconds = 0.0  # of the steps of this epoch, since the start or the last resumption
        self.epoch_steps = 0  # taken in that time

    @property
    def has_epochs_left(self) -> bool:
        """True unless all epochs are done or patience has ended the training."""
        return self.history.stopped != "patience" and len(self.history.epochs) < self.config.epochs

    @property
    def epochs_done(self) -> float:
        """The position in epochs, a fraction within an epoch."""
        return self.steps / self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """The steps of all epochs."""
        return self.steps_per_epoch * self.config.epochs

    def batches(self, data: Batch | int) -> Iterator[Batch]:
        """Yield this process's share of each batch that is left in the epoch.

        Every epoch takes the rows in a new random order. Rows that do not fill a batch are left out of it.
        """
        self.model.train()
        begun = time.perf_counter()
        done = self.steps - len(self.history.epochs) * self.steps_per_epoch
        if isinstance(data, int):
            yield from repeat(None, data - done)
        else:
            size = self.config.batch_size
            if self.order is None:
                self.order = torch.randperm(len(tensors_of(data)[0]), generator=self.shuffle)
            for k in range(done, self.steps_per_epoch):
                yield picked(data, self.order[k * size + self.workers.rank : (k + 1) * size : self.workers.size])
        self.epoch_seconds = time.perf_counter() - begun
        self.epoch_steps = self.steps_per_epoch - done

    def step(self, batch: Batch, annealed: dict[str, float]) -> None:
        """Take one step down the loss. A step whose loss or gradient is not finite is skipped.

        Raises:
            NotFiniteError: max_skipped steps in a row were skipped.
        """
        self.weights.clear_gradients()
        with self.autocast:
            loss = self.loss(moved(batch, self.device), annealed, self.requests)
        loss.backward()
        gradients = self.weights.gradients()
        norm = clip_norm(gradients, self.config.clip_norm)
        reached, checkpoint, stop = self.mailbox.receive()
        self.shared_requests = (checkpoint > 0, stop > 0)
        learning_rate = self._learning_rate()
        self.steps += 1
        if math.isfinite(reached) and math.isfinite(norm):
            self.optimizer.step(gradients, learning_rate)
            if self.average is not None:
                self.average.update()
            self.objective_sum -= reached
            self.steps_summed += 1
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.config.max_skipped:
                raise NotFiniteError

    def notify(self, on_step: OnStep | None) -> None:
        """Call on_step; a KeyboardInterrupt that it raises is a request to stop."""
        if on_step is not None:
            try:
                on_step(self.task, self.steps, self.total_steps)
            except KeyboardInterrupt:
                self.requests = (self.requests[0], True)

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint if it is time, and after a request to stop, which raises KeyboardInterrupt.

        Of several processes each learns of the requests of the others with the next step.
        """
        due = self.checkpoints is not None and time.perf_counter() - self.saved > self.checkpoints.every
        self.requests = (due, self.requests[1])
        checkpoint, stop = self.requests if self.workers.size == 1 else self.shared_requests
        if checkpoint or stop:
            self.save()
        if stop:
            raise KeyboardInterrupt

    @torch.no_grad()
    def validate(self, objective: Objective, data: Batch | int) -> float:
        """Return the mean term of the evaluated weights over all rows, with the same noise at every call.

        Each process takes its share of the batches.
        """
        if self.average is not None:
            self.average.copy_buffers(self.model)
        self.evaluated.eval()
        means: list[Tensor] = []
        sizes: list[int] = []
        with seeded(self.workers.rank_seed(self.config.seed), cuda=True):
            batches = in_order(data, self.config.batch_size)
            for batch, size in islice(batches, self.workers.rank, None, self.workers.size):
                with self.autocast:
                    terms = objective(self.evaluated, moved(batch, self.device))
                means.append(_mean(terms))  # read at the end, so that a GPU is not waited for in between
                sizes.append(size)
        total = sum(mean * size for mean, size in zip(_numbers(means), sizes, strict=True))
        total, rows = self.workers.sum(total, float(sum(sizes)))
        return total / rows

    def end_epoch(self, reached: float) -> Epoch:
        """Add the epoch to the history, and keep the evaluated weights if they are the best so far."""
        better = reached > self.best
        if better:
            self.best = reached
            self.epochs_since_best = 0
            self.best_weights = {k: v.detach().clone() for k, v in self.evaluated.state_dict().items()}
        else:
            self.epochs_since_best += 1
        epoch = Epoch(
            epoch=len(self.history.epochs) + 1,
            train=self.objective_sum / self.steps_summed if self.steps_summed else math.nan,
            validation=reached,
            best=better,
            learning_rate=self._learning_rate(),
            seconds=self.epoch_seconds,
            rows_per_second=self.epoch_steps * self.config.batch_size / self.epoch_seconds,
            skipped=self.skipped,
        )
        self.history.epochs.append(epoch)
        self.order = None
        self.objective_sum = 0.0
        self.steps_summed = self.skipped = 0
        if self.config.patience and self.epochs_since_best >= self.config.patience:
            self.history.stopped = "patience"
        return epoch

    def finish(self) -> None:
        """Load the best weights into the model."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()
        self.history.seconds = self._seconds()

    def close(self) -> None:
        """Give the model's parameters memory of their own again."""
        self.weights.close()

    def save(self) -> None:
        """Write a checkpoint, if there is a place for it."""
        self.history.seconds = self._seconds()
        if self.checkpoints is not None:
            self.checkpoints.save(self.to_checkpoint())
        self.saved = time.perf_counter()

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            ValueError: it is of another training, or incomplete.
        """
        checkpoint = None if self.checkpoints is None else self.checkpoints.load()
        if self.checkpoints is None or checkpoint is None:
            return
        try:
            self.restore(checkpoint)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected a complete checkpoint of this training in {self.checkpoints.folder}, got "
                f"{type(error).__name__}: {error}"
            ) from None
        if self.checkpoints.on_resume is not None:
            self.checkpoints.on_resume(self.task, checkpoint)

    def to_checkpoint(self) -> Checkpoint:
        """Return the state, with the random generators of all processes."""
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state(), "best": self.best_weights}
        if self.average is not None:
            self.average.copy_buffers(self.model)
            parts["averaged"] = self.average.state()
        tensors = {f"{prefix}.{name}": value for prefix, part in parts.items() for name, value in part.items()}
        tensors["shuffle"] = self.shuffle.get_state()
        tensors |= {f"noise.{rank}": state for rank, state in enumerate(self.workers.gather(self._noise()))}
        if self.order is not None:
            tensors["order"] = self.order
        numbers = {name: getattr(self, name) for name in POSITION}
        numbers |= {"fingerprint": self.fingerprint, "config": asdict(self.config), "history": asdict(self.history)}
        return Checkpoint(tensors, numbers)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint; ValueError if it is of another training."""
        expected = {"fingerprint": self.fingerprint, "config": asdict(self.config)}
        differing = [name for name, value in expected.items() if checkpoint.numbers.get(name) != value]
        if differing:
            what = "data" if "fingerprint" in differing else "settings"
            raise ValueError(
                f"expected a checkpoint of the same data and settings to resume from, got other {what}; give those "
                "that the training was started with, or remove its checkpoints to start again"
            )
        tensors = checkpoint.tensors
        for name, value in self.model.state_dict().items():
            value.copy_(tensors[f"model.{name}"])
        if self.average is not None:
            self.average.restore(_under(tensors, "averaged"))
        self.optimizer.restore(_under(tensors, "optimizer"))
        self.best_weights = _under(tensors, "best")
        self.shuffle.set_state(tensors["shuffle"].cpu())
        self._restore_noise(_under(tensors, "noise"), checkpoint.steps)
        self.order = tensors.get("order")
        for name in POSITION:
            setattr(self, name, checkpoint.numbers[name])
        self.history = checkpoint.history
        self.seconds_before = self.history.seconds

    def _learning_rate(self) -> float:
        """Return the learning rate of the next step: a linear warm-up times a cosine, or constant."""
        config = self.config
        rise = min(1.0, (self.steps + 1) / config.warm_up_steps) if config.warm_up_steps else 1.0
        if config.schedule == "constant":
            return config.learning_rate * rise
        cosine = math.cos(math.pi * self.steps / self.total_steps)
        return config.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + cosine))

    def _seconds(self) -> float:
        """Return the duration of the training so far, with the runs that this one resumes."""
        return self.seconds_before + time.perf_counter() - self.started

    def _noise(self) -> Tensor:
        """Return the state of the generator that noise comes from, on the device of the training."""
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _restore_noise(self, states: dict[str, Tensor], steps: int) -> None:
        """Restore the generator of each process; with another number of processes, seed new noise by the steps."""
        if len(states) != self.workers.size:
            torch.manual_seed(self.workers.rank_seed(self.config.seed) + steps)
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(states[str(self.workers.rank)].cpu(), self.device)
        else:
            torch.set_rng_state(states[str(self.workers.rank)].cpu())


class _Loss(nn.Module):
    """Negative mean of an objective's terms, as a module for DistributedDataParallel, with the step's mail."""

    def __init__(self, model: nn.Module, objective: Objective, mailbox: Mailbox) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.mailbox = mailbox

    def forward(self, batch: Batch, annealed: dict[str, float], requests: tuple[bool, bool]) -> Tensor:
        loss = -_mean(self.objective(self.model, batch, **annealed))
        if not loss.requires_grad and torch.is_grad_enabled():
            raise ValueError("expected terms that depend on the model's weights, got an objective without a gradient")
        return self.mailbox.send(loss, loss.detach(), *requests)


def _parallel(loss: nn.Module, workers: Workers) -> nn.Module:
    """Return the loss, wrapped so that several processes average its gradients.

    A forward pass changes no buffers, so none are sent; the name of that option depends on the version of torch.
    Gradients are views of the buckets that are sent.
    """
    if workers.size == 1:
        return loss
    from torch.nn.parallel import DistributedDataParallel

    newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(loss, gradient_as_bucket_view=True, **options)


def _mean(terms: Tensor) -> Tensor:
    """Return the mean of the terms, in at least float32."""
    return terms.mean(dtype=torch.promote_types(terms.dtype, torch.float32))


def _numbers(means: list[Tensor]) -> list[float]:
    """Return scalar tensors as numbers, in one read."""
    return torch.stack(means).tolist() if means else []


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix and a dot, without them."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
