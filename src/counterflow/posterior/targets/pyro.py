"""Targets from Pyro models: the model runs once for a whole batch, under torch.func.vmap."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Size, Tensor
from torch.distributions.transforms import Transform

from counterflow.posterior.targets.target import Array, Layout, Target, float64_by_default, not_finite
from counterflow.posterior.targets.variables import bijection, check_whole, label, misfit, plate_dims
from counterflow.random import seeded

Named = Mapping[str, Tensor]
Choice = Callable[[str, Transform, Size], Tensor]  # (site, its bijection, the shape of its values) -> unconstrained
RowFunction = Callable[[Any], dict[str, Tensor]]  # of theta (D,), or of values by name, one row of each


def from_pyro(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Target:
    """A target from a Pyro model and the arguments that it is called with, its data among them.

    The density is that of all sample sites and factors, with masks and scales, each latent site under the bijection of
    its support, which may depend on other sites. `constrain` holds the latent sites and the deterministic ones,
    `predictive` draws the observed ones anew. Parameters (`pyro.param`) stay as they are.

    Tensors among the arguments become float64, and torch's default dtype is float64 while the model runs. A batch is
    one run under `torch.func.vmap`; a model whose Python branches on the values of its sites runs once for each row.

        >>> import pyro
        >>> from pyro.distributions import HalfNormal, Normal
        >>> def model(y):
        ...     tau = pyro.sample("tau", HalfNormal(5.0))
        ...     with pyro.plate("row", len(y)):
        ...         pyro.sample("y", Normal(0.0, tau), obs=y)
        >>> target = from_pyro(model, torch.tensor([1.0, -2.0]))
        >>> target.coordinates, target.dims
        (('log(tau)',), {'y': ['row']})

    Raises ImportError where Pyro is not installed, and ValueError for discrete or subsampled sites, for a model without
    latent sites, and for data that do not fit the model.
    """
    program = _Program(model, args, kwargs)
    return Target(
        program.log_density,
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
        self.model = model
        self.args = [_double(value) for value in args]
        self.kwargs = {name: _double(value) for name, value in kwargs.items()}
        sites, latent = self._run(lambda name, transform, shape: torch.zeros(transform.inverse_shape(shape)))
        self.layout = Layout({name: tuple(free.shape) for name, free in latent.free.items()})
        self.labels = {name: label(name, transform) for name, transform in latent.transforms.items()}
        self.observed = {name: np.asarray(site["value"]) for name, site in sites.items() if _is_data(site)}
        self.dims = plate_dims({name: sites[name] for name in (*self.layout.shapes, *self.observed)})
        self._over_rows = torch.func.vmap if self._takes_batches() else _one_by_one

    def log_density(self, theta: Tensor) -> Tensor:
        return self._over_rows(self._density)(theta)["log p"]

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        return self._over_rows(self._values)(theta)

    def unconstrain(self, values: Named) -> Tensor:
        return self.layout.join(self._over_rows(self._free)(values))

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        from pyro.infer import Predictive

        values = self.constrain(theta)
        latent = {name: values[name] for name in self.layout.shapes}
        model = _messengers().Unobserved(self.observed)(self.model)
        draw = Predictive(model, latent, return_sites=tuple(self.observed))
        with seeded(seed), float64_by_default():
            return {name: value.numpy() for name, value in draw(*self.args, **self.kwargs).items()}

    def explain(self, theta: Tensor) -> str:
        sites, _ = self._at(theta)
        return not_finite({name: float(site["log_prob_sum"]) for name, site in sites.items()})

    def _density(self, theta: Tensor) -> dict[str, Tensor]:
        sites, latent = self._at(theta)
        terms = [*(site["log_prob_sum"] for site in sites.values()), *latent.log_jacobians]
        return {"log p": torch.stack([term.to(theta) for term in terms]).sum()}

    def _values(self, theta: Tensor) -> dict[str, Tensor]:
        sites, latent = self._at(theta)
        derived = [name for name, site in sites.items() if site["infer"].get("_deterministic")]
        return {name: sites[name]["value"] for name in (*latent.free, *derived)}

    def _free(self, values: Named) -> dict[str, Tensor]:
        return self._run(lambda name, transform, shape: transform.inv(values[name]))[1].free

    def _at(self, theta: Tensor) -> tuple[dict[str, Any], Any]:
        pieces = self.layout.split(theta)
        return self._run(lambda name, transform, shape: pieces[name])

    def _run(self, choose: Choice) -> tuple[dict[str, Any], Any]:
        """The sample sites of one run, with their log densities, and the messenger that chose the latent ones."""
        pyro = _pyro()
        with pyro.validation_enabled(False), float64_by_default():  # vmap cannot look at values, as checks do
            with _messengers().Latent(choose) as latent:
                trace = pyro.poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            try:
                trace.compute_log_prob()
            except RuntimeError as error:
                site = next(n for n, s in trace.nodes.items() if s["type"] == "sample" and "log_prob" not in s)
                raise misfit(site, error) from error
        samples = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        return {name: site for name, site in samples.items() if not _is_subsample(site)}, latent

    def _takes_batches(self) -> bool:
        try:
            torch.func.vmap(self._density)(torch.zeros(2, len(self.layout.coordinates({})), dtype=torch.float64))
        except (RuntimeError, ValueError):
            return False
        return True


def _pyro() -> Any:
    try:
        import pyro
    except ImportError as error:
        raise ImportError("expected pyro for its models; pip install 'counterflow[pyro]'") from error
    return pyro


@cache
def _messengers() -> Any:
    """Two classes of effect handlers, made when Pyro is there."""
    from pyro.poutine.messenger import Messenger

    class Latent(Messenger):  # type: ignore[misc]
        """Sets the latent sites of a model to x = b(u), where `choose` gives u."""

        def __init__(self, choose: Choice) -> None:
            super().__init__()
            self.choose = choose
            self.transforms: dict[str, Transform] = {}
            self.free: dict[str, Tensor] = {}
            self.log_jacobians: list[Tensor] = []

        def _pyro_sample(self, site: dict[str, Any]) -> None:
            name, fn = site["name"], site["fn"]
            if _is_subsample(site):
                check_whole(name, fn.size, fn.subsample_size)
            elif site["value"] is None:
                self.transforms[name] = transform = bijection(name, fn.support)
                self.free[name] = free = self.choose(name, transform, fn.shape())
                site["value"] = value = transform(free)
                self.log_jacobians.append(transform.log_abs_det_jacobian(free, value).sum())

    class Unobserved(Messenger):  # type: ignore[misc]
        """Lets the model draw its data; poutine.uncondition would draw the deterministic sites as well."""

        def __init__(self, data: Container[str]) -> None:
            super().__init__()
            self.data = data

        def _pyro_sample(self, site: dict[str, Any]) -> None:
            if site["name"] in self.data:
                site.update(value=None, is_observed=False, done=False)

    return SimpleNamespace(Latent=Latent, Unobserved=Unobserved)


def _one_by_one(function: RowFunction) -> RowFunction:
    """What torch.func.vmap does, with a loop."""

    def rows(batch: Any) -> dict[str, Tensor]:
        results = [function(row) for row in (batch if isinstance(batch, Tensor) else _transposed(batch))]
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}

    return rows


def _transposed(batch: Named) -> Iterator[dict[str, Tensor]]:
    return (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _is_subsample(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _is_data(site: Mapping[str, Any]) -> bool:
    factor = type(site["fn"]).__name__ == "Unit"
    return site["is_observed"] and not factor and not site["infer"].get("_deterministic")
