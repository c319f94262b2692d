"""Targets from NumPyro models: value and gradient of a batch, compiled by JAX in float64."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.posterior.targets.bijections import find_bijection, unconstrained_name
from counterflow.posterior.targets.layout import Layout
from counterflow.posterior.targets.memory import points_at_once
from counterflow.posterior.targets.sites import (
    check_full_plate,
    check_not_scaled_from_part,
    check_same_terms,
    data_mismatch_error,
    dependent_support_error,
    first_free_axis,
    is_data,
    plate_dims,
)
from counterflow.posterior.targets.target import (
    INITIAL_RADIUS,
    Array,
    Program,
    Target,
    check_simulates,
    describe_nonfinite,
    log_density_with_gradient,
)

# (site, step of a scan that it is in) -> its value; the step is an index of scanned values, () outside of scans
Chooser = Callable[[Mapping[str, Any], Any], Any]

MIN_ROWS = 8  # batches are padded to a power of two of at least this many rows, so that JAX compiles for few sizes
MEDIAN_DRAWS = 15  # prior draws whose median is the first initial point, as in NumPyro's init_to_median


def from_numpyro(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Target:
    """Make a target from a NumPyro model and its arguments, which include the data.

    The density is that of all sample sites and factors, each latent site under the bijection of its support, which may
    depend on other sites. `constrain` returns the latent and the deterministic sites, `predictive` draws the observed
    ones anew. Parameters (`numpyro.param`) stay at their initial values.

    Discrete sites with a finite support are summed out, exactly, by NumPyro's enumeration, which needs funsor.
    `constrain` leaves out what depends on them, and `sample_discrete` draws them.

    The model runs in float64 whatever JAX's own setting is, and the setting is left as it was. JAX compiles once for
    each power of two of the batch size; batches are padded.

    Args:
        model: the model, a function of args and kwargs.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ImportError: NumPyro is not installed, or funsor for a model with discrete sites.
        ValueError: a subsampled site, a discrete one with an infinite support or inside a scan, no latent site, or data
            that do not fit the model.

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
        self._args, self._kwargs = self._jax.tree.map(_copy_of_array, (args, dict(kwargs)))
        with self._modes():
            sites = self._run(_at_zero)
            latent = {name: site for name, site in sites.items() if _is_latent(site)}
            transforms = {name: _bijection(site) for name, site in latent.items()}
            shapes = {name: transforms[name].inverse_shape(np.shape(site["value"])) for name, site in latent.items()}
            self.observed = {name: np.array(site["value"]) for name, site in sites.items() if is_data(site)}
            self.discrete = tuple(name for name, site in sites.items() if _is_enumerable(site))
            if not self.discrete:
                check_same_terms(_terms(sites), _terms(self._run(_at_zero, seed=1)))
        check_not_scaled_from_part(sites, self.observed, (model, self._args, self._kwargs))
        self._layout = Layout(shapes)
        self.coordinates = self._layout.coordinates(
            {name: unconstrained_name(name, transform) for name, transform in transforms.items()}
        )
        self.parameters = tuple(shapes)
        self.dims = plate_dims({name: sites[name] for name in (*self.parameters, *self.observed)})
        derived = [name for name, site in sites.items() if site["type"] == "deterministic"]
        if self.discrete:
            # Each discrete site gets an axis, from this one on to the left.
            self._first_axis = first_free_axis(site for site in sites.values() if site["type"] == "sample")
            self._enumeration = require("numpyro.contrib.funsor", "numpyro", "models with discrete sites")
            derived = self._independent_of_discrete(derived, sites)
        self._variables = [*self.parameters, *derived]
        self._compiled: dict[tuple[Callable[..., Any], int], Any] = {}
        self._min_rows = MIN_ROWS

    def log_density(self, theta: Tensor) -> Tensor:
        return log_density_with_gradient(self._value_and_gradient, theta)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = self._over_rows(self._values_of_row, theta.cpu().numpy())
        return {name: torch.tensor(np.asarray(values[name]), device=theta.device) for name in self._variables}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        return self._unconstrain({name: value.cpu().numpy() for name, value in values.items()})

    def initial_points(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n points (n, D): the median of prior draws in unconstrained space, and prior draws."""
        draws = self._unconstrain(self._over_rows(self._prior_draw, _keys(n + MEDIAN_DRAWS, generator)))
        finite = torch.where(draws.isfinite(), draws, 0.0)
        return torch.cat([finite[n:].median(0, keepdim=True).values, finite[: n - 1]])[:n]

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        keys = _keys(len(theta), torch.Generator().manual_seed(seed))
        draws = self._over_rows(self._predictive_draw, (theta.cpu().numpy(), keys))
        return {name: np.asarray(draws[name]) for name in self.observed}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        if self.discrete or not self.observed:
            return {}
        values = self._over_rows(self._log_likelihood_of_row, theta.cpu().numpy())
        return {name: torch.tensor(np.asarray(values[name])) for name in self.observed}

    def _log_likelihood_of_row(self, theta: Any) -> dict[str, Any]:
        sites = self._run(self._at(theta))
        return {name: _log_prob(sites[name]) for name in self.observed}

    def bytes_per_point(self, theta: Tensor) -> float:
        rows = np.repeat(theta.cpu().numpy(), MIN_ROWS, 0)
        analysis = self._compile(self._density_and_gradient_of_row, rows).memory_analysis()
        needed = analysis.temp_size_in_bytes / MIN_ROWS if analysis else 0.0
        if points_at_once(needed) < MIN_ROWS:
            self._min_rows = 1
        return needed

    def explain(self, theta: Tensor) -> str:
        with self._modes():
            terms = _terms(self._run(self._at(theta.cpu().numpy())))
            return describe_nonfinite({name: float(term) for name, term in terms.items()})

    def _value_and_gradient(self, theta: Array) -> tuple[Array, Array]:
        value, gradient = self._over_rows(self._density_and_gradient_of_row, theta)
        return np.array(value), np.array(gradient)

    def _density_and_gradient_of_row(self, theta: Any) -> tuple[Any, Any]:
        return self._jax.value_and_grad(self._log_density_of_row)(theta)

    def sample_discrete(self, theta: Tensor, seed: int) -> dict[str, Tensor]:
        keys = _keys(len(theta), torch.Generator().manual_seed(seed))
        draws = self._over_rows(self._discrete_draw, (theta.cpu().numpy(), keys))
        return {name: torch.tensor(np.asarray(draws[name])) for name in self.discrete}

    def _discrete_draw(self, theta_and_key: tuple[Any, Any]) -> dict[str, Any]:
        theta, key = theta_and_key
        handlers, enumeration = self._numpyro.handlers, self._enumeration
        model = enumeration.config_enumerate(handlers.substitute(self._model, self._latent_values(theta)))
        drawn = enumeration.infer_discrete(model, first_available_dim=self._first_axis, temperature=1, rng_key=key)
        sites = handlers.trace(handlers.seed(drawn, key)).get_trace(*self._args, **self._kwargs)
        return {name: sites[name]["value"] for name in self.discrete}

    def _latent_values(self, theta: Any) -> dict[str, Any]:
        sites = self._run(self._at(theta))
        return {name: sites[name]["value"] for name in self.parameters}

    def _independent_of_discrete(self, names: list[str], sites: Mapping[str, Any]) -> list[str]:
        """Return the sites whose values do not depend on the discrete sites.

        Raises:
            ValueError: the support of a latent site depends on them, or noise that the model draws.
        """
        theta = np.random.default_rng(0).normal(size=len(self.coordinates))  # a point without symmetry
        with self._modes():
            supports = {name: sites[name]["fn"].enumerate_support(expand=False) for name in self.discrete}

            def with_value(k: int) -> dict[str, Any]:
                """Return the sites of a run in which each discrete site has its value number k, or its last one."""
                return self._run(self._at(theta), discrete=lambda site, _: supports[site["name"]][: k + 1][-1])

            runs = [with_value(k) for k in range(max(map(len, supports.values())))]
            values = [self._enumerated_log_density(theta, seed) for seed in (0, 1)]
        check_same_terms({"the model": values[0]}, {"the model": values[1]})
        dependent = {
            name
            for name in (*self.parameters, *names)
            if any(not np.array_equal(run[name]["value"], runs[0][name]["value"]) for run in runs)
        }
        for name in self.parameters:
            if name in dependent:
                raise dependent_support_error(name)
        return [name for name in names if name not in dependent]

    def _enumerated_log_density(self, theta: Any, seed: int = 0) -> Any:
        """Return the log density of the model at theta (D,), without the Jacobian, summed over the discrete sites."""
        model = self._enumeration.config_enumerate(_data_as_jax()(self._numpyro.handlers.seed(self._model, seed)))
        enumerated = self._enumeration.enum(model, first_available_dim=self._first_axis)
        with self._numpyro.validation_enabled(), warnings.catch_warnings():  # see `_log_prob`
            warnings.filterwarnings("ignore", "Out-of-support values")
            value, _ = self._enumeration.log_density(enumerated, self._args, self._kwargs, self._latent_values(theta))
        return value

    def _log_density_of_row(self, theta: Any) -> Any:
        sites = self._run(self._at(theta))
        log_density = self._enumerated_log_density(theta) if self.discrete else sum(_terms(sites).values())
        for name, unconstrained in self._layout.split(theta).items():
            transform = _bijection(sites[name])
            log_density += transform.log_abs_det_jacobian(unconstrained, sites[name]["value"]).sum()
        return log_density

    def _values_of_row(self, theta: Any) -> dict[str, Any]:
        sites = self._run(self._at(theta))
        return {name: sites[name]["value"] for name in self._variables}

    def _unconstrain(self, values: Any) -> Tensor:
        unconstrained = self._over_rows(self._unconstrain_row, values)
        return self._layout.join({name: torch.tensor(np.asarray(value)) for name, value in unconstrained.items()})

    def _unconstrain_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        sites = self._run(lambda site, index: values[site["name"]][index])
        return {name: _bijection(sites[name]).inv(sites[name]["value"]) for name in self.parameters}

    def _prior_draw(self, key: Any) -> dict[str, Any]:
        def draw(site: Mapping[str, Any], index: Any) -> Any:
            own = self._key_of_site(key, site, index)
            shape = _shape(site)
            try:
                return site["fn"](rng_key=own, sample_shape=site["kwargs"].get("sample_shape", ()))
            except NotImplementedError:  # an improper prior
                transform = _bijection(site)
                radius = INITIAL_RADIUS
                return transform(self._jax.random.uniform(own, transform.inverse_shape(shape), float, -radius, radius))

        sites = self._run(draw)
        return {name: sites[name]["value"] for name in self.parameters}

    def _predictive_draw(self, theta_and_key: tuple[Any, Any]) -> dict[str, Any]:
        theta, key = theta_and_key

        def draw(site: Mapping[str, Any], index: Any) -> Any:
            return site["fn"](rng_key=self._key_of_site(key, site, index))

        sites = self._run(self._at(theta), draw_data=draw)
        return {name: sites[name]["value"] for name in self.observed}

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        key = _keys(1, torch.Generator().manual_seed(seed))[0]

        def draw(site: Mapping[str, Any], index: Any) -> Any:
            own = self._key_of_site(key, site, index)
            return site["fn"](rng_key=own, sample_shape=site["kwargs"].get("sample_shape", ()))

        with self._modes():
            at_zero = [site for site in self._run(_at_zero).values() if site["type"] == "sample"]
            kinds = {site["name"]: type(site["fn"]).__name__ for site in at_zero}
            check_simulates(
                [name for name, kind in kinds.items() if kind == "Unit"],
                [name for name, kind in kinds.items() if kind == "ImproperUniform"],
            )
            sites = self._run(draw, draw_data=draw)
            values = {name: torch.tensor(np.array(sites[name]["value"])) for name in self.parameters}
            data = {name: np.array(sites[name]["value"]) for name in self.observed}
        model = self._numpyro.handlers.substitute(self._model, data=data)
        return values, from_numpyro(model, *self._args, **self._kwargs)

    def _key_of_site(self, key: Any, site: Mapping[str, Any], index: Any) -> Any:
        """Return a random key of the site's own, and of its step in a scan."""
        fold_in = self._jax.random.fold_in
        own = fold_in(key, zlib.crc32(site["name"].encode()))
        return own if isinstance(index, tuple) else fold_in(own, index)

    def _at(self, theta: Any) -> Chooser:
        """Return a function of a latent site that gives its value at theta (D,)."""
        pieces = self._layout.split(theta)
        return lambda site, index: _bijection(site)(pieces[site["name"]][index])

    def _run(
        self, choose: Chooser, draw_data: Chooser | None = None, discrete: Chooser | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """Return the sites of one run.

        Args:
            choose: gives the values of latent sites.
            draw_data: draws data, and discrete sites from their prior.
            discrete: gives the values of discrete sites that are summed out.
            seed: seed of all that is given by nobody.
        """

        def substitute(site: Mapping[str, Any]) -> Any:
            if site["type"] == "plate":
                check_full_plate(site["name"], *site["args"])
            if site["type"] != "sample":
                return None
            index = site["infer"].get("_scan_current_index")
            if _is_latent(site):
                return choose(site, () if index is None else index)
            if _is_enumerable(site):
                if index is not None:
                    raise ValueError(
                        f"expected discrete sites outside of scans, got {site['name']}; write a loop, or sum it out"
                    )
                give = discrete or draw_data
                return None if give is None else give(site, ())
            return draw_data(site, () if index is None else index) if draw_data and is_data(site) else None

        handlers = self._numpyro.handlers
        model = handlers.substitute(handlers.seed(self._model, seed), substitute_fn=substitute)
        sites: dict[str, Any] = handlers.trace(model).get_trace(*self._args, **self._kwargs)
        return sites

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Work in float64, and without validation, which only warns where `explain` says more."""
        with self._jax.enable_x64(True), self._numpyro.validation_enabled(is_validate=False):
            yield

    def _over_rows(self, function: Callable[[Any], Any], rows: Any) -> Any:
        """Return function of each row of an array, or of nested arrays, with copies of the last row as padding."""
        tree_map = self._jax.tree.map
        (count,) = {len(array) for array in self._jax.tree.leaves(rows)}
        padding = max(self._min_rows, 1 << (count - 1).bit_length()) - count
        padded = tree_map(lambda array: np.concatenate([array, np.asarray(array[-1:]).repeat(padding, 0)]), rows)
        with self._modes():
            return tree_map(lambda array: array[:count], self._compile(function, padded)(padded))

    def _compile(self, function: Callable[[Any], Any], rows: Any) -> Any:
        """Return function of a row, compiled for as many rows. No array of the user stays in the compiled function.

        JAX 0.10 gives an array the type that it was traced with as long as the traced copy exists: if float64 data of
        the user stayed here, plain JAX would fail on them in float32.
        """
        key = (function, len(self._jax.tree.leaves(rows)[0]))
        if key not in self._compiled:
            extend = require("jax.extend.core", "numpyro", "models of NumPyro")
            with self._modes():
                traced, shapes = self._jax.make_jaxpr(self._jax.vmap(function), return_shape=True)(rows)
                structure = self._jax.tree.structure(shapes)
                copies = [np.array(x) if isinstance(x, np.ndarray) else x for x in traced.consts]
                flat = extend.jaxpr_as_fun(extend.ClosedJaxpr(traced.jaxpr, copies))

                def run(rows: Any) -> Any:
                    return self._jax.tree.unflatten(structure, flat(*self._jax.tree.leaves(rows)))

                self._compiled[key] = self._jax.jit(run).lower(rows).compile()
        return self._compiled[key]


def _at_zero(site: Mapping[str, Any], index: Any) -> Any:
    """Return the value of a latent site at the origin of unconstrained space."""
    transform = _bijection(site)
    return transform(np.zeros(transform.inverse_shape(_shape(site))))


def _keys(n: int, generator: torch.Generator) -> Array:
    """Return n random keys of JAX, as arrays (n, 2)."""
    return torch.randint(1 << 32, (n, 2), generator=generator).numpy().astype(np.uint32)


def _is_latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"] and not _is_enumerable(site)


def _is_enumerable(site: Mapping[str, Any]) -> bool:
    """Return True for a site that is summed out: latent, and discrete with a finite support."""
    if site["type"] != "sample" or site["is_observed"]:
        return False
    return bool(site["fn"].support.is_discrete and site["fn"].has_enumerate_support)


def _shape(site: Mapping[str, Any]) -> tuple[int, ...]:
    return (*site["kwargs"].get("sample_shape", ()), *site["fn"].shape())


def _bijection(site: Mapping[str, Any]) -> Any:
    from numpyro.distributions import biject_to

    return find_bijection(site["name"], site["fn"].support, biject_to)


def _terms(sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return the log density of each sample site, scaled. Its mask is part of its distribution."""
    return {name: _log_prob(site).sum() for name, site in sites.items() if site["type"] == "sample"}


def _log_prob(site: Mapping[str, Any]) -> Any:
    """Return the log density of each element of a site, -inf for data outside of the support.

    NumPyro checks the support in validation only.
    """
    from jax.numpy import asarray
    from numpyro.distributions.distribution import validation_enabled

    value = asarray(site["value"]) if is_data(site) else site["value"]
    try:
        with validation_enabled(is_data(site)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Out-of-support values")
            log_prob = site["fn"].log_prob(value)
    except (TypeError, ValueError) as error:
        raise data_mismatch_error(site["name"], error) from error
    return log_prob if site["scale"] is None else site["scale"] * log_prob


@cache
def _data_as_jax() -> Any:
    """Return an effect handler that makes arrays of JAX of the data: a support of traced bounds takes no others."""
    from jax.numpy import asarray
    from numpyro.primitives import Messenger

    class DataAsJax(Messenger):  # type: ignore[misc]
        def process_message(self, msg: dict[str, Any]) -> None:
            if is_data(msg):
                msg["value"] = asarray(msg["value"])

    return DataAsJax


def _copy_of_array(value: Any) -> Any:
    return np.array(value) if isinstance(value, np.ndarray) else value
