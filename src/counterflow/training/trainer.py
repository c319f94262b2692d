"""The state of a training between two steps, and one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from inspect import signature
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from counterflow.training.batches import Batch, parts_of
from counterflow.training.checkpoints import Checkpoint
from counterflow.training.config import FitConfig
from counterflow.training.distributed import Workers
from counterflow.training.history import Epoch, History

Objective = Callable[..., Tensor]  # (model, batch, **annealed) -> terms in nats; the loss is their negative mean
OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}


class Trainer:
    """A training as it stands between two steps."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: FitConfig,
        steps_per_epoch: int,
        fingerprint: str,
        group: Workers,
    ) -> None:
        self.model, self.config, self.steps_per_epoch, self.fingerprint = model, config, steps_per_epoch, fingerprint
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"expected a model with weights to train, got {type(model).__name__} without any")
        self.group, loss = group, _Loss(model, objective)
        self.told = loss.told
        self.loss: nn.Module = loss if group.size == 1 else DistributedDataParallel(loss, **_PARALLEL)
        self.shuffle = torch.Generator().manual_seed(config.seed)  # of the order of rows, the same in all processes
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.averaged = AveragedModel(model, multi_avg_fn=_ema(config.ema)) if config.ema else None
        self.evaluated: nn.Module = model if self.averaged is None else self.averaged.module
        self.history = History()
        self.steps = 0  # done, over all epochs
        self.order: Tensor | None = None  # of the rows, in this epoch
        self.total, self.counted, self.skipped = 0.0, 0, 0  # of this epoch
        self.in_a_row, self.since_best, self.best = 0, 0, -math.inf
        self.best_weights: dict[str, Tensor] = {}

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.history.stopped != "patience" and len(self.history.epochs) < self.config.epochs

    @property
    def progress(self) -> float:
        """Epochs, as a float."""
        return self.steps / self.steps_per_epoch

    def batches(self, data: Batch | int) -> Iterator[Batch]:
        """This process' share of the batches that the epoch still has.

        In a new random order; rows that do not fill a batch wait for another one.
        """
        done = self.steps - len(self.history.epochs) * self.steps_per_epoch
        if isinstance(data, int):
            yield from repeat(None, data - done)
            return
        size = self.config.batch_size
        if self.order is None:
            self.order = torch.randperm(len(parts_of(data)[0]), generator=self.shuffle)
        for k in range(done, self.steps_per_epoch):
            index = self.order[k * size + self.group.rank : (k + 1) * size : self.group.size]
            picked = tuple(part[index] for part in parts_of(data))
            yield picked if isinstance(data, tuple) else picked[0]

    def step(self, loss: Tensor) -> tuple[bool, bool]:
        """One step down the loss, unless it or its gradient is not finite; too many such in a row are _NotFinite.

        What any process had to tell all others in this step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.told.grad = None
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(self.config, self.steps, self.steps_per_epoch * self.config.epochs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.steps += 1
        reached, due, ended = cast(Tensor, self.told.grad).tolist()
        heard = due > 0, ended > 0
        if math.isfinite(reached) and math.isfinite(norm.item()):
            self.optimizer.step()
            self.total, self.counted, self.in_a_row = self.total - reached, self.counted + 1, 0
            if self.averaged is not None:
                self.averaged.update_parameters(self.model)
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row >= self.config.max_skipped:
                raise NotFiniteError
        return heard

    def end_epoch(self, reached: float, seconds: float) -> Epoch:
        """Note what the epoch came to, and keep the weights if they are the best so far."""
        better = reached > self.best
        if better:
            self.best, self.since_best = reached, 0
            self.best_weights = {k: v.detach().clone() for k, v in self.evaluated.state_dict().items()}
        else:
            self.since_best += 1
        row = Epoch(
            epoch=len(self.history.epochs) + 1,
            train=self.total / self.counted if self.counted else math.nan,
            validation=reached,
            best=better,
            learning_rate=_learning_rate(self.config, self.steps, self.steps_per_epoch * self.config.epochs),
            seconds=seconds,
            rows_per_second=self.steps_per_epoch * self.config.batch_size / seconds,
            skipped=self.skipped,
        )
        self.history.epochs.append(row)
        self.order, self.total, self.counted, self.skipped = None, 0.0, 0, 0
        if self.config.patience and self.since_best >= self.config.patience:
            self.history.stopped = "patience"
        return row

    def state(self) -> Checkpoint:
        """What `restore` needs."""
        optimizer = self.optimizer.state_dict()["state"]
        tensors = {f"optimizer.{i}.{key}": value for i, slot in optimizer.items() for key, value in slot.items()}
        for prefix, part in self._parts().items():
            tensors |= {f"{prefix}.{key}": value for key, value in part.items()}
        tensors["shuffle"] = self.shuffle.get_state()
        tensors |= {f"noise.{rank}": state for rank, state in enumerate(self.group.gather(self._noise()))}
        if self.order is not None:
            tensors["order"] = self.order
        numbers = {name: getattr(self, name) for name in _POSITION}
        numbers |= {"fingerprint": self.fingerprint, "config": asdict(self.config), "history": asdict(self.history)}
        return Checkpoint(tensors, numbers)

    def restore(self, state: Checkpoint) -> None:
        """Stand where the state was taken; ValueError where it is of another training."""
        expected = {"fingerprint": self.fingerprint, "config": asdict(self.config)}
        other = [name for name, value in expected.items() if state.numbers.get(name) != value]
        if other:
            what = "data" if "fingerprint" in other else "settings"
            raise ValueError(
                f"expected a state of the same data and settings to resume from, got other {what}; resume with what "
                "the training was begun with, or remove its states to begin anew"
            )
        tensors = state.tensors
        self.best_weights = _under(tensors, "best")
        for prefix, part in self._parts().items():
            if prefix != "best":
                for key, value in part.items():
                    value.copy_(tensors[f"{prefix}.{key}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _under(tensors, "optimizer").items():
            i, _, key = name.partition(".")
            slots.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.shuffle.set_state(tensors["shuffle"].cpu())
        noise = _under(tensors, "noise")
        if len(noise) == self.group.size:
            self._set_noise(noise[str(self.group.rank)].cpu())
        else:  # other processes than before: new noise, the same in every repetition
            torch.manual_seed(self.group.rank_seed(self.config.seed) + state.steps)
        self.order = tensors.get("order")
        for name in _POSITION:
            setattr(self, name, state.numbers[name])
        self.history = state.history

    def _noise(self) -> Tensor:
        """The state of the generator that noise comes from, on the device of the training."""
        cuda = self.config.device.startswith("cuda")
        return torch.cuda.get_rng_state(self.config.device) if cuda else torch.get_rng_state()

    def _set_noise(self, state: Tensor) -> None:
        if self.config.device.startswith("cuda"):
            torch.cuda.set_rng_state(state, self.config.device)
        else:
            torch.set_rng_state(state)

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """The weights of which there are several."""
        averaged = {} if self.averaged is None else self.averaged.state_dict()
        return {"model": self.model.state_dict(), "averaged": averaged, "best": self.best_weights}


class _Loss(nn.Module):
    """What DistributedDataParallel wraps: minus the mean of an objective's terms.

    Processes talk once a step, for each time costs a wait for the slowest: what else they have to tell comes with the
    gradients, as that of `told`, which is 0. It is the mean over all of the loss, and of two flags.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        weight = next(model.parameters())
        self.told = nn.Parameter(weight.new_zeros(3, dtype=_at_least_float32(weight.dtype)))

    def forward(self, batch: Batch, annealed: dict[str, float], flags: tuple[bool, bool]) -> Tensor:
        loss = -mean_term(self.objective(self.model, batch, **annealed))
        if not loss.requires_grad and torch.is_grad_enabled():
            raise ValueError("expected terms that depend on the model's weights, got an objective without a gradient")
        tells = torch.cat([loss.detach().reshape(1), loss.new_tensor(flags)]).to(self.told)
        return loss + (self.told * tells).sum()


# Buffers are masks, orders and the like: nothing that a forward pass changes. The older name of that option warns where
# there is the newer one. Gradients are kept where they are sent from.
_NEWER = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_PARALLEL: dict[str, Any] = {
    "forward_sync_buffers" if _NEWER else "broadcast_buffers": False,
    "gradient_as_bucket_view": True,
}


_POSITION = ("steps", "total", "counted", "skipped", "in_a_row", "since_best", "best")


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with prefix and a dot, without them."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


class NotFiniteError(Exception):
    """Too many steps in a row were not finite."""


def mean_term(terms: Tensor) -> Tensor:
    """Return the mean of the terms, in at least float32."""
    return terms.mean(dtype=_at_least_float32(terms.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _learning_rate(config: FitConfig, step: int, steps: int) -> float:
    """The learning rate at a step."""
    rise = min(1.0, (step + 1) / config.warm_up_steps) if config.warm_up_steps else 1.0
    fall = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0
    return config.learning_rate * rise * fall


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that forgets the first weights sooner: decay min(decay, (1 + n) / (10 + n)) at step n."""

    def update(averaged: Any, current: Any, n: Any) -> None:
        now = min(decay, (1 + int(n)) / (10 + int(n)))
        get_ema_multi_avg_fn(now)(averaged, current, n)

    return update
