"""Conversion of draws to ArviZ's data structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from counterflow.diagnostics.chains import import_arviz


def arviz_data(
    groups: Mapping[str, Mapping[str, Any]],
    attributes: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
) -> Any:
    """Convert arrays to InferenceData (ArviZ 0) or an xarray DataTree (ArviZ 1).

    Args:
        groups: group -> variable -> array; draws are (chains, draws, *shape).
        attributes: attributes of the group "posterior".
        dims: names of each variable's dimensions.
        coords: labels of the coordinates along each dimension.

    Raises:
        ImportError: ArviZ is not installed.
    """
    arviz = import_arviz()
    named = {"dims": {name: list(value) for name, value in dims.items()}, "coords": dict(coords)}
    data = arviz.from_dict(**groups, **named) if hasattr(arviz, "InferenceData") else arviz.from_dict(groups, **named)
    data["posterior"].attrs.update(attributes)
    return data
