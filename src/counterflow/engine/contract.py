"""What a solver is given and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from counterflow.made.activations import Activation
from counterflow.made.architecture import Links
from counterflow.univariate.base import Univariate


@dataclass(frozen=True)
class Layout:
    """What stays the same from call to call.

    The staircase (see `MADE.ends`), the activation, the feature's map, and how the layers are joined.
    """

    ends: tuple[tuple[int, ...], ...]
    activation: Activation
    univariate: Univariate
    links: Links

    @property
    def groups(self) -> int:
        """G, the number of degrees."""
        return len(self.ends[0]) - 1

    def fed(self, k: int, hidden: Tensor) -> Tensor:
        """What hidden layer k feeds the next one with, from what it holds before its activation."""
        return hidden if k in self.links.linear else self.activation.f(hidden)

    def slope(self, k: int, hidden: Tensor) -> Tensor:
        """The derivative of `fed` by it."""
        return torch.ones_like(hidden) if k in self.links.linear else self.activation.df(hidden)


@dataclass(frozen=True)
class System:
    """y = g(x; params(x)), for N rows of D features sorted by degree.

    weights: (H1, D), (H2, H1), ..., (D P, HL), of which only what the degrees allow is read, and (D P, D) with
    skip_to_output. biases: (H1,), ..., (D P,), or (N, H) for what a context enters.
    """

    layout: Layout
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


class Solution(NamedTuple):
    """A point of the system: x with f(x) = y, and what the network holds there."""

    x: Tensor  # (N, D)
    log_det: Tensor  # (N,), of the map from y to x
    params: Tensor  # (N, D, P)
    hidden: tuple[Tensor, ...]  # before activation, (N, H) each


class Adjoints(NamedTuple):
    """u with J^T u = v - w dlog_det/dx, J = dy/dx, and the adjoints that cotangents (u, w) of (y, log_det) leave."""

    u: Tensor  # (N, D)
    params: Tensor  # (N, D, P)
    hidden: tuple[Tensor, ...]  # of the values before activation, (N, H) each


class Body(Protocol):
    """One way to compute both substitutions."""

    def forward_substitution(self, system: System, y: Tensor, *, keep: bool = True) -> Solution:
        """Solve f(x) = y for x, y (N, D). Unless keep, params and hidden may be left empty."""

    def back_substitution(self, system: System, solution: Solution, v: Tensor, w: Tensor) -> Adjoints:
        """Solve J^T u = v - w dlog_det/dx at the solution, v (N, D), w (N,); log_det is that of x to y."""
