"""Targets from Stan programs: a compiled library scores a whole batch in one call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.io.json import read_json
from counterflow.posterior.targets.stan_library import open_program
from counterflow.posterior.targets.target import Array, Target, bracketed, compiled

NONE: Mapping[str, Any] = MappingProxyType({})


def from_stan(
    program: str | Path,
    data: Mapping[str, Any] | str | Path = NONE,
    *,
    observed: Sequence[str] = (),
    dims: Mapping[str, Sequence[str]] = NONE,
    coords: Mapping[str, Sequence[Any]] = NONE,
) -> Target:
    """A target from a Stan program and its data.

    The density is the program's, with the Jacobian of its constraints and with all constants, those of `~` statements
    too. Points that the program rejects have -inf and a gradient of 0. `constrain` holds the parameters, the
    transformed parameters and the generated quantities, which are drawn with the same seed at every call. What a
    program prints is dropped. Indices count from 0; the unconstrained coordinates of a variable with several axes are
    counted in Stan's own order.

    Stan's compiler and C++ come from the package httpstan, which PyStan 3 stands on; neither PyStan nor its server is
    used. Compiling takes half a minute or more, once: the library is kept in ~/.cache/counterflow. A batch is spread
    over `torch.get_num_threads()` threads; 256 draws of the eight schools take 0.4 ms on one core of an AMD EPYC 9004.
    Where BridgeStan is installed with its sources, it takes httpstan's place.

    Arguments:
        program        the path of a .stan file, or the program itself
        data           name -> numbers, or the path of a JSON file
        observed       the names of those data that are observations, for ArviZ
        dims, coords   the dimensions' names of each variable, and their labels, for ArviZ

        target = from_stan("schools.stan", {"J": 8, "y": y, "sigma": sigma}, observed=["y"])

    Raises ImportError where neither httpstan nor BridgeStan is installed, FileNotFoundError for a missing file, and
    ValueError for a program that does not compile, for data that do not fit it, and for a program without parameters.
    """
    values = _values(data)
    if not set(observed) <= set(values):
        raise ValueError(f"expected observed to name some of the data {', '.join(values)}, got {', '.join(observed)}")
    library = open_program(_code(program), json.dumps(values))
    places, parameters = _places(library.names), _places(library.parameters)

    def constrain(theta: Tensor) -> dict[str, Tensor]:
        flat = torch.tensor(library.constrain(_rows(theta)), device=theta.device)
        return {name: flat[:, at] for name, at in places.items()}

    def unconstrain(values: Mapping[str, Tensor]) -> Tensor:
        flat = torch.empty(len(next(iter(values.values()))), len(library.parameters), dtype=torch.float64)
        for name, at in parameters.items():
            flat[:, at] = values[name].cpu()
        return torch.tensor(library.unconstrain(flat.numpy()))

    return Target(
        compiled(library.value_and_gradient),
        constrain,
        coordinates=_coordinates(library.coordinates),
        parameters=tuple(parameters),
        unconstrain=unconstrain,
        explain=lambda theta: library.reason(_rows(theta[None])),
        observed={name: np.asarray(values[name]) for name in observed},
        dims=dims,
        coords=coords,
    )


def _code(program: str | Path) -> str:
    if isinstance(program, str) and not program.endswith(".stan"):
        return program
    path = Path(program).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a Stan program in {path}, where no file is; check the path")
    return path.read_text("utf-8")


def _values(data: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {name: _plain(name, value) for name, value in data.items()}
    path = Path(data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected data as a mapping or a JSON file, got {path}, where no file is")
    return read_json(path, "the data of a Stan program")


def _plain(name: str, value: Any) -> Any:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"expected one size for all rows of the data {name}, got: {error}; pad them") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"expected numbers for the data {name}, got an array of {array.dtype}; convert it to numbers")
    return (array.astype(int) if array.dtype.kind == "b" else array).tolist()


def _rows(theta: Tensor) -> Array:
    return np.ascontiguousarray(theta.cpu().numpy())


def _coordinates(names: Sequence[str]) -> tuple[str, ...]:
    """What Stan calls the unconstrained coordinates, in brackets; those of a variable with several axes are counted.

    Stan's own indices of these are in another order than the coordinates themselves, which go through an array matrix
    by matrix, and through a matrix column by column.

    >>> _coordinates(["mu", "x.1", "x.2", "A.1.1", "A.2.1"])
    ('mu', 'x[0]', 'x[1]', 'A[0]', 'A[1]')
    """
    seen: Counter[str] = Counter()
    coordinates = []
    for variable, index in map(_split, names):
        coordinates.append(bracketed(variable, (seen[variable],) if index else ()))
        seen[variable] += 1
    return tuple(coordinates)


def _places(names: Sequence[str]) -> dict[str, Tensor]:
    """Where each element of each variable stands in Stan's flat order: name -> positions, shaped as the variable.

    >>> _places(["mu", "A.1.1", "A.2.1", "A.1.2", "A.2.2"])["A"]
    tensor([[1, 3],
            [2, 4]])
    """
    found: dict[str, dict[tuple[int, ...], int]] = {}
    for position, (name, index) in enumerate(map(_split, names)):
        found.setdefault(name, {})[index] = position
    return {name: _grid(positions) for name, positions in found.items()}


def _grid(positions: Mapping[tuple[int, ...], int]) -> Tensor:
    grid = torch.empty([1 + max(axis) for axis in zip(*positions, strict=True)], dtype=torch.long)
    for index, position in positions.items():
        grid[index] = position
    return grid


def _split(name: str) -> tuple[str, tuple[int, ...]]:
    """Stan's "A.2.1" as ("A", (1, 0)); a part of a complex number or of a tuple, "z.real", is a scalar of that name."""
    variable, *index = name.split(".")
    return (variable, tuple(int(i) - 1 for i in index)) if all(i.isdigit() for i in index) else (name, ())
