"""Access to ArviZ, of either generation.

Version 0 is one package, `arviz`. Version 1 consists of `arviz_base` (data structures), `arviz_stats` and
`arviz_plots`, which the package `arviz` only gathers. Draws are put into an xarray DataTree, which needs no ArviZ: to
import version 0 takes seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.checks import require
from counterflow.diagnostics.importance import k_hat_threshold

Array = npt.NDArray[Any]
EXTRA = "posterior"
NETCDF_MODULES = ("xarray", "h5netcdf", "h5py")  # write a `draws_tree`; to be checked before a fit
DATA_GROUPS = ("observed_data", "constant_data")  # without chains and draws
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


def draws_tree(
    groups: Mapping[str, Mapping[str, Any]],
    attributes: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    """Put arrays into an xarray DataTree with the groups, dimensions and coordinates of ArviZ's schema.

    Args:
        groups: group -> variable -> array; draws are (chains, draws, *shape), data (*shape).
        attributes: attributes of the group "posterior".
        dims: names of each variable's dimensions; `x_dim_0`, ... where a variable x has none, or others in number.
        coords: labels of the coordinates along each dimension; 0, 1, ... where a dimension has none.

    Raises:
        ImportError: xarray is not installed.
    """
    xarray = require("xarray", EXTRA, "groups of draws")
    tree = {}
    for group, variables in groups.items():
        leading = () if group in DATA_GROUPS else ("chain", "draw")
        arrays, labels = {}, {}
        for name, given in variables.items():
            array = np.asarray(given)
            axes = array.ndim - len(leading)
            own = dims.get(name, ())
            if len(own) != axes:  # such as the log likelihood of rows of a multivariate variable
                own = [f"{name}_dim_{k}" for k in range(axes)]
            arrays[name] = ((*leading, *own), array)
            for dim, size in zip((*leading, *own), array.shape, strict=True):
                labels[dim] = list(coords[dim]) if dim in coords else np.arange(size)
        tree[group] = xarray.Dataset(arrays, labels, attributes if group == "posterior" else None)
    return xarray.DataTree.from_dict(tree)


def arviz_data(tree: Any) -> Any:
    """Return the tree as the data structure of the installed ArviZ: InferenceData (0), or the tree itself (1).

    Raises:
        ImportError: ArviZ is not installed.
    """
    if _uses_version_1():
        require("arviz_base", EXTRA, "to_arviz")
        return tree
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        arviz = require("arviz", EXTRA, "to_arviz")
    return arviz.InferenceData(**{name: group.to_dataset() for name, group in tree.children.items()})


def approximate_loo(tree: Any, var_name: str) -> Any:
    """Estimate leave-one-out predictive densities from draws of an approximation, by the installed ArviZ.

        elpd_i = log sum_s w_is p(y_i | x_s) / sum_s w_is,    w_is = psis(p(x_s) / q(x_s) / p(y_i | x_s))

    Args:
        tree: draws of q in the groups posterior and log_likelihood; sample_stats has their lp and log_q.
        var_name: the observed variable.

    Returns:
        arviz-stats' ELPDData of `loo_approximate_posterior`; the ELPDData of `az.loo` for ArviZ 0.

    Raises:
        ImportError: neither arviz-stats nor ArviZ 0 is installed.

    Source: Magnusson et al. 2019, "Bayesian leave-one-out cross-validation for large data", section 2.2.
    """
    stats = tree["sample_stats"]
    if _uses_version_1():
        loo = require("arviz_stats", EXTRA, "leave-one-out cross-validation").loo_approximate_posterior
        return loo(tree, stats["lp"], stats["log_q"], pointwise=True, var_name=var_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import, ArviZ 0.23 announces version 1
        arviz = require("arviz", EXTRA, "leave-one-out cross-validation")
    log_ratio = stats["lp"] - stats["log_q"]
    log_likelihood = tree["log_likelihood"][var_name]
    sample = {"__sample__": ("chain", "draw")}
    log_w, pareto_k = arviz.psislw((log_ratio - log_likelihood).stack(sample))
    terms = log_likelihood.stack(sample)
    elpd = _log_sum(log_w + terms).rename("loo_i")
    in_sample = _log_sum(terms + log_ratio.stack(sample)) - _log_sum(log_ratio.stack(sample))
    S, N = terms.sizes["__sample__"], elpd.size
    good_k = k_hat_threshold(S)
    is_bad = bool((pareto_k > good_k).any())
    facts = {
        "elpd_loo": elpd.values.sum(),
        "se": (N * elpd.values.var()) ** 0.5,
        "p_loo": (in_sample - elpd).values.sum(),
        "n_samples": S,
        "n_data_points": N,
        "warning": is_bad,
        "loo_i": elpd,
        "pareto_k": pareto_k,
        "scale": "log",
        "good_k": good_k,
    }
    if is_bad:
        warnings.warn(
            f"k-hat is above {good_k:.2f} for {int((pareto_k > good_k).sum())} of {N} observations: their terms are "
            "unreliable; use k-fold cross-validation, or a model with heavier tails",
            stacklevel=3,
        )
    return arviz.stats.ELPDData(data=list(facts.values()), index=list(facts))


def _log_sum(terms: Any) -> Any:
    """Return log sum exp over the samples."""
    largest = terms.max("__sample__")
    return np.log(np.exp(terms - largest).sum("__sample__")) + largest


def chains_modules() -> tuple[str, ...]:
    """Return the modules that `r_hat_and_ess` needs, to be checked before chains run."""
    return ("arviz_stats",) if _generation("arviz-stats") == 1 else ("arviz",)


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
