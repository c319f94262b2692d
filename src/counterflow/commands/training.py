"""Trainings that survive: their states in the run folder, a stop between two steps, and the way back in."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from counterflow import __version__
from counterflow.commands import console
from counterflow.files import write_json
from counterflow.group import Group
from counterflow.states import State, States

FORMAT = 1  # of the run folder
STATES = "states"  # a folder of the run folder, while the run is not finished
Command = TypeVar("Command")


@dataclasses.dataclass
class Stop:
    """Whether Ctrl-C or SIGTERM has asked for an end."""

    signal: int | None = None

    def check(self) -> None:
        """To be called between two steps: raises KeyboardInterrupt when an end was asked for."""
        if self.signal is not None:
            raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """The exit code of a process that was ended by that signal: 130 or 143."""
        return 128 + (self.signal or signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Hold the first Ctrl-C or SIGTERM back until `Stop.check`; a second one interrupts at once."""
    stop = Stop()

    def ask(number: int, frame: types.FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number
        console.note("ending after this step; once more ends at once, without a state to go on from")

    if threading.current_thread() is not threading.main_thread():  # only that one is given signals
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def course(run: Path, name: str, every: float, about: dict[str, Any]) -> States:
    """The states of one training of a run; where it goes on from one, metrics.jsonl then ends where that one does.

    about is what the lines of this training have, and those of others do not.
    """

    def on_resume(folder: Path, state: State) -> None:
        console.note(f"{name}: going on from step {state.steps:,} ({folder})")

    states = States(run / STATES / name, every, on_resume)
    state = states.load()
    metrics = run / "metrics.jsonl"
    if metrics.exists() and Group.here().rank == 0:
        over = 0 if state is None else len(state.numbers["record"]["epochs"])
        lines = metrics.read_text("utf-8").splitlines()
        metrics.write_text("".join(f"{line}\n" for line in lines if not _is_later(line, about, over)), "utf-8")
    return states


def _is_later(line: str, about: dict[str, Any], epochs: int) -> bool:
    """Whether a line of metrics.jsonl is of this training, and of an epoch after so many; half a line is."""
    try:
        row = json.loads(line)
    except ValueError:
        return True
    return about.items() <= row.items() and row["epoch"] > epochs


def finish(run: Path) -> None:
    """Nothing is left to go on from."""
    shutil.rmtree(run / STATES, ignore_errors=True)


def opened(command: Command, name: str) -> tuple[Command, Path | None]:
    """The command as it is to be run, and the folder of the run that it goes on with, if any.

    That is the one of --resume, with the options that its config.json says; or, under torchrun, the one of --out,
    where torchrun has started the same command again.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it is a run of another command, a finished one, or of other options.
    """
    run, group = getattr(command, "resume"), Group.here()  # noqa: B009  # every command that trains has it
    if run is not None:
        config = _config_of(run, name)
        given = _given(command)
        if given:
            raise ValueError(
                f"expected --resume without other options, which the run knows, got {', '.join(given)} as well"
            )
        return _built(type(command), config), run
    out = getattr(command, "out")  # noqa: B009
    if group.size > 1 and out is None:
        raise ValueError("expected --out under torchrun, where a run that is started again finds its states, got none")
    (again,) = group.any(group.size > 1 and (out / STATES).is_dir())
    if not again:
        return command, None
    if _built(type(command), _config_of(out, name)) != command:
        raise ValueError(
            f"expected the options that {out} was begun with, got others; give another --out for a new run"
        )
    return command, out


def begun(command: Command, run: Path | None, name: str) -> Path:
    """The folder of the run, made and given its config.json unless it goes on with one."""
    group = Group.here()
    if run is None:
        run = getattr(command, "out")  # noqa: B009
        if group.rank == 0:
            run = console.new_run(run, name)
            values = dataclasses.asdict(typing.cast(Any, command))
            write_json(run / "config.json", {"format": FORMAT, "command": name, "version": __version__, **values})
    group.wait()
    return typing.cast(Path, run)


def _config_of(run: Path, name: str) -> dict[str, Any]:
    """What the config.json of an unfinished run says."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a run folder of counterflow {name} to resume, got {run}: no config.json there"
        )
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if config.get("command") != name:
        raise ValueError(f"expected a run of counterflow {name}, got {run}, one of counterflow {config.get('command')}")
    if not (run / STATES).is_dir():
        ended = "which is finished" if (run / "summary.json").is_file() else "which ended before its first state"
        raise ValueError(f"expected an unfinished run to resume, got {run}, {ended}; begin another one")
    return config


def _given(command: Command) -> list[str]:
    """The options that are not at their defaults."""
    fields = [f for f in dataclasses.fields(typing.cast(Any, command)) if f.name != "resume"]
    return ["--" + f.name.replace("_", "-") for f in fields if getattr(command, f.name) != _default(f)]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _built(cls: type[Command], values: dict[str, Any]) -> Command:
    """A dataclass of what JSON has kept of it."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(typing.cast(Any, cls)) if f.name in values]
    return cls(**{name: _as(hints[name], values[name]) for name in names})


def _as(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _built(typing.cast(Any, hint), value)
    kinds = {hint, *typing.get_args(hint)}
    if value is not None and Path in kinds:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has; all but the first one are silent."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpus else "gloo")
    console.out.quiet = console.err.quiet = dist.get_rank() > 0
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_step(stop: Stop, show: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """What `fit` calls after a step: shows it, and ends where an end was asked for."""

    def after(done: int, steps: int) -> None:
        show(done, steps)
        stop.check()

    return after
