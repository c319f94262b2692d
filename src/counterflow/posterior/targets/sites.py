"""Facts about the sites of a trace that hold for Pyro and NumPyro alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import getclosurevars
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt


def is_data(site: Mapping[str, Any]) -> bool:
    """Return True for an observed sample site, and False for factors and deterministic sites."""
    if site["type"] != "sample" or not site["is_observed"]:
        return False
    is_factor = type(site["fn"]).__name__ == "Unit"
    is_deterministic = site["infer"].get("_deterministic", False)  # Pyro's are observed sample sites
    return not is_factor and not is_deterministic


def check_full_plate(plate: str, size: int, subsample_size: int | None) -> None:
    """Raise ValueError for a plate that holds a part of the data."""
    if subsample_size not in (None, size):
        raise ValueError(
            f"expected plates over all data, got {subsample_size} of {size} in plate {plate}; leave its "
            "subsample_size or subsample out and observe all data, as the log density has to be the same at every call"
        )


def check_same_terms(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raise ValueError if the terms of a log density differ between two runs with different random numbers."""
    differing = [name for name, term in first.items() if not np.allclose(term, second[name], 1e-9, equal_nan=True)]
    if differing:
        raise ValueError(
            f"expected the same log density at every call, got one of {', '.join(differing)} that depends on random "
            "numbers drawn in the model, such as a part of the data; observe all data and draw no noise"
        )


def check_not_scaled_from_part(
    sites: Mapping[str, Mapping[str, Any]], observed: Mapping[str, npt.NDArray[Any]], model_and_data: Any
) -> None:
    """Raise ValueError for observed sites whose scale makes up for rows that the model was given but does not use.

    Args:
        sites: the trace.
        observed: the data of the sites.
        model_and_data: the model and its arguments, in which larger arrays are looked for.
    """
    lengths = set(_lengths(model_and_data))
    for name, value in observed.items():
        scale = sites[name]["scale"]
        rows = len(value) if value.ndim else 1
        if scale is not None and np.ndim(scale) == 0 and scale > 1 and rows * float(scale) in lengths:
            raise ValueError(
                f"expected the log density of all data, got that of {rows} of {rows * float(scale):g} rows at {name}, "
                f"scaled by {float(scale):g}; observe all rows without a scale"
            )


def _lengths(value: Any) -> Iterator[int]:
    """Return the lengths of all arrays in nested containers, and in the variables that a function closes over."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for inner in value:
            yield from _lengths(inner)
    elif isinstance(value, FunctionType):
        for inner in getclosurevars(value).nonlocals.values():
            if not isinstance(inner, FunctionType):
                yield from _lengths(inner)
    elif isinstance(shape := getattr(value, "shape", None), tuple) and shape:
        yield shape[0]


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


def first_free_axis(sites: Iterable[Mapping[str, Any]]) -> int:
    """Return the axis, counted from the right, to the left of all batches and plates of sample sites: -1, -2, ..."""
    return -1 - max(max([len(site["fn"].batch_shape), *(-plate.dim for plate in _plates(site))]) for site in sites)


def _plates(site: Mapping[str, Any]) -> list[Any]:
    """Return the plates of a site that have an axis; in Pyro, a loop over a plate has none."""
    return [plate for plate in site["cond_indep_stack"] if getattr(plate, "vectorized", True)]


def dependent_support_error(site: str) -> ValueError:
    """Return the error to raise for a latent site whose support depends on discrete sites."""
    return ValueError(
        f"expected supports that do not depend on discrete sites, got that of {site}; write the model with a variable "
        "on a fixed support"
    )


def _plate_at(site: Mapping[str, Any], axis: int) -> str | None:
    return next((plate.name for plate in site["cond_indep_stack"] if plate.dim == axis), None)
