"""The experiment tracker of a run: --tracker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from counterflow import plots
from counterflow.commands.options import run_folder_of
from counterflow.interop.trackers import EVENTS, open_tracker
from counterflow.training.distributed import Workers
from counterflow.training.tracking import Guarded, Tracker, settings_of


@contextmanager
def tracking(command: Any, folder: Path) -> Iterator[Tracker | None]:
    """Open the tracker of a run, log its options and, in the end, its results; None without --tracker, and on rank > 0.

    A run that is resumed is logged anew, its finished epochs included.

    Args:
        command: options of the command.
        folder: run folder, whose name is the name of the run.

    Raises:
        ConnectionError: the tracker did not start a run.
    """
    kind = run_folder_of(command).tracker
    if kind is None or Workers.current().rank:
        yield None
        return
    shutil.rmtree(folder / EVENTS, ignore_errors=True)
    try:
        client = open_tracker(kind, folder.resolve().name, folder)
    except Exception as error:
        raise ConnectionError(f"expected {kind} to start a run, got {type(error).__name__}: {error}") from error
    with client:
        tracker = Guarded(client)
        tracker.log_params(settings_of(command))
        with plots.figures_to(tracker.add_figure):
            yield tracker
        summary = folder / "summary.json"
        if summary.is_file():
            tracker.log_metrics(_numbers(json.loads(summary.read_text("utf-8"))))


def _numbers(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers at the top of a summary as summary/NAME, and those of each result as summary/RESULT/NAME."""
    parts = {"": summary, **{f"{result['posterior']}/": result for result in summary.get("results", [])}}
    return {
        f"summary/{prefix}{name}": float(value)
        for prefix, part in parts.items()
        for name, value in part.items()
        if isinstance(value, int | float)
    }
