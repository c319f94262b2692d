"""Tables of categories and numbers: their joint density, in Python and on the command line."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import ONE_FLOW, files, read_table, write_table

import counterflow as cf
from counterflow.density.categories import CategoryColumn
from counterflow.density.comparison import column_shifts
from counterflow.flows.categories import CategoryNetwork

RNG = np.random.default_rng(0)
N = 600
COLOUR = RNG.choice(["blue", "green", "red"], N, p=[0.5, 0.3, 0.2])
SOLD = np.where(RNG.random(N) < np.where(COLOUR == "red", 0.9, 0.2), "yes", "no")
TABLE = pd.DataFrame(
    {
        "colour": COLOUR,
        "size": RNG.normal(size=N) + 4 * (COLOUR == "red") - 4 * (SOLD == "yes"),
        "sold": SOLD,
        "region": RNG.choice([13, 69, 75], N),
        "weight": RNG.lognormal(size=N),
        "currency": "EUR",
    }
)
SETTINGS = {
    "layers": 1,
    "hidden": (16,),
    "members": 1,
    "epochs": 20,
    "random_state": 0,
    "columns": {"region": "category"},
}


@pytest.fixture(scope="module")
def density():
    with pytest.warns(UserWarning, match="left out columns: 'currency' is constant"):
        return cf.FlowDensity(**SETTINGS).fit(TABLE)


def test_the_factors_of_a_network_are_conditional_probabilities_and_sum_to_one():
    torch.manual_seed(0)
    network = CategoryNetwork([[0.5, 0.5], [0.2, 0.3, 0.5], [0.9, 0.1]], context=2, hidden=(12,)).double()
    for weight in network.parameters():
        torch.nn.init.normal_(weight)
    c = torch.randn(1, 2, dtype=torch.float64)
    every = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in network.sizes))
    p = network.log_prob(every, c).exp()
    assert p.sum().item() == pytest.approx(1)
    first = network.log_prob(torch.tensor([[1.0, -1, -1]]).double(), c).exp()  # the others are missing
    assert p[every[:, 0] == 1].sum().item() == pytest.approx(first.item())
    drawn = network.sample(torch.ones(4000, 3, dtype=torch.bool), c.expand(4000, -1))
    counts = torch.stack([(drawn == row).all(1).double().mean() for row in every])
    assert (counts - p).abs().max() < 0.03
    some = network.sample(torch.tensor([[True, False, True]] * 5), c.expand(5, -1))
    assert (some >= 0).tolist() == [[True, False, True]] * 5
    with pytest.raises(ValueError, match="expected positive shares of at least one category, got "):
        CategoryNetwork([[0.5, 0.0]])


def test_the_joint_density_of_categories_and_numbers(density):
    """log p(k, x) = log p(k) + log q(x | k), so that the densities of x given k, weighted, give that of k."""
    assert density.density_.kinds == {
        "colour": "category", "size": "linear", "sold": "category", "region": "category", "weight": "log",
    }  # fmt: skip
    drawn = density.sample(4000, random_state=0, as_frame=True)
    assert list(drawn) == list(TABLE) and drawn.region.dtype == np.int64 and (drawn.currency == "EUR").all()
    for column in ("colour", "sold", "region"):
        shares, wanted = drawn[column].value_counts(normalize=True), TABLE[column].value_counts(normalize=True)
        assert (shares - wanted).abs().max() < 0.06
    sold = drawn.groupby("colour").sold.apply(lambda column: (column == "yes").mean())
    assert sold["red"] > sold["blue"] + 0.35
    means = drawn.groupby(["colour", "sold"])["size"].mean()
    assert abs(means["red", "no"] - 4) < 1.2 and abs(means["blue", "yes"] + 4) < 1.2
    grid = np.sinh(np.linspace(-7, 7, 300))
    total = 0.0
    one = cf.FlowDensity(**SETTINGS | {"columns": "auto"}).fit(TABLE[["size", "sold"]])
    for sold in ("yes", "no"):
        p = np.exp(one.score_samples(pd.DataFrame({"size": grid, "sold": sold})))
        total += np.trapezoid(p, grid)
    assert abs(total - 1) < 0.02


def test_objects_lists_and_files_give_the_same_density(density, tmp_path):
    scores = density.score_samples(TABLE)
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(again.score_samples(TABLE), scores)
    density.save(tmp_path)
    assert files(tmp_path) == {"model.safetensors", "density.json", "categories.safetensors"}
    loaded = cf.FlowDensity.load(tmp_path)
    np.testing.assert_array_equal(loaded.score_samples(TABLE), scores)
    np.testing.assert_array_equal(loaded.sample(7, random_state=1), density.sample(7, random_state=1))
    quick = SETTINGS | {"columns": {"x3": "category"}, "epochs": 1}
    rows = TABLE.drop(columns="currency").to_numpy(dtype=object)
    one = cf.FlowDensity(**quick).fit(rows)
    np.testing.assert_array_equal(one.score_samples(rows.tolist()), one.score_samples(rows))
    drawn = one.sample(5, random_state=0)
    assert drawn.dtype == object and {*drawn[:, 0]} <= {*COLOUR} and isinstance(drawn[0, 1], float)
    numbers = TABLE[["size", "region"]].to_numpy()
    coded = cf.FlowDensity(**quick | {"columns": {"x1": "category"}}).fit(numbers)
    assert {*coded.sample(50, random_state=0)[:, 1]} == {13.0, 69.0, 75.0}


def test_categories_that_training_did_not_see_are_reported(density):
    rows = TABLE.head(3).copy()
    rows.loc[1, "colour"] = "pink"
    with pytest.warns(UserWarning, match=r"categories that training did not see have log density -inf.*\['colour'\]"):
        scores = density.score_samples(rows)
    assert np.isneginf(scores).tolist() == [False, True, False]
    rows.loc[1, "colour"] = None
    with pytest.raises(ValueError, match=r"1 missing .NaN.: row 1 of .colour."):
        density.score_samples(rows)


def test_context_and_weights_beside_categories():
    year = RNG.normal(size=N)
    table = pd.DataFrame({"late": np.where(year + 0.3 * RNG.normal(size=N) > 0, "yes", "no"), "x": RNG.normal(size=N)})
    density = cf.FlowDensity(**SETTINGS | {"columns": "auto"}).fit(table, context=year)
    late = [(density.sample(300, [[value]], random_state=0)[:, 0] == "yes").mean() for value in (-2.0, 2.0)]
    assert late[0] < 0.3 and late[1] > 0.7
    weights = np.where(table.late == "yes", 1.0, 1e-3)
    tilted = cf.FlowDensity(**SETTINGS | {"columns": "auto", "epochs": 2}).fit(table, sample_weight=weights)
    assert (tilted.sample(300, random_state=0)[:, 0] == "yes").mean() > 0.9


def test_columns_of_text_that_are_no_categories_are_refused():
    for column, message in {
        "names": "expected categories that repeat in column 'a', got 600 different ones in 600 rows, such as 'r0'",
        "a fault": "expected a number in every cell of column 'a', as in most, got 'high'; correct it, or state that",
    }.items():
        cells = [f"r{k}" for k in range(N)] if column == "names" else [*map(str, range(N - 1)), "high"]
        with pytest.raises(ValueError, match=message):
            cf.FlowDensity(**SETTINGS | {"columns": "auto"}).fit(pd.DataFrame({"a": cells, "b": TABLE["size"]}))
    with pytest.raises(ValueError, match="expected at least one column of numbers, got categories only"):
        cf.FlowDensity(**SETTINGS | {"columns": "auto"}).fit(TABLE[["colour", "sold"]])
    assert CategoryColumn.from_cells("a", np.array(["1", "2", "high"] * 4, dtype=object), stated=True).is_text


def test_categories_that_have_moved_are_named():
    a = np.stack([RNG.normal(size=400), RNG.integers(0, 3, 400)], 1)
    b = np.stack([RNG.normal(size=400), np.minimum(RNG.integers(0, 4, 400), 2)], 1)
    (first, second) = column_shifts(a, b, ["x", "k"], {"k"})
    assert (first.name, first.medians[1], first.p_value < 0.01 < second.p_value) == ("k", 2.0, True)


@pytest.mark.slow
def test_files_with_categories(here, tmp_path):
    table = TABLE.assign(id=[f"r{k}" for k in range(N)])
    write_table(table, tmp_path / "table.csv")
    code, told, err = here("density", "table.csv", *ONE_FLOW, "--out", "run")
    assert code == 2 and "got text in 'id' ('r0' in row 0)" in err and err.rstrip().endswith("try --drop id")
    code, told, err = here("density", "table.csv", "--drop", "id", "--categories", "region", *ONE_FLOW, "--out", "run")
    assert code == 0 and "Gaussian" not in told
    assert "categories.safetensors" in files(tmp_path / "run")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "blue" in report and "category" in report
    rows = TABLE.head(8).assign(colour=["pink", *TABLE.colour[1:8]])
    write_table(rows, tmp_path / "more.csv")
    code, told, err = here("score", "run", "more.csv", "--out", "scores.csv")
    assert code == 0 and "without 1 rows outside of the support" in told
    assert "column 'colour' has categories that training did not see" in err
    scores = read_table(tmp_path / "scores.csv")
    with pytest.warns(UserWarning, match="did not see"):
        expected = cf.FlowDensity.load(tmp_path / "run").score_samples(rows)
    np.testing.assert_allclose(scores.log_density, expected, rtol=1e-9)
    assert here("sample", "run", "-n", 30, "--out", "drawn.parquet")[0] == 0
    drawn = read_table(tmp_path / "drawn.parquet")
    assert list(drawn) == list(TABLE) and {*drawn.colour} <= {*COLOUR} and {*drawn.region} <= {13, 69, 75}
    moved = TABLE.assign(colour="red", size=TABLE["size"])
    write_table(moved, tmp_path / "moved.csv")
    write_table(TABLE, tmp_path / "table.csv")
    code, told, _ = here("compare", "run", "table.csv", "moved.csv")
    assert code == 0 and "has moved" in told and "blue" in told and "moved: colour" in told
    assert not math.isnan(scores.log_density[1])
