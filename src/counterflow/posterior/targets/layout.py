"""Layout of a model's variables in the unconstrained vector theta, and names of its elements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Positions of the variables in theta (..., D): one after another, each flattened in row-major order.

    Args:
        shapes: name -> shape of the variable's unconstrained form.

    Example:
        >>> layout = Layout({"mu": (), "theta": (2, 1)})
        >>> layout.split(torch.arange(3.0))
        {'mu': tensor(0.), 'theta': tensor([[1.], [2.]])}
        >>> layout.coordinates({"mu": "log(mu)"})
        ('log(mu)', 'theta[0,0]', 'theta[1,0]')
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def dim(self) -> int:
        """Length D of theta."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def split(self, theta: Any) -> dict[str, Any]:
        """Return name -> (..., *shape) for theta (..., D), a tensor or an array of any tool."""
        pieces: dict[str, Any] = {}
        start = 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            pieces[name] = theta[..., start:stop].reshape((*theta.shape[:-1], *shape))
            start = stop
        return pieces

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Return theta (S, D) of the pieces, name -> (S, *shape)."""
        return torch.cat([pieces[name].reshape(-1, math.prod(shape)) for name, shape in self.shapes.items()], -1)

    def coordinates(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Return the D names of the coordinates. A variable without a label is called by its own name."""
        names = ((labels.get(name, name), shape) for name, shape in self.shapes.items())
        return tuple(element for name, shape in names for element in element_names(name, shape))


def variables_of(theta: Tensor, coordinates: Sequence[str]) -> dict[str, Tensor]:
    """Return theta (S, D) by variable, name -> (S, *shape), for the names of its coordinates.

    Example:
        >>> found = variables_of(torch.arange(4.0)[None], ("log(tau)", "z[0]", "z[1]", "w[0]"))
        >>> {name: value.tolist() for name, value in found.items()}
        {'log(tau)': [0.0], 'z': [[1.0, 2.0]], 'w': [[3.0]]}
    """
    columns: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for column, coordinate in enumerate(coordinates):
        name, _, index = coordinate.removesuffix("]").partition("[")
        columns.setdefault(name, []).append(column)
        shapes[name] = tuple(int(i) + 1 for i in index.split(",")) if index else ()  # the last index is the largest
    return {name: theta[:, columns[name]].reshape(-1, *shape) for name, shape in shapes.items()}


def element_name(name: str, index: Sequence[int]) -> str:
    """Return the name of one element of a variable, such as "theta[0,1]"; the name itself for an empty index."""
    return f"{name}[{','.join(map(str, index))}]" if index else name


def element_names(name: str, shape: Sequence[int]) -> list[str]:
    """Return the names of all elements of a variable in row-major order.

    Example:
        >>> element_names("theta", (1, 2)), element_names("mu", ())
        (['theta[0,0]', 'theta[0,1]'], ['mu'])
    """
    return [element_name(name, index) for index in np.ndindex(*shape)]
