"""Tables as other programs write them: the numbers are those of the file, and what was guessed is reported."""

import datetime
import sqlite3
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from registry import over

from counterflow.io.data.dialect import Dialect
from counterflow.io.data.tables import open_table, read_table
from counterflow.io.data.types import arrow_type, decode, encode
from counterflow.io.data.writers import table_writer
from counterflow.io.table_formats import TableOptions

RNG = np.random.default_rng(0)
N = 60
TABLE = pd.DataFrame(
    {
        "Größe": np.round(RNG.normal(170, 8, N), 1),
        "Alter": RNG.integers(18, 80, N),
        "Preis": np.round(RNG.lognormal(8, 1, N), 2),
    }
)
GERMAN = str.maketrans(",.", ".,")


def read(path, **options):
    source = open_table(path, TableOptions(**options))
    columns, _, types = read_table(source, source.names, [])
    return source, np.stack([column.to_numpy() for column in columns.columns], 1), types


def with_thousands(marks=None):
    prices = [f"{price:,.2f}" for price in TABLE.Preis]
    table = TABLE.assign(Preis=prices if marks is None else [price.translate(marks) for price in prices])
    return table if marks is None else table.assign(Größe=[str(v).translate(marks) for v in TABLE["Größe"]])


def half(comment):
    lines = TABLE.to_csv(index=False).splitlines()
    return "\n".join([*comment, *lines[:30], "# half-way", *lines[30:]]).encode()


CSV = {  # name -> bytes, and what is reported
    "german.csv": (
        TABLE.to_csv(index=False, sep=";", decimal=",").encode("cp1252"),
        "separator ';', decimal ',', encoding cp1252",
    ),
    "tabs.tsv": (TABLE.to_csv(index=False, sep="\t").encode(), "separator tab"),
    "bars.txt": (TABLE.to_csv(index=False, sep="|").encode(), "separator '|'"),
    "excel.csv": (b"\xef\xbb\xbf" + TABLE.to_csv(index=False, lineterminator="\r\n").encode(), ""),
    "unicode.txt": (TABLE.to_csv(index=False, sep="\t").encode("utf-16"), "separator tab, encoding utf-16"),
    "thousands.csv": (with_thousands().to_csv(index=False).encode(), "thousands ','"),
    "punkte.csv": (
        with_thousands(GERMAN).to_csv(index=False, sep=";").encode(),
        "separator ';', decimal ',', thousands '.'",
    ),
    "spaces.csv": (
        with_thousands(str.maketrans(",.", "\u202f,")).to_csv(index=False, sep=";").encode(),
        r"separator ';', decimal ',', thousands '\u202f'",
    ),
    "comments.csv": (half(["# a scale", "# 2024"]), "comments before line 3"),
    "commented.csv": (
        TABLE.to_csv(index=False).replace("Größe", "# Größe", 1).encode(),
        "comments before line 2",
    ),
    "plain.csv": (TABLE.to_csv(index=False).encode(), ""),
    "table.csv.gz": (TABLE.to_csv(index=False).encode(), ""),
    "table.csv.zst": (TABLE.to_csv(index=False).encode(), ""),
}


@over(CSV)
def test_every_dialect_of_csv_is_read(name, tmp_path):
    content, reported = CSV[name]
    compression = {"gz": "gzip", "zst": "zstd"}.get(name.rpartition(".")[2])
    with pa.output_stream(str(tmp_path / name), compression=compression) as stream:
        stream.write(content)
    source, x, types = read(tmp_path / name)
    assert source.names == list(TABLE) and source.named
    np.testing.assert_array_equal(x, TABLE)
    assert types == {"Größe": "double", "Alter": "int64", "Preis": "double"}
    expected = f"{tmp_path / name}: {reported}; --sep, --decimal and --encoding override it"
    assert source.notes == ((expected,) if reported else ())


def test_options_override_the_dialect(tmp_path):
    (tmp_path / "a.csv").write_text("a;b\n1,234;?\n2,345;-999\n")
    source = open_table(tmp_path / "a.csv", TableOptions(na=("?", "-999")))
    (batch,) = source.batches(9)
    assert batch.to_pydict() == {"a": ["1.234", "2.345"], "b": [None, None]}
    (batch,) = open_table(tmp_path / "a.csv", TableOptions(decimal=".")).batches(9)
    assert batch.column("a").to_pylist() == ["1234", "2345"]
    (batch,) = open_table(tmp_path / "a.csv", TableOptions(sep="|", encoding="latin-1")).batches(9)
    assert batch.schema.names == ["a;b"]


def test_texts_are_left_as_they_are_beside_normalized_numbers():
    texts = pa.array(["1.234,5", "-7", "1,5e3", "1.2.2024", "12,", "a,b", "", None])
    expected = ["1234.5", "-7", "1.5e3", "1.2.2024", "12.", "a,b", "", None]
    assert Dialect(decimal=",", thousands=".").normalized(texts).to_pylist() == expected


def database(module, path):
    if path.exists():
        path.unlink()
    with module.connect(str(path)) as connection:
        connection.execute("create table people (size double, age integer, word text)")
        connection.executemany("insert into people values (?, ?, ?)", [(1.5, 3, "a"), (2, None, "b"), (None, 4, "c")])


@over(["sqlite", "duckdb", "db"], "suffix")
def test_databases_answer_queries(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    database(sqlite3 if suffix == "sqlite" else pytest.importorskip("duckdb"), path)
    (batch,) = open_table(path).batches(9)
    assert batch.to_pydict() == {"size": [1.5, 2.0, None], "age": [3, None, 4], "word": ["a", "b", "c"]}
    source = open_table(path, TableOptions(query="select age + 1 as older from people where age > 3;"))
    assert (source.rows, [batch.to_pydict() for batch in source.batches(9)]) == (1, [{"older": [5]}])
    before = path.read_bytes()
    for query in ("drop table people", "select 1; drop table people", "select nothing_here from people", "stars"):
        with pytest.raises(ValueError, match=r"--query to be a query that .* answers, got: .*; its tables: 'people'$"):
            open_table(path, TableOptions(query=query))
    assert path.read_bytes() == before


def test_a_database_of_several_tables_needs_a_query(tmp_path):
    with sqlite3.connect(tmp_path / "a.sqlite") as connection:
        connection.execute("create table a (x)")
        connection.execute('create table "b ""c" (x blob)')
        connection.execute('insert into "b ""c" values (?)', [b"\0"])
    with pytest.raises(ValueError, match=r"expected --query to choose a table .*; its tables: 'a', 'b .c'$"):
        open_table(tmp_path / "a.sqlite")
    with pytest.raises(ValueError, match=r"expected numbers or texts in column 'x' of .*, got blobs"):
        open_table(tmp_path / "a.sqlite", TableOptions(query='b "c'))
    (tmp_path / "b.sqlite").write_bytes(b"SQLite format 3\0 and no more")
    with pytest.raises(ValueError, match=r"b\.sqlite to be an SQLite database, but it does not read"):
        open_table(tmp_path / "b.sqlite")


def test_sheets_of_excel(tmp_path):
    pytest.importorskip("openpyxl")
    days = TABLE.assign(day=pd.date_range("2024-01-01", periods=N), ok=TABLE.Alter > 40)
    with pd.ExcelWriter(tmp_path / "two.xlsx") as writer:
        days.to_excel(writer, sheet_name="people", index=False, startrow=2)
        TABLE.to_excel(writer, sheet_name="index")
        pd.DataFrame({"a": [1, "x"], "b": [1.5, None]}).to_excel(writer, sheet_name="mixed", index=False)
    _, x, types = read(tmp_path / "two.xlsx", sheet="people")
    np.testing.assert_array_equal(x[:, :3], TABLE)
    assert types == {"Größe": "double", "Alter": "int64", "Preis": "double", "day": "date32[day]", "ok": "bool"}
    (batch,) = open_table(tmp_path / "two.xlsx", TableOptions(sheet="mixed")).batches(9)
    assert batch.to_pydict() == {"a": ["1", "x"], "b": [1.5, None]}
    for sheet, message in (
        (None, "--sheet to be a sheet of .*, 'people', 'index', 'mixed', got none"),
        ("none", "'mixed', got 'none'"),
        ("index", "a name for every column of .* got none in column 1; name the column"),
    ):
        with pytest.raises(ValueError, match=message):
            open_table(tmp_path / "two.xlsx", TableOptions(sheet=sheet))


@over(["lz4", "zstd", "uncompressed"], "compression")
def test_feather(compression, tmp_path):
    table = TABLE.assign(kind=pd.Categorical(["a", "b"] * (N // 2)))
    feather.write_feather(table, tmp_path / "a.feather", compression=compression, chunksize=7)
    source = open_table(tmp_path / "a.feather")
    assert source.rows == N
    assert [batch.num_rows for batch in source.batches(5)] == [5, 2] * 8 + [4]
    columns, others, _ = read_table(source, list(TABLE), ["kind"])
    np.testing.assert_array_equal(np.stack([c.to_numpy() for c in columns.columns], 1), TABLE)
    assert others["kind"].tolist() == ["a", "b"] * (N // 2)
    parts = [pa.Table.from_batches(part.batches(4)).num_rows for part in source.parts(25)]
    assert parts == [25, 25, 10]


def test_a_feather_file_that_declares_terabytes_is_refused(tmp_path):
    path = tmp_path / "a.feather"
    feather.write_feather(pa.table({"a": np.zeros(10_000)}), path, compression="zstd")
    content = path.read_bytes()
    place = content.index((80_000).to_bytes(8, "little"))
    path.write_bytes(content[:place] + (1 << 42).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(ValueError, match=r"at most 256 MiB of memory, .* got 4,398,.* bytes for a batch"):
        open_table(path)
    for broken in (content[:-20], content[:40], b"ARROW1", b"FEA1"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.feather to be an Arrow or Feather file, but it does not read"):
            open_table(path)


@over(["parquet", "feather"], "suffix")
def test_the_index_of_a_pandas_frame_is_left_out_and_reported(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    filtered = pa.Table.from_pandas(TABLE[TABLE.Alter > 40])
    (parquet.write_table if suffix == "parquet" else feather.write_feather)(filtered, path)
    source = open_table(path)
    assert source.names == list(TABLE)
    assert source.notes == (
        f"{path}: left out the index of the pandas frame, __index_level_0__; reset_index() makes it a column",
    )
    (batch,) = source.batches(99)
    assert "__index_level_0__" in batch.schema.names  # a scored table keeps it


TYPED = {
    "timestamp[us]": [datetime.datetime(2020, 1, 1, 3, 4, 5, 600_000), None],
    "timestamp[s, tz=Europe/Berlin]": [datetime.datetime(2020, 6, 1, 12, tzinfo=datetime.UTC)],
    "date32[day]": [datetime.date(1960, 2, 29), None],
    "time64[us]": [datetime.time(3, 4, 5)],
    "duration[us]": [datetime.timedelta(seconds=90)],
    "bool": [True, False, None],
    "decimal128(9, 2)": pa.array([Decimal("1.50"), Decimal("-2.25")], pa.decimal128(9, 2)),
    "uint8": pa.array([3, 255], pa.uint8()),
    "float": pa.array([1.5, None], pa.float32()),
}


@over(TYPED, "type")
def test_numbers_come_back_in_the_type_of_their_column(type, tmp_path):
    column = TYPED[type] if isinstance(TYPED[type], pa.Array) else pa.array(TYPED[type], arrow_type(type))
    values, found = decode(column)
    assert found == type
    known = ~np.isnan(values)
    assert encode(values[known], type).equals(column.drop_null())


def test_texts_have_the_type_of_their_content():
    texts = {
        "date32[day]": ["31.12.2020", "01.02.2021"],
        "timestamp[s]": ["2020-01-01 10:00:00", "NA"],
        "timestamp[us, tz=UTC]": ["2020-01-01T10:00:00.5+01:00"],
        "bool": ["True", "false"],
        "int64": ["1", "", "-3"],
        "double": ["1", "2.5"],
    }
    for type, column in texts.items():
        assert decode(pa.array(column))[1] == type
    assert decode(pa.array(["12/31/2020"])) == (None, None)  # day first, or month first?


@over([".csv", ".tsv", ".csv.gz", ".csv.zst", ".feather", ".parquet"], "suffix")
def test_what_is_written_is_read(suffix, tmp_path):
    with table_writer(tmp_path / f"a{suffix}") as write:
        for batch in pa.Table.from_pandas(TABLE).to_batches(25):
            write(batch)
    np.testing.assert_array_equal(read(tmp_path / f"a{suffix}")[1], TABLE)


MISUSED = {
    "sheet": ({"sheet": "a"}, "expected a sheet only with an .xlsx file, got 'a' with .*a.csv; leave the sheet out"),
    "query": ({"query": "a"}, "expected a query only with an SQLite or DuckDB file, got 'a'"),
    "sep": ({"sep": ";;"}, "expected --sep to be one character, .* got ';;'"),
    "decimal": ({"decimal": "x"}, "expected --decimal to be one of . ,, got 'x'"),
    "encoding": ({"encoding": "klingon"}, "expected --encoding to be one that Python knows, .* got 'klingon'"),
}


@over(MISUSED)
def test_options_that_cannot_be_are_refused(name, tmp_path):
    options, message = MISUSED[name]
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=message):
        open_table(tmp_path / "a.csv", TableOptions(**options))


def test_a_column_of_dates_and_numbers_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("a\n2020-01-01\n5\n")
    with pytest.raises(ValueError, match=r"got text in 'a' .'2020-01-01' in row 0."):
        read(tmp_path / "a.csv")


def test_a_long_cell_takes_linear_time(tmp_path):
    (tmp_path / "a.csv").write_text(f"a,b\n{'1' * 500_000}x,2\n")
    (batch,) = open_table(tmp_path / "a.csv").batches(9)
    assert batch.num_rows == 1
