"""Targets from Stan programs: a compiled library scores a whole batch in one call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counterflow.io.json import read_json
from counterflow.posterior.targets.layout import element_name
from counterflow.posterior.targets.stan_data import check_data_names
from counterflow.posterior.targets.stan_library import StanLibrary, open_library
from counterflow.posterior.targets.target import EMPTY, Array, Program, Target, log_density_with_gradient

LOG_LIKELIHOOD = "log_lik"  # generated quantity, by the convention of Stan's loo packages


def from_stan(
    program: str | Path,
    data: Mapping[str, Any] | str | Path = EMPTY,
    *,
    observed: Sequence[str] = (),
    dims: Mapping[str, Sequence[str]] = EMPTY,
    coords: Mapping[str, Sequence[Any]] = EMPTY,
) -> Target:
    """Make a target from a Stan program and its data.

        target = from_stan("schools.stan", {"J": 8, "y": y, "sigma": sigma}, observed=["y"])

    The density is the program's, with the Jacobian of its constraints and with all constants, including those of `~`
    statements. Points that the program rejects have log density -inf and a gradient of 0. `constrain` returns the
    parameters, the transformed parameters and the generated quantities, which are drawn with the same seed at every
    call. The program's printed output is dropped. Indices count from 0; the unconstrained coordinates of a variable
    with several axes are numbered in Stan's own order.

    Stan's compiler and C++ come from the package httpstan, on which PyStan 3 is built; neither PyStan nor its server is
    used. Compiling takes half a minute or more, once: the library is kept in ~/.cache/counterflow. A batch is spread
    over `torch.get_num_threads()` threads; 256 draws of the eight schools take 0.4 ms on one core of an AMD EPYC 9004.
    If BridgeStan is installed with its sources, it is used in place of httpstan.

    `log_likelihood` returns the generated quantities that are called log_lik, or log_lik_ and more.

    Args:
        program: path of a .stan file, or the program's text.
        data: name -> numbers, or the path of a JSON file.
        observed: names of the data that are observations, for ArviZ.
        dims: names of the dimensions of each variable, for ArviZ.
        coords: labels along each dimension, for ArviZ.

    Raises:
        ImportError: neither httpstan nor BridgeStan is installed, or there is no C++ compiler.
        FileNotFoundError: a file does not exist.
        TypeError: data that are not numbers.
        ValueError: a program that does not compile, data that do not fit it, or a program without parameters.
    """
    values = _values(data)
    if not set(observed) <= set(values):
        raise ValueError(f"expected observed to name some of the data {', '.join(values)}, got {', '.join(observed)}")
    code = _code(program)
    check_data_names(code, values)  # compiling takes a minute
    model = _StanProgram(open_library(code, json.dumps(values)))
    model.observed = {name: np.asarray(values[name]) for name in observed}
    model.dims = dims
    model.coords = coords
    return Target(model)


class _StanProgram(Program):
    """Compiled Stan program with its data."""

    def __init__(self, library: StanLibrary) -> None:
        self._library = library
        self._positions = _positions(library.names)
        self._parameter_positions = _positions(library.parameters)
        self.coordinates = _coordinates(library.coordinates)
        self.parameters = tuple(self._parameter_positions)

    def log_density(self, theta: Tensor) -> Tensor:
        return log_density_with_gradient(self._library.value_and_gradient, theta)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        flat = torch.tensor(self._library.constrain(_array(theta)), device=theta.device)
        return {name: flat[:, positions] for name, positions in self._positions.items()}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        names = [name for name in self._positions if name == LOG_LIKELIHOOD or name.startswith(f"{LOG_LIKELIHOOD}_")]
        if not names:
            return {}
        values = self.constrain(theta)
        return {name: values[name] for name in names}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        rows = len(next(iter(values.values())))
        flat = torch.empty(rows, len(self._library.parameters), dtype=torch.float64)
        for name, positions in self._parameter_positions.items():
            flat[:, positions] = values[name].cpu()
        return torch.tensor(self._library.unconstrain(flat.numpy()))

    def explain(self, theta: Tensor) -> str:
        return self._library.rejection_reason(_array(theta[None]))


def _code(program: str | Path) -> str:
    if isinstance(program, str) and not program.endswith(".stan"):
        return program
    path = Path(program).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a Stan program in {path}, got no such file; check the path")
    return path.read_text("utf-8")


def _values(data: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(data, Mapping):
        return {name: _to_json(name, value) for name, value in data.items()}
    path = Path(data).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected data to be a mapping or a JSON file, got {path}, which is no file")
    return read_json(path, "the data of a Stan program")


def _to_json(name: str, value: Any) -> Any:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"expected one size for all rows of the data {name}, got: {error}; pad them") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"expected numbers for the data {name}, got an array of {array.dtype}; convert it to numbers")
    return (array.astype(int) if array.dtype.kind == "b" else array).tolist()


def _array(theta: Tensor) -> Array:
    return np.ascontiguousarray(theta.cpu().numpy())


def _coordinates(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the unconstrained coordinates in our notation, numbered within each variable.

    Stan's own indices of a variable with several axes do not follow the order of its coordinates, which go through an
    array matrix by matrix and through a matrix column by column.

    Example:
        >>> _coordinates(["mu", "x.1", "x.2", "A.1.1", "A.2.1"])
        ('mu', 'x[0]', 'x[1]', 'A[0]', 'A[1]')
    """
    count: Counter[str] = Counter()
    coordinates = []
    for variable, index in map(_parse_name, names):
        coordinates.append(element_name(variable, (count[variable],) if index else ()))
        count[variable] += 1
    return tuple(coordinates)


def _positions(names: Sequence[str]) -> dict[str, Tensor]:
    """Return the positions of each variable's elements in Stan's flat order: name -> positions in the variable's shape.

    Example:
        >>> _positions(["mu", "A.1.1", "A.2.1", "A.1.2", "A.2.2"])["A"]
        tensor([[1, 3],
                [2, 4]])
    """
    found: dict[str, dict[tuple[int, ...], int]] = {}
    for position, (name, index) in enumerate(map(_parse_name, names)):
        found.setdefault(name, {})[index] = position
    return {name: _grid(positions) for name, positions in found.items()}


def _grid(positions: Mapping[tuple[int, ...], int]) -> Tensor:
    grid = torch.empty([1 + max(axis) for axis in zip(*positions, strict=True)], dtype=torch.long)
    for index, position in positions.items():
        grid[index] = position
    return grid


def _parse_name(name: str) -> tuple[str, tuple[int, ...]]:
    """Return Stan's "A.2.1" as ("A", (1, 0)). Parts of complex numbers and tuples, "z.real", are scalars."""
    variable, *index = name.split(".")
    return (variable, tuple(int(i) - 1 for i in index)) if all(i.isdigit() for i in index) else (name, ())
