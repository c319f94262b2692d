"""Targets from NumPyro models: value and gradient of a batch, compiled by JAX in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.posterior.targets.bijections import find_bijection, unconstrained_name
from counterflow.posterior.targets.layout import Layout
from counterflow.posterior.targets.sites import check_full_plate, data_mismatch_error, is_data, plate_dims
from counterflow.posterior.targets.target import (
    Array,
    Program,
    Target,
    describe_nonfinite,
    log_density_with_gradient,
)

# (site, its bijection, shape of its values) -> its unconstrained form
Chooser = Callable[[str, Any, tuple[int, ...]], Any]

MIN_ROWS = 8  # batches are padded to a power of two of at least this many rows, so that JAX compiles for few sizes


def from_numpyro(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Target:
    """Make a target from a NumPyro model and its arguments, which include the data.

    The density is that of all sample sites and factors, each latent site under the bijection of its support, which may
    depend on other sites. `constrain` returns the latent and the deterministic sites, `predictive` draws the observed
    ones anew. Parameters (`numpyro.param`) stay at their initial values.

    The model runs in float64 whatever JAX's own setting is, and the setting is left as it was. JAX compiles once for
    each power of two of the batch size; batches are padded.

    Args:
        model: the model, a function of args and kwargs.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ImportError: NumPyro is not installed.
        ValueError: a discrete or subsampled site, no latent site, or data that do not fit the model.

    Example:
        >>> import numpyro
        >>> from numpyro.distributions import HalfNormal, Normal
        >>> def model(y):
        ...     tau = numpyro.sample("tau", HalfNormal(5))
        ...     with numpyro.plate("row", len(y)):
        ...         numpyro.sample("y", Normal(0, tau), obs=y)
        >>> target = from_numpyro(model, np.array([1.0, -2.0]))
        >>> target.coordinates, target.dims
        (('log(tau)',), {'y': ['row']})
    """
    return Target(_NumpyroProgram(model, args, kwargs))


class _NumpyroProgram(Program):
    """Model with its arguments, and the facts about its sites that one run, at theta = 0, reveals."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._numpyro = require("numpyro", "numpyro", "models of NumPyro")
        self._jax = require("jax", "numpyro", "models of NumPyro")
        self._model = model
        self._args = args
        self._kwargs = kwargs
        with self._jax.enable_x64(True):
            run = self._run(lambda name, transform, shape: np.zeros(transform.inverse_shape(shape)))
            self.observed = {name: np.asarray(site["value"]) for name, site in run.sites.items() if is_data(site)}
        self._layout = Layout({name: np.shape(free) for name, free in run.unconstrained.items()})
        self.coordinates = self._layout.coordinates(
            {name: unconstrained_name(name, transform) for name, transform in run.transforms.items()}
        )
        self.parameters = tuple(self._layout.shapes)
        self.dims = plate_dims({name: run.sites[name] for name in (*self.parameters, *self.observed)})
        derived = [name for name, site in run.sites.items() if site["type"] == "deterministic"]
        self._variables = [*self.parameters, *derived]
        self._batched_gradient = self._jax.jit(self._jax.vmap(self._jax.value_and_grad(self._log_density_of_row)))
        self._batched_values = self._jax.jit(self._jax.vmap(self._values_of_row))
        self._batched_unconstrain = self._jax.jit(self._jax.vmap(self._unconstrain_row))

    def log_density(self, theta: Tensor) -> Tensor:
        return log_density_with_gradient(self._value_and_gradient, theta)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = self._padded(self._batched_values, theta.cpu().numpy())
        return {name: torch.tensor(np.asarray(values[name]), device=theta.device) for name in self._variables}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: value.cpu().numpy() for name, value in values.items()}
        unconstrained = self._padded(self._batched_unconstrain, arrays)
        return self._layout.join({name: torch.tensor(np.asarray(value)) for name, value in unconstrained.items()})

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        predictive = require("numpyro.infer", "numpyro", "models of NumPyro").Predictive
        values = self.constrain(theta)
        latent = {name: values[name].cpu().numpy() for name in self.parameters}
        model = self._numpyro.handlers.uncondition(self._model)
        draw = predictive(model, latent, return_sites=list(self.observed))
        with self._jax.enable_x64(True):
            draws = draw(self._jax.random.PRNGKey(seed), *self._args, **self._kwargs)
            return {name: np.asarray(value) for name, value in draws.items()}

    def explain(self, theta: Tensor) -> str:
        with self._jax.enable_x64(True):
            return describe_nonfinite(
                {name: float(term) for name, term in self._run_at(theta.cpu().numpy()).terms.items()}
            )

    def _value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        value, gradient = self._padded(self._batched_gradient, theta)
        return np.array(value), np.array(gradient)

    def _log_density_of_row(self, theta: Any) -> Any:
        run = self._run_at(theta)
        return sum(run.terms.values()) + sum(run.log_jacobians)

    def _values_of_row(self, theta: Any) -> dict[str, Any]:
        sites = self._run_at(theta).sites
        return {name: sites[name]["value"] for name in self._variables}

    def _unconstrain_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._run(lambda name, transform, shape: transform.inv(values[name])).unconstrained

    def _run_at(self, theta: Any) -> _Run:
        pieces = self._layout.split(theta)
        return self._run(lambda name, transform, shape: pieces[name])

    def _run(self, choose: Chooser) -> _Run:
        run = _Run(choose)
        handlers = self._numpyro.handlers
        model = handlers.substitute(handlers.seed(self._model, 0), substitute_fn=run.substitute)
        with self._numpyro.validation_enabled(is_validate=False):  # validation only warns; `explain` says more
            run.sites = handlers.trace(model).get_trace(*self._args, **self._kwargs)
            run.terms = {name: _log_prob(site) for name, site in run.sites.items() if site["type"] == "sample"}
        return run

    def _padded(self, function: Callable[[Any], Any], rows: Any) -> Any:
        """Return function(rows) for an array or arrays by name, called with copies of the last row as padding."""
        tree_map = self._jax.tree.map
        (count,) = {len(array) for array in self._jax.tree.leaves(rows)}
        padding = max(MIN_ROWS, 1 << (count - 1).bit_length()) - count
        with self._jax.enable_x64(True):
            padded = tree_map(lambda array: np.concatenate([array, array[-1:].repeat(padding, 0)]), rows)
            return tree_map(lambda array: array[:count], function(padded))


class _Run:
    """One run of a model, in which `choose` gives the unconstrained forms of the latent sites.

    Attributes:
        sites: the trace.
        terms: name -> log density of each sample site.
        transforms: name -> bijection of each latent site.
        unconstrained: name -> unconstrained form of each latent site.
        log_jacobians: one term for each latent site.
    """

    sites: dict[str, Any]
    terms: dict[str, Any]

    def __init__(self, choose: Chooser) -> None:
        self._choose = choose
        self.transforms: dict[str, Any] = {}
        self.unconstrained: dict[str, Any] = {}
        self.log_jacobians: list[Any] = []

    def substitute(self, site: Mapping[str, Any]) -> Any:
        """Return the value of a latent site; None for other sites, which keep theirs."""
        from numpyro.distributions import biject_to

        name = site["name"]
        if site["type"] == "plate":
            check_full_plate(name, *site["args"])
        if site["type"] != "sample" or site["is_observed"]:
            return None
        transform = find_bijection(name, site["fn"].support, biject_to)
        unconstrained = self._choose(name, transform, site["fn"].shape())
        value = transform(unconstrained)
        self.transforms[name] = transform
        self.unconstrained[name] = unconstrained
        self.log_jacobians.append(transform.log_abs_det_jacobian(unconstrained, value).sum())
        return value


def _log_prob(site: Mapping[str, Any]) -> Any:
    """Return the log density of a sample site, scaled. Its mask is part of its distribution."""
    try:
        density = site["fn"].log_prob(site["value"])
    except (TypeError, ValueError) as error:
        raise data_mismatch_error(site["name"], error) from error
    return (density if site["scale"] is None else site["scale"] * density).sum()
