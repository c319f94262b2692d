"""Posterior fits in a PyMC workflow: a model goes in, ArviZ's data with the groups of `pm.sample` come out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from counterflow.checks import require
from counterflow.posterior.config import PosteriorConfig
from counterflow.posterior.fit import fit_posterior
from counterflow.posterior.targets.pymc import from_pymc
from counterflow.training.tracking import Tracker

if TYPE_CHECKING:
    from pymc import Model


def fit(
    model: Model | None = None,
    config: PosteriorConfig = PosteriorConfig(),
    *,
    samples: int = 4000,
    starts: Mapping[str, Any] | None = None,
    log_likelihood: bool = True,
    posterior_predictive: bool = False,
    tracker: Tracker | None = None,
) -> Any:
    """Fit the posterior of a PyMC model and return draws as ArviZ's data, where `pm.sample` would be called.

        with model:
            data = counterflow.interop.pymc.fit()
        az.summary(data), az.loo(data), pm.sample_posterior_predictive(data, model)

    The groups are those of `Posterior.to_arviz`: posterior with the model's dims and coords and its deterministic
    variables, unconstrained_posterior, sample_stats with the log weights, log_likelihood, observed_data and
    constant_data. The attributes of posterior hold the verdict; a bad one is also a warning.

    Args:
        model: the model; None takes that of the `with` block.
        config: configuration of the fit.
        samples: number of draws, as one chain.
        starts: values of variables at which to start as well: see `counterflow.fit_posterior`.
        log_likelihood: compute the log likelihood of each observation, which `az.loo` and `az.compare` need.
        posterior_predictive: draw new data as well, as `pm.sample_posterior_predictive` does later from the result.
        tracker: client of an experiment tracker: see `counterflow.fit_posterior`.

    Raises:
        ImportError: PyMC or ArviZ is not installed.
        TypeError, ValueError: as `counterflow.targets.from_pymc` and `counterflow.fit_posterior` do.

    Warns:
        RuntimeWarning: the approximation cannot be trusted.
    """
    pymc = require("pymc", "pymc", "its models")
    model = pymc.modelcontext(model)
    posterior = fit_posterior(from_pymc(model), config, starts=starts, tracker=tracker)
    if not posterior.trusted:
        warnings.warn(posterior.sentence, RuntimeWarning, stacklevel=2)
    return posterior.to_arviz(samples, predictive=posterior_predictive, log_likelihood=log_likelihood)
