"""Detection of column kinds, checks of degenerate columns, and the encoding of context columns."""

import math

import numpy as np
import pytest
import torch
from registry import close, over

from counterflow.density.context import ContextEncoder
from counterflow.density.detection import detect
from counterflow.density.validation import check_columns
from counterflow.transforms import GridColumn, LinearColumn, TableTransform

RNG = np.random.default_rng(0)
N = 2000
ZEROS = np.where(RNG.random(N) < 0.3, 0.0, RNG.gamma(2, size=N))


def test_cells_hold_their_number_and_snap_undoes_the_noise():
    x = np.stack([RNG.integers(0, 3, N), RNG.poisson(40, N), np.round(RNG.normal(size=N), 1), ZEROS], 1)
    t = detect(x, list("abcd"))
    assert [c.map for c in t.columns] == ["ordinal", "linear", "linear", "linear"]
    assert [c.mass for c in t.columns] == [True, True, False, False] and t.quantized == [0, 1, 2, 3]
    values = torch.from_numpy(x)
    start, width = t.cells(values)
    assert ((start <= values) & (values <= start + width)).all()
    assert (width[:, 3] > 0).equal(values[:, 3] == 0)
    inside = start + width * torch.rand_like(values) * 0.999
    close(t.snap(inside), values, 1e-9)
    close(t.log_mass(width), torch.zeros(N, dtype=torch.float64))  # cells one wide


def test_samples_keep_to_what_was_seen():
    x = np.stack([RNG.poisson(3, N), RNG.integers(0, 2, N), ZEROS], 1)
    t = detect(x, list("abc"))
    wild = t.snap(t.inverse(5 * torch.randn(4000, 3, dtype=torch.float64))[0])
    for column, seen in zip(wild.T.numpy(), x.T, strict=True):
        assert seen.min() <= column.min()
    assert set(wild[:, 0].tolist()) <= set(range(int(x[:, 0].max()) + 1)) and set(wild[:, 1].tolist()) == {0, 1}
    assert (wild[:, 2] == 0).any()


FOUND = {
    "normal": (RNG.normal(size=N), "linear"),
    "uniform": (RNG.random(N), "linear"),
    "lognormal": (RNG.lognormal(size=N), "log"),
    "tails": (RNG.standard_t(2, N), "asinh"),
    "one far out": (np.append(RNG.normal(size=N - 1), 1e6), "asinh"),
    "counts": (RNG.poisson(60, N), "linear"),
    "large counts": (RNG.poisson(RNG.lognormal(3, 1.5, N)), "log"),
    "ratings": (RNG.integers(1, 6, N), "ordinal"),
    "uneven grid": (RNG.choice([0.25, 1.0, 7.5], N), "ordinal"),
    "year": (RNG.integers(1900, 2000, N), "linear"),
}


@pytest.mark.parametrize(("x", "map"), FOUND.values(), ids=FOUND)
def test_the_kind_of_a_column_is_detected(x, map):
    (column,) = detect(np.asarray(x, float)[:, None], ["a"]).columns
    assert column.map == map
    y, _ = TableTransform([column])(torch.from_numpy(np.asarray(x, float))[:, None])
    if map != "ordinal":
        assert abs(y.mean().item()) < 0.1 and 0.5 < y.std().item() < 1.5


RESOLUTIONS = {"0.1": 1, "0.01": 2, "float32": 1}


@over(RESOLUTIONS)
def test_the_resolution_of_recorded_numbers(name):
    x = np.round(RNG.normal(5, 2, N), RESOLUTIONS[name])
    (column,) = detect((x.astype(np.float32) if name == "float32" else x).astype(float)[:, None], ["a"]).columns
    assert isinstance(column, GridColumn) and not column.mass
    assert column.step == pytest.approx(10.0 ** -RESOLUTIONS[name])
    (fine,) = detect(np.round(RNG.normal(5, 2, N), 6)[:, None], ["a"]).columns
    assert not fine.quantized


def test_few_rows_give_no_detection():
    (column,) = detect(np.array([[1.0], [2.0], [1e9]]), ["a"]).columns
    assert isinstance(column, LinearColumn)


def test_stated_kinds_are_used():
    x = np.stack([RNG.random(N), RNG.gamma(3, size=N), RNG.integers(0, 4, N), RNG.poisson(3, N)], 1)
    t = detect(x, list("abcd"), {"c": "real", "d": "integer"}, {"a": (0, 1), "b": (0, None), "d": (0, None)})
    assert [c.map for c in t.columns] == ["logit", "log", "linear", "log"]
    assert t.quantized == [3] and t.columns[3].step == 1 and t.columns[3].column.low == -0.5
    assert (t.columns[3].minimum, t.columns[3].maximum) == (0, None)
    assert t.inside(torch.tensor([[0.5, 1, 0, 0], [1.5, 1, 0, 0], [0.5, -1, 0, 0]], dtype=torch.float64)).tolist() == [
        True,
        False,
        False,
    ]


BAD = {
    "name": ({"kinds": {"z": "real"}}, r"expected names of columns \('a', 'b'\), got \['z'\]"),
    "kind": ({"kinds": {"a": "nominal"}}, "expected kinds of columns among auto, real, integer, ordinal, got"),
    "bounds": ({"bounds": {"a": (0, 0.5)}}, r"expected numbers in \[0, 0.5\] in column 'a', .* in row "),
    "order": ({"bounds": {"a": (1, 0)}}, "low < high"),
    "integer": ({"kinds": {"a": "integer"}}, "expected whole numbers in the integer column 'a', got .* in row 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_impossible_kinds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect(np.random.default_rng(0).random((50, 2)), ["a", "b"], **arguments)


def test_columns_without_a_density_are_named_in_one_error():
    a, b = RNG.normal(size=(2, 50))
    x = np.stack([a, np.ones(50), b, 3 - 2 * a, b, np.zeros(50)], 1)
    copies = "'d' is an affine copy of 'a' and 'e' is an affine copy of 'c'; drop them"
    message = f"columns; 'b' is constant, 'f' is constant, {copies}"
    with pytest.raises(ValueError, match=f"expected distinct, non-constant {message}"):
        check_columns(x, list("abcdef"))
    c, d = RNG.normal(size=(2, 50))
    with pytest.raises(ValueError, match="columns; one of 'a', 'b', 'e' is a linear function of the others; drop"):
        check_columns(np.stack([a, b, c, d, a + 2 * b], 1), list("abcde"))
    check_columns(np.stack([a, b, c, d, a + 2 * b + 1e-3 * RNG.normal(size=50)], 1), list("abcde"))
    check_columns(np.stack([a, b, a + 2 * b], 1), list("abc"), quantized=[2])
    check_columns(RNG.normal(size=(5, 30)), [str(k) for k in range(30)])


# -- context -----------------------------------------------------------------------------------------

TABLE = {"colour": np.array(["red", "blue", "red", "grey"], dtype=object), "age": np.array([1.0, 2, 3, 4])}


def test_context_is_encoded_by_name():
    context = ContextEncoder.from_table(TABLE)
    c = context.encode({name: TABLE[name] for name in ("age", "colour")})
    assert context.size == 4 and context.names == ["colour", "age"]
    assert c[:, :3].tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert math.isclose(c[:, 3].mean(), 0, abs_tol=1e-12) and math.isclose(c[:, 3].std(), 1)
    assert np.array_equal(ContextEncoder.from_json(context.columns).encode(TABLE), c)


UNFIT = {
    "unseen": ({**TABLE, "colour": ["red", "pink"], "age": [1, 2]}, r"that training saw \(blue, grey, red\), got 'pin"),
    "column": ({"colour": ["red"]}, r"expected a context of the columns \['colour', 'age'\], got \['colour'\]"),
    "number": ({"colour": ["red"], "age": ["old"]}, "numbers in column 'age' of the context, got 'old' in row 7"),
    "nan": ({"colour": ["red"], "age": [np.nan]}, r"every cell of the context, got missing \(NaN\): row 7 of 'age'"),
    "none": ({"colour": [None], "age": [1.0]}, "a value in every cell of the context, got missing: row 7 of 'colour'"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "message"), UNFIT.values(), ids=UNFIT)
def test_context_that_does_not_fit(table, message):
    arrays = {name: np.array(v, dtype=object if name == "colour" else None) for name, v in table.items()}
    with pytest.raises(ValueError, match=message):
        ContextEncoder.from_table(TABLE).encode(arrays, first=7)


def test_context_that_does_not_vary():
    for table in ({"a": np.ones(3)}, {"a": np.array(["x", "x"])}):
        with pytest.raises(ValueError, match="context columns that vary, got the constant column 'a'; drop it"):
            ContextEncoder.from_table(table)
    with pytest.raises(ValueError, match="at least one column as context"):
        ContextEncoder.from_table({})
