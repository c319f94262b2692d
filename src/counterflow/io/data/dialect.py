"""Dialect of a CSV file: separator, decimal mark, thousands separator, encoding and comments, found from its start."""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.table_formats import TableOptions

SEPARATORS = (",", ";", "\t", "|", " ")
NAMES = {",": "','", ";": "';'", "\t": "tab", "|": "'|'", " ": "space"}
DECIMALS = (".", ",")
ROWS = 1_000  # of the start that are compared
MIN_SHARE = 0.5  # of these rows that have the same number of cells
SPACES = " \u00a0\u202f'"  # thousands separators besides the decimal mark that is not in use
NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")  # with either decimal mark, in linear time
GROUPED = re.compile(rf"[+-]?\d{{1,3}}([.,{SPACES}])\d{{3}}(\1\d{{3}})*([.,]\d+)?")
AMBIGUOUS = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}")  # 1,234 is a thousand, or a little more than one


@dataclass(frozen=True)
class Dialect:
    """Dialect of a CSV file.

    Args:
        sep: separator of the cells.
        decimal: decimal mark, "." or ",".
        thousands: separators of thousands, each a character.
        encoding: name of a Python codec.
        comments: number of lines before the table.
        names: names of the columns, where they stand in a comment.
        later_comments: lines among the rows that begin with # were seen.
    """

    sep: str = ","
    decimal: str = "."
    thousands: str = ""
    encoding: str = "utf8"
    comments: int = 0
    names: tuple[str, ...] | None = None
    later_comments: bool = False

    def describe(self) -> str:
        """Return what differs from the usual dialect, on one line; "" for nothing.

        Example:
            >>> Dialect(sep=";", decimal=",").describe()
            "separator ';', decimal ','"
        """
        parts = [f"separator {NAMES.get(self.sep, repr(self.sep))}"] if self.sep != "," else []
        parts += [f"decimal {self.decimal!r}"] if self.decimal != "." else []
        parts += [f"thousands {' '.join(map(repr, self.thousands))}"] if self.thousands else []
        parts += [f"encoding {self.encoding}"] if self.encoding != "utf8" else []
        parts += [f"comments before line {self.comments + 1}"] if self.comments else []
        return ", ".join(parts)

    def normalized(self, column: Any) -> Any:
        """Return an Arrow column of texts whose numbers have a decimal point and no separated thousands."""
        if self.decimal == "." and not self.thousands:
            return column
        compute = require("pyarrow.compute", "data", "a CSV file")
        digits = r"\d+"
        if self.thousands:
            grouped = [r"\d{1,3}(?:" + re.escape(each) + r"\d{3})+" for each in self.thousands]
            digits = f"(?:{'|'.join(grouped)}|{digits})"
        mark = re.escape(self.decimal)
        pattern = rf"^\s*[+-]?(?:{digits}(?:{mark}\d*)?|{mark}\d+)(?:[eE][+-]?\d+)?\s*$"
        plain = column
        for each in self.thousands:
            plain = compute.replace_substring(plain, each, "")
        plain = compute.replace_substring(plain, self.decimal, ".")
        return compute.if_else(compute.match_substring_regex(column, pattern), plain, column)


def detect_dialect(start: bytes, is_complete: bool, options: TableOptions, path: Path) -> Dialect:
    """Find the dialect of a CSV file from its first bytes; what the options state is not looked for.

    The separator is the one that gives the rows the same number of cells, and the most cells that are numbers. The
    decimal mark is that of the numbers that can be read in one way only. Where all numbers are like 1,234, the comma
    is the decimal mark if semicolons separate cells, and a separator of thousands otherwise. Lines before the table
    that begin with # are comments; the last of them may hold the names.

    Args:
        start: the first bytes, decompressed.
        is_complete: they are the whole file.
        options: those of reading the table.
        path: the file, for errors.

    Raises:
        ValueError: the options cannot be, or the bytes are not text.
    """
    encoding = _encoding(start, options.encoding, path)
    text = codecs.getincrementaldecoder(encoding)("replace").decode(start, is_complete).removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(
            f"expected {path} to be a CSV table, got bytes that are not text; convert it, or give its --encoding"
        )
    lines = text.splitlines()
    lines = lines if is_complete or len(lines) < 2 else lines[:-1]
    comments = next((k for k, line in enumerate(lines) if line.strip() and not line.startswith("#")), 0)
    body = [line for line in lines[comments : comments + ROWS] if line.strip() and not line.startswith("#")]
    sep = _separator(body) if options.sep is None else _one_character(options.sep)
    cells = [cell.strip() for row in _rows(body, sep) for cell in row]
    decimal, thousands = _marks(cells, sep, options.decimal)
    dialect = Dialect(sep, decimal, thousands, encoding, comments)
    names = _commented_names(lines[:comments], body, dialect)
    return replace(dialect, names=names, later_comments=any(line.startswith("#") for line in lines[comments:]))


def _encoding(start: bytes, stated: str | None, path: Path) -> str:
    if stated is not None:
        try:
            return codecs.lookup(stated).name.replace("utf-8", "utf8")
        except LookupError:
            raise ValueError(f"expected --encoding to be one that Python knows, such as utf8, got {stated!r}") from None
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    for encoding in ("utf8", "cp1252"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(start)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"


def _one_character(sep: str) -> str:
    sep = {"\\t": "\t", "tab": "\t"}.get(sep, sep)
    if len(sep) != 1 or sep in '"\r\n#' or not sep.isascii():
        raise ValueError(f"expected --sep to be one character, such as ';' or \\t, got {sep!r}")
    return sep


def _separator(lines: Sequence[str]) -> str:
    """Return the separator under which most rows have as many cells as the first, and most cells are numbers."""

    def quality(sep: str) -> tuple[float, float, int]:
        rows = _rows(lines, sep)
        width = len(rows[0]) if rows else 1
        share = sum(len(row) == width for row in rows) / max(len(rows), 1)
        if width < 2 or share < MIN_SHARE:
            return 0.0, 0.0, 0
        cells = [cell.strip() for row in rows[1:] for cell in row]
        numbers = sum(bool(NUMBER.fullmatch(cell) or GROUPED.fullmatch(cell)) for cell in cells)
        return round(share, 2), round(numbers / max(len(cells), 1), 2), width

    return max(SEPARATORS, key=quality)  # the first of equals


def _rows(lines: Sequence[str], sep: str) -> list[list[str]]:
    """Return the cells of each row; none if Python's reader refuses, so that Arrow's reader reports the fault."""
    try:
        return list(csv.reader(lines, delimiter=sep))
    except csv.Error:
        return []


def _marks(cells: Sequence[str], sep: str, stated: str | None) -> tuple[str, str]:
    """Return the decimal mark, and the separators of thousands."""
    if stated not in (None, *DECIMALS):
        raise ValueError(f"expected --decimal to be one of {' '.join(DECIMALS)}, got {stated!r}")
    decimals: Counter[str] = Counter()  # of numbers that can be read in one way only
    grouping: Counter[str] = Counter()
    ambiguous: Counter[str] = Counter()
    for cell in cells:
        if unclear := AMBIGUOUS.fullmatch(cell):
            ambiguous[unclear[1]] += 1
        elif (grouped := GROUPED.fullmatch(cell)) and not cell.lstrip("+-").startswith("0"):
            grouping[grouped[1]] += 1
            if grouped[3] and grouped[3][0] != grouped[1]:
                decimals[grouped[3][0]] += 1
        elif NUMBER.fullmatch(cell) and (mark := re.search("[.,]", cell)):
            decimals[mark[0]] += 1
    decimal = stated or _likely_decimal(decimals, grouping, ambiguous, sep)
    (other,) = {*DECIMALS} - {decimal}
    thousands = other if grouping[other] or (ambiguous[other] and not decimals[other]) else ""
    return decimal, thousands + "".join(each for each in SPACES if grouping[each] and each != sep)


def _likely_decimal(decimals: Counter[str], grouping: Counter[str], ambiguous: Counter[str], sep: str) -> str:
    if decimals[","] != decimals["."]:
        return max(DECIMALS, key=lambda mark: decimals[mark])
    if grouping["."] != grouping[","]:
        return min(DECIMALS, key=lambda mark: grouping[mark])
    return "," if sep == ";" and ambiguous[","] and not ambiguous["."] else "."


def _commented_names(comments: Sequence[str], body: Sequence[str], dialect: Dialect) -> tuple[str, ...] | None:
    """Return the names in the last comment, as numpy.savetxt writes them, if the first row of the table has numbers."""
    if not comments or not body:
        return None
    names = [name.strip() for row in _rows([comments[-1].lstrip("# ")], dialect.sep) for name in row]
    first = [cell.strip() for row in _rows(body[:1], dialect.sep) for cell in row]
    has_numbers = any(NUMBER.fullmatch(cell) or GROUPED.fullmatch(cell) for cell in first)
    return tuple(names) if has_numbers and len(names) == len(first) and all(names) else None
