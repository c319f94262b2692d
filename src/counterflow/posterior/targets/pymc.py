"""Targets from PyMC models: one compiled call for the log densities and gradients of a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from counterflow.posterior.targets.target import Array, Layout, Target, check_free, compiled, not_finite

if TYPE_CHECKING:
    from pymc import Model


Compiled = Callable[..., list[Array]]

OCCASIONAL = "FAST_COMPILE"  # PyTensor in plain Python: for what is called now and then, compiling takes longer


def from_pymc(model: Model | None = None) -> Target:
    """A target from a PyMC model, or from the model of the `with` block around the call.

    The density is the model's joint log density with its potentials, under PyMC's own transforms. `constrain` holds the
    free variables and the deterministic ones, `predictive` draws the observed ones. Data containers (`pm.Data`) are
    read at every call.

    The graph of one point is vectorised over the batch and compiled with Numba: the densities of 256 draws of the eight
    schools and their gradients take 0.16 ms on one core of an AMD EPYC 9004. Operations that PyTensor never met on a
    machine take it some 20 s; it keeps most of them on disk, and then needs about a second. What it does not keep is
    the linear algebra of an LKJ prior: that takes 25 s in each process.

        >>> import pymc as pm
        >>> with pm.Model() as model:
        ...     tau = pm.HalfNormal("tau", 5)
        ...     y = pm.Normal("y", 0, tau, observed=[1.0, -2.0])
        >>> target = from_pymc(model)
        >>> target.coordinates
        ('log(tau)',)
        >>> target(torch.zeros(3, 1)).shape
        torch.Size([3])

    Raises ImportError where PyMC is not installed, TypeError for what is no model of it, and ValueError for a model
    with discrete variables, without free ones, or without a gradient.
    """
    graphs = _Graphs(_checked(model))
    return Target(
        compiled(graphs.value_and_gradient()),
        graphs.constrain,
        coordinates=graphs.layout.coordinates(graphs.labels),
        parameters=tuple(graphs.layout.shapes),
        unconstrain=graphs.unconstrain,
        predictive=graphs.predictive,
        explain=graphs.explain,
        observed=graphs.observed,
        dims={name: dims for name, dims in graphs.model.named_vars_to_dims.items() if None not in dims},
        coords={name: list(values) for name, values in graphs.model.coords.items() if values is not None},
    )


def _checked(model: Model | None) -> Model:
    try:
        import pymc
    except ImportError as error:
        raise ImportError("expected pymc for its models; pip install 'counterflow[pymc]'") from error
    model = pymc.modelcontext(model)
    if not isinstance(model, pymc.Model):
        raise TypeError(f"expected a PyMC model, got {type(model).__name__}; give the object that pm.Model() returned")
    discrete = [rv.name for rv in model.free_RVs if not rv.dtype.startswith("float")]
    if discrete:
        raise ValueError(
            f"expected continuous free variables, got {', '.join(discrete)}, which is discrete; sum it out, by hand or "
            "with pymc_extras.marginalize, as a flow has no place for it"
        )
    check_free(model.free_RVs)
    return model


class _Graphs:
    """The compiled graphs of a model, each made when it is first needed."""

    def __init__(self, model: Model) -> None:
        shapes = model.eval_rv_shapes()
        values = {rv.name: model.rvs_to_values[rv].name for rv in model.free_RVs}
        self.layout = Layout({name: tuple(map(int, shapes[value])) for name, value in values.items()})
        self.model = model

    @property
    def labels(self) -> dict[str, str]:
        transforms = {rv.name: self.model.rvs_to_transforms[rv] for rv in self.model.free_RVs}
        return {name: name if way is None else f"{way.name}({name})" for name, way in transforms.items()}

    @property
    def observed(self) -> dict[str, Array]:
        from pymc.backends.arviz import find_observations

        return {name: np.asarray(value) for name, value in find_observations(self.model).items()}

    def value_and_gradient(self) -> Compiled:
        import pytensor

        theta = self._theta()
        (density,) = self._at(theta, [_without_checks(self.model.logp(jacobian=True)).astype("float64")])
        try:
            gradient = pytensor.grad(density, theta)
        except (NotImplementedError, pytensor.gradient.NullTypeGradError) as error:
            raise ValueError(
                f"expected a log density with a gradient, got one without: {error}; write it with operations of "
                "PyTensor that have one"
            ) from error
        return _vectorized([theta], [density, gradient], "NUMBA")

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = zip(self._named, self._constrain(theta.cpu().numpy()), strict=True)
        return {variable.name: torch.tensor(value, device=theta.device) for variable, value in values}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        pieces = self._unconstrain(*(values[name].cpu().numpy() for name in self.layout.shapes))
        return self.layout.join({name: torch.tensor(p) for name, p in zip(self.layout.shapes, pieces, strict=True)})

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        from pymc.pytensorf import compile as compile_pymc

        # Row by row: not every random variable of PyMC can be vectorised, such as mixtures and autoregressions.
        values, data = self.constrain(theta), self.model.observed_RVs
        draw = compile_pymc(*self._given_free(data), random_seed=seed, mode=OCCASIONAL, on_unused_input="ignore")
        columns = [values[name].cpu().numpy() for name in self.layout.shapes]
        draws = zip(*(draw(*row) for row in zip(*columns, strict=True)), strict=True)
        return {variable.name: np.stack(rows) for variable, rows in zip(data, draws, strict=True)} if data else {}

    def explain(self, theta: Tensor) -> str:
        terms = [*self.model.basic_RVs, *self.model.potentials]
        point = self._theta()
        densities = self._at(point, [_without_checks(d).sum() for d in self.model.logp(sum=False)])
        values = _vectorized([point], densities, OCCASIONAL)(theta.cpu().numpy()[None])
        return not_finite({term.name: float(value[0]) for term, value in zip(terms, values, strict=True)})

    @property
    def _named(self) -> list[Any]:
        return [*self.model.free_RVs, *self.model.deterministics]

    @cached_property
    def _constrain(self) -> Compiled:
        theta = self._theta()
        return _vectorized([theta], self._at(theta, self.model.replace_rvs_by_values(self._named)), OCCASIONAL)

    @cached_property
    def _unconstrain(self) -> Compiled:
        ways = self.model.rvs_to_transforms
        free = [rv if ways[rv] is None else ways[rv].forward(rv, *rv.owner.inputs) for rv in self.model.free_RVs]
        return _vectorized(*self._given_free(free), OCCASIONAL)

    def _given_free(self, outputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """New inputs in place of the free variables, and graphs of the model's random variables as graphs of them."""
        from pytensor.graph.replace import clone_replace

        values = {rv: rv.type() for rv in self.model.free_RVs}
        return list(values.values()), clone_replace(list(outputs), values, rebuild_strict=False)

    def _theta(self) -> Any:
        import pytensor.tensor as pt

        return pt.tensor("theta", dtype="float64", shape=(sum(int(np.prod(s)) for s in self.layout.shapes.values()),))

    def _at(self, theta: Any, outputs: Sequence[Any]) -> list[Any]:
        """The outputs, which are graphs of the model's value variables, as graphs of theta (D,)."""
        from pytensor.graph.replace import clone_replace

        pieces, model = self.layout.split(theta), self.model
        values = {model.rvs_to_values[rv]: pieces[rv.name].astype(rv.dtype) for rv in model.free_RVs}
        return clone_replace(list(outputs), values, rebuild_strict=False)


def _without_checks(density: Any) -> Any:
    """The density with -inf where parameters are out of bounds: a check would end the batch for one row's sake."""
    from pymc.logprob.utils import local_check_parameter_to_ninf_switch
    from pytensor.graph.rewriting.basic import in2out
    from pytensor.graph.rewriting.utils import rewrite_graph

    return rewrite_graph(density, include=(), custom_rewrite=in2out(local_check_parameter_to_ninf_switch))


def _vectorized(inputs: Sequence[Any], outputs: Sequence[Any], mode: str) -> Compiled:
    """Compile a graph of one point for a batch of them: each input and output has one axis more, the first."""
    import pytensor
    import pytensor.tensor as pt
    from pytensor.graph.basic import clone_get_equiv
    from pytensor.graph.replace import vectorize_graph
    from pytensor.graph.traversal import graph_inputs

    # Compiling rewrites the inner graph of a Scan in place, which would leave the user's model without a gradient.
    kept = {"copy_inputs": False, "copy_orphans": False}
    clones = clone_get_equiv(list(graph_inputs(outputs)), outputs, clone_inner_graphs=True, **kept)
    outputs = [clones[output] for output in outputs]
    batches = {x: pt.tensor(x.name, dtype=x.dtype, shape=(None, *x.type.shape)) for x in inputs}
    many = vectorize_graph(outputs, batches)
    function = pytensor.function(list(batches.values()), many, mode=mode, on_unused_input="ignore")
    fixed = [one.ndim == batch.ndim for one, batch in zip(outputs, many, strict=True)]  # does not depend on the inputs

    def call(*arrays: Array) -> list[Array]:
        values = function(*arrays)
        return [np.stack([v] * len(arrays[0])) if same else v for v, same in zip(values, fixed, strict=True)]

    return call
