"""Options that commands share, and the ways from a command line to config.json and back."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from counterflow.io.json import from_json
from counterflow.io.table_formats import TableOptions
from counterflow.training.config import TrackerName

Command = TypeVar("Command")

FLAT = tyro.conf.arg(name="")  # the fields of a nested dataclass stand beside the options of the command


def optional(metavar: str) -> Any:
    """Show an option that is unset by default with this placeholder, and without "(default: None)"."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder that a run is written to."""

    out: Annotated[Path | None, optional("FOLDER")] = None
    """new folder for the run; by default runs/COMMAND-DATE-TIME"""
    resume: Annotated[Path | None, optional("FOLDER")] = None
    """folder of an interrupted run, which continues with its own options; give no other option"""
    save_every: float = 60.0
    """seconds between checkpoints, from which --resume continues"""
    tracker: Annotated[TrackerName | None, optional("{tensorboard,wandb,mlflow}")] = None
    """experiment tracker that options, epochs, results and plots are logged to as well"""

    def __post_init__(self) -> None:
        if not self.save_every >= 0:
            raise ValueError(f"expected --save-every to be at least 0 seconds, got {self.save_every}")


@dataclasses.dataclass(frozen=True)
class TableFile:
    """Options of reading a table, each of some formats; see `TableOptions`."""

    key: Annotated[str | None, optional("NAME")] = None
    """array of an .npz file"""
    sep: Annotated[str | None, optional("CHARACTER")] = None
    """separator of a CSV file, such as ; or \\t for a tab; by default found from the first lines"""
    decimal: Annotated[str | None, optional("MARK")] = None
    """decimal mark of a CSV file, . or a comma; by default found from the first lines"""
    encoding: Annotated[str | None, optional("NAME")] = None
    """encoding of a CSV file, such as utf8 or cp1252; by default found from the first lines"""
    na: Annotated[tuple[str, ...], optional("TEXT [TEXT ...]")] = ()
    """more texts of a CSV file that stand for a missing cell, such as ?"""
    sheet: Annotated[str | None, optional("NAME")] = None
    """sheet of an .xlsx file; needed if there are several"""
    query: Annotated[str | None, optional("SQL")] = None
    """query on an .sqlite or .duckdb file, or a table in it; needed if there are several tables"""

    def options(self) -> TableOptions:
        """Return the options for `open_table`."""
        return TableOptions(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Messages:
    """Options of every command: how much it prints."""

    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["-q"], help_behavior_hint="")] = False
    """print results, warnings and errors only, without notes and progress"""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(aliases=["-v"], help_behavior_hint="")] = False
    """print the traceback of an error"""


@dataclasses.dataclass(frozen=True)
class Session(Messages):
    """Options of every command but bench, which has threads of its own."""

    threads: Annotated[int | None, optional("INT")] = None
    """threads of the CPU; by default as many as torch uses"""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"expected --threads to be at least 1, got {self.threads}")


def with_session(command: type[Command]) -> Any:
    """Return a dataclass with the options of a command as `command`, and those of every command as `session`."""
    has_threads = any(field.name == "threads" for field in dataclasses.fields(typing.cast(Any, command)))
    session = Messages if has_threads else Session
    fields: list[Any] = [
        ("command", Annotated[command, FLAT]),
        ("session", Annotated[session, FLAT], dataclasses.field(default=session())),
    ]
    return dataclasses.make_dataclass("Invocation", fields, frozen=True)


def run_folder_of(command: Any) -> RunFolder:
    """Return the run folder options of a command that trains; every such command has them."""
    options: RunFolder = command.folder
    return options


def given_options(command: Any) -> list[str]:
    """Return the options of a command, except --resume, that differ from their defaults, as they are typed."""
    defaults = type(command)(folder=RunFolder(resume=run_folder_of(command).resume))
    return [name for name, value, default in _options(command, defaults) if value != default]


def command_line(name: str, command: Any) -> str:
    """Return the command line of a command, without --out and --resume.

    Example:
        >>> from counterflow.commands.density import Density
        >>> command_line("density", Density(data="my table.csv", drop=("id", "day")))
        "counterflow density 'my table.csv' --drop id day"
    """
    words: list[str] = []
    flags: list[str] = []
    for option, value, default in _options(command, type(command)()):
        if value == default or option in ("--out", "--resume"):
            continue
        texts = [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
        if not option.startswith("--"):
            words += texts
        else:
            flags += [option] if isinstance(value, bool) else [option, *texts]
    return shlex.join(["counterflow", name, *words, *flags])


def _options(values: Any, defaults: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name as it is typed, the value and the default of each option."""
    hints = typing.get_type_hints(type(values), include_extras=True)
    for field in dataclasses.fields(values):
        value, default = (getattr(each, field.name) for each in (values, defaults))
        metadata = getattr(hints[field.name], "__metadata__", ())
        if dataclasses.is_dataclass(value):
            yield from _options(value, default)
        elif tyro.conf.Positional in metadata:
            yield next(each.metavar for each in metadata if getattr(each, "metavar", None)).strip("[]"), value, default
        else:
            flag = field.name.replace("_", "-")
            yield f"--no-{flag}" if value is False else f"--{flag}", value, default


def from_config(like: Command, config: dict[str, Any], run: Path) -> Command:
    """Build a command of the same type from the contents of a config.json.

    Raises:
        ValueError: config.json does not hold the options of this command.
    """
    names = {field.name for field in dataclasses.fields(typing.cast(Any, like))}
    options = {name: value for name, value in config.items() if name in names}
    command: Command = from_json(options, type(like), f"the options in {run / 'config.json'}")
    return command
