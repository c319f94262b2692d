"""Constrained variables: their bijections from unconstrained space, and what the models of Pyro and NumPyro share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Size, Tensor
from torch.distributions.constraint_registry import biject_to
from torch.distributions.transforms import Transform

from counterflow.posterior.targets.target import Layout


@dataclass(frozen=True)
class Bijections:
    """Named variables x = b(u), each with its bijection b from a real-valued u.

    shapes       name -> the shape of x; in the methods x and u have one axis before it, (B, *shape)
    transforms   name -> b
    """

    shapes: Mapping[str, tuple[int, ...]]
    transforms: Mapping[str, Transform]

    @property
    def layout(self) -> Layout:
        """Where each u stands in theta."""
        return Layout({name: tuple(self.transforms[name].inverse_shape(Size(x))) for name, x in self.shapes.items()})

    @property
    def labels(self) -> dict[str, str]:
        """name -> how u is called."""
        return {name: label(name, transform) for name, transform in self.transforms.items()}

    def constrain(self, unconstrained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> x."""
        return {name: transform(unconstrained[name]) for name, transform in self.transforms.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> u."""
        return {name: transform.inv(values[name]) for name, transform in self.transforms.items()}

    def log_jacobians(self, unconstrained: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> list[Tensor]:
        """log|det dx/du| of each variable in each row (B,)."""
        by_element = (t.log_abs_det_jacobian(unconstrained[name], values[name]) for name, t in self.transforms.items())
        return [value.reshape(len(value), -1).sum(-1) for value in by_element]


def bijection(name: str, constraint: Any, biject_to: Callable[[Any], Any] = biject_to) -> Any:
    """The map from unconstrained space onto the values that a constraint allows, by torch's `biject_to` or NumPyro's.

    Raises ValueError for a discrete variable, and for a constraint that has no such map.
    """
    if constraint.is_discrete:
        raise ValueError(
            f"expected continuous variables, got {name}, which is discrete ({constraint}); sum it out of the density "
            "(for a mixture, logsumexp over its components), as a flow has no place for it"
        )
    try:
        return biject_to(constraint)
    except NotImplementedError:
        raise ValueError(
            f"expected constraints that biject_to knows, got {constraint} for {name}; "
            "write the variable as a function of one that is less constrained"
        ) from None


def label(name: str, transform: Any) -> str:
    """How the unconstrained form of a variable is called, for the transforms of torch and, alike, of NumPyro.

    >>> from torch.distributions import biject_to, constraints
    >>> label("mu", biject_to(constraints.real)), label("tau", biject_to(constraints.positive))
    ('mu', 'log(tau)')
    """
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    parts = transform.parts if hasattr(transform, "parts") else [transform]
    kinds = [type(part).__name__ for part in parts if not _trivial(part)]
    return {(): name, ("ExpTransform",): f"log({name})", ("SigmoidTransform",): f"logit({name})"}.get(
        tuple(kinds), f"unconstrained({name})"
    )


def _trivial(transform: Any) -> bool:
    kind = type(transform).__name__
    if kind == "AffineTransform":
        return bool(np.all(np.asarray(transform.loc) == 0) and np.all(np.asarray(transform.scale) == 1))
    return kind == "IdentityTransform"


def check_whole(plate: str, size: int, subsample_size: int | None) -> None:
    """Raise ValueError for a plate of Pyro or NumPyro that draws a part of the data."""
    if subsample_size not in (None, size):
        raise ValueError(
            f"expected plates over all data, got {subsample_size} of {size} in plate {plate}; leave its "
            "subsample_size out, as the log density has to be the same at every call"
        )


def misfit(site: str, error: Exception) -> ValueError:
    """What to raise when the log density of a site of Pyro or NumPyro fails."""
    return ValueError(
        f"expected data that fit the model, got at {site}: {error}; compare the shapes of its data and its distribution"
    )


def plate_dims(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The dimensions' names of sites of Pyro or NumPyro that stand in plates: name -> those of its batch axes."""
    return {
        name: [_plate(site, axis) or f"{name}_dim_{axis + n}" for axis in range(-n, 0)]
        for name, site in sites.items()
        if (n := len(site["fn"].batch_shape)) and site["cond_indep_stack"]
    }


def _plate(site: Mapping[str, Any], axis: int) -> str | None:
    return next((plate.name for plate in site["cond_indep_stack"] if plate.dim == axis), None)
