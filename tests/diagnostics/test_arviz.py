"""Conversion to the data structures of the installed ArviZ."""

import warnings
from importlib import import_module

import numpy as np

from counterflow.diagnostics.arviz import NETCDF_MODULES, _uses_version_1, arviz_data, draws_tree


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
