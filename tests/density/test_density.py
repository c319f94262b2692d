"""FlowDensity as scikit-learn users meet it, and whether its densities are right."""

import importlib
import math
import pickle
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from registry import over
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import counterflow as cf
from counterflow.density.config import DESCRIPTION, MODEL, DensityConfig

RNG = np.random.default_rng(0)
TINY = {"layers": 1, "hidden": (8,), "epochs": 2, "random_state": 0}
SMALL = {"layers": 2, "hidden": (16,), "members": 1, "epochs": 15, "random_state": 0}
ROWS = RNG.normal([10.0, -3.0], [2.0, 0.1], (300, 2))


@pytest.mark.slow
@parametrize_with_checks([cf.FlowDensity(layers=1, hidden=(8,), epochs=2)])
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


def test_the_defaults_are_defined_once():
    settings = cf.FlowDensity().get_params()
    default = DensityConfig()
    assert {name: settings[name] for name in vars(default)} == vars(default)


@pytest.fixture(scope="module")
def mixed():
    """A table of every kind of column, and its density."""
    n = 1200
    colour = RNG.choice(["blue", "red"], n)
    a = RNG.normal(size=n) + 5 * (colour == "red")
    table = pd.DataFrame(
        {
            "a": a,
            "income": RNG.lognormal(10 + 0.3 * a, 0.5),
            "children": RNG.poisson(2, n),
            "grade": RNG.choice([1.0, 2.0, 5.0], n, p=[0.2, 0.5, 0.3]),
            "rain": np.where(RNG.random(n) < 0.4, 0.0, RNG.gamma(2, size=n)),
            "share": RNG.beta(2, 3, n),
        }
    )
    return (
        table,
        pd.DataFrame({"colour": colour}),
        cf.FlowDensity(bounds={"share": (0, 1)}, **SMALL | {"members": 2}).fit(table),
    )


@pytest.mark.slow
def test_samples_look_like_the_table(mixed):
    table, _, density = mixed
    x = pd.DataFrame(density.sample(4000, random_state=0), columns=density.get_feature_names_out())
    assert list(x) == list(table) and list(density.feature_names_in_) == list(table)
    for name in table:
        quartiles = np.percentile(table[name], [10, 50, 90])
        assert np.abs(np.percentile(x[name], [10, 50, 90]) - quartiles).max() < 0.25 * (quartiles[2] - quartiles[0])
    assert set(x.grade) == {1, 2, 5} and (x.children == x.children.round()).all() and x.children.min() == 0
    assert x.income.min() > 0 and x.share.min() > 0 and x.share.max() < 1
    assert abs((x.rain == 0).mean() - 0.4) < 0.1 and x.rain.min() == 0
    for value, share in ((1, 0.2), (2, 0.5), (5, 0.3)):
        assert abs((x.grade == value).mean() - share) < 0.06


def test_masses_sum_to_one():
    x = np.stack([RNG.poisson(2, 600), RNG.choice([1.0, 2.0, 5.0], 600)], 1).astype(float)
    density = cf.FlowDensity(cell_points=64, **SMALL).fit(x)
    grid = np.array([(k, v) for k in range(-5, 30) for v in (1.0, 2.0, 5.0)])
    p = np.exp(density.score_samples(grid))
    assert abs(p.sum() - 1) < 0.02
    for k, v in ((2, 1.0), (0, 5.0)):
        assert abs(p[(grid == (k, v)).all(1)][0] - (x == (k, v)).all(1).mean()) < 0.04


def test_the_density_of_a_number_alone_integrates_to_one():
    x = RNG.standard_t(3, size=(500, 1))
    density = cf.FlowDensity(**SMALL).fit(x)
    grid = np.sinh(np.linspace(-8, 8, 20_001))
    p = np.exp(density.score_samples(grid[:, None]))
    assert abs(np.trapezoid(p, grid) - 1) < 5e-3


def test_densities_are_in_the_units_of_the_table():
    """The same table in other units: log p moves by the log of the units, and nothing else."""
    for unit in (1e-12, 1e9):
        scores = [cf.FlowDensity(**TINY).fit(ROWS * u + 7 * u).score_samples(ROWS * u + 7 * u) for u in (1.0, unit)]
        np.testing.assert_allclose(scores[0] - scores[1], 2 * math.log(unit), atol=1e-3)


def test_a_normal_table_is_fitted_closely():
    density = cf.FlowDensity(**TINY).fit(ROWS)
    truth = -0.5 * (((ROWS - [10, -3]) / [2, 0.1]) ** 2).sum(1) - math.log(2 * math.pi) - math.log(0.2)
    assert abs(density.score(ROWS) - truth.mean()) < 0.05
    assert density.score(ROWS) == pytest.approx(density.score_samples(ROWS).mean())
    x = torch.from_numpy(ROWS)
    np.testing.assert_allclose(density.flow_().log_prob(x).detach(), density.score_samples(ROWS), rtol=1e-12)


@pytest.mark.slow
def test_repeated_numbers_do_not_let_the_density_diverge():
    x = np.where(RNG.random((800, 2)) < 0.3, 0.0, RNG.normal(size=(800, 2)))
    density = cf.FlowDensity(**SMALL).fit(x)
    atoms = density.score_samples(x)[(x == 0).all(1)]
    # 0.09 of the rows on a square as wide as the typical gap between numbers
    width = density.columns_.columns[0].width
    assert np.all(atoms < math.log(0.09) - 2 * math.log(width) + 1) and np.isfinite(atoms).all()


def test_the_density_outside_of_the_support_is_zero(mixed):
    _, _, density = mixed
    table = mixed[0].head(3).copy()
    table.loc[0, "share"], table.loc[1, "grade"] = 1.5, 99.0
    scores = density.score_samples(table)
    assert (
        np.isneginf(scores[0]) and np.isfinite(scores[1:]).all() and scores[1] < density.score_samples(mixed[0]).min()
    )
    with pytest.warns(
        UserWarning, match="1 of 3 rows are outside of the support and have log density -inf; the mean of"
    ):
        assert density.score(table) == -np.inf


def test_noise_is_normal_where_the_density_is_right(mixed):
    table, _, density = mixed
    eps = density.density_.to_noise(table.to_numpy(), seed=0)
    assert eps.shape == table.shape and np.abs(eps.mean(0)).max() < 0.2 and np.abs(eps.std(0) - 1).max() < 0.2


# -- context, weights --------------------------------------------------------------------------------


def test_context_moves_the_density(mixed):
    table, colour, _ = mixed
    density = cf.FlowDensity(**SMALL).fit(table[["a"]], context=colour)
    red, blue = (density.sample(500, pd.DataFrame({"colour": [c]}), random_state=0).mean() for c in ("red", "blue"))
    assert abs(red - 5) < 0.4 and abs(blue) < 0.4
    own = density.score(table[["a"]], context=colour)
    other = density.score(table[["a"]], context=colour.replace({"red": "blue", "blue": "red"}))
    assert own > other + 3
    one_each = density.sample(3, pd.Series(["red", "blue", "red"], name="colour"), random_state=0)[:, 0]
    assert (np.abs(one_each - [5, 0, 5]) < 4).all()
    with pytest.raises(ValueError, match=r"expected a context of the columns \['colour'\], as in fit, got none"):
        density.score_samples(table[["a"]])
    with pytest.raises(ValueError, match="expected a context of one row or of n=3 rows, got 2"):
        density.sample(3, pd.Series(["red", "blue"], name="colour"))
    with pytest.raises(ValueError, match="expected as many rows in context as in X, 1200, got"):
        density.score_samples(table[["a"]], colour.head(7))


def test_context_of_numbers_in_an_array():
    c = RNG.normal(size=(800, 1))
    density = cf.FlowDensity(**SMALL).fit(2 * c + 0.1 * RNG.normal(size=(800, 1)), context=c)
    assert abs(density.sample(200, [[1.0]], random_state=0).mean() - 2) < 0.2


@pytest.mark.slow
def test_a_row_of_weight_n_counts_as_n_rows():
    x = np.concatenate([RNG.normal(0, 1, (300, 1)), RNG.normal(20, 1, (300, 1))])
    weights = np.repeat([1.0, 0.0], 300)
    density = cf.FlowDensity(**TINY).fit(x, sample_weight=weights)
    np.testing.assert_array_equal(density.score_samples(x), cf.FlowDensity(**TINY).fit(x[:300]).score_samples(x))
    tilted = cf.FlowDensity(**SMALL).fit(x, sample_weight=np.repeat([9.0, 1.0], 300))
    assert abs((tilted.sample(2000, random_state=0) < 10).mean() - 0.9) < 0.05


# -- manners -----------------------------------------------------------------------------------------


@over(["nsf", "maf", "coupling", "iaf"], "flow")
def test_every_flow(flow):
    density = cf.FlowDensity(flow, **TINY).fit(ROWS)
    assert density.score(ROWS) > -2.2 and density.sample(7).shape == (7, 2)


def recipe(features, context):
    return cf.MAF(features, context, layers=1, hidden=(8,), univariate=cf.transforms.SinhArcsinh())


def test_a_user_defined_recipe():
    density = cf.FlowDensity(recipe, **TINY).fit(ROWS)
    assert "SinhArcsinh" in repr(density.flow_)
    with pytest.raises(ValueError, match=r"expected a recipe .* for 2 and 0, got"):
        cf.FlowDensity(lambda features, context: cf.MAF(3), **TINY).fit(ROWS)


@pytest.mark.slow
def test_the_seed_decides():
    def scores(seed):
        return cf.FlowDensity(**{**TINY, "random_state": seed}).fit(ROWS).score_samples(ROWS)

    before = torch.random.get_rng_state()
    assert np.array_equal(scores(1), scores(1)) and not np.array_equal(scores(1), scores(2))
    assert torch.equal(before, torch.random.get_rng_state())
    density = cf.FlowDensity(**TINY).fit(ROWS)
    assert np.array_equal(density.sample(5, random_state=3), density.sample(5, random_state=3))


def test_scores_do_not_depend_on_the_rows_beside(mixed):
    table, _, density = mixed
    together = density.score_samples(table)
    np.testing.assert_allclose(density.score_samples(table.iloc[5:6]), together[5:6], rtol=1e-10)
    np.testing.assert_allclose(density.score_samples(table.iloc[::-1])[::-1], together, rtol=1e-10)


@pytest.mark.slow
def test_in_a_pipeline_and_a_search():
    search = GridSearchCV(cf.FlowDensity(**TINY), {"layers": [1, 2], "flow": ["maf"]}, cv=2).fit(ROWS)
    assert search.best_params_["layers"] in (1, 2) and np.isfinite(search.best_score_)
    pipeline = make_pipeline(StandardScaler(), cf.FlowDensity(**TINY)).fit(ROWS)
    assert pipeline.score_samples(ROWS).shape == (300,)
    assert np.isfinite(cross_val_score(cf.FlowDensity(**TINY), ROWS, cv=2)).all()


def test_clone_pickle_and_isinstance(mixed):
    table, _, density = mixed
    again = pickle.loads(pickle.dumps(density))
    assert isinstance(again, cf.FlowDensity)
    np.testing.assert_array_equal(again.score_samples(table), density.score_samples(table))
    fresh = clone(density)
    assert fresh.get_params() == density.get_params() and not hasattr(fresh, "flow_")


def test_save_and_load(mixed, tmp_path):
    table, colour, density = mixed
    for name, (fitted, given) in {
        "plain": (density, None),
        "given": (cf.FlowDensity(**TINY).fit(table.head(300), context=colour.head(300)), colour),
        "array": (cf.FlowDensity(recipe, **TINY).fit(table.head(300).to_numpy()), None),
    }.items():
        x = table.to_numpy() if name == "array" else table
        fitted.save(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {MODEL, DESCRIPTION}
        loaded = cf.FlowDensity.load(tmp_path / name)
        np.testing.assert_array_equal(loaded.score_samples(x, given), fitted.score_samples(x, given))
        np.testing.assert_array_equal(loaded.get_feature_names_out(), fitted.get_feature_names_out())
        assert isinstance(cf.load(tmp_path / name / MODEL), cf.flows.FlowMixture)
    with pytest.raises(FileNotFoundError, match=r"density.json, which FlowDensity.save writes, got no such file"):
        cf.FlowDensity.load(tmp_path)
    (tmp_path / "plain" / DESCRIPTION).write_text("{}")
    with pytest.raises(ValueError, match="to hold a FlowDensity as save writes it, got"):
        cf.FlowDensity.load(tmp_path / "plain")


def test_a_missing_scikit_learn_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "counterflow.density.estimator")
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"expected scikit-learn .* pip install 'counterflow\[data\]'"):
        importlib.import_module("counterflow.density.estimator")


# -- what is refused, in words -----------------------------------------------------------------------

HOLES = ROWS.copy()
HOLES[[3, 7], [1, 0]] = np.nan
TEXT = pd.DataFrame({"a": RNG.normal(size=20), "b": [f"r{k}" for k in range(20)]})
COPIES = np.concatenate([ROWS, 3 * ROWS, np.ones((300, 1))], 1)
REFUSED = {
    "missing": (HOLES, {}, r"got 2 missing \(NaN\): row 3 of 'x1', row 7 of 'x0' .* impute .* or drop 2 of 300 rows"),
    "infinite": (np.where(ROWS > 15, np.inf, ROWS), {}, r"infinite \(inf\): row .* of 'x0'"),
    "copies": (COPIES, {"constant": "error"}, "'x4' is constant, 'x2' is an affine copy"),
    "text": (TEXT, {}, r"expected categories that repeat in column .b., got 20 different ones in 20 rows"),
    "one row": (ROWS[:1], {}, "minimum of 2 is required"),
    "fraction": (ROWS, {"validation_fraction": 1.0}, r"expected validation_fraction in \(0, 1\), got 1.0"),
    "cell_points": (ROWS, {"cell_points": 0}, "expected cell_points to be a whole number of at least 1, got 0"),
    "device": (ROWS, {"device": "toaster"}, "expected device to be an available torch device"),
    "flow": (ROWS, {"flow": "nfs"}, "expected flow to be one of nsf, maf, coupling, iaf, or a recipe, got 'nfs'"),
    "epochs": (ROWS, {"epochs": 0}, "expected epochs to be a whole number of at least 1, got 0"),
    "hidden": (ROWS, {"hidden": (0,)}, r"expected hidden\[0\] to be a whole number"),
    "hidden sizes": (ROWS, {"hidden": 8}, "expected the sizes of the hidden layers, such as .* got hidden=8"),
    "columns": (ROWS, {"columns": 3}, "expected columns to be one of auto, real, integer, ordinal, or kinds by name"),
    "constant": (ROWS, {"constant": "keep"}, "expected constant to be one of drop, error, got 'keep'"),
    "nothing varies": (np.ones((30, 2)), {}, "expected at least one column that varies, got constant columns only"),
    "bounds": (ROWS, {"bounds": {"x0": (0, 5)}}, r"expected numbers in \[0, 5\] in column 'x0'"),
}  # fmt: skip


@pytest.mark.parametrize(("x", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_input_is_refused(x, settings, message):
    with pytest.raises(ValueError, match=message):
        cf.FlowDensity(**{**TINY, **settings}).fit(x)
    with pytest.raises(ValueError, match=message):
        cf.FlowDensity(**{**TINY, **settings})._trainer(x)


def test_samples_that_cannot_be_drawn():
    density = cf.FlowDensity(**TINY).fit(ROWS)
    for n in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="expected n to be a whole number of at least 1"):
            density.sample(n)
    with pytest.raises(ValueError, match="expected no context, as in fit, got one"):
        density.score_samples(ROWS, context=ROWS)


@pytest.mark.slow
def test_wide_and_short_tables():
    wide = RNG.normal(size=(40, 300))
    density = cf.FlowDensity(**TINY).fit(wide)
    assert np.isfinite(density.score_samples(wide)).all() and density.sample(3).shape == (3, 300)
    short = cf.FlowDensity(**TINY).fit(wide[:2, :3])
    assert np.isfinite(short.score_samples(wide[:2, :3])).all()


# -- several flows, and kernels ----------------------------------------------------------------------


def test_members_are_averaged_and_one_is_a_flow():
    density = cf.FlowDensity(**TINY).fit(ROWS)
    assert len(density.flow_.flows) == 3 and len(density.histories_) == 4
    x = torch.from_numpy(ROWS[:5])
    with torch.no_grad():
        each = torch.stack([flow().log_prob(x) for flow in density.flow_.flows])
    np.testing.assert_allclose(density.score_samples(ROWS[:5]), torch.logsumexp(each, 0).numpy() - math.log(3))
    assert each.std(0).min() > 0
    assert isinstance(cf.FlowDensity(**TINY, members=1).fit(ROWS).flow_, cf.Flow)
    with pytest.raises(ValueError, match="expected members to be a whole number of at least 1, got 0"):
        cf.FlowDensity(**TINY, members=0).fit(ROWS)


@pytest.fixture(scope="module")
def repeated():
    """Rows that come twice, nearly equal, and their density, which keeps them as kernels."""
    twice = RNG.normal(size=(300, 2)).repeat(2, 0) + 1e-3 * RNG.normal(size=(600, 2))
    return twice, cf.FlowDensity(**SMALL | {"members": 2}).fit(twice)


@pytest.mark.slow
def test_rows_that_come_twice_are_kept_as_kernels_unless_forbidden(repeated, tmp_path):
    twice, density = repeated
    other = cf.FlowDensity(**SMALL | {"epochs": 5}, kernels=False).fit(twice)
    assert density.holds_rows_ and not other.holds_rows_
    new = twice[:200] + 1e-3 * RNG.normal(size=(200, 2))
    assert density.score(new) > other.score(new) + 0.5
    density.save(tmp_path)
    np.testing.assert_array_equal(cf.FlowDensity.load(tmp_path).score_samples(new), density.score_samples(new))
    assert not cf.FlowDensity(**TINY).fit(ROWS).holds_rows_


@pytest.mark.slow
def test_the_noise_of_a_mixture_with_kernels_is_normal(repeated):
    _, density = repeated
    assert density.holds_rows_ and len(density.flow_.flows) == 2
    eps = density.density_.to_noise(density.sample(4000, random_state=1), seed=2)
    assert np.abs(eps.mean(0)).max() < 0.06 and np.abs(eps.std(0) - 1).max() < 0.06
