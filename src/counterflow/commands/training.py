"""Trainings that survive: run folders to go on with, a stop between two steps, and several processes as one."""

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
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
import tyro
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from counterflow import __version__
from counterflow.commands import console
from counterflow.io.json import from_json, read_json, write_json
from counterflow.training.checkpoints import Checkpoint, Checkpoints
from counterflow.training.distributed import Workers

FORMAT = 1  # of the run folder
CHECKPOINTS = "checkpoints"  # a folder of the run folder, while there is something to go on from
PART = ".part"  # ends the names of what is not whole
PATIENCE = 0.2  # seconds between two looks for the launcher
Command = TypeVar("Command")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Where a run is written."""

    out: Path | None = None
    """run folder, which must be new; runs/COMMAND-DATE-TIME when not given"""
    resume: Path | None = None
    """run folder of a run that was ended or killed, to go on with; without other options"""
    save_every: float = 60.0
    """seconds between two checkpoints from which --resume can go on"""

    def __post_init__(self) -> None:
        if not self.save_every >= 0:
            raise ValueError(f"expected save-every of at least 0 seconds, got {self.save_every}")


Place = Annotated[RunFolder, tyro.conf.arg(name="")]  # its options stand beside those of the command


# -- the run folder ----------------------------------------------------------------------------------


def opened(command: Command, name: str) -> tuple[Command, Path | None]:
    """The command as it is to be run, and the folder of the run that it goes on with, if any.

    That is the one of --resume, with the options that its config.json says; or, under torchrun, the one of --out,
    where the same command was started before and did not end.

    Raises:
        ValueError: there is no such run; it is one of another command, a finished one, or one of other options.
        SystemExit: torchrun has started a run again that is finished.
    """
    place = _place(command)
    if place.resume is not None:
        resumed, given = place.resume, _given(command)
        if given:
            raise ValueError(
                f"expected --resume without other options, which the run knows, got {', '.join(given)} as well"
            )
        config = Workers.current().broadcast_result(lambda: _unfinished(resumed, name))
        return _built(command, config, resumed), resumed
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command, None
    if place.out is None:
        raise ValueError(
            "expected --out under torchrun, where a run that is started again finds its checkpoints, got none"
        )
    out = place.out
    group = Workers.current()
    (again,) = group.any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)  # machines count their own
    if group.broadcast_result(lambda: again and _is_finished(out)):
        raise SystemExit(0)
    config = group.broadcast_result(lambda: _unfinished(out, name) if _is_begun(out) else None)
    if config is None:
        return command, None
    if _built(command, config, out) != command:
        raise ValueError(
            f"expected the options that {out} was begun with, got others; give another --out for a new run"
        )
    return command, out


def begun(command: Command, run: Path | None, name: str) -> Path:
    """The folder of the run, made and given its config.json unless it goes on with one."""

    def make() -> str:
        if run is not None:
            _clear(run)
            return str(run)
        folder = console.new_run(_place(command).out, name)
        values = dataclasses.asdict(typing.cast(Any, command))
        write_json(folder / "config.json", {"format": FORMAT, "command": name, "version": __version__, **values})
        return str(folder)

    return Path(Workers.current().broadcast_result(make))


@contextmanager
def under_way(run: Path) -> Iterator[Stop]:
    """While the run is written: signals wait for the end of a step, and an error leaves what can be gone on with.

    A folder that holds neither a checkpoint nor weights is removed.
    """
    with stoppable() as stop:
        try:
            yield stop
        except BaseException as error:
            if (run / CHECKPOINTS).is_dir():
                error.add_note(f"go on with --resume {run}")
            elif Workers.current().rank == 0 and not any(run.glob("*.safetensors")):
                shutil.rmtree(run, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt) and stop.signal is not None:
                error.args = (stop.signal,)
            raise


def finish(run: Path) -> None:
    """Nothing is left to go on from."""
    if (run / CHECKPOINTS).is_dir():
        os.replace(run / CHECKPOINTS, run / f"{CHECKPOINTS}{PART}")  # at once, whatever happens next
    _clear(run)


def _clear(run: Path) -> None:
    """Remove what a killed process left half-done."""
    for part in run.rglob(f"*{PART}"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _is_begun(run: Path) -> bool:
    return (run / "config.json").is_file()


def _is_finished(run: Path) -> bool:
    return (run / "summary.json").is_file() and not (run / CHECKPOINTS).is_dir()


def _unfinished(run: Path, name: str) -> dict[str, Any]:
    """What the config.json of an unfinished run says."""
    if not _is_begun(run):
        raise ValueError(f"expected a run folder of counterflow {name} to resume, got {run}: no config.json there")
    config = read_json(run / "config.json", "the configuration of a run")
    if config.get("command") != name:
        raise ValueError(f"expected a run of counterflow {name}, got {run}, one of counterflow {config.get('command')}")
    if _is_finished(run):
        raise ValueError(f"expected an unfinished run to resume, got {run}, which is finished; begin another one")
    return config


# -- what is kept of a training ----------------------------------------------------------------------


@contextmanager
def metrics(run: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes a line of metrics.jsonl; a resumed run writes them all again."""
    path = run / "metrics.jsonl" if Workers.current().rank == 0 else Path(os.devnull)
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row), file=file, flush=True)


def checkpoints(
    run: Path,
    place: RunFolder,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoints:
    """Return the run's checkpoints. On resume, report it and write the finished epochs to metrics.jsonl again."""

    def on_resume(task: str, checkpoint: Checkpoint) -> None:
        console.note(f"{task}: resuming from step {checkpoint.steps:,} of {run / CHECKPOINTS}")
        if write is not None:
            for epoch in checkpoint.history.epochs:
                write({"task": task, **dataclasses.asdict(epoch)})

    return Checkpoints(run / CHECKPOINTS, place.save_every, on_resume)


# -- signals -----------------------------------------------------------------------------------------


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

    def after_step(self, show: Callable[..., None]) -> Callable[..., None]:
        """What `fit` calls after a step: shows it, and ends where an end was asked for."""

        def after(*where: Any) -> None:
            show(*where)
            self.check()

        return after


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Hold the first Ctrl-C or SIGTERM back until `Stop.check`; a second one interrupts at once."""
    stop = Stop()

    def ask(number: int, frame: types.FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt(number)
        stop.signal = number
        console.note("ending after this step; once more ends at once, without a checkpoint to resume from")

    if threading.current_thread() is not threading.main_thread():  # only that one is given signals
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- options -----------------------------------------------------------------------------------------


def _place(command: Any) -> RunFolder:
    place: RunFolder = command.folder  # every command that trains has it
    return place


def _given(command: Any) -> list[str]:
    """The options beside --resume that are not at their defaults, as they are typed."""
    named = _options(command, type(command)(folder=RunFolder(resume=_place(command).resume)))
    return [name for name, (value, default) in named.items() if value != default]


def _options(values: Any, defaults: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """By the name that is typed: the value and its default."""
    found: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(type(values), include_extras=True)
    for field in dataclasses.fields(values):
        value, default = (getattr(each, field.name) for each in (values, defaults))
        more = getattr(hints[field.name], "__metadata__", ())
        name = next((m.name for m in more if getattr(m, "name", None) is not None), field.name.replace("_", "-"))
        if dataclasses.is_dataclass(value):
            found |= _options(value, default, f"{prefix}{name}." if name else prefix)
        else:
            metavar = next((m.metavar for m in more if getattr(m, "metavar", None)), None)
            found[metavar if metavar and tyro.conf.Positional in more else f"--{prefix}{name}"] = (value, default)
    return found


def _built(like: Command, config: dict[str, Any], run: Path) -> Command:
    """The command that a config.json has kept."""
    names = {field.name for field in dataclasses.fields(typing.cast(Any, like))}
    options = {name: value for name, value in config.items() if name in names}
    built: Command = from_json(options, type(like), f"the options in {run / 'config.json'}")
    return built


# -- several processes -------------------------------------------------------------------------------


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
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun keeps its store, where new processes would meet dead ones
        store = PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size)
    console.out.quiet = console.err.quiet = rank > 0
    try:
        with _ended_with_torchrun():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _ended_with_torchrun() -> Iterator[None]:
    """SIGTERM comes where torchrun has been killed, which can no longer send it.

    Processes that are left alone would wait for each other for ever, or write beside those that are started next.
    """
    if not dist.is_torchelastic_launched():  # a parent that is no launcher may end when it likes
        yield
        return
    torchrun, ended = os.getppid(), threading.Event()

    def watch() -> None:
        while not ended.wait(PATIENCE):
            if os.getppid() != torchrun:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        if os.getppid() != torchrun:  # the first process says so also where another one saw it before
            console.note("torchrun was killed: ending this process as well")
