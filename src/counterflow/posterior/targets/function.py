"""Targets from log densities written in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, real

from counterflow.checks import positive
from counterflow.posterior.targets.bijections import Bijections, find_bijection
from counterflow.posterior.targets.memory import bytes_of_evaluation
from counterflow.posterior.targets.target import EMPTY, Array, Program, Target, float64_by_default


def from_torch(
    log_density: Callable[..., Tensor],
    dim: int | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    constraints: Mapping[str, Constraint] = EMPTY,
    derived: Callable[..., Mapping[str, Tensor]] | None = None,
    log_likelihood: Callable[..., Mapping[str, Tensor]] | None = None,
    simulate: Callable[[int], tuple[Mapping[str, Tensor], Target]] | None = None,
    observed: Mapping[str, Array] = EMPTY,
    dims: Mapping[str, Sequence[str]] = EMPTY,
    coords: Mapping[str, Sequence[Any]] = EMPTY,
) -> Target:
    """Make a target from a log density of a batch, written in torch for float64.

    With `dim`, log_density takes theta (B, dim), unconstrained, and returns (B,). `torch.func.vmap` makes such a
    function from one of a single point.

    With `shapes`, log_density takes the variables by name, each (B, *shape) and inside its constraint, and returns the
    density of these variables (B,). The Jacobian of the change from unconstrained space is added here:

        log p(theta) = log_density(**x) + sum over variables of log|det dx/dtheta|,    x = biject_to(constraint)(theta)

    While log_density runs, torch's default dtype is float64, so that the constants of Normal(0, 5) are exact.

    Args:
        log_density: the function.
        dim: D, the length of theta.
        shapes: name -> shape of each variable, in place of dim.
        constraints: name -> one of torch.distributions.constraints; a variable without one is unconstrained.
        derived: takes the variables as log_density does and returns further ones for `constrain`, name -> (B, *shape).
        log_likelihood: takes what log_density takes and returns the log likelihood of each observation, name of the
            data -> (B, *shape), for `Posterior.loo`.
        simulate: takes a seed and returns parameters drawn from the prior, name -> (*shape), and the target of data
            drawn given them, for simulation-based calibration.
        observed: the data by name, for ArviZ.
        dims: names of the dimensions of each variable, for ArviZ.
        coords: labels along each dimension, for ArviZ.

    Raises:
        ValueError: names, shapes and constraints that do not fit together; when the target is called, a log density of
            another shape than (B,).
        TypeError: when the target is called, a log density that is not float64.

    Example:
        >>> target = from_torch(lambda theta: -theta.square().sum(-1) / 2, dim=3)
        >>> target(torch.ones(2, 3))
        tensor([-1.5000, -1.5000], dtype=torch.float64)

        >>> from torch.distributions import Exponential, Normal, constraints
        >>> y = torch.tensor([28.0, 8.0, -3.0], dtype=torch.float64)
        >>> def schools(mu, tau, theta):
        ...     prior = Normal(0, 5).log_prob(mu) + Exponential(0.2).log_prob(tau)
        ...     group = Normal(mu[:, None], tau[:, None]).log_prob(theta).sum(-1)
        ...     return prior + group + Normal(theta, 10).log_prob(y).sum(-1)
        >>> shapes = {"mu": (), "tau": (), "theta": (3,)}
        >>> target = from_torch(schools, shapes=shapes, constraints={"tau": constraints.positive})
        >>> target.coordinates
        ('mu', 'log(tau)', 'theta[0]', 'theta[1]', 'theta[2]')
    """
    if (dim is None) == (shapes is None):
        raise ValueError(
            "expected either dim, for a log density of theta (B, dim), or shapes, for one of named variables, got "
            f"dim={dim} and shapes={shapes}; models of Pyro and NumPyro have from_pyro and from_numpyro"
        )
    program = _TorchProgram(log_density, dim, shapes, constraints, derived, log_likelihood, simulate)
    program.observed = observed
    program.dims = dims
    program.coords = coords
    return Target(program)


def as_target(target: Target | Callable[..., Tensor], dim: int | None = None) -> Target:
    """Return the target itself, or make one from a function theta (B, dim) -> (B,).

    Args:
        target: a target or a function.
        dim: D of a function; it may also be an attribute of the function.

    Raises:
        TypeError: neither a target nor a function.
        ValueError: dim is missing, or differs from the target's.
    """
    if isinstance(target, Target):
        if dim not in (None, target.dim):
            raise ValueError(f"expected dim={target.dim}, which the target has, got dim={dim}; leave dim out")
        return target
    if not callable(target) or isinstance(target, type):
        raise TypeError(
            "expected a target or a function of theta (B, D), got "
            f"{type(target).__module__.split('.')[0]}'s {type(target).__name__}; a model becomes a target with "
            "counterflow.targets.from_pymc, from_pyro, from_numpyro or from_stan"
        )
    return from_torch(target, getattr(target, "dim", None) if dim is None else dim)


class _TorchProgram(Program):
    """Function of theta, or of named variables under their bijections."""

    def __init__(
        self,
        log_density: Callable[..., Tensor],
        dim: int | None,
        shapes: Mapping[str, tuple[int, ...]] | None,
        constraints: Mapping[str, Constraint],
        derived: Callable[..., Mapping[str, Tensor]] | None,
        log_likelihood: Callable[..., Mapping[str, Tensor]] | None,
        simulate: Callable[[int], tuple[Mapping[str, Tensor], Target]] | None,
    ) -> None:
        self._function = log_density
        self._by_name = shapes is not None
        self._derived = derived
        self._log_likelihood = log_likelihood
        self._simulate = simulate
        self._variables = _bijections({"theta": (positive(dim, "dim"),)} if shapes is None else shapes, constraints)  # type: ignore[arg-type]
        self._layout = self._variables.layout
        self.coordinates = self._layout.coordinates(self._variables.labels)
        self.parameters = tuple(self._layout.shapes)

    def log_density(self, theta: Tensor) -> Tensor:
        if not self._by_name:
            return _call(self._function, theta, {})
        unconstrained = self._layout.split(theta)
        values = self._variables.constrain(unconstrained)
        density = _call(self._function, theta, values)
        return torch.stack([density, *self._variables.log_jacobians(unconstrained, values)]).sum(0)

    def bytes_per_point(self, theta: Tensor) -> float:
        return bytes_of_evaluation(self.log_density, theta)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        values = self._variables.constrain(self._layout.split(theta))
        if self._derived is None:
            return values
        with float64_by_default():
            return {**values, **self._derived(**values)}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        if self._log_likelihood is None:
            return {}
        with float64_by_default():
            if not self._by_name:
                return dict(self._log_likelihood(theta))
            return dict(self._log_likelihood(**self._variables.constrain(self._layout.split(theta))))

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        if self._simulate is None:
            return super().simulate(seed)
        values, target = self._simulate(seed)
        return dict(values), target

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        return self._layout.join(self._variables.unconstrain(values))


def _bijections(shapes: Mapping[str, tuple[int, ...]], constraints: Mapping[str, Constraint]) -> Bijections:
    unknown = [name for name in constraints if name not in shapes]
    if unknown:
        raise ValueError(f"expected constraints of {', '.join(shapes)}, got one of {', '.join(unknown)}")
    transforms = {name: find_bijection(name, constraints.get(name, real)) for name in shapes}
    for name, shape in shapes.items():
        event_dim = transforms[name].codomain.event_dim
        if len(shape) < event_dim:
            raise ValueError(
                f"expected {name} to have {event_dim} axes or more under its constraint {constraints[name]}, "
                f"got {shape}"
            )
    return Bijections(shapes, transforms)


def _call(function: Callable[..., Tensor], theta: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Return the log density (B,) by the user's function of theta, or of the named values if there are any."""
    try:
        with float64_by_default():
            density = function(**values) if values else function(theta)
    except RuntimeError as error:
        error.add_note("theta is float64, and tensors that meet it have to be float64 as well: convert with x.double()")
        raise
    kind = f"{density.dtype}" if isinstance(density, Tensor) else type(density).__name__
    if kind != "torch.float64":
        raise TypeError(f"expected the log density to be a float64 tensor, got {kind}; convert the data with .double()")
    if density.shape != theta.shape[:1]:
        raise ValueError(
            f"expected a log density of shape ({len(theta)},), one for each row of theta, got {tuple(density.shape)}; "
            "sum over all other axes"
        )
    return density
