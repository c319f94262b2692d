"""Run folders as reports read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from counterflow.commands.bench.command import Bench
from counterflow.commands.density import Density
from counterflow.commands.distill import Distill
from counterflow.commands.options import command_line, from_config
from counterflow.commands.posterior import Posterior
from counterflow.commands.report.page import Picture, picture
from counterflow.commands.vae import Vae
from counterflow.io.json import read_json

COMMANDS: dict[str, type[Any]] = {
    "vae": Vae,
    "posterior": Posterior,
    "density": Density,
    "distill": Distill,
    "bench": Bench,
}


@dataclass(frozen=True)
class Run:
    """Files of a run folder."""

    folder: Path
    command: str  # name of the command
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; none if the file does not read."""
        path = self.folder / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError):
            return []

    def picture(self, name: str, title: str, sentence: str) -> Picture:
        """Return a plot of the run."""
        return picture(self.folder / "plots" / f"{name}.png", title, sentence)

    def command_line(self) -> str:
        """Return the command that repeats the run; "" if this version does not know its options."""
        try:
            return command_line(self.command, from_config(COMMANDS[self.command](), self.config, self.folder))
        except (TypeError, ValueError):
            return ""


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder is not that of a run, or the run has not come to its results.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"expected a run folder, got {folder}, without a config.json")
    config = read_json(path, "the configuration of a run")
    command = config.get("command")
    if command not in COMMANDS:
        raise ValueError(f"expected {path} to name a command of counterflow, got {command!r:.100}")
    if not (folder / "summary.json").is_file():
        raise ValueError(
            f"expected a run with results, got {folder}, without a summary.json; finish it with --resume {folder}"
        )
    return Run(folder, command, config, read_json(folder / "summary.json", "the results of a run"))
