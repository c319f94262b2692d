"""Targets from PyMC models: one compiled call for the log densities and gradients of a whole batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from counterflow.checks import require
from counterflow.posterior.targets.layout import Layout
from counterflow.posterior.targets.target import (
    Array,
    Program,
    Target,
    check_has_free_variables,
    check_simulates,
    describe_nonfinite,
    log_density_with_gradient,
)

if TYPE_CHECKING:
    from pymc import Model


CompiledFunction = Callable[..., list[Array]]

# PyTensor's mode for functions that are called a few times: they run as plain Python, as compiling would take longer.
RARELY_CALLED = "FAST_COMPILE"
FLAT_PRIORS = ("FlatRV", "HalfFlatRV")


def from_pymc(model: Model | None = None) -> Target:
    """Make a target from a PyMC model, or from the model of the `with` block around the call.

    The density is the model's joint log density with its potentials, under PyMC's own transforms. `constrain` returns
    the free and the deterministic variables, `predictive` draws the observed ones. Data containers (`pm.Data`) are read
    at every call.

    The graph of one point is vectorised over the batch and compiled with Numba: the densities of 256 draws of the eight
    schools and their gradients take 0.16 ms on one core of an AMD EPYC 9004. PyTensor needs about 20 s for operations
    that it has not compiled on a machine before. It caches most of them on disk and then needs about a second. It does
    not cache the linear algebra of an LKJ prior, which takes 25 s in each process.

    Args:
        model: the model; None takes that of the `with` block.

    Raises:
        ImportError: PyMC is not installed.
        TypeError: not a PyMC model.
        ValueError: a model with discrete variables, without free ones, without a gradient, or of a part of its data
            (`pm.Minibatch`, `total_size`), or with variables of `pymc.dims`.

    Example:
        >>> import pymc as pm
        >>> with pm.Model() as model:
        ...     tau = pm.HalfNormal("tau", 5)
        ...     y = pm.Normal("y", 0, tau, observed=[1.0, -2.0])
        >>> target = from_pymc(model)
        >>> target.coordinates
        ('log(tau)',)
        >>> target(torch.zeros(3, 1)).shape
        torch.Size([3])
    """
    return Target(_PymcProgram(_checked(model)))


def _checked(model: Model | None) -> Model:
    pymc = require("pymc", "pymc", "its models")
    model = pymc.modelcontext(model)
    if not isinstance(model, pymc.Model):
        raise TypeError(f"expected a PyMC model, got {type(model).__name__}; give the object that pm.Model() returned")
    labelled = [rv.name for rv in model.basic_RVs if type(rv.type).__name__ == "XTensorType"]
    if labelled:
        raise ValueError(
            f"expected variables of pymc itself, got {', '.join(labelled)} of pymc.dims, whose labelled tensors are "
            "not supported; write them as pm.Normal(..., dims=...) and the like"
        )
    discrete = [rv.name for rv in model.free_RVs if not rv.dtype.startswith("float")]
    if discrete:
        raise ValueError(
            f"expected continuous free variables, got {', '.join(discrete)}, which is discrete; sum it out, by hand or "
            "with pymc_extras.marginalize, as a flow has no place for it"
        )
    check_has_free_variables(model.free_RVs)
    partial = _terms_of_partial_data(model)
    if partial:
        raise ValueError(
            f"expected the log density of all data, got that of a part or of random data for {', '.join(partial)} "
            "(pm.Minibatch, total_size, or random numbers in the model); observe the full data without them"
        )
    return model


def _terms_of_partial_data(model: Model) -> list[str]:
    """Return the names of variables and potentials whose log densities are drawn at random or scaled up."""
    from pymc.data import MinibatchOp
    from pymc.variational.minibatch_rv import MinibatchRandomVariable
    from pytensor.graph.traversal import ancestors
    from pytensor.tensor.random.op import RandomVariable

    random = (MinibatchOp, RandomVariable)
    terms = [*model.basic_RVs, *model.potentials]
    found = [
        term.name
        for term, log_density in zip(terms, model.logp(sum=False), strict=True)
        if any(v.owner is not None and isinstance(v.owner.op, random) for v in ancestors([log_density]))
    ]
    for rv in model.basic_RVs:
        if rv.name not in found and rv.owner is not None and isinstance(rv.owner.op, MinibatchRandomVariable):
            totals = [getattr(total, "data", None) for total in rv.owner.inputs[1:]]
            shape = model.rvs_to_values[rv].shape.eval()
            if any(total is not None and total != rows for total, rows in zip(totals, shape, strict=True)):
                found.append(rv.name)
    return found


class _PymcProgram(Program):
    """Compiled graphs of a model, each made when it is first needed."""

    def __init__(self, model: Model) -> None:
        shapes = model.eval_rv_shapes()
        values = {rv.name: model.rvs_to_values[rv].name for rv in model.free_RVs}
        self._model = model
        self._layout = Layout({name: tuple(map(int, shapes[value])) for name, value in values.items()})
        self.coordinates = self._layout.coordinates(_labels(model))
        self.parameters = tuple(self._layout.shapes)
        self.observed = _observations(model)
        self.constants = _constants(model)
        self.dims = {name: dims for name, dims in model.named_vars_to_dims.items() if None not in dims}
        self.coords = {name: list(values) for name, values in model.coords.items() if values is not None}
        theta, outputs = self._value_and_gradient_graph()
        self._bytes_per_point = _bytes_of_values(outputs)
        self._value_and_gradient = _vectorized([theta], outputs, "NUMBA")

    def log_density(self, theta: Tensor) -> Tensor:
        return log_density_with_gradient(self._value_and_gradient, theta)

    def bytes_per_point(self, theta: Tensor) -> float:
        return self._bytes_per_point

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = zip(self._variables, self._constrain(theta.cpu().numpy()), strict=True)
        return {variable.name: torch.tensor(value, device=theta.device) for variable, value in values}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        pieces = self._unconstrain(*(values[name].cpu().numpy() for name in self.parameters))
        return self._layout.join({name: torch.tensor(p) for name, p in zip(self.parameters, pieces, strict=True)})

    def initial_points(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n points (n, D): the model's initial point, and draws of the prior, under the variables' initvals."""
        from pymc.initial_point import make_initial_point_fn

        seeds = torch.randint(1 << 31, (n,), generator=generator).tolist()
        default = make_initial_point_fn(model=self._model)
        points = [default(seed) for seed in seeds[:1]]
        if n > 1:
            try:
                prior = make_initial_point_fn(model=self._model, default_strategy="prior")
                points += [prior(seed) for seed in seeds[1:]]
            except NotImplementedError:  # a flat prior cannot be drawn from
                points += [default(seed) for seed in seeds[1:]]
        names = {rv.name: self._model.rvs_to_values[rv].name for rv in self._model.free_RVs}
        values = {
            name: torch.tensor(np.array([point[value] for point in points], dtype=np.float64))
            for name, value in names.items()
        }
        return self._layout.join(values)

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        from pymc.pytensorf import compile as compile_pymc

        observed = self._model.observed_RVs
        if not observed:
            return {}
        # Row by row, as some random variables of PyMC, such as mixtures and autoregressions, cannot be vectorised.
        values = self.constrain(theta)
        inputs, outputs = self._as_functions_of_values(observed)
        draw = compile_pymc(inputs, outputs, random_seed=seed, mode=RARELY_CALLED, on_unused_input="ignore")
        columns = [values[name].cpu().numpy() for name in self.parameters]
        draws = zip(*(draw(*row) for row in zip(*columns, strict=True)), strict=True)
        return {variable.name: np.stack(rows) for variable, rows in zip(observed, draws, strict=True)}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        observed = self._model.observed_RVs
        if not observed:
            return {}
        point = self._theta()
        densities = [_without_checks(density) for density in self._model.logp(vars=observed, sum=False)]
        evaluate = _vectorized([point], self._as_functions_of(point, densities), RARELY_CALLED)
        values = zip(observed, evaluate(theta.cpu().numpy()), strict=True)
        return {variable.name: torch.tensor(value, dtype=torch.float64) for variable, value in values}

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        from pymc import draw

        check_simulates([potential.name for potential in self._model.potentials])
        free, observed = self._model.free_RVs, self._model.observed_RVs
        try:
            drawn = draw([*free, *observed], random_seed=seed)
        except NotImplementedError:  # a flat prior
            check_simulates([], [rv.name for rv in free if type(rv.owner.op).__name__ in FLAT_PRIORS])
            raise
        data, target = self._simulated
        for variable, rv, value in zip(data, observed, drawn[len(free) :], strict=True):
            variable.set_value(value)
            target.observed[rv.name] = value
        values = zip(free, drawn[: len(free)], strict=True)
        return {rv.name: torch.tensor(np.asarray(value)) for rv, value in values}, target

    @cached_property
    def _simulated(self) -> tuple[list[Any], Target]:
        """Return shared variables for the data, and the target of a copy of the model that reads them at every call."""
        from pymc.model.fgraph import clone_model
        from pytensor import shared

        model = clone_model(self._model)
        data = []
        for rv in model.observed_RVs:
            before = model.rvs_to_values[rv]
            value = shared(np.asarray(before.eval()), name=before.name, shape=before.type.shape)
            model.rvs_to_values[rv] = value
            del model.values_to_rvs[before]
            model.values_to_rvs[value] = rv
            data.append(value)
        return data, Target(_PymcProgram(model))

    def explain(self, theta: Tensor) -> str:
        terms = [*self._model.basic_RVs, *self._model.potentials]
        point = self._theta()
        densities = self._as_functions_of(point, [_without_checks(d).sum() for d in self._model.logp(sum=False)])
        values = _vectorized([point], densities, RARELY_CALLED)(theta.cpu().numpy()[None])
        return describe_nonfinite({term.name: float(value[0]) for term, value in zip(terms, values, strict=True)})

    def _value_and_gradient_graph(self) -> tuple[Any, list[Any]]:
        """Return theta (D,), and the log density and its gradient as graphs of theta."""
        import pytensor

        theta = self._theta()
        log_density = _without_checks(self._model.logp(jacobian=True)).astype("float64")
        (log_density,) = self._as_functions_of(theta, [log_density])
        try:
            gradient = pytensor.grad(log_density, theta)
        except (NotImplementedError, pytensor.gradient.NullTypeGradError) as error:
            raise ValueError(
                f"expected a log density with a gradient, got one without: {error}; write it with operations of "
                "PyTensor that have one"
            ) from error
        return theta, [log_density, gradient]

    @property
    def _variables(self) -> list[Any]:
        return [*self._model.free_RVs, *self._model.deterministics]

    @cached_property
    def _constrain(self) -> CompiledFunction:
        theta = self._theta()
        variables = self._as_functions_of(theta, self._model.replace_rvs_by_values(self._variables))
        return _vectorized([theta], variables, RARELY_CALLED)

    @cached_property
    def _unconstrain(self) -> CompiledFunction:
        transforms = self._model.rvs_to_transforms
        unconstrained = [
            rv if transforms[rv] is None else transforms[rv].forward(rv, *rv.owner.inputs)
            for rv in self._model.free_RVs
        ]
        return _vectorized(*self._as_functions_of_values(unconstrained), RARELY_CALLED)

    def _theta(self) -> Any:
        import pytensor.tensor as pt

        return pt.tensor("theta", dtype="float64", shape=(self._layout.dim,))

    def _as_functions_of(self, theta: Any, outputs: Sequence[Any]) -> list[Any]:
        """Return graphs of the model's value variables as graphs of theta (D,)."""
        from pytensor.graph.replace import clone_replace

        pieces = self._layout.split(theta)
        values = {self._model.rvs_to_values[rv]: pieces[rv.name].astype(rv.dtype) for rv in self._model.free_RVs}
        return clone_replace(list(outputs), values, rebuild_strict=False)

    def _as_functions_of_values(self, outputs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Return inputs for the values of the free variables, and graphs of random variables as graphs of them."""
        from pytensor.graph.replace import clone_replace

        values = {rv: rv.type() for rv in self._model.free_RVs}
        return list(values.values()), clone_replace(list(outputs), values, rebuild_strict=False)


def _labels(model: Model) -> dict[str, str]:
    transforms = {rv.name: model.rvs_to_transforms[rv] for rv in model.free_RVs}
    return {name: name if transform is None else f"{transform.name}({name})" for name, transform in transforms.items()}


def _observations(model: Model) -> dict[str, Array]:
    from pymc.backends.arviz import find_observations

    return {name: np.asarray(value) for name, value in find_observations(model).items()}


def _constants(model: Model) -> dict[str, Array]:
    from pymc.backends.arviz import find_constants

    return {name: np.asarray(value) for name, value in find_constants(model).items()}


def _without_checks(log_density: Any) -> Any:
    """Replace checks of parameters by -inf, as a failed check would end a batch because of one row."""
    from pymc.logprob.utils import local_check_parameter_to_ninf_switch
    from pytensor.graph.rewriting.basic import in2out
    from pytensor.graph.rewriting.utils import rewrite_graph

    return rewrite_graph(log_density, include=(), custom_rewrite=in2out(local_check_parameter_to_ninf_switch))


def _bytes_of_values(outputs: Sequence[Any]) -> float:
    """Return the bytes of all values that a graph computes, by their static shapes; an unknown length counts as 1.

    Compiled code computes several operations at once, so it takes less: about a quarter.
    """
    import pytensor.tensor as pt
    from pytensor.compile.sharedvalue import SharedVariable
    from pytensor.graph.replace import clone_replace
    from pytensor.graph.traversal import ancestors, graph_inputs

    shared = [v for v in graph_inputs(outputs) if isinstance(v, SharedVariable)]  # pm.Data, whose lengths may change
    constants = {v: pt.constant(v.get_value()) for v in shared if isinstance(v.type, pt.TensorType)}
    values = ancestors(clone_replace(list(outputs), constants, rebuild_strict=False))
    sizes = [math.prod(d or 1 for d in v.type.shape) for v in values if v.owner and isinstance(v.type, pt.TensorType)]
    return 8.0 * sum(sizes)


def _vectorized(inputs: Sequence[Any], outputs: Sequence[Any], mode: str) -> CompiledFunction:
    """Compile a graph of one point for a batch: each input and output gets a batch axis, the first."""
    import pytensor
    import pytensor.tensor as pt
    from pytensor.graph.basic import clone_get_equiv
    from pytensor.graph.replace import vectorize_graph
    from pytensor.graph.traversal import graph_inputs

    # Compiling rewrites the inner graph of a Scan in place, which would leave the user's model without a gradient.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTensor 3 has no use for the option
        clones = clone_get_equiv(
            list(graph_inputs(outputs)), outputs, copy_inputs=False, copy_orphans=False, clone_inner_graphs=True
        )
    cloned = [clones[output] for output in outputs]
    batches = {x: pt.tensor(x.name, dtype=x.dtype, shape=(None, *x.type.shape)) for x in inputs}
    batched = vectorize_graph(cloned, batches)
    function = pytensor.function(list(batches.values()), batched, mode=mode, on_unused_input="ignore")
    is_constant = [one.ndim == many.ndim for one, many in zip(cloned, batched, strict=True)]  # without a batch axis

    def call(*arrays: Array) -> list[Array]:
        values = function(*arrays)
        return [np.stack([v] * len(arrays[0])) if same else v for v, same in zip(values, is_constant, strict=True)]

    return call
