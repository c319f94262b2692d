"""The folder of a run: create it or resume the run in it, keep checkpoints, and mark it as done.

config.json          the options of the command
metrics.jsonl        one line per epoch or stage
checkpoints/         while the run is not done: the state of each training
model.safetensors    the weights
summary.json         written after all else: a folder that has it and no checkpoints is done
report.html          made from the others
.lock                while a process writes to the folder
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from counterflow import __version__
from counterflow.commands import console
from counterflow.commands.folder_lock import locked
from counterflow.commands.options import Command, RunFolder, from_config, given_options, run_folder_of
from counterflow.commands.preflight import CHECKPOINTS, PARTIAL, check_new
from counterflow.commands.signals import Stop, stopping
from counterflow.commands.torchrun import is_restarted, is_torchrun
from counterflow.commands.tracking import tracking
from counterflow.io.json import read_json, write_json
from counterflow.training.checkpoints import Checkpoint, Checkpoints
from counterflow.training.distributed import Workers
from counterflow.training.tracking import Tracker, log_epoch

FORMAT = 1  # of the run folder
DEFAULT_PARENT = Path("runs")  # of run folders without --out


def resolve_run(command: Command, name: str) -> tuple[Command, Path | None]:
    """Return the command to run, and the run folder to resume if there is one.

    With --resume that is the folder given, and the options come from its config.json. Under torchrun, which starts a
    command again after a failure, it is the folder of --out if the same command was started there and did not finish.

    Raises:
        ValueError: there is no such run, it belongs to another command, it is done, or its options differ.
        SystemExit: torchrun restarted a run that is done.
    """
    folder = run_folder_of(command)
    if folder.resume is not None:
        resumed = folder.resume
        given = given_options(command)
        if given:
            raise ValueError(
                f"expected --resume without other options, which config.json holds, got {', '.join(given)}"
            )
        config = Workers.current().broadcast_result(lambda: _config_to_resume(resumed, name))
        return from_config(command, config, resumed), resumed
    if not is_torchrun():
        return command, None
    if folder.out is None:
        raise ValueError("expected --out under torchrun, which finds the checkpoints there when it restarts, got none")
    out = folder.out
    workers = Workers.current()
    (restarted,) = workers.any_rank(is_restarted())  # each machine counts its own restarts
    if workers.broadcast_result(lambda: restarted and _is_done(out)):
        raise SystemExit(0)
    config = workers.broadcast_result(lambda: _config_to_resume(out, name) if _has_config(out) else None)
    if config is None:
        return command, None
    if from_config(command, config, out) != command:
        raise ValueError(f"expected the options that the run in {out} was started with, got others; give another --out")
    return command, out


@contextmanager
def running(command: Command, resumed: Path | None, name: str) -> Iterator[tuple[Path, Stop, Tracker | None]]:
    """Create the run folder, or reopen the one to resume, and hold it while the run lasts.

    Yields the folder, the `Stop` that holds signals back until a step ends, and the client of --tracker, if any. No
    other command can write to the folder meanwhile. After an error, a folder with neither checkpoints nor weights is
    removed; one with checkpoints is named, so that the run can be resumed.

    Raises:
        FileExistsError: the new folder exists and is not empty, or another command is writing to it.
    """
    with ExitStack() as locks:  # of rank 0
        folder = Path(Workers.current().broadcast_result(lambda: str(_open(command, resumed, name, locks))))
        with stopping() as stop:
            try:
                with tracking(command, folder) as tracker:
                    yield folder, stop, tracker
            except BaseException as error:
                if (folder / CHECKPOINTS).is_dir():
                    error.add_note(f"continue with --resume {folder}")
                elif Workers.current().rank == 0 and not any(folder.glob("*.safetensors")):
                    shutil.rmtree(folder, ignore_errors=True)
                    with suppress(OSError):  # it holds other runs
                        DEFAULT_PARENT.rmdir()
                if isinstance(error, KeyboardInterrupt) and stop.signal is not None:
                    error.args = (stop.signal,)
                raise


def _open(command: Command, resumed: Path | None, name: str, locks: ExitStack) -> Path:
    if resumed is not None:
        locks.enter_context(locked(resumed))
        _config_to_resume(resumed, name)  # again: another process may have finished the run before the lock was free
        _remove_partial(resumed)
        return resumed
    folder = new_run_folder(run_folder_of(command).out, name, locks)
    write_config(folder, name, dataclasses.asdict(typing.cast(Any, command)))
    return folder


def write_config(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Write config.json: the command, its options, the versions and the time."""
    about = {
        "format": FORMAT,
        "command": name,
        "version": __version__,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version(), **{each: version(each) for each in ("torch", "numpy")}},
    }
    write_json(folder / "config.json", {**about, **options})


def new_run_folder(out: Path | None, name: str, locks: ExitStack) -> Path:
    """Create a run folder, `out` or runs/NAME-DATE-TIME, and lock it until the stack is closed.

    Raises:
        FileExistsError: the folder exists and is not empty, or another command is writing to it.
    """
    if out is not None:
        return _claim(out, locks)
    default = DEFAULT_PARENT / time.strftime(f"{name}-%Y%m%d-%H%M%S")
    with suppress(FileExistsError):  # where another run started in the same second
        return _claim(default, locks)
    return _claim(default.with_name(f"{default.name}-{os.getpid()}"), locks)


def _claim(folder: Path, locks: ExitStack) -> Path:
    check_new(folder)
    locks.enter_context(locked(folder))
    check_new(folder)  # again: another process may have written a run before the lock was free
    return folder


def mark_done(run: Path) -> None:
    """Remove the checkpoints of a run, which makes it done."""
    if (run / CHECKPOINTS).is_dir():
        os.replace(run / CHECKPOINTS, run / f"{CHECKPOINTS}{PARTIAL}")  # atomic, unlike removing the files
    _remove_partial(run)


def _remove_partial(run: Path) -> None:
    """Remove what a killed process left incomplete."""
    for path in run.rglob(f"*{PARTIAL}"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _has_config(run: Path) -> bool:
    return (run / "config.json").is_file()


def _is_done(run: Path) -> bool:
    return (run / "summary.json").is_file() and not (run / CHECKPOINTS).is_dir()


def _config_to_resume(run: Path, name: str) -> dict[str, Any]:
    """Return the config.json of a run that can be resumed.

    Raises:
        ValueError: there is no such run, it belongs to another command, or it is done.
    """
    if not _has_config(run):
        raise ValueError(f"expected the run folder of counterflow {name} to resume, got {run}, without a config.json")
    config = read_json(run / "config.json", "the configuration of a run")
    if config.get("command") != name:
        raise ValueError(
            f"expected a run of counterflow {name}, got {run}, a run of counterflow {config.get('command')}"
        )
    if _is_done(run):
        raise ValueError(f"expected an unfinished run to resume, got {run}, which is done; start a new run")
    return config


@contextmanager
def metrics(run: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that appends a line to metrics.jsonl, which is rewritten from the start on resume."""
    path = run / "metrics.jsonl" if Workers.current().rank == 0 else Path(os.devnull)
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(json.dumps(row), file=file, flush=True)


def checkpoints(
    run: Path,
    options: RunFolder,
    tracker: Tracker | None,
    write: Callable[[dict[str, Any]], None] | None = None,
) -> Checkpoints:
    """Return the checkpoints of a run. On resume, report it, and write and log the finished epochs again.

    Args:
        run: run folder.
        options: of the run folder.
        tracker: that `running` yields.
        write: function that `metrics` yields.
    """

    def on_resume(task: str, checkpoint: Checkpoint) -> None:
        console.note(f"{task}: resuming from step {checkpoint.steps:,} of {run / CHECKPOINTS}")
        for epoch in checkpoint.history.epochs:
            if write is not None:
                write({"task": task, **dataclasses.asdict(epoch)})
            if tracker is not None:
                log_epoch(tracker, task, epoch)

    return Checkpoints(run / CHECKPOINTS, options.save_every, on_resume)
