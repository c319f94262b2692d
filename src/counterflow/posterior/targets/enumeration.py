"""Sums over the discrete sites of a Pyro model, whose values are enumerated in parallel, for a batch of points."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

BATCH = "Z"  # symbol of the axis of points; Pyro gives small letters first


@dataclass(frozen=True)
class Factors:
    """The factors of a log density and the axes that they share.

    Args:
        tensors: site -> log density, with an axis for each plate and each discrete site that it depends on.
        symbols: site -> the symbols of these axes.
        plates: site -> the symbols of the plates that it is in.
        discrete: the symbols of the discrete sites.
    """

    tensors: Mapping[str, Tensor]
    symbols: Mapping[str, str]
    plates: Mapping[str, frozenset[str]]
    discrete: frozenset[str]


def factors_of(trace: Any, sites: Mapping[str, Any]) -> Factors:
    """Return the factors of the sites of an enumerated trace, whose log densities are computed."""
    trace.pack_tensors()
    plate_symbols = trace.plate_to_symbol
    packed = {name: site["packed"]["log_prob"] for name, site in sites.items()}
    return Factors(
        tensors=packed,
        symbols={name: factor._pyro_dims for name, factor in packed.items()},
        plates={
            name: frozenset(plate_symbols[plate.name] for plate in site["cond_indep_stack"] if plate.vectorized)
            for name, site in sites.items()
        },
        discrete=frozenset(trace.symbol_to_dim) - frozenset(plate_symbols.values()),
    )


def sum_out(batch: Mapping[str, Tensor], structure: Factors) -> Tensor:
    """Return the log density (B,) of B points, summed over all values of the discrete sites.

    Args:
        batch: site -> the factors of all points, with an axis for the points before the others.
        structure: factors of one point, whose tensors are not used.
    """
    from pyro.ops.contract import contract_to_tensor

    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name, symbols in structure.symbols.items():
        factor: Any = batch[name].view_as(batch[name])  # a new tensor, which gets an attribute
        factor._pyro_dims = BATCH + symbols
        tree.setdefault(structure.plates[name] | {BATCH}, []).append(factor)
    total: Tensor = contract_to_tensor(tree, set(structure.discrete), frozenset({BATCH}))
    return total
