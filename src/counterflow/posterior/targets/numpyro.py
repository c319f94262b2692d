"""Targets from NumPyro models: the value and the gradient of a batch, compiled by JAX in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.posterior.targets.target import Array, Layout, Target, compiled, not_finite
from counterflow.posterior.targets.variables import bijection, check_whole, label, misfit, plate_dims

Choice = Callable[[str, Any, tuple[int, ...]], Any]  # (site, its bijection, the shape of its values) -> unconstrained

SMALLEST = 8  # rows: a batch is filled up to a power of two, so that JAX compiles for few sizes


def from_numpyro(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Target:
    """A target from a NumPyro model and the arguments that it is called with, its data among them.

    The density is that of all sample sites and factors, each latent site under the bijection of its support, which may
    depend on other sites. `constrain` holds the latent sites and the deterministic ones, `predictive` draws the
    observed ones anew. Parameters (`numpyro.param`) stay at their initial values.

    The model runs in float64, whatever JAX's own setting is, which stays as it is. JAX compiles once for each power of
    two of the batch size, and batches are filled up to it.

        >>> import numpyro
        >>> from numpyro.distributions import HalfNormal, Normal
        >>> def model(y):
        ...     tau = numpyro.sample("tau", HalfNormal(5))
        ...     with numpyro.plate("row", len(y)):
        ...         numpyro.sample("y", Normal(0, tau), obs=y)
        >>> target = from_numpyro(model, np.array([1.0, -2.0]))
        >>> target.coordinates, target.dims
        (('log(tau)',), {'y': ['row']})

    Raises ImportError where NumPyro is not installed, and ValueError for discrete or subsampled sites, for a model
    without latent sites, and for data that do not fit the model.
    """
    program = _Program(model, args, kwargs)
    return Target(
        compiled(program.value_and_gradient),
        program.constrain,
        coordinates=program.layout.coordinates(program.labels),
        parameters=tuple(program.layout.shapes),
        unconstrain=program.unconstrain,
        predictive=program.predictive,
        explain=program.explain,
        observed=program.observed,
        dims=program.dims,
    )


class _Program:
    """A model with its arguments, and what a first run, at zero, says of its sites."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.jax, self.numpyro = _tools()
        self.model, self.args, self.kwargs = model, args, kwargs
        with self.jax.enable_x64(True):
            run = self._run(lambda name, transform, shape: np.zeros(transform.inverse_shape(shape)))
            observed = {name: site for name, site in run.sites.items() if _is_data(site)}
            self.observed = {name: np.asarray(site["value"]) for name, site in observed.items()}
        self.layout = Layout({name: np.shape(free) for name, free in run.free.items()})
        derived = [name for name, site in run.sites.items() if site["type"] == "deterministic"]
        self.names = [*self.layout.shapes, *derived]
        self.labels = {name: label(name, transform) for name, transform in run.transforms.items()}
        self.dims = plate_dims({name: run.sites[name] for name in (*self.layout.shapes, *observed)})
        self._value_and_gradient = self.jax.jit(self.jax.vmap(self.jax.value_and_grad(self._density)))
        self._constrain = self.jax.jit(self.jax.vmap(self._values))
        self._unconstrain = self.jax.jit(self.jax.vmap(self._free))

    def value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        value, gradient = self._filled(self._value_and_gradient, theta)
        return np.array(value), np.array(gradient)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = self._filled(self._constrain, theta.cpu().numpy())
        return {name: torch.tensor(np.asarray(values[name]), device=theta.device) for name in self.names}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        free = self._filled(self._unconstrain, {name: value.cpu().numpy() for name, value in values.items()})
        return self.layout.join({name: torch.tensor(np.asarray(value)) for name, value in free.items()})

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        values = self.constrain(theta)
        latent = {name: values[name].cpu().numpy() for name in self.layout.shapes}
        model = self.numpyro.handlers.uncondition(self.model)
        draw = self.numpyro.infer.Predictive(model, latent, return_sites=list(self.observed))
        with self.jax.enable_x64(True):
            draws = draw(self.jax.random.PRNGKey(seed), *self.args, **self.kwargs)
            return {name: np.asarray(value) for name, value in draws.items()}

    def explain(self, theta: Tensor) -> str:
        with self.jax.enable_x64(True):
            return not_finite({name: float(term) for name, term in self._at(theta.cpu().numpy()).terms.items()})

    def _density(self, theta: Any) -> Any:
        run = self._at(theta)
        return sum(run.terms.values()) + sum(run.log_jacobians)

    def _values(self, theta: Any) -> dict[str, Any]:
        sites = self._at(theta).sites
        return {name: sites[name]["value"] for name in self.names}

    def _free(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self._run(lambda name, transform, shape: transform.inv(values[name])).free

    def _at(self, theta: Any) -> _Run:
        pieces = self.layout.split(theta)
        return self._run(lambda name, transform, shape: pieces[name])

    def _run(self, choose: Choice) -> _Run:
        run, handlers = _Run(choose), self.numpyro.handlers
        model = handlers.substitute(handlers.seed(self.model, 0), substitute_fn=run.substitute)
        with self.numpyro.validation_enabled(is_validate=False):  # which only warns; `explain` says more
            run.sites = handlers.trace(model).get_trace(*self.args, **self.kwargs)
            run.terms = {name: _term(site) for name, site in run.sites.items() if site["type"] == "sample"}
        return run

    def _filled(self, function: Callable[[Any], Any], rows: Any) -> Any:
        """function(rows), an array or arrays by name, which is called with some more rows, copies of the last."""
        tree_map = self.jax.tree.map
        (count,) = {len(array) for array in self.jax.tree.leaves(rows)}
        extra = max(SMALLEST, 1 << (count - 1).bit_length()) - count
        with self.jax.enable_x64(True):
            filled = tree_map(lambda array: np.concatenate([array, array[-1:].repeat(extra, 0)]), rows)
            return tree_map(lambda array: array[:count], function(filled))


class _Run:
    """One run of a model: `choose` gives the unconstrained forms of its latent sites."""

    terms: dict[str, Any]
    sites: dict[str, Any]

    def __init__(self, choose: Choice) -> None:
        self.choose = choose
        self.transforms: dict[str, Any] = {}
        self.free: dict[str, Any] = {}
        self.log_jacobians: list[Any] = []

    def substitute(self, site: Mapping[str, Any]) -> Any:
        """The value of a latent site; None for all other sites, which keep theirs."""
        from numpyro.distributions import biject_to

        name = site["name"]
        if site["type"] == "plate":
            check_whole(name, *site["args"])
        if site["type"] != "sample" or site["is_observed"]:
            return None
        self.transforms[name] = transform = bijection(name, site["fn"].support, biject_to)
        self.free[name] = free = self.choose(name, transform, site["fn"].shape())
        value = transform(free)
        self.log_jacobians.append(transform.log_abs_det_jacobian(free, value).sum())
        return value


def _tools() -> tuple[Any, Any]:
    try:
        import jax
        import numpyro
        import numpyro.infer
    except ImportError as error:
        raise ImportError("expected numpyro for its models; pip install 'counterflow[numpyro]'") from error
    return jax, numpyro


def _term(site: Mapping[str, Any]) -> Any:
    """The log density of a sample site; a mask is part of its distribution."""
    try:
        density = site["fn"].log_prob(site["value"])
    except (TypeError, ValueError) as error:
        raise misfit(site["name"], error) from error
    return (density if site["scale"] is None else site["scale"] * density).sum()


def _is_data(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"] and type(site["fn"]).__name__ != "Unit"
