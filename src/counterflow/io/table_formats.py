"""Tables in files: the suffixes of their formats, and the options of reading them. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SUFFIXES = {  # of tables: the suffix -> the format
    **dict.fromkeys((".csv", ".tsv", ".txt"), "csv"),
    ".parquet": "parquet",
    **dict.fromkeys((".feather", ".arrow", ".ipc"), "feather"),
    ".xlsx": "excel",
    **dict.fromkeys((".sqlite", ".sqlite3"), "sqlite"),
    ".duckdb": "duckdb",
    ".db": "database",  # of either kind
    ".npy": "npy",
    ".npz": "npz",
}
STREAM = "-"  # stands for standard input or output
COMPRESSED = (".gz", ".zst")  # of CSV files, after their suffix
TABLE = "a table (.csv, .parquet, .feather, .xlsx, .sqlite, .duckdb, .npy or .npz)"


def suffix_of(path: Path) -> str:
    """Return the suffix of a file in lower case, with that of its compression before it, as in .csv.gz.

    Example:
        >>> suffix_of(Path("Table.CSV.gz")), suffix_of(Path("a.b.parquet"))
        ('.csv.gz', '.parquet')
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in COMPRESSED else suffix


def format_of(suffix: str) -> str | None:
    """Return the format of a suffix, see `SUFFIXES`; None if it is not that of a table."""
    plain = suffix.removesuffix(".gz").removesuffix(".zst")
    found = SUFFIXES.get(plain)
    return found if found == "csv" or plain == suffix else None


@dataclass(frozen=True)
class TableOptions:
    """Options of reading a table. Each belongs to some formats, and is refused with the others."""

    key: str | None = None  # array of an .npz file
    sep: str | None = None  # CSV: separator of cells; \t for a tab; found from the first lines by default
    decimal: str | None = None  # CSV: decimal mark, . or , ; found from the first lines by default
    encoding: str | None = None  # CSV: encoding of the text, such as utf8 or cp1252; found by default
    na: tuple[str, ...] = ()  # CSV: more texts that stand for a missing cell, such as ? or -999
    sheet: str | None = None  # sheet of an .xlsx file; needed if there are several
    query: str | None = None  # SQL query of an SQLite or DuckDB file, or the name of a table in it
