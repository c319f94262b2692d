"""Access to ArviZ, of either generation.

Version 0 is one package, `arviz`. Version 1 consists of `arviz_base` (data structures), `arviz_stats` and
`arviz_plots`, which the package `arviz` only gathers. Only the parts that are needed are imported, since importing all
of them takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.checks import require

Array = npt.NDArray[Any]
EXTRA = "posterior"
TAILS = (0.05, 0.95)  # quantiles whose effective sample size is that of the tails


def r_hat_and_ess(draws: Array) -> tuple[Array, Array, Array]:
    """Compute R-hat and the effective sample sizes of centre and tails, (D,) each, of draws (chains, draws, D).

    Raises:
        ImportError: neither arviz-stats 1 nor ArviZ 0 is installed.
    """
    purpose = "R-hat and effective sample sizes"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0 / 0 if a chain does not move; more chains than draws; ArviZ 0's import
        if _generation("arviz-stats") == 1:
            stats = require("arviz_stats.base", EXTRA, purpose).array_stats
            axes = {"chain_axis": 0, "draw_axis": 1}
            bulk, tail = stats.ess(draws, method="bulk", **axes), stats.ess(draws, method="tail", prob=TAILS, **axes)
            return stats.rhat(draws, **axes), bulk, tail
        arviz = require("arviz", EXTRA, purpose)
        data = arviz.convert_to_dataset({"x": draws})
        found = arviz.rhat(data), arviz.ess(data, method="bulk"), arviz.ess(data, method="tail", prob=TAILS)
        r_hat, bulk, tail = (np.asarray(part["x"].values) for part in found)
        return r_hat, bulk, tail


def arviz_data(
    groups: Mapping[str, Mapping[str, Any]],
    attributes: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    """Convert arrays to the data structure of the installed ArviZ: InferenceData (0) or an xarray DataTree (1).

    Args:
        groups: group -> variable -> array; draws are (chains, draws, *shape).
        attributes: attributes of the group "posterior".
        dims: names of each variable's dimensions.
        coords: labels of the coordinates along each dimension.

    Raises:
        ImportError: ArviZ is not installed.
    """
    purpose = "to_arviz"
    named = {"dims": {name: list(value) for name, value in dims.items()}, "coords": dict(coords)}
    if _uses_version_1():
        data = require("arviz_base", EXTRA, purpose).from_dict(groups, **named)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
            arviz = require("arviz", EXTRA, purpose)
        data = arviz.from_dict(**groups, **named)
    data["posterior"].attrs.update(attributes)
    return data


def netcdf_modules() -> tuple[str, ...]:
    """Return the modules that `arviz_data` and its method `to_netcdf` need, to be checked before a fit."""
    return ("arviz_base" if _uses_version_1() else "arviz", "h5netcdf", "h5py")


def _uses_version_1() -> bool:
    """Return whether data are converted by arviz-base: not if ArviZ 0 is installed, whose users expect its data."""
    generation = _generation("arviz")
    return _generation("arviz-base") == 1 if generation is None else generation == 1


def _generation(package: str) -> int | None:
    """Return 0 or 1, the generation of an installed package; None if it is not installed."""
    try:
        return min(1, int(version(package).partition(".")[0]))
    except PackageNotFoundError:
        return None
