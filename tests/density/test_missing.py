"""Densities of rows with missing cells: against closed forms, in Python and on the command line."""

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import files, read_table, write_table
from scipy import stats

import counterflow as cf
from counterflow.density.missing import MaskedTableDensity, filled_at_random, random_cells
from counterflow.transforms import MaskedAutoregressive

RNG = np.random.default_rng(0)
MEAN = np.array([1.0, -2.0, 50.0])
COVARIANCE = np.array([[1.0, 0.8, 0.0], [0.8, 1.0, 2.0], [0.0, 2.0, 25.0]])
N = 1500
HOLES = RNG.random((N, 3)) < 0.25
X = np.where(HOLES, np.nan, RNG.multivariate_normal(MEAN, COVARIANCE, N))
QUICK = {"flow": "maf", "layers": 2, "hidden": (32,), "members": 1, "missing": "model", "random_state": 0}
TINY = QUICK | {"layers": 1, "hidden": (8,), "epochs": 2}


def gaussian(x):
    """The log density of what is known of rows under the truth."""
    known = ~np.isnan(x)
    return np.array([
        stats.multivariate_normal(MEAN[k], COVARIANCE[np.ix_(k, k)]).logpdf(row[k]) if k.any() else 0.0
        for row, k in zip(x, known, strict=True)
    ])  # fmt: skip


@pytest.fixture(scope="module")
def density():
    return cf.FlowDensity(**QUICK).fit(X)


def test_features_that_a_mask_leaves_out_neither_change_nor_matter():
    torch.manual_seed(0)
    layer = cf.Autoregressive(
        4, context=6, hidden=(16,), univariate=cf.RationalQuadraticSpline(4), degrees=[3, 1, 4, 2]
    )
    t = MaskedAutoregressive(layer).double()
    for weight in t.parameters():
        torch.nn.init.normal_(weight)
    x, rest = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).double().expand(5, 4)
    c = torch.cat([mask, rest], 1)
    y, log_det = t(x, c)
    other = x.clone()
    other[:, 1] = 7.0
    changed, same = t(other, c)
    assert torch.equal(y[:, [0, 2, 3]], changed[:, [0, 2, 3]]) and torch.allclose(log_det, same)
    assert torch.allclose(y[:, 1], x[:, 1]) and not torch.allclose(y[:, 0], x[:, 0])
    back, inverse_log_det = t.inverse(y, c)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_log_det, -log_det)
    jacobian = torch.autograd.functional.jacobian(lambda v: t(v, c[0])[0], x[0])
    assert torch.linalg.slogdet(jacobian).logabsdet.item() == pytest.approx(log_det[0].item())
    with pytest.raises(ValueError, match="whose context begins with a mask of 3 numbers, got context=2"):
        MaskedAutoregressive(cf.Autoregressive(3, context=2))


def test_random_cells_are_known_and_given_ones_are_not_asked_for():
    known = torch.rand(2000, 5) < 0.7
    given, asked = random_cells(known)
    assert not (given & asked).any() and not ((given | asked) & ~known).any()
    plain = ~given.any(1) & (asked == known).all(1)
    assert 0.3 < plain.float().mean() < 0.7 and given.any(1).float().mean() > 0.3
    filled = filled_at_random(X, ["a", "b", "c"], 0)
    assert not np.isnan(filled).any() and np.array_equal(filled[~HOLES], X[~HOLES])


@pytest.mark.slow
def test_what_is_known_is_scored_as_by_the_truth(density):
    test = RNG.multivariate_normal(MEAN, COVARIANCE, 500)
    for share in (0.0, 0.3, 0.7):
        rows = np.where(RNG.random(test.shape) < share, np.nan, test)
        gap = gaussian(rows) - density.score_samples(rows)
        assert abs(gap.mean()) < 0.06 and np.abs(gap).mean() < 0.3
    assert density.score_samples(np.full((1, 3), np.nan))[0] == pytest.approx(0.0)


@pytest.mark.slow
def test_missing_cells_are_drawn_given_the_others(density):
    row = np.array([[2.0, np.nan, 53.0]])
    given = [0, 2]
    gain = COVARIANCE[1, given] @ np.linalg.inv(COVARIANCE[np.ix_(given, given)])
    mean, std = MEAN[1] + gain @ (row[0, given] - MEAN[given]), (1 - gain @ COVARIANCE[given, 1]) ** 0.5
    drawn = density.impute(row, samples=2000, random_state=0, candidates=8)
    assert drawn.shape == (2000, 1, 3) and (drawn[:, 0, given] == row[0, given]).all()
    assert abs(drawn[:, 0, 1].mean() - mean) < 0.3 * std and 0.85 < drawn[:, 0, 1].std() / std < 1.2
    once = density.impute(X, random_state=1)
    assert once.shape == X.shape and np.isfinite(once).all() and np.array_equal(once[~HOLES], X[~HOLES])
    np.testing.assert_array_equal(once, density.impute(X, random_state=1))


@pytest.mark.slow
def test_any_columns_given_any_others(density):
    test = RNG.multivariate_normal(MEAN, COVARIANCE, 300)
    for names, places in ((["x0"], [0]), (["x2", "x0"], [0, 2])):
        given = density.conditional(names)
        only = np.where(np.isin(np.arange(3), places), test, np.nan)
        truth = gaussian(test) - gaussian(only)
        assert abs((truth - given.score_samples(test)).mean()) < 0.08
        direct = density.density_.score_given(test, np.isin(np.arange(3), places))
        assert abs((truth - direct).mean()) < 0.2
        rows, ess = given.sample(pd.DataFrame(test, columns=["x0", "x1", "x2"]), 2, None, 0, 4, return_ess=True)
        assert rows.shape == (2, 300, 3) and 2 < ess <= 4
        assert (rows[..., places] == test[:, places]).all()


@pytest.mark.slow
def test_a_mixture_is_told_from_one_column():
    """Two clusters: given one coordinate, the other has one mode, where a Gaussian would have it between."""
    side = np.where(RNG.random(N) < 0.5, -3.0, 3.0)
    x = np.stack([side, -side], 1) + 0.5 * RNG.normal(size=(N, 2))
    density = cf.FlowDensity(**QUICK | {"flow": "nsf"}).fit(np.where(RNG.random(x.shape) < 0.3, np.nan, x))
    drawn = density.impute([[3.0, np.nan], [-3.0, np.nan], [np.nan, np.nan]], samples=500, random_state=0)
    assert (drawn[:, 0, 1] < 0).mean() > 0.85 and (drawn[:, 1, 1] > 0).mean() > 0.85
    assert 0.35 < (drawn[:, 2, 0] > 0).mean() < 0.65 and (drawn[:, 2, 0] * drawn[:, 2, 1] < 0).mean() > 0.85


def table():
    colour = RNG.choice(["red", "blue"], 400)
    frame = pd.DataFrame(
        {"colour": colour, "size": RNG.normal(size=400) + 6 * (colour == "red"), "count": RNG.poisson(9, 400)}
    )
    frame.loc[RNG.random(400) < 0.2, "colour"] = None
    return frame.mask(RNG.random(frame.shape) < 0.1)


@pytest.mark.slow
def test_categories_and_recorded_numbers_with_holes(tmp_path):
    frame = table()
    density = cf.FlowDensity(**QUICK | {"epochs": 25, "columns": {"count": "integer"}}).fit(frame)
    assert isinstance(density.density_, MaskedTableDensity) and np.isfinite(density.score_samples(frame)).all()
    every = density.impute(frame, random_state=0)
    known = frame.notna().to_numpy()
    assert (every[known] == frame.to_numpy(dtype=object)[known]).all() and {*every[:, 0]} == {"red", "blue"}
    large, small = (frame["colour"].isna() & (frame["size"] > 4), frame["colour"].isna() & (frame["size"] < 2))
    assert (every[large, 0] == "red").mean() > 0.8 and (every[small, 0] == "blue").mean() > 0.8
    assert all(float(value).is_integer() for value in every[:, 2])
    drawn = density.conditional(["colour"]).sample({"colour": ["red"] * 200}, random_state=0)
    assert (drawn[:, 0] == "red").all() and abs(np.mean(drawn[:, 1].astype(float)) - 6) < 1
    density.save(tmp_path)
    again = cf.FlowDensity.load(tmp_path)
    np.testing.assert_array_equal(again.score_samples(frame), density.score_samples(frame))
    assert again.missing == "model" and again.sample(3, random_state=0).shape == (3, 3)


def test_what_is_refused():
    plain = cf.FlowDensity(layers=1, hidden=(8,), epochs=1, members=1, random_state=0).fit(X[~HOLES.any(1)])
    for ask in (lambda: plain.impute(X), lambda: plain.conditional(["x0"])):
        with pytest.raises(ValueError, match='that was fitted with missing="model", got missing="error"'):
            ask()
    with pytest.raises(ValueError, match="expected flow to be nsf or maf with missing='model', got 'coupling'"):
        cf.FlowDensity(**TINY | {"flow": "coupling"}).fit(X)
    with pytest.raises(ValueError, match="expected missing to be one of error, model, got 'impute'"):
        cf.FlowDensity(**TINY | {"missing": "impute"}).fit(X[~HOLES.any(1)])
    with pytest.raises(ValueError, match="expected at least one value in column 'x1', got missing cells only; drop it"):
        cf.FlowDensity(**TINY).fit(np.where([False, True, False], np.nan, X))
    with pytest.raises(ValueError, match="1 infinite"):
        cf.FlowDensity(**TINY).fit(np.where(np.arange(N)[:, None] == 5, [np.inf, 1, 1], X))
    fitted = cf.FlowDensity(**TINY).fit(X)
    for names in (["x9"], [], ["x0", "x1", "x2"]):
        with pytest.raises(ValueError, match=r"expected some of the columns \['x0', 'x1', 'x2'\], but not all, got"):
            fitted.conditional(names)
    with pytest.raises(ValueError, match=r"expected the given columns \['x0'\], got none called x0"):
        fitted.conditional(["x0"]).sample({"x1": [0.0]})


@pytest.mark.slow
def test_files_with_holes(here, tmp_path):
    write_table(table(), tmp_path / "table.csv")
    small = ["--layers", 1, "--hidden", 8, "--epochs", 2, "--members", 1]
    code, _, err = here("density", "table.csv", *small, "--out", "run")
    assert code == 2 and "--missing model models the other cells, --drop-missing leaves out" in err
    code, _, err = here("density", "table.csv", *small, "--missing", "model", "--out", "run")
    assert code == 0, err
    assert "report.html" in files(tmp_path / "run")
    assert here("score", "run", "table.csv", "--out", "scores.csv")[0] == 0
    scores = read_table(tmp_path / "scores.csv")
    expected = cf.FlowDensity.load(tmp_path / "run").score_samples(pd.read_csv(tmp_path / "table.csv"))
    np.testing.assert_allclose(scores.log_density, expected, rtol=1e-9)
