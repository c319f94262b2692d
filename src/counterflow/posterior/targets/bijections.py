"""Bijections from unconstrained space onto the supports of variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Size, Tensor
from torch.distributions.constraint_registry import biject_to
from torch.distributions.transforms import Transform

from counterflow.posterior.targets.layout import Layout


def _shape_of_u(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of u for that of x; torch's `inverse_shape` imports SymPy, which takes most of a second."""
    if transform.domain.event_dim == transform.codomain.event_dim == 0:
        return shape
    return tuple(transform.inverse_shape(Size(shape)))


@dataclass(frozen=True)
class Bijections:
    """Named variables x = b(u), each with a bijection b from a real-valued u.

    Args:
        shapes: name -> shape of x. In the methods, x and u have a batch axis before it, (B, *shape).
        transforms: name -> b.
    """

    shapes: Mapping[str, tuple[int, ...]]
    transforms: Mapping[str, Transform]

    @property
    def layout(self) -> Layout:
        """Positions of the u in theta."""
        return Layout({name: _shape_of_u(self.transforms[name], shape) for name, shape in self.shapes.items()})

    @property
    def labels(self) -> dict[str, str]:
        """Names of the u: name -> label."""
        return {name: unconstrained_name(name, transform) for name, transform in self.transforms.items()}

    def constrain(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return name -> x for name -> u."""
        return {name: transform(unconstrained[name]) for name, transform in self.transforms.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return name -> u for name -> x."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def log_jacobians(self, unconstrained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[Tensor]:
        """Return log|det dx/du| of each variable in each row, a list of (B,)."""
        by_element = (t.log_abs_det_jacobian(unconstrained[name], values[name]) for name, t in self.transforms.items())
        return [value.reshape(len(value), -1).sum(-1) for value in by_element]


def find_bijection(name: str, support: Any, biject_to: Callable[[Any], Any] = biject_to) -> Any:
    """Return the bijection from unconstrained space onto a support.

    Args:
        name: the variable, for errors.
        support: a constraint of torch or NumPyro.
        biject_to: the registry of the tool that the constraint comes from.

    Raises:
        ValueError: the support is discrete, or the registry has no bijection onto it.
    """
    if support.is_discrete:
        raise ValueError(
            f"expected continuous variables, got {name}, which is discrete ({support}); sum it out of the density "
            "(for a mixture, logsumexp over its components), as a flow has no place for it"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"expected a support that biject_to knows, got {support} for {name}; "
            "write the variable as a function of one with fewer constraints"
        ) from None


def unconstrained_name(name: str, transform: Any) -> str:
    """Return a name for the unconstrained form of a variable under a transform of torch or NumPyro.

    Example:
        >>> from torch.distributions import biject_to, constraints
        >>> unconstrained_name("mu", biject_to(constraints.real)), unconstrained_name(
        ...     "tau", biject_to(constraints.positive)
        ... )
        ('mu', 'log(tau)')
    """
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    parts = transform.parts if hasattr(transform, "parts") else [transform]
    match [type(part).__name__ for part in parts if not _is_identity(part)]:
        case []:
            return name
        case ["ExpTransform"]:
            return f"log({name})"
        case ["SigmoidTransform"]:
            return f"logit({name})"
        case _:
            return f"unconstrained({name})"


def _is_identity(transform: Any) -> bool:
    kind = type(transform).__name__
    if kind == "AffineTransform":
        return bool(np.all(np.asarray(transform.loc) == 0) and np.all(np.asarray(transform.scale) == 1))
    return kind == "IdentityTransform"
