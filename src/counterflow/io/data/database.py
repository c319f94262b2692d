"""SQLite and DuckDB files: the result of one query, or one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from counterflow.checks import require
from counterflow.io.data.arrow import located_errors
from counterflow.io.data.source import TableSource, sequential_parts
from counterflow.io.limits import decoding, one_line

SQLITE, DUCKDB = "an SQLite database", "a DuckDB database"
ROWS = 1 << 14  # fetched at a time
MEMORY = "1GB"  # that DuckDB may take
MAX_LISTED = 20  # tables that an error names
SQLITE_TABLES = (
    "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER BY name"
)
DUCKDB_TABLES = "SELECT table_name FROM information_schema.tables ORDER BY table_name"
SQLITE_TYPES = ("integer", "real", "text", "blob", "null")  # of cells: columns have none


def open_sqlite(path: Path, query: str | None) -> TableSource:
    """Open the result of a query on an SQLite file, which is opened for reading only."""
    with decoding(path, SQLITE), closing(_sqlite(path)) as database:
        tables = [name for (name,) in database.execute(SQLITE_TABLES)]
    sql = _select(path, tables, query)
    with _answering(path, tables), closing(_sqlite(path)) as database:
        names = [column for column, *_ in database.execute(f"SELECT * FROM ({sql}) LIMIT 0").description]
        counts = ", ".join(
            f"coalesce(sum(typeof({_quoted(name)}) = '{kind}'), 0)" for name in names for kind in SQLITE_TYPES
        )
        found = iter(database.execute(f"SELECT count(*), {counts} FROM ({sql})").fetchone())
    rows = next(found)
    kinds = [[kind for kind in SQLITE_TYPES if next(found)] for _ in names]
    for name, held in zip(names, kinds, strict=True):
        if "blob" in held:
            raise ValueError(
                f"expected numbers or texts in column {name!r} of {path}, got blobs; leave it out of --query"
            )
    read = partial(_sqlite_batches, path, sql, names, kinds)
    return TableSource(path, names, True, rows, sequential_parts(path, rows, read))


def _sqlite(path: Path) -> Any:
    """Connect to an SQLite file for reading; functions with side effects are off in what the file defines."""
    sqlite3 = require("sqlite3", "data", SQLITE)
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA query_only = ON")
    return database


def _sqlite_batches(path: Path, sql: str, names: Sequence[str], kinds: Sequence[Sequence[str]]) -> Iterator[Any]:
    arrow = require("pyarrow", "data", SQLITE)
    types = [_sqlite_type(held) for held in kinds]
    with closing(_sqlite(path)) as database:
        with decoding(path, SQLITE):
            cursor = database.execute(f"SELECT * FROM ({sql})")
        while True:
            with decoding(path, SQLITE):
                rows = cursor.fetchmany(ROWS)
                columns = [arrow.array([_cell(row[k], type) for row in rows], type) for k, type in enumerate(types)]
            if not rows:
                return
            yield arrow.record_batch(columns, names=list(names))


def _sqlite_type(kinds: Sequence[str]) -> Any:
    """Return the Arrow type of a column whose cells are of these types."""
    arrow = require("pyarrow", "data", SQLITE)
    if "text" in kinds:
        return arrow.string()
    return arrow.float64() if "real" in kinds else arrow.int64()


def _cell(cell: Any, type: Any) -> Any:
    return str(cell) if cell is not None and str(type) == "string" else cell


def open_duckdb(path: Path, query: str | None) -> TableSource:
    """Open the result of a query on a DuckDB file, which is opened for reading only, without extensions."""
    with decoding(path, DUCKDB), _duckdb(path) as database:
        tables = [name for (name,) in database.execute(DUCKDB_TABLES).fetchall()]
    sql = _select(path, tables, query)
    with _answering(path, tables), _duckdb(path) as database:
        names = [column for column, *_ in database.execute(f"SELECT * FROM ({sql}) LIMIT 0").description]
        (rows,) = database.execute(f"SELECT count(*) FROM ({sql})").fetchone()
    return TableSource(path, names, True, rows, sequential_parts(path, rows, partial(_duckdb_batches, path, sql)))


def _duckdb(path: Path) -> Any:
    """Connect to a DuckDB file for reading: no other file, no network, no extension, bounded memory."""
    duckdb = require("duckdb", "databases", DUCKDB)
    config = {
        "enable_external_access": "false",
        "autoload_known_extensions": "false",
        "autoinstall_known_extensions": "false",
        "memory_limit": MEMORY,
        "lock_configuration": "true",
    }
    return duckdb.connect(str(path), read_only=True, config=config)


def _duckdb_batches(path: Path, sql: str) -> Iterator[Any]:
    with decoding(path, DUCKDB):
        database = _duckdb(path)
    with database:
        with decoding(path, DUCKDB):
            reader = database.sql(f"SELECT * FROM ({sql})").to_arrow_reader(ROWS)
        yield from located_errors(reader, path, DUCKDB)


def _select(path: Path, tables: Sequence[str], query: str | None) -> str:
    """Return the query, or the query of all rows of the table it names, or of the only table."""
    if query is None and len(tables) != 1:
        raise ValueError(
            f"expected --query to choose a table of {path}, or to be a query in SQL, got none; {_listed(tables)}"
        )
    chosen = tables[0] if query is None else query
    return f"SELECT * FROM {_quoted(chosen)}" if chosen in tables else chosen.strip().rstrip(";")


@contextmanager
def _answering(path: Path, tables: Sequence[str]) -> Iterator[None]:
    """Turn an error of a query into one ValueError that names the tables there are."""
    try:
        yield
    except Exception as error:  # sqlite3.Error, duckdb.Error
        raise ValueError(
            f"expected --query to be a query that {path} answers, got: {one_line(error)}; {_listed(tables)}"
        ) from error


def _listed(tables: Sequence[str]) -> str:
    return f"its tables: {', '.join(map(repr, tables[:MAX_LISTED])) or 'none'}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
