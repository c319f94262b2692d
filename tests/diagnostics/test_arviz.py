"""Conversion to the data structures of the installed ArviZ."""

import warnings
from importlib import import_module

import numpy as np
import pytest

from counterflow.diagnostics.arviz import NETCDF_MODULES, _uses_version_1, approximate_loo, arviz_data, draws_tree


def from_netcdf(path):
    """Read a file with the installed ArviZ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        return import_module("arviz_base" if _uses_version_1() else "arviz").from_netcdf(path)


def test_data_with_dimensions_coordinates_and_attributes(tmp_path):
    groups = {
        "posterior": {"mu": np.arange(5.0)[None], "theta": np.zeros((1, 5, 3))},
        "sample_stats": {"lp": np.ones((1, 5))},
        "observed_data": {"y": np.arange(3.0)},
    }
    tree = draws_tree(groups, {"verdict": "good"}, {"theta": ("school",)}, {"school": ["a", "b", "c"]})
    data = arviz_data(tree)
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["posterior"]["school"].values.tolist() == ["a", "b", "c"]
    assert data["posterior"]["mu"].values.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]
    assert data["sample_stats"]["lp"].shape == (1, 5) and data["observed_data"]["y"].shape == (3,)
    assert data["posterior"].attrs["verdict"] == "good"
    assert data["observed_data"]["y"].dims == ("y_dim_0",) and data["posterior"]["draw"].values.tolist() == [*range(5)]
    tree.to_netcdf(str(tmp_path / "data.nc"), engine="h5netcdf")
    read = from_netcdf(tmp_path / "data.nc")
    for group, variables in groups.items():
        for name, values in variables.items():
            assert np.array_equal(read[group][name].values, values) and read[group][name].dims == data[group][name].dims
    assert read["posterior"].attrs["verdict"] == "good"


def test_the_modules_that_write_netcdf_are_installed():
    for module in NETCDF_MODULES:
        import_module(module)


def log_normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))


def test_leave_one_out_from_a_wrong_approximation_is_that_of_exact_draws():
    """y_i ~ N(mu, 1) with a flat prior: p(y_i | the others) = N(their mean, 1 + 1 / 29)."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=30)
    sd = 30**-0.5
    mu = y.mean() + 0.5 * sd + 1.3 * sd * rng.normal(size=4000)  # q is shifted and too wide

    def tree(mu):
        log_p, log_q = log_normal(mu, y.mean(), sd), log_normal(mu, y.mean() + 0.5 * sd, 1.3 * sd)
        groups = {
            "posterior": {"mu": mu[None]},
            "sample_stats": {"lp": log_p[None] - 7, "log_q": log_q[None]},
            "log_likelihood": {"y": log_normal(y, mu[:, None], 1.0)[None]},
        }
        return draws_tree(groups, {}, {}, {})

    others = (y.sum() - y) / 29
    expected = log_normal(y, others, (1 + 1 / 29) ** 0.5)
    loo = approximate_loo(tree(mu), "y")
    elpd, pointwise = (loo.elpd, loo.elpd_i) if _uses_version_1() else (loo.elpd_loo, loo.loo_i)
    assert pointwise.values == pytest.approx(expected, abs=0.02) and elpd == pytest.approx(expected.sum(), abs=0.1)
    assert loo.se == pytest.approx(30**0.5 * expected.std(), abs=0.1) and (loo.pareto_k < 0.7).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        arviz = import_module("arviz_stats" if _uses_version_1() else "arviz")
        exact = arviz.loo(arviz_data(tree(y.mean() + sd * rng.normal(size=4000))), pointwise=True)
        table = arviz.compare({"exact": exact, "approximation": loo})
    assert (exact.elpd if _uses_version_1() else exact.elpd_loo) == pytest.approx(elpd, abs=0.1)
    assert set(table.index) == {"exact", "approximation"}


def test_leave_one_out_reports_observations_that_a_few_draws_decide():
    rng = np.random.default_rng(0)
    x = 0.5 * rng.normal(size=(1, 1000))
    y = np.array([0.0, 40.0])
    groups = {
        "posterior": {"x": x},
        "sample_stats": {"lp": log_normal(x, 0, 0.5), "log_q": log_normal(x, 0, 0.5)},
        "log_likelihood": {"y": log_normal(y, x[..., None], 1.0)},
    }
    with pytest.warns(UserWarning, match="k-hat is above|Pareto"):
        loo = approximate_loo(draws_tree(groups, {}, {}, {}), "y")
    assert loo.warning and (loo.pareto_k.values > 0.7).tolist() == [False, True]
