"""Tables in batches: the rows read are those of the file, and a file is written completely or not at all."""

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from registry import over

from counterflow.io.data.cells import numbers
from counterflow.io.data.tables import open_table, read_table
from counterflow.io.data.writers import table_writer
from counterflow.io.table_formats import TableOptions

RNG = np.random.default_rng(0)
X = RNG.normal(size=(101, 3))


def write_csv(path):
    pd.DataFrame(X, columns=list("abc")).to_csv(path, index=False)


def write_headless(path):
    np.savetxt(path, X, delimiter=",", fmt="%.17g")


def write_parquet(path):
    columns = {name: pa.array(column) for name, column in zip("abc", X.T, strict=True)}
    parquet.write_table(pa.table(columns), path, row_group_size=40)


FILES = {
    "t.csv": (write_csv, None, True),
    "headless.csv": (write_headless, None, False),
    "t.parquet": (write_parquet, None, True),
    "t.npy": (lambda path: np.save(path, X), None, False),
    "fortran.npy": (lambda path: np.save(path, np.asfortranarray(X)), None, False),
    "t.npz": (lambda path: np.savez_compressed(path, x=X, y=X[:2]), "x", False),
    "fortran.npz": (lambda path: np.savez(path, x=np.asfortranarray(X)), None, False),
    "float16.npz": (lambda path: np.savez(path, x=X.astype(np.float16)), None, False),
}


@pytest.mark.parametrize("size", [7, 40, 1000])
@over(FILES)
def test_batches_hold_the_rows_in_order(name, size, tmp_path):
    write, key, named = FILES[name]
    write(tmp_path / name)
    source = open_table(tmp_path / name, TableOptions(key=key))
    assert source.named == named and source.names == (list("abc") if named else ["f0", "f1", "f2"])
    assert source.rows in (None, 101)
    batches = list(source.batches(size))
    assert max(batch.num_rows for batch in batches) <= size
    x = np.concatenate([numbers(batch, source.names, source.path) for batch in batches])
    expected = X.astype(np.float16) if "float16" in name else X
    np.testing.assert_array_equal(x, expected)
    table, others, _ = read_table(source, source.names[:2], source.names[2:])
    np.testing.assert_array_equal(np.stack([c.to_numpy() for c in table.columns], 1), expected[:, :2])
    np.testing.assert_array_equal(others[source.names[2]], expected[:, 2])


@over([1, 700, 10**6], "text_bytes")
def test_texts_in_parquet_are_read_in_pieces_that_fit(text_bytes, tmp_path, monkeypatch):
    """The number of rows read at a time does not change the batches; with missing texts, categories and lists."""
    monkeypatch.setattr("counterflow.io.data.parquet.TEXT_BYTES", text_bytes)
    words = RNG.choice(["here", "there", "everywhere"], 101)
    table = pd.DataFrame({"x": X[:, 0], "word": words, "kind": pd.Categorical(words), "list": [[1.5], []] * 50 + [[]]})
    table["struct"] = [{"x": k, "word": word} for k, word in enumerate(words)]
    table.loc[7, "word"] = None
    table.to_parquet(tmp_path / "t.parquet", row_group_size=60)
    batches = list(open_table(tmp_path / "t.parquet").batches(50))
    assert all(batch.num_rows <= 50 for batch in batches) and len(batches) <= 4
    read = pa.Table.from_batches(batches)
    assert read.cast(pa.Table.from_pandas(table).schema).equals(pa.Table.from_pandas(table))


def test_texts_are_kept(tmp_path):
    texts = ["plain", "a, b", 'say "hi"', "", "1.10", "line\nbreak", "naïve"]
    table = pd.DataFrame({"t": texts, "x": [f"{k}.50" for k in range(7)]})
    table.to_csv(tmp_path / "in.csv", index=False)
    source = open_table(tmp_path / "in.csv")
    with table_writer(tmp_path / "out.csv") as write:
        for batch in source.batches(3):
            write(batch)
    again = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert again.equals(table)


@over([".csv", ".parquet", ".npy", ".npz"], "suffix")
def test_an_unfinished_file_is_removed(suffix, tmp_path):
    batch = pa.record_batch({"a": [1.0, 2.0]})
    path = tmp_path / "new" / "deep" / f"out{suffix}"
    with pytest.raises(RuntimeError, match="half-way"), table_writer(path, 4) as write:
        write(batch)
        assert not path.exists()
        raise RuntimeError("half-way")
    assert not list(tmp_path.iterdir())
    with table_writer(path, 4) as write:
        write(batch)
        write(batch)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if suffix in (".npy", ".npz"):
        held = np.load(path)
        np.testing.assert_array_equal(held if suffix == ".npy" else held["rows"], [[1], [2], [1], [2]])


def test_numbers_of_every_arrow_type(tmp_path):
    columns = {
        "int8": pa.array([1, 2], pa.int8()),
        "bool": pa.array([True, False]),
        "float32": pa.array([0.5, 1.5], pa.float32()),
        "text": pa.array([" 1e3", "2 "]),
        "dictionary": pa.array([3, 4]).dictionary_encode(),
        "decimal": pa.array([1, 2]).cast(pa.decimal128(21, 2)),
    }
    batch = pa.record_batch(columns)
    expected = [[1, 1, 0.5, 1000, 3, 1], [2, 0, 1.5, 2, 4, 2]]
    np.testing.assert_array_equal(numbers(batch, list(columns), tmp_path), expected)
    with pytest.raises(ValueError, match=r"expected numbers in column 'when' of .*, got \['2020'\] in row 7"):
        numbers(pa.record_batch({"when": [["2020"]]}), ["when"], tmp_path, 7)
    days = pa.record_batch({"when": [datetime.date(1970, 1, 2)]})
    np.testing.assert_array_equal(numbers(days, ["when"], tmp_path, types=["timestamp[s]"]), [[86400]])
    with pytest.raises(ValueError, match=r"expected double in column 'when' of .*, as in training, got date32"):
        numbers(days, ["when"], tmp_path, types=["double"])
