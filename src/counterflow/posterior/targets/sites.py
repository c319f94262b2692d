"""Facts about the sites of a trace that hold for Pyro and NumPyro alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_data(site: Mapping[str, Any]) -> bool:
    """Return True for an observed sample site, and False for factors and deterministic sites."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    is_factor = type(site["fn"]).__name__ == "Unit"
    is_deterministic = site["infer"].get("_deterministic", False)  # Pyro's are observed sample sites
    return not is_factor and not is_deterministic


def check_full_plate(plate: str, size: int, subsample_size: int | None) -> None:
    """Raise ValueError for a plate that draws a part of the data."""
    if subsample_size not in (None, size):
        raise ValueError(
            f"expected plates over all data, got {subsample_size} of {size} in plate {plate}; leave its "
            "subsample_size out, as the log density has to be the same at every call"
        )


def data_mismatch_error(site: str, error: Exception) -> ValueError:
    """Return the error to raise when the log density of a site cannot be computed."""
    return ValueError(
        f"expected data that fit the model, got at {site}: {error}; compare the shapes of its data and its distribution"
    )


def plate_dims(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the names of the batch dimensions of each site inside plates: name -> plate names."""
    return {
        name: [_plate_at(site, axis) or f"{name}_dim_{axis + n}" for axis in range(-n, 0)]
        for name, site in sites.items()
        if (n := len(site["fn"].batch_shape)) and site["cond_indep_stack"]
    }


def _plate_at(site: Mapping[str, Any], axis: int) -> str | None:
    return next((plate.name for plate in site["cond_indep_stack"] if plate.dim == axis), None)
