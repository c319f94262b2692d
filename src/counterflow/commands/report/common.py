"""Parts that the reports of all commands share."""

from __future__ import annotations

from collections.abc import Mapping

from counterflow.commands.report.page import Cell, Page, Section
from counterflow.commands.report.run_data import Run

MIN_P = 0.01  # p-value of a two-sample test below which a difference is found


def make_page(
    run: Run,
    title: str,
    verdict: str,
    good: bool | None,
    warnings: list[str],
    facts: Mapping[str, str],
    sections: list[Section],
) -> Page:
    """Return a page, with what the reports of all commands have: versions, the command line, a note of interruption."""
    stopped = run.summary.get("stopped")
    if stopped == "interrupted" or (isinstance(stopped, dict) and "interrupted" in stopped.values()):
        folder = run.folder
        warnings = [f"The run was interrupted: these are its best weights so far; --resume {folder}", *warnings]
    return Page(
        f"counterflow {run.command}",
        title,
        verdict,
        good,
        warnings,
        {name: value for name, value in facts.items() if value},
        [section for section in sections if section.table or section.cards or section.pictures or section.note],
        run.command_line(),
        _about(run),
    )


def _about(run: Run) -> dict[str, str]:
    """Return versions, time and place of a run."""
    config = run.config
    about = {"run folder": str(run.folder.resolve())}
    if "started" in config:
        about["started"] = str(config["started"])
    about["counterflow"] = str(config["version"])
    return about | {str(name): str(version) for name, version in config.get("versions", {}).items()}


def yes(value: bool) -> Cell:
    """Return the cell of an answer, yes being the good one."""
    return Cell("yes" if value else "no", mark="good" if value else "bad")


def maybe(value: float | None, form: str) -> str:
    """Return a number as text; None stands for one that is not finite."""
    return "not finite" if value is None else format(value, form)
