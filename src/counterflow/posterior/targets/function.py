"""Targets from log densities that are written in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint, real

from counterflow.posterior.targets.target import Array, Target, float64_by_default
from counterflow.posterior.targets.variables import Bijections, bijection

NONE: Mapping[str, Any] = MappingProxyType({})


def from_torch(
    log_density: Callable[..., Tensor],
    dim: int | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    constraints: Mapping[str, Constraint] = NONE,
    derived: Callable[..., Mapping[str, Tensor]] | None = None,
    observed: Mapping[str, Array] = NONE,
    dims: Mapping[str, Sequence[str]] = NONE,
    coords: Mapping[str, Sequence[Any]] = NONE,
) -> Target:
    """A target from a log density of a batch, written in torch for float64.

    With `dim`, log_density takes theta (B, dim), free in all directions, and returns (B,); `torch.func.vmap` makes such
    a function out of one of a single point.

        >>> target = from_torch(lambda theta: -theta.square().sum(-1) / 2, dim=3)
        >>> target(torch.ones(2, 3))
        tensor([-1.5000, -1.5000], dtype=torch.float64)

    With `shapes`, log_density takes the variables by name, each (B, *shape) and inside its constraint, and returns the
    density of these variables (B,). The Jacobian of the change from unconstrained space is added here:

        log p(theta) = log_density(**x) + sum over variables of log|det dx/dtheta|,    x = biject_to(constraint)(theta)

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

    While log_density runs, torch's default dtype is float64, so that the constants of Normal(0, 5) are exact.

    Arguments:
        constraints   name -> one of torch.distributions.constraints; a name that is left out is unconstrained
        derived       takes the variables as log_density does; returns further ones for `constrain`, name -> (B, *shape)
        observed, dims, coords   what ArviZ shows besides: the data by name, the dimensions' names, their labels

    Raises ValueError for names, shapes and constraints that do not fit together and, when the target is called, for a
    log density of another shape than (B,); TypeError for one that is not float64.
    """
    if (dim is None) == (shapes is None):
        raise ValueError(
            "expected either dim, for a log density of theta (B, dim), or shapes, for one of named variables, got "
            f"dim={dim} and shapes={shapes}; models of Pyro and NumPyro have from_pyro and from_numpyro"
        )
    variables = _variables({"theta": (_whole(dim),)} if shapes is None else shapes, constraints)
    layout = variables.layout

    def of_named(theta: Tensor) -> Tensor:
        free = layout.split(theta)
        values = variables.constrain(free)
        density = _checked(log_density, theta, values)
        return torch.stack([density, *variables.log_jacobians(free, values)]).sum(0)

    def constrain(theta: Tensor) -> dict[str, Tensor]:
        values = variables.constrain(layout.split(theta))
        if derived is None:
            return values
        with float64_by_default():
            return {**values, **derived(**values)}

    return Target(
        of_named if shapes is not None else lambda theta: _checked(log_density, theta, None),
        constrain,
        coordinates=layout.coordinates(variables.labels),
        parameters=tuple(layout.shapes),
        unconstrain=lambda values: layout.join(variables.unconstrain(values)),
        observed=observed,
        dims=dims,
        coords=coords,
    )


def as_target(target: Target | Callable[..., Tensor], dim: int | None = None) -> Target:
    """The target itself, or one made of a function theta (B, dim) -> (B,).

    dim may also be an attribute of the function.

    Raises TypeError for what is neither, and ValueError for a missing dim, or one that is not the target's.
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


def _whole(dim: Any) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"expected dim to be a whole number of at least 1, got {dim!r}")
    return dim


def _variables(shapes: Mapping[str, tuple[int, ...]], constraints: Mapping[str, Constraint]) -> Bijections:
    strangers = [name for name in constraints if name not in shapes]
    if strangers:
        raise ValueError(f"expected constraints of {', '.join(shapes)}, got one of {', '.join(strangers)}")
    transforms = {name: bijection(name, constraints.get(name, real)) for name in shapes}
    for name, shape in shapes.items():
        event = transforms[name].codomain.event_dim
        if len(shape) < event:
            raise ValueError(
                f"expected {name} to have {event} axes or more under its constraint {constraints[name]}, got {shape}"
            )
    return Bijections(shapes, transforms)


def _checked(log_density: Callable[..., Tensor], theta: Tensor, values: Mapping[str, Tensor] | None) -> Tensor:
    """The log density (B,) of a user's function, which may be wrong in every way."""
    try:
        with float64_by_default():
            density = log_density(theta) if values is None else log_density(**values)
    except RuntimeError as error:
        error.add_note("theta is float64: tensors that meet it have to be float64 as well, as x.double() makes them")
        raise
    came = f"{density.dtype}" if isinstance(density, Tensor) else type(density).__name__
    if came != "torch.float64":
        raise TypeError(f"expected the log density as a float64 tensor, got {came}; convert the data with .double()")
    if density.shape != theta.shape[:1]:
        raise ValueError(
            f"expected a log density of shape ({len(theta)},), one for each row of theta, got {tuple(density.shape)}; "
            "sum over all other axes"
        )
    return density
