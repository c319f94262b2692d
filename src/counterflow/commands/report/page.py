"""Pages of reports: what is on one, and its HTML."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

SCRIPT = "sort.js"
MAX_PICTURE = 8 << 20  # bytes of a picture; larger ones are named instead


@dataclass(frozen=True)
class Cell:
    """Cell of a table."""

    text: str
    exact: str = ""  # shown while the pointer rests on the cell
    order: float | str | None = None  # key to sort by; None for text
    mark: str = ""  # "good", "bad" or "unusual"


@dataclass(frozen=True)
class Table:
    """Table of cells; its rows are sorted by a click on a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """Picture, and a sentence on how to read it."""

    title: str
    sentence: str
    data: str  # a data: URI; empty if the file is missing


@dataclass(frozen=True)
class Card:
    """Facts about one column of a table, and histograms of data and samples in the same bins, scaled to 1."""

    title: str
    subtitle: str
    facts: Mapping[str, str]
    data: Sequence[float] = ()
    samples: Sequence[float] = ()


@dataclass(frozen=True)
class Section:
    """Part of a page under a heading."""

    title: str
    note: str = ""
    table: Table | None = None
    cards: Sequence[Card] = ()
    pictures: Sequence[Picture] = ()
    side_by_side: bool = False  # of the pictures


@dataclass(frozen=True)
class Page:
    """Report of one run, or comparison of several."""

    kind: str  # such as "counterflow density"
    title: str
    verdict: str  # the result in words
    good: bool | None = None  # of the verdict; None if it judges nothing
    warnings: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    sections: Sequence[Section] = ()
    command: str = ""  # runs it again
    about: Mapping[str, str] = field(default_factory=dict)  # versions, machine and time


def picture(path: Path, title: str, sentence: str) -> Picture:
    """Return a picture with the PNG file in it; without data if there is no such file."""
    if not path.is_file() or path.stat().st_size > MAX_PICTURE:
        return Picture(title, sentence, "")
    return Picture(title, sentence, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode())


def number(value: float | None, digits: str = ".4g", mark: str = "") -> Cell:
    """Return a cell with a rounded number, whose exact value shows on hover; an empty cell for None."""
    if value is None:
        return Cell("", order="-Infinity")
    return Cell(format(value, digits), repr(value), float(value), mark)


def render(page: Page) -> str:
    """Return the HTML of a page. All texts are escaped, and no script but the page's own can run."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("counterflow.commands.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _source(environment, SCRIPT)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values: dict[str, Any] = {"page": page, "script": script, "digest": digest}
    return environment.get_template("page.html").render(values, style=_source(environment, "style.css"))


def _source(environment: jinja2.Environment, name: str) -> str:
    if environment.loader is None:
        raise ValueError("expected a loader of templates, got none")
    return environment.loader.get_source(environment, name)[0]
