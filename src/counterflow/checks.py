"""Checks of arguments, and the import of optional packages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the configurations import this module, and a command's help should not wait for torch
    from torch import Tensor

_DISTRIBUTIONS = {"PIL": "pillow", "pyro": "pyro-ppl", "sklearn": "scikit-learn"}  # import name: name for pip


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError if values (N, ...) hold a NaN or an infinity; the message names the first one and counts all.

    Args:
        values: numbers with rows along the first axis.
        what: name of the values for the message, such as a file or "the training rows".

    Example:
        >>> import torch
        >>> check_finite(torch.tensor([[1.0, 2.0], [float("nan"), 4.0]]), "table.csv")
        Traceback (most recent call last):
        ...
        ValueError: expected finite numbers in table.csv, got 1 non-finite of 4, the first (nan) at row 1, column 0 \
(counted from 0); drop or impute the 1 of 2 rows that hold them
    """
    bad = ~values.isfinite()
    if not bad.any():
        return
    row, *rest = bad.nonzero()[0].tolist()
    place = f", column {rest[0]}" if len(rest) == 1 else f", index {tuple(rest)}" if rest else ""
    rows = int(bad.flatten(1).any(1).sum()) if rest else int(bad.sum())
    raise ValueError(
        f"expected finite numbers in {what}, got {int(bad.sum())} non-finite of {values.numel()}, the first "
        f"({values[(row, *rest)].item()}) at row {row}{place} (counted from 0); drop or impute the {rows} of "
        f"{len(values)} rows that hold them"
    )


def check_device(name: str) -> None:
    """Raise ValueError unless torch can create tensors on the device of that name."""
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # torch asserts that it was built with CUDA
        raise ValueError(f"expected device to be an available torch device, such as cpu, got {name!r}") from None


def one_of(value: object, name: str, known: Iterable[str]) -> None:
    """Raise ValueError unless value is one of the known names."""
    known = list(known)
    if value not in known:
        raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")


def positive(value: int, name: str) -> int:
    """Return value if it is a whole number of at least 1; otherwise raise ValueError with its name and value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
    return value


def positive_number(value: float, name: str) -> None:
    """Raise ValueError unless value is a positive, finite number."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"expected {name} to be a positive number, got {value!r}")


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package, or raise ImportError with the command that installs it.

    Args:
        module: import name, such as "pyarrow.parquet".
        extra: extra of counterflow that installs the package, such as "data".
        purpose: what needs the package, the end of "expected PACKAGE for ...".

    Returns:
        The module.

    Raises:
        ImportError: the package cannot be imported.

    Example:
        >>> require("math", "data", "sums").sqrt(4.0)
        2.0
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = _DISTRIBUTIONS.get(module.partition(".")[0], module.partition(".")[0])
        raise ImportError(
            f"expected {package} for {purpose}, got: {error}; pip install 'counterflow[{extra}]'"
        ) from error
