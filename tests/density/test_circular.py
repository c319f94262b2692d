"""Circular columns: densities without a seam, and samples in one turn."""

import datetime

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import ONE_FLOW, read_table, write_table
from scipy import stats

import counterflow as cf
from counterflow.density.detection import detect

RNG = np.random.default_rng(0)
N = 1000
ANGLE = stats.vonmises(kappa=2.0, loc=0.3).rvs(N, random_state=0)
HOUR = np.mod(ANGLE * 12 / np.pi, 24)
SMALL = {"layers": 2, "hidden": (16,), "members": 1, "epochs": 30, "kernels": False, "random_state": 0}
TINY = SMALL | {"layers": 1, "hidden": (8,), "epochs": 2}


def truth(hour):
    return stats.vonmises(kappa=2.0, loc=0.3).pdf(hour * np.pi / 12) * np.pi / 12


def test_the_circle_is_cut_open_where_numbers_are_rare():
    column = detect(HOUR[:, None], ["hour"], circular={"hour": 24}).columns[0]
    assert (column.map, column.low, column.quantized) == ("circular", 0.0, False) and abs(column.cut - 13) < 3
    whole = detect(np.floor(HOUR)[:, None], ["hour"], circular={"hour": 24}).columns[0]
    assert (whole.column.step, whole.mass, whole.cut % 1) == (1.0, True, 0.5)
    assert detect(ANGLE[:, None], ["angle"], circular={"angle": 2 * np.pi}).columns[0].low == pytest.approx(-np.pi)
    x = torch.tensor([0.0, 12.5, 23.9, 24.0, -1.0], dtype=torch.float64)
    wrapped = column.wrapped(x)
    assert (wrapped >= column.cut).all() and (wrapped < column.cut + 24).all()
    torch.testing.assert_close(torch.remainder(wrapped, 24), torch.remainder(x, 24))
    snapped = whole.snap(torch.tensor([23.7, -0.2, 47.6], dtype=torch.float64))
    assert snapped.tolist() == [0.0, 0.0, 0.0]
    for circular, message in {
        "expected the period of column 'hour' to be a positive number, got 0": {"hour": 0},
        r"expected names of columns \('hour'\), got \['day'\]": {"day": 7},
    }.items():
        with pytest.raises(ValueError, match=circular):
            detect(HOUR[:, None], ["hour"], circular=message)
    with pytest.raises(ValueError, match=r"expected bounds of columns that are not circular, got \['hour'\] in both"):
        detect(HOUR[:, None], ["hour"], bounds={"hour": (0, 24)}, circular={"hour": 24})
    with pytest.raises(ValueError, match="to be a number or one of day, week, year, got 'month'"):
        cf.FlowDensity(**TINY, circular={"x0": "month"}).fit(HOUR[:, None])


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["error", "model"])
def test_the_density_of_a_circle_has_no_seam_and_integrates_to_one(missing):
    x = np.stack([HOUR, 5 * np.cos(ANGLE) + RNG.normal(size=N)], 1)
    density = cf.FlowDensity(**SMALL, missing=missing, circular={"x0": 24}).fit(x)
    seam = density.score_samples([[24 - 1e-9, 5.0], [0.0, 5.0], [24.0, 5.0]])
    assert np.ptp(seam) < 1e-6
    cut = density.columns_.columns[0].cut % 24
    assert np.ptp(density.score_samples([[cut - 1e-9, -5.0], [cut + 1e-9, -5.0]])) < 0.05
    one = cf.FlowDensity(**SMALL, missing=missing, circular={"x0": 24}).fit(x[:, :1])
    grid = np.linspace(0, 24, 2001)
    p = np.exp(one.score_samples(grid[:, None]))
    assert abs(np.trapezoid(p, grid) - 1) < 1e-3 and np.abs(p - truth(grid)).max() < 0.03
    drawn = density.sample(4000, random_state=0)
    assert drawn[:, 0].min() >= 0 and drawn[:, 0].max() < 24
    turn = np.exp(1j * np.pi / 12 * drawn[:, 0])
    assert abs(turn.mean() - np.exp(1j * ANGLE).mean()) < 0.05
    assert np.corrcoef(turn.real, drawn[:, 1])[0, 1] > 0.8
    eps = density.density_.to_noise(x, seed=0)
    assert np.abs(eps.mean(0)).max() < 0.2 and np.abs(eps.std(0) - 1).max() < 0.2


def test_whole_hours_are_masses_that_sum_to_one(tmp_path):
    x = np.floor(HOUR)[:, None]
    density = cf.FlowDensity(**SMALL | {"layers": 1, "epochs": 15}, circular={"x0": 24}).fit(x)
    p = np.exp(density.score_samples(np.arange(24.0)[:, None]))
    assert abs(p.sum() - 1) < 0.02 and np.abs(p - np.bincount(x[:, 0].astype(int), minlength=24) / N).max() < 0.04
    assert {*density.sample(500, random_state=0)[:, 0]} <= {*np.arange(24.0)}
    density.save(tmp_path)
    again = cf.FlowDensity.load(tmp_path)
    np.testing.assert_array_equal(again.score_samples(x), density.score_samples(x))
    assert again.circular == {"x0": 24}


def test_times_of_day_and_the_command_line(here, tmp_path):
    when = pd.Timestamp("2024-03-01") + pd.to_timedelta(86_400 * RNG.integers(0, 90, N) + (3600 * HOUR).round(), "s")
    table = pd.DataFrame({"when": when, "wind": np.mod(np.degrees(ANGLE), 360), "speed": RNG.lognormal(size=N)})
    density = cf.FlowDensity(**TINY, circular={"when": "day", "wind": 360}).fit(table)
    drawn = density.sample(200, random_state=0, as_frame=True)
    assert isinstance(drawn.when[0], datetime.time) and drawn.wind.between(0, 360).all()
    early = np.mean([time.hour < 8 or time.hour > 18 for time in drawn.when])
    assert early > 0.6
    write_table(table, tmp_path / "table.parquet")
    assert here("density", "table.parquet", *ONE_FLOW, "--circular", "when=day", "wind=360", "--out", "run")[0] == 0
    assert here("sample", "run", "-n", 20, "--out", "drawn.parquet")[0] == 0
    assert isinstance(read_table(tmp_path / "drawn.parquet").when[0], datetime.time)
    for flag, message in {
        "when=month": "to be a number or one of day, week, year, got 'month'",
        "when": "expected --circular COLUMN=PERIOD, such as hour=24 or sold=day, got when",
        "then=24": "expected names of columns (when, wind, speed), got then",
    }.items():
        code, _, err = here("density", "table.parquet", "--circular", flag, "--out", "other")
        assert code == 2 and message in err
