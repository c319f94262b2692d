"""Cells: what counts as a number, and errors that name the cells that do not."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from counterflow.io.data.cells import check_cells, to_numbers, to_numbers_or_texts

RNG = np.random.default_rng(0)


def test_cells_without_a_number_are_named():
    x = RNG.normal(size=(9, 2))
    check_cells(x, ["a", "b"])
    x[[2, 5, 6, 7], [1, 0, 0, 1]] = np.nan
    message = r"4 missing \(NaN\): row 2 of 'b', row 5 of 'a', row 6 of 'a', \.\. .* or drop 4 of 9 rows"
    with pytest.raises(ValueError, match=message):
        check_cells(x, ["a", "b"])
    message = r"every cell of t.csv, got missing \(NaN\): row 102 of 'b', .*; impute them, .* or drop such rows"
    with pytest.raises(ValueError, match=message):
        check_cells(x, ["a", "b"], "t.csv", first=100)
    with pytest.raises(ValueError, match=r"1 infinite \(inf\): row 3 of 'a'"):
        check_cells(np.where(np.arange(18).reshape(9, 2) == 6, -np.inf, 0), ["a", "b"])


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA, pd.NaT])
def test_missing_texts_are_named(missing):
    x = np.array([["x", "y"], ["z", missing]], dtype=object)
    with pytest.raises(ValueError, match=r"a value in every cell, got 1 missing: row 1 of 'b' .* or drop 1 of 2 rows"):
        check_cells(x, ["a", "b"])


COLUMNS = [
    pa.array([1, None, 3]),
    pa.array(["1", "", " 3.0 "]),
    pa.array(["1", "NA", "3"]).dictionary_encode(),
    pa.array([1, None, 3]).cast(pa.decimal128(21, 2)),
    np.array([1.0, np.nan, 3.0]),
    np.array([1, None, 3], dtype=object),
    np.array([1, pd.NA, 3], dtype=object),
    pd.Series([1, None, 3]),
]


@pytest.mark.parametrize("column", COLUMNS, ids=range(len(COLUMNS)))
def test_missing_cells_are_nan_in_columns_of_every_library(column):
    np.testing.assert_array_equal(to_numbers(column, "a", "table"), [1, np.nan, 3])


def test_a_column_is_numbers_or_texts():
    np.testing.assert_array_equal(to_numbers_or_texts(pa.array(["1", "nan"])), [1, np.nan])
    assert to_numbers_or_texts(pa.array(["1", "", "b", None])).tolist() == ["1", None, "b", None]
