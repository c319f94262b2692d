"""The one training loop: every training of the library is this function with another objective."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from inspect import signature
from itertools import islice, repeat
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from counterflow.group import Group
from counterflow.noise import seeded
from counterflow.rows import Batch, check_rows, fingerprint_of, in_order, moved, parts_of
from counterflow.states import State, States

Objective = Callable[..., Tensor]  # (model, batch, **annealed) -> terms in nats; the loss is their negative mean
Stopped = Literal["finished", "settled", "interrupted", "not finite"]


def check_device(name: str) -> None:
    """Raise ValueError unless tensors can be made on the device of that name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # torch asserts that it was built with CUDA
        raise ValueError(f"expected device as one that is here, such as cpu, got {name!r}") from None


@dataclass(frozen=True)
class FitConfig:
    """How to train."""

    epochs: int = 100  # passes over the training rows
    batch_size: int = 128  # rows a step; those left over wait for the next epoch's order
    optimizer: Literal["adam", "adamax", "adamw"] = "adamax"  # adamax is the calmest with flows (Kingma et al. 2016)
    learning_rate: float = 2e-3  # at its highest, after the warm-up steps
    weight_decay: float = 0.0  # decoupled for adamw, an L2 penalty for the others
    schedule: Literal["cosine", "constant"] = "cosine"  # cosine ends at a hundredth of the learning rate
    warm_up_steps: int = 100  # until the learning rate is reached: Adam's first moments are noise
    clip_norm: float = 50.0  # bound of the whole gradient's norm; high, so that only outliers are cut
    ema: float = 0.999  # decay of the averaged weights, which are the ones evaluated and kept; 0 turns it off
    patience: int = 0  # epochs without a better validation objective before stopping; 0 never stops
    max_skipped: int = 20  # non-finite steps in a row that end the run
    seed: int = 0  # of splits, initial weights, the order of rows and all noise
    device: str = "cpu"  # cpu, cuda or mps
    precision: Literal["float32", "bf16"] = "float32"  # bf16 is autocast; substitution keeps to float32

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "warm_up_steps", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} above 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"expected ema in [0, 1), got {self.ema}")
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} as one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_device(self.device)


OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "adamw": torch.optim.AdamW}
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. Objectives are mean terms in nats: higher is better."""

    epoch: int
    train: float
    validation: float
    best: bool  # whether this validation objective is the highest so far
    learning_rate: float
    seconds: float
    rows_per_second: float
    skipped: int  # non-finite steps


@dataclass
class Record:
    """The course of a training."""

    epochs: list[Epoch] = field(default_factory=list)
    stopped: Stopped = "finished"
    seconds: float = 0.0

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights were kept."""
        return next((e for e in reversed(self.epochs) if e.best), None)


def fit(
    model: nn.Module,
    objective: Objective,
    train: Batch | int,
    validation: Batch | int,
    config: FitConfig = FitConfig(),
    *,
    validate: Objective | None = None,
    anneal: Callable[[float], dict[str, float]] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch, nn.Module], None] | None = None,
    states: States | None = None,
) -> Record:
    """Maximise the mean of an objective's terms; the model ends with the weights that validated best.

    A step whose loss or gradient is not finite never reaches the weights: it is skipped and counted, and
    max_skipped of them in a row end the run with a RuntimeWarning. Ctrl-C ends it as well. However it ends, the
    best weights so far are restored and `Record.stopped` says why.

    Where torch.distributed has a process group, all its processes call this with the same arguments, and come to the
    same weights by DistributedDataParallel: each takes its share of every batch, with noise of its own, and of the
    validation rows. What an objective draws without data is drawn by each. on_epoch is called by the first process
    alone.

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
        on_step: called with (steps done, steps in all), between two steps: a KeyboardInterrupt raised here loses none.
            Of several processes each hears of it with the next step, and they end after that one.
        on_epoch: called with the epoch and the model as evaluated (averaged weights).
        states: where to keep what it takes to go on from between two steps, and to look for it: a training that was
            ended goes on bit by bit when model, data and config are the same. One is written every so many seconds,
            after an interruption by on_step, and at the end.

    Raises:
        ValueError: fewer rows than a batch, data that hold a NaN or an infinity, a model without weights or terms
            without a gradient, or a state of another training.

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.MAF(features=2, layers=1, hidden=(8,), seed=0)
        >>> rows = 3 + torch.randn(400, 2)
        >>> record = cf.fit(flow, cf.log_likelihood, rows[:300], rows[300:], cf.FitConfig(epochs=3, batch_size=50))
        >>> len(record.epochs), record.stopped
        (3, 'finished')
    """
    steps_per_epoch = check_rows(train, "the training data", config.batch_size) // config.batch_size
    check_rows(validation, "the validation data", 1)
    device, group = torch.device(config.device), Group.here()
    group.share(config.batch_size, "batch_size")
    fingerprint = "" if states is None else fingerprint_of((train, validation))
    training = _Training(model.to(device), objective, config, steps_per_epoch, fingerprint, group)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    started = saved = time.perf_counter()
    with seeded(group.seed(config.seed), cuda=True):
        if states is not None:
            _go_on(training, states)
        before = training.record.seconds

        def keep() -> None:
            nonlocal saved
            training.record.seconds = before + time.perf_counter() - started
            if states is not None:
                states.save(training.state())
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
                    ended = _interrupted(on_step, training.steps, steps_per_epoch * config.epochs)
                    due = states is not None and time.perf_counter() - saved > states.every
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
                    on_epoch(row, training.evaluated)
            keep()
        except KeyboardInterrupt:
            training.record.stopped = "interrupted"
        except _NotFinite:
            training.record.stopped = "not finite"
    record = training.record
    if training.best_weights:
        model.load_state_dict(training.best_weights)
    model.eval()
    record.seconds = before + time.perf_counter() - started
    if record.stopped == "not finite":
        warnings.warn(
            f"training ended: {config.max_skipped} steps in a row had a loss or gradient that is not finite; the "
            "best weights so far are kept. Try a smaller learning_rate, a smaller clip_norm, or data on a scale near 1",
            RuntimeWarning,
            stacklevel=2,
        )
    return record


def _go_on(training: _Training, states: States) -> None:
    """From the newest state, if there is one."""
    state = states.load()
    if state is None:
        return
    try:
        training.restore(state)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        came = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected a whole state of this training in {states.folder}, got {came}") from None
    if states.on_resume is not None:
        states.on_resume(states.folder, state)


class _Training:
    """A training as it stands between two steps."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: FitConfig,
        steps_per_epoch: int,
        fingerprint: str,
        group: Group,
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
        self.record = Record()
        self.steps = 0  # done, over all epochs
        self.order: Tensor | None = None  # of the rows, in this epoch
        self.total, self.counted, self.skipped = 0.0, 0, 0  # of this epoch
        self.in_a_row, self.since_best, self.best = 0, 0, -math.inf
        self.best_weights: dict[str, Tensor] = {}

    @property
    def goes_on(self) -> bool:
        """Whether there is another epoch."""
        return self.record.stopped != "settled" and len(self.record.epochs) < self.config.epochs

    @property
    def progress(self) -> float:
        """Epochs, as a float."""
        return self.steps / self.steps_per_epoch

    def batches(self, data: Batch | int) -> Iterator[Batch]:
        """This process' share of the batches that the epoch still has.

        In a new random order; rows that do not fill a batch wait for another one.
        """
        done = self.steps - len(self.record.epochs) * self.steps_per_epoch
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
                raise _NotFinite
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
            epoch=len(self.record.epochs) + 1,
            train=self.total / self.counted if self.counted else math.nan,
            validation=reached,
            best=better,
            learning_rate=_learning_rate(self.config, self.steps, self.steps_per_epoch * self.config.epochs),
            seconds=seconds,
            rows_per_second=self.steps_per_epoch * self.config.batch_size / seconds,
            skipped=self.skipped,
        )
        self.record.epochs.append(row)
        self.order, self.total, self.counted, self.skipped = None, 0.0, 0, 0
        if self.config.patience and self.since_best >= self.config.patience:
            self.record.stopped = "settled"
        return row

    def state(self) -> State:
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
        numbers |= {"fingerprint": self.fingerprint, "config": asdict(self.config), "record": asdict(self.record)}
        return State(tensors, numbers)

    def restore(self, state: State) -> None:
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
            torch.manual_seed(self.group.seed(self.config.seed) + state.steps)
        self.order = tensors.get("order")
        for name in _POSITION:
            setattr(self, name, state.numbers[name])
        course = state.numbers["record"]
        stopped: Stopped = "settled" if course["stopped"] == "settled" else "finished"
        self.record = Record([Epoch(**row) for row in course["epochs"]], stopped, course["seconds"])

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
        loss = -_mean(self.objective(self.model, batch, **annealed))
        if not loss.requires_grad and torch.is_grad_enabled():
            raise ValueError("expected terms that depend on the model's weights, got an objective without a gradient")
        tells = torch.cat([loss.detach().reshape(1), loss.new_tensor(flags)]).to(self.told)
        return loss + (self.told * tells).sum()


def _interrupted(on_step: Callable[[int, int], None] | None, done: int, steps: int) -> bool:
    """Whether on_step asked for an end."""
    try:
        if on_step is not None:
            on_step(done, steps)
    except KeyboardInterrupt:
        return True
    return False


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


class _NotFinite(Exception):
    """Too many steps in a row were not finite."""


def _mean(terms: Tensor) -> Tensor:
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


@torch.no_grad()
def _validate(
    model: nn.Module, objective: Objective, data: Batch | int, config: FitConfig, autocast: Any, group: Group
) -> float:
    """The mean term over all rows, with the same noise at every call; every process takes its share of the batches."""
    model.eval()
    device = torch.device(config.device)
    total, rows = 0.0, 0.0
    with seeded(group.seed(config.seed), cuda=True):
        for batch, size in islice(in_order(data, config.batch_size), group.rank, None, group.size):
            with autocast:
                terms = objective(model, moved(batch, device))
            total, rows = total + _mean(terms).item() * size, rows + size
    total, rows = group.sum(total, rows)
    return total / rows
