"""Reports as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from counterflow.commands.report.command import REPORT
from counterflow.commands.report.contents import key_numbers, page_of
from counterflow.commands.report.page import Cell, Page, Section, Table, render
from counterflow.commands.report.run_data import Run, read_run
from counterflow.io.atomic import write_bytes

ALIKE = ("folder", "out", "resume", "save_every", "format", "version", "started", "versions")  # no settings of a run


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a run, and return its path.

    Args:
        folder: run folder.
        out: file to write; report.html in the run folder if None.

    Raises:
        ValueError: the folder is not that of a run with results.
    """
    path = out or folder / REPORT
    write_bytes(path, render(page_of(read_run(folder))).encode())
    return path


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the comparison of several runs of one command, and return its path.

    Raises:
        ValueError: a folder is not that of a run with results, or the runs are of different commands.
    """
    runs = [read_run(folder) for folder in folders]
    if len({run.command for run in runs}) > 1:
        described = ", ".join(f"{run.folder} ({run.command})" for run in runs)
        raise ValueError(f"expected runs of one command to compare, got {described}")
    write_bytes(out, render(_comparison(runs)).encode())
    return out


def _comparison(runs: Sequence[Run]) -> Page:
    pages = [page_of(run) for run in runs]
    names = _names(runs)
    numbers = [key_numbers(run) for run in runs]
    rows = [
        [Cell(label), *(found.get(label, Cell("")) for found in numbers)]
        for label in dict.fromkeys(label for found in numbers for label in found)
    ]
    settings = [_settings(run) for run in runs]
    options = [
        [Cell(name), *(Cell(found.get(name, "")) for found in settings)]
        for name in dict.fromkeys(name for found in settings for name in found)
        if len({found.get(name) for found in settings}) > 1
    ]
    verdicts = [[Cell(name), Cell(page.verdict)] for name, page in zip(names, pages, strict=True)]
    pictures: dict[str, Section] = {}
    for name, page in zip(names, pages, strict=True):
        for each in (picture for section in page.sections for picture in section.pictures):
            shown = dataclasses.replace(each, title=name, sentence="")
            known = pictures.get(each.title, Section(each.title, each.sentence, side_by_side=True))
            pictures[each.title] = dataclasses.replace(known, pictures=[*known.pictures, shown])
    alike = "All options are equal." if not options else ""
    return Page(
        f"counterflow {runs[0].command}",
        f"{len(runs)} runs",
        f"Comparison of {', '.join(names)}.",
        sections=[
            Section("Results", table=Table(("", *names), rows)),
            Section("In words", table=Table(("run", "result"), verdicts)),
            Section("Options that differ", alike, Table(("option", *names), options) if options else None),
            *pictures.values(),
        ],
        about={name: str(run.folder.resolve()) for name, run in zip(names, runs, strict=True)},
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the folders; their paths if two have the same name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _settings(run: Run) -> dict[str, str]:
    """Return the options of a run by name, those of nested objects beside the others."""
    found: dict[str, str] = {}
    for name, value in run.config.items():
        if name in ALIKE:
            continue
        nested = value if isinstance(value, dict) else {name: value}
        found |= {key: "" if part is None else str(part) for key, part in nested.items()}
    return found
