"""Targets from Pyro models: the model runs once for a whole batch, under torch.func.vmap."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.overrides import TorchFunctionMode

from counterflow.checks import require
from counterflow.posterior.targets.bijections import find_bijection, unconstrained_name
from counterflow.posterior.targets.enumeration import Factors, factors_of, sum_out
from counterflow.posterior.targets.layout import Layout
from counterflow.posterior.targets.memory import bytes_of_evaluation
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
    float64_by_default,
)
from counterflow.random import seeded

TensorsByName = Mapping[str, Tensor]
Chooser = Callable[[Mapping[str, Any], Transform], Tensor]  # (site, its bijection) -> unconstrained form of its value
RowFunction = Callable[[Any], dict[str, Tensor]]  # of theta (D,), or of values by name, one row of each

MEDIAN_DRAWS = 15  # prior draws whose median is the first initial point


def from_pyro(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Target:
    """Make a target from a Pyro model and its arguments, which include the data.

    The density is that of all sample sites and factors, with masks and scales, each latent site under the bijection of
    its support, which may depend on other sites. `constrain` returns the latent and the deterministic sites,
    `predictive` draws the observed ones anew. Parameters (`pyro.param`) stay as they are.

    The model runs in float64: tensors of lower precision are converted wherever it uses them, such as the weights of a
    module, and torch's default dtype is float64 meanwhile. A batch is one run under `torch.func.vmap`; a model whose
    Python code branches on values of its sites runs once for each row.

    Args:
        model: the model, a function of args and kwargs.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ImportError: Pyro is not installed.
        ValueError: a subsampled site, a discrete one with an infinite support, no latent site, or data that do not fit
            the model.

    Example:
        >>> import pyro
        >>> from pyro.distributions import HalfNormal, Normal
        >>> def model(y):
        ...     tau = pyro.sample("tau", HalfNormal(5.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", Normal(0.0, tau), obs=y)
        >>> target = from_pyro(model, torch.tensor([1.0, -2.0]))
        >>> target.coordinates, target.dims
        (('log(tau)',), {'y': ['row']})
    """
    return Target(_PyroProgram(model, args, kwargs))


class _PyroProgram(Program):
    """Model with its arguments, and the facts about its sites that one run, at theta = 0, reveals."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._pyro = require("pyro", "pyro", "models of Pyro")
        self._model = model
        self._args = [_to_float64(value) for value in args]
        self._kwargs = {name: _to_float64(value) for name, value in kwargs.items()}
        self._enumerated: Callable[..., Any] | None = None
        self._structure: Factors
        sites, latent = self._run(_at_zero)
        self.discrete = tuple(latent.discrete)
        if self.discrete:
            infer = require("pyro.infer", "pyro", "models of Pyro")
            # Each discrete site gets an axis, from this one on to the left.
            self._first_axis = first_free_axis(sites.values())
            self._enumerated = infer.config_enumerate(model, "parallel")
        self._layout = Layout({name: tuple(free.shape) for name, free in latent.unconstrained.items()})
        self.coordinates = self._layout.coordinates(
            {name: unconstrained_name(name, transform) for name, transform in latent.transforms.items()}
        )
        self.parameters = tuple(self._layout.shapes)
        self.observed = {name: np.asarray(site["value"]) for name, site in sites.items() if is_data(site)}
        self.dims = plate_dims({name: sites[name] for name in (*self.parameters, *self.observed)})
        if self._enumerated is None:
            again, _ = self._run(_at_zero)
            check_same_terms(_terms(sites), _terms(again))
        check_not_scaled_from_part(sites, self.observed, (model, self._args, self._kwargs))
        shapes = {name: site["value"].shape for name, site in sites.items() if site["infer"].get("_deterministic")}
        at_zero, _ = self._run_at(torch.zeros(self._layout.dim, dtype=torch.float64))
        self._derived = [name for name, shape in shapes.items() if at_zero[name]["value"].shape == shape]
        self._over_rows = torch.func.vmap if self._runs_under_vmap() else _one_by_one

    def log_density(self, theta: Tensor) -> Tensor:
        terms = self._over_rows(self._terms_of_row)(theta)
        if not self.discrete:
            return terms["rest"]
        factors = {name: terms[f"factor {name}"] for name in self._structure.symbols}
        with self._pyro.validation_enabled(False), float64_by_default():
            return sum_out(factors, self._structure) + terms["rest"]

    def bytes_per_point(self, theta: Tensor) -> float:
        return bytes_of_evaluation(self._terms_of_row, theta[0])

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        return self._over_rows(self._values_of_row)(theta)

    def unconstrain(self, values: TensorsByName) -> Tensor:
        return self._layout.join(self._over_rows(self._unconstrain_row)(values))

    def initial_points(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n points (n, D): the median of prior draws in unconstrained space, and prior draws."""
        draws = []
        with seeded(int(torch.randint(1 << 31, (), generator=generator))), torch.no_grad():
            for _ in range(n + MEDIAN_DRAWS):
                _, latent = self._run(_draw_from_prior, enumerated=False)
                draws.append(self._layout.join({name: u[None] for name, u in latent.unconstrained.items()}))
        finite = torch.nan_to_num(torch.cat(draws), nan=0.0, posinf=0.0, neginf=0.0)
        return torch.cat([finite[n:].median(0, keepdim=True).values, finite[: n - 1]])[:n]

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        predictive = require("pyro.infer", "pyro", "models of Pyro").Predictive
        values = self.constrain(theta)
        latent = {name: values[name] for name in self.parameters}
        model = _messengers().Unobserved(self.observed)(self._model)
        draw = predictive(model, latent, return_sites=tuple(self.observed))
        with seeded(seed), float64_by_default(), _InFloat64():
            return {name: value.numpy() for name, value in draw(*self._args, **self._kwargs).items()}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        if self.discrete or not self.observed:
            return {}
        return self._over_rows(self._log_likelihood_of_row)(theta)

    def _log_likelihood_of_row(self, theta: Tensor) -> dict[str, Tensor]:
        sites, _ = self._run_at(theta)
        return {name: sites[name]["log_prob"] for name in self.observed}

    def sample_discrete(self, theta: Tensor, seed: int) -> dict[str, Tensor]:
        infer_discrete = require("pyro.infer", "pyro", "models of Pyro").infer_discrete

        def of_row(theta: Tensor) -> dict[str, Tensor]:
            def given_theta(*args: Any, **kwargs: Any) -> Any:
                with _messengers().Latent(self._chooser_at(theta)):
                    return self._enumerated(*args, **kwargs)  # type: ignore[misc]  # there are discrete sites

            model = infer_discrete(given_theta, first_available_dim=self._first_axis, temperature=1)
            trace = self._pyro.poutine.trace(model).get_trace(*self._args, **self._kwargs)
            return {name: trace.nodes[name]["value"] for name in self.discrete}

        with seeded(seed), self._pyro.validation_enabled(False), float64_by_default(), _InFloat64():
            return _one_by_one(of_row)(theta)

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        original = self._model
        self._model = _messengers().Unobserved(self.observed)(original)
        try:
            with seeded(seed):
                sites, latent = self._run(_draw_from_prior, enumerated=False)
        finally:
            self._model = original
        check_simulates([name for name, site in sites.items() if type(site["fn"]).__name__ == "Unit"], latent.improper)
        data = {name: sites[name]["value"] for name in self.observed}
        model = _messengers().Observed(data)(original)
        return {name: sites[name]["value"] for name in self.parameters}, from_pyro(model, *self._args, **self._kwargs)

    def explain(self, theta: Tensor) -> str:
        sites, _ = self._run_at(theta)
        return "" if self.discrete else describe_nonfinite(_terms(sites))

    def _terms_of_row(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the log density at theta (D,), or its factors if there are discrete sites to sum out."""
        trace, latent = self._trace(self._chooser_at(theta))
        sites = _sample_sites(trace)
        terms = latent.log_jacobians
        factors: dict[str, Tensor] = {}
        if self.discrete:
            self._structure = factors_of(trace, sites)
            factors = {f"factor {name}": factor for name, factor in self._structure.tensors.items()}
        else:
            terms = [*(site["log_prob_sum"] for site in sites.values()), *terms]
        return {**factors, "rest": torch.stack([term.to(theta) for term in terms]).sum()}

    def _values_of_row(self, theta: Tensor) -> dict[str, Tensor]:
        sites, latent = self._run_at(theta)
        return {name: sites[name]["value"] for name in (*latent.unconstrained, *self._derived)}

    def _unconstrain_row(self, values: TensorsByName) -> dict[str, Tensor]:
        _, latent = self._run(lambda site, transform: transform.inv(values[site["name"]]))
        unconstrained: dict[str, Tensor] = latent.unconstrained
        return unconstrained

    def _run_at(self, theta: Tensor) -> tuple[dict[str, Any], Any]:
        return self._run(self._chooser_at(theta))

    def _chooser_at(self, theta: Tensor) -> Chooser:
        """Return the function that gives the unconstrained form of each latent site at theta (D,)."""
        pieces = self._layout.split(theta)
        return lambda site, transform: pieces[site["name"]]

    def _run(self, choose: Chooser, *, enumerated: bool = True) -> tuple[dict[str, Any], Any]:
        """Return the sample sites of one run, with their log densities, and the messenger with the latent ones."""
        trace, latent = self._trace(choose, enumerated=enumerated)
        return _sample_sites(trace), latent

    def _trace(self, choose: Chooser, *, enumerated: bool = True) -> tuple[Any, Any]:
        """Return the trace of one run, with log densities, and the messenger with the latent sites.

        Discrete sites are enumerated, or drawn from their prior.
        """
        model = self._model
        if self._enumerated is not None and enumerated:
            model = self._pyro.poutine.enum(self._enumerated, first_available_dim=self._first_axis)
        # Validation looks at values, which torch.func.vmap does not allow.
        with self._pyro.validation_enabled(False), float64_by_default(), _InFloat64():
            with _messengers().Latent(choose) as latent:
                trace = self._pyro.poutine.trace(model).get_trace(*self._args, **self._kwargs)
            try:
                trace.compute_log_prob()
            except RuntimeError as error:
                site = next(n for n, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" not in s)
                raise data_mismatch_error(site, error) from error
        return trace, latent

    def _runs_under_vmap(self) -> bool:
        try:
            torch.func.vmap(self._terms_of_row)(torch.zeros(2, self._layout.dim, dtype=torch.float64))
        except (RuntimeError, ValueError):
            return False
        return True


def _sample_sites(trace: Any) -> dict[str, Any]:
    samples = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {name: site for name, site in samples.items() if not _is_subsample(site)}


def _terms(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(site["log_prob_sum"].detach()) for name, site in sites.items()}


def _at_zero(site: Mapping[str, Any], transform: Transform) -> Tensor:
    return torch.zeros(transform.inverse_shape(site["fn"].shape()))


def _draw_from_prior(site: Mapping[str, Any], transform: Transform) -> Tensor:
    """Return a draw of the site's prior in unconstrained space, uniform on (-2, 2) for an improper one."""
    try:
        return transform.inv(site["fn"]())
    except NotImplementedError:
        return INITIAL_RADIUS * (2 * torch.rand(transform.inverse_shape(site["fn"].shape())) - 1)


@cache
def _messengers() -> Any:
    """Return classes of effect handlers, which can only be defined once Pyro is imported."""
    from pyro.poutine.messenger import Messenger

    class Latent(Messenger):  # type: ignore[misc]
        """Set the latent sites of a model to x = b(u), where `choose` gives u."""

        def __init__(self, choose: Chooser) -> None:
            super().__init__()
            self._choose = choose
            self.transforms: dict[str, Transform] = {}
            self.unconstrained: dict[str, Tensor] = {}
            self.log_jacobians: list[Tensor] = []
            self.discrete: list[str] = []  # sites whose value is left to others
            self.improper: list[str] = []  # sites whose distribution cannot be drawn from

        def _pyro_sample(self, site: dict[str, Any]) -> None:
            name = site["name"]
            fn = site["fn"]
            if _is_subsample(site):
                given = site["value"]
                check_full_plate(name, fn.size, fn.subsample_size if given is None else len(given))
            elif site["value"] is None and fn.support.is_discrete and fn.has_enumerate_support:
                self.discrete.append(name)
            elif site["value"] is None:
                transform = find_bijection(name, fn.support)
                unconstrained = self._choose(site, transform)
                value = transform(unconstrained)
                if transform.inverse_shape(value.shape) != unconstrained.shape:  # it has the axes of discrete sites
                    raise dependent_support_error(name)
                site["value"] = value
                self.transforms[name] = transform
                if type(fn).__name__ == "ImproperUniform":
                    self.improper.append(name)
                self.unconstrained[name] = unconstrained
                self.log_jacobians.append(transform.log_abs_det_jacobian(unconstrained, value).sum())

    class Unobserved(Messenger):  # type: ignore[misc]
        """Let the model draw its data; poutine.uncondition would draw the deterministic sites as well."""

        def __init__(self, data: Container[str]) -> None:
            super().__init__()
            self._data = data

        def _pyro_sample(self, site: dict[str, Any]) -> None:
            if site["name"] in self._data:
                site.update(value=None, is_observed=False, done=False)

    class Observed(Messenger):  # type: ignore[misc]
        """Put other data in the place of the model's."""

        def __init__(self, data: TensorsByName) -> None:
            super().__init__()
            self._data = data

        def _pyro_sample(self, site: dict[str, Any]) -> None:
            if site["name"] in self._data:
                site.update(value=self._data[site["name"]], is_observed=True)

    return SimpleNamespace(Latent=Latent, Unobserved=Unobserved, Observed=Observed)


def _one_by_one(function: RowFunction) -> RowFunction:
    """Return a loop over rows in place of torch.func.vmap."""

    def rows(batch: Any) -> dict[str, Tensor]:
        results = [function(row) for row in (batch if isinstance(batch, Tensor) else _rows_of(batch))]
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    return rows


def _rows_of(batch: TensorsByName) -> Iterator[dict[str, Tensor]]:
    return (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


class _InFloat64(TorchFunctionMode):
    """Convert tensors of lower precision to float64 wherever a function of torch takes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]  # Pyro reads its shape; vmap does not allow data
            return args[0].detach()
        if func.__name__ == "__get__":  # an attribute, such as requires_grad, is that of the tensor itself
            return func(*args, **(kwargs or {}))
        return func(*_to_float64(args), **_to_float64(kwargs or {}))


def _to_float64(value: Any) -> Any:
    """Return a tensor in float64; look into dicts, tuples and lists as well."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() and value.dtype != torch.float64 else value
    if type(value) is dict:
        return {name: _to_float64(inner) for name, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_to_float64(inner) for inner in value)
    return value


def _is_subsample(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"
