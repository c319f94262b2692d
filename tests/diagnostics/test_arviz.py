"""Conversion to the data structures of the installed ArviZ."""

from importlib import import_module

import numpy as np

from counterflow.diagnostics.arviz import arviz_data, netcdf_modules


def test_data_with_dimensions_coordinates_and_attributes(tmp_path):
    groups = {
        "posterior": {"mu": np.arange(5.0)[None], "theta": np.zeros((1, 5, 3))},
        "sample_stats": {"lp": np.ones((1, 5))},
        "observed_data": {"y": np.arange(3.0)},
    }
    data = arviz_data(groups, {"verdict": "good"}, {"theta": ("school",)}, {"school": ["a", "b", "c"]})
    assert data["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert data["posterior"]["school"].values.tolist() == ["a", "b", "c"]
    assert data["posterior"]["mu"].values.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]
    assert data["sample_stats"]["lp"].shape == (1, 5) and data["observed_data"]["y"].shape == (3,)
    assert data["posterior"].attrs["verdict"] == "good"
    data.to_netcdf(str(tmp_path / "data.nc"))
    assert (tmp_path / "data.nc").stat().st_size > 1_000


def test_the_modules_that_write_netcdf_are_installed():
    for module in netcdf_modules():
        import_module(module)
