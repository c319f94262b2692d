"""Tables as they come: dates, masks, constants, copies, recorded decimals, numbers that training did not see."""

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

import counterflow as cf
from counterflow.density.comparison import classifier_test, column_shifts
from counterflow.density.detection import detect

RNG = np.random.default_rng(0)
N = 200
TINY = {"layers": 1, "hidden": (8,), "epochs": 2, "members": 1, "kernels": False, "random_state": 0}
A = RNG.normal(size=N)


def test_columns_without_a_density_of_their_own_are_left_out_and_come_back_in_samples(tmp_path):
    b = RNG.normal(size=N)
    x = np.stack([np.full(N, 7.0), A, 3 - 2 * A, b, A + b], 1)
    with pytest.warns(UserWarning, match=r"left out columns: 'x0' is constant; 'x2' is an affine copy of 'x1'; one of"):
        density = cf.FlowDensity(**TINY).fit(x)
    plain = cf.FlowDensity(**TINY).fit(x[:, [1, 3]])
    np.testing.assert_array_equal(density.score_samples(x), plain.score_samples(x[:, [1, 3]]))
    density.save(tmp_path)
    again = cf.FlowDensity.load(tmp_path)
    assert again.n_features_in_ == 5 and again.density_.all_names == [f"x{i}" for i in range(5)]
    for each in (density, again):
        drawn = each.sample(50, random_state=0)
        expected = np.stack(
            [np.full(50, 7.0), drawn[:, 1], 3 - 2 * drawn[:, 1], drawn[:, 3], drawn[:, [1, 3]].sum(1)], 1
        )
        np.testing.assert_allclose(drawn, expected, atol=1e-8)
        np.testing.assert_array_equal(each.score_samples(x), plain.score_samples(x[:, [1, 3]]))


def test_a_frame_of_every_type_comes_back_in_its_types(tmp_path):
    table = pd.DataFrame(
        {
            "day": [datetime.date(2024, 1, 1) + datetime.timedelta(days=int(d)) for d in RNG.integers(0, 300, N)],
            "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(RNG.integers(0, 10**6, N), "s"),
            "ok": RNG.random(N) < 0.3,
            "count": pd.array(RNG.poisson(9, N), dtype="Int64"),
            "price": [Decimal(f"{v:.2f}") for v in RNG.lognormal(3, 1, N)],
        }
    )
    density = cf.FlowDensity(**TINY).fit(table)
    density.save(tmp_path)
    drawn = cf.FlowDensity.load(tmp_path).sample(60, random_state=0, as_frame=True)
    assert list(drawn) == list(table)
    assert isinstance(drawn.day[0], datetime.date) and drawn.when.dtype.kind == "M" and drawn.ok.dtype == bool
    assert drawn["count"].dtype == np.int64 and isinstance(drawn.price[0], Decimal)
    assert drawn.when.between(table.when.min() - pd.Timedelta("9D"), table.when.max() + pd.Timedelta("9D")).mean() > 0.9
    assert np.isfinite(density.score_samples(table)).all()


def test_masked_cells_are_missing():
    x = np.ma.masked_array(RNG.normal(size=(N, 2)), mask=np.zeros((N, 2)))
    x[3, 1] = np.ma.masked
    with pytest.raises(ValueError, match=r"got 1 missing \(NaN\): row 3 of 'x1'"):
        cf.FlowDensity(**TINY).fit(x)


def test_samples_are_numbers_that_could_have_been_recorded():
    x = np.stack([np.round(RNG.normal(170, 8, N), 1), np.round(RNG.lognormal(8, 1, N), 2), 1e6 * A.round(4)], 1)
    drawn = cf.FlowDensity(**TINY).fit(x).sample(500, random_state=0)
    for column, places in zip(drawn.T, (1, 2, 0), strict=True):
        assert all(value == float(f"{value:.{places}f}") for value in column.tolist())


def test_whole_numbers_that_training_did_not_see_score_low():
    x = RNG.choice([0.0, 1.0, 2.0, 5.0], size=(N, 1))
    density = cf.FlowDensity(**TINY).fit(x)
    scores = density.score_samples(np.array([[1.0], [3.0], [6.0], [40.0], [-7.0]]))
    assert (
        np.isfinite(scores).all() and scores[0] > scores[1] + 2 and scores[2] > scores[3] and scores[0] > scores[4] + 4
    )
    every = np.exp(density.score_samples(np.arange(-60.0, 80.0)[:, None]))
    assert abs(every.sum() - 1) < 0.02
    assert {*density.sample(3000, random_state=0)[:, 0]} == {0.0, 1.0, 2.0, 5.0}
    assert detect(x, ["a"]).columns[0].values == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


def test_what_has_moved_is_named():
    a, b = RNG.normal(size=(2, 400, 3))
    assert classifier_test(a, b).p_value > 0.01 and min(s.p_value for s in column_shifts(a, b, "abc")) > 0.01
    b[:, 1] += 0.8
    moved = column_shifts(a, b, "abc")
    assert classifier_test(a, b).p_value < 1e-6
    assert (moved[0].name, moved[0].p_value < 1e-6, moved[1].p_value > 0.01) == ("b", True, True)
    twisted = a * [1, 1, -1]  # the columns are as before, their relation is not
    a[:, 2], twisted[:, 2] = a[:, 0], -a[:, 0]
    assert classifier_test(a, twisted).auc > 0.9 and column_shifts(a, twisted, "abc")[1].p_value > 0.01


def test_rows_that_both_tables_hold_are_told_apart_by_chance():
    a = np.random.default_rng(2).normal(size=(300, 3))
    assert classifier_test(a, a).auc == 0.5
