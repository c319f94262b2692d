"""The contract between autoregressive layers and the bodies that solve them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from counterflow.made.activations import Activation
from counterflow.made.architecture import Links
from counterflow.univariate.base import Univariate

LAYOUTS: dict[str, Layout] = {}  # by name: the operators that torch.compile sees take no Python objects


@dataclass(unsafe_hash=True)  # not frozen, for walkers that set attributes; no slots, for torch.compile of torch 2.4
class Layout:
    """The part of a layer that is the same in every call.

    Args:
        ends: for the features and for each hidden layer, how many units have a degree of at most g, for g = 0..G.
        activation: the activation of the hidden layers.
        univariate: the map of one feature.
        links: skip connections of the network.

    Attributes:
        name: the same in every process; `LAYOUTS` holds the layout under it.
    """

    ends: tuple[tuple[int, ...], ...]
    activation: Activation
    univariate: Univariate
    links: Links
    name: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        f = self.activation.f
        self.name = f"{f.__module__}.{f.__qualname__} {self.univariate!r} {self.ends} {self.links}"
        LAYOUTS[self.name] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, (self.ends, self.activation, self.univariate, self.links)  # a copy has its name in LAYOUTS

    @property
    def groups(self) -> int:
        """G, the number of degrees."""
        return len(self.ends[0]) - 1

    def output(self, k: int, hidden: Tensor) -> Tensor:
        """Return the output of hidden layer k, given its values before the activation."""
        return hidden if k in self.links.linear else self.activation.f(hidden)

    def slope(self, k: int, hidden: Tensor) -> Tensor:
        """Return the derivative of `output`."""
        return torch.ones_like(hidden) if k in self.links.linear else self.activation.df(hidden)


@dataclass(frozen=True)
class System:
    """The system y = g(x; params(x)) for N rows of D features, sorted by degree.

    Args:
        layout: see `Layout`.
        weights: (H1, D), (H2, H1), ..., (D P, HL), and (D P, D) if the features lead straight to the parameters.
            Entries that the degrees forbid are ignored.
        biases: (H1,), ..., (D P,); (N, H) where a context is added.
    """

    layout: Layout
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


class Solution(NamedTuple):
    """A point of the system, f(x) = y, with the values of the network there."""

    x: Tensor  # (N, D)
    log_det: Tensor  # (N,), of the map from y to x
    params: Tensor  # (N, D, P)
    hidden: tuple[Tensor, ...]  # before activation, (N, H) each


class Adjoints(NamedTuple):
    """The solution u of J^T u = v - w dlog_det/dx with J = dy/dx, and the adjoints of the network.

    The adjoints are those that cotangents u of y and w of log_det cause in the map from x to y.
    """

    u: Tensor  # (N, D)
    params: Tensor  # (N, D, P)
    hidden: tuple[Tensor, ...]  # of the values before activation, (N, H) each


class Body(Protocol):
    """An implementation of both substitutions."""

    def forward_substitution(self, system: System, y: Tensor, *, keep: bool = True) -> Solution:
        """Solve f(x) = y for x, with x and y (N, D). If keep is False, params and hidden may be empty."""

    def back_substitution(self, system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
        """Solve J^T u = v - w dlog_det/dx at the solution, with v (N, D) and w (N,); log_det is that of x to y."""
