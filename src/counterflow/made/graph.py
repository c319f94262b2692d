"""Networks in which each feature sees its parents in a graph alone.

A hidden unit belongs to a set of features, the parents of some feature. It sees the features in its set and the units
whose sets are subsets of its own, and feature i sees the units whose sets are subsets of its parents. The degree of a
feature is the number of features on the longest path that ends there, so these masks lie within those of the degrees.

Source: the precedence of rows in zuko's MaskedMLP (Rozet et al. 2022) has the same masks; the degrees are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from counterflow.made.derived import Derived, with_values

Set = tuple[int, ...]  # of features, in ascending order


def check_adjacency(adjacency: Sequence[Sequence[int]] | Tensor, features: int) -> tuple[Set, ...]:
    """Return the parents of each feature.

    Args:
        adjacency: (D, D), nonzero at [i, j] if feature i depends on feature j; the diagonal does not count.
        features: D.

    Raises:
        ValueError: another shape, or a cycle.

    Example:
        >>> check_adjacency([[0, 0, 0], [1, 0, 0], [1, 1, 0]], 3)
        ((), (0,), (0, 1))
    """
    with with_values():
        matrix = torch.as_tensor(adjacency, device="cpu")
        edges = [row.nonzero()[:, 0].tolist() for row in matrix]
    if matrix.shape != (features, features):
        raise ValueError(
            f"expected adjacency of shape ({features}, {features}), got {tuple(matrix.shape)}; row i marks the "
            "features that feature i depends on"
        )
    parents = tuple(tuple(j for j in row if j != i) for i, row in enumerate(edges))
    longest_paths(parents)
    return parents


def longest_paths(parents: Sequence[Set]) -> list[int]:
    """Return the number of features on the longest path that ends at each feature.

    Raises:
        ValueError: a feature depends on itself through others.

    Example:
        >>> longest_paths([(), (0,), (0, 1), ()])
        [1, 2, 3, 1]
    """
    lengths = [0] * len(parents)  # 0 where it is not known yet
    waiting = list(range(len(parents)))
    while waiting:
        known = [i for i in waiting if all(lengths[j] for j in parents[i])]
        if not known:
            raise ValueError(
                f"expected adjacency without cycles, got one through some of the features {waiting}; remove an edge"
            )
        found = [1 + max((lengths[j] for j in parents[i]), default=0) for i in known]
        for i, length in zip(known, found, strict=True):
            lengths[i] = length
        waiting = [i for i in waiting if not lengths[i]]
    return lengths


def ancestors(parents: Sequence[Set]) -> list[list[int]]:
    """Return the adjacency matrix (D, D) of all ancestors of each feature.

    Example:
        >>> ancestors([(), (0,), (1,)])
        [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """
    found: dict[int, set[int]] = {}
    lengths = longest_paths(parents)
    for i in sorted(range(len(parents)), key=lengths.__getitem__):
        found[i] = set(parents[i]).union(*(found[j] for j in parents[i]))
    return [[int(j in found[i]) for j in range(len(parents))] for i in range(len(parents))]


def unit_sets(parents: Sequence[Set], size: int, context: int) -> list[Set]:
    """Return the sets of `size` hidden units, each set of parents as often as the others, in ascending order of degree.

    Args:
        parents: of each feature.
        size: number of units.
        context: C; without a context no unit has the empty set, as it would be a constant.

    Raises:
        ValueError: fewer units than different sets.

    Example:
        >>> unit_sets([(), (0,), (0, 1), (0,)], size=4, context=0)
        [(0,), (0,), (0, 1), (0, 1)]
    """
    lengths = longest_paths(parents)
    sets = {each for each in parents if each or context} or {()}
    ordered = sorted(sets, key=lambda each: (degree(each, lengths), each))
    if size < len(ordered):
        raise ValueError(
            f"expected hidden layers of at least {len(ordered)} units, one for each different set of parents in "
            f"adjacency, got {size}"
        )
    return [ordered[k * len(ordered) // size] for k in range(size)]


def degree(seen: Set, lengths: Sequence[int]) -> int:
    """Return the degree of a hidden unit that sees these features."""
    return max((lengths[j] for j in seen), default=0)


class Subsets(Derived):
    """Mask of a weight between units that belong to sets of features. Nothing in it is saved or trained.

    Args:
        outputs: the set of each output.
        inputs: the set of each input, that of a feature being itself alone.
        features: D.

    Attributes:
        mask: (out, in), 1 where the input's set is a subset of the output's.
    """

    mask: Tensor

    def __init__(self, outputs: Sequence[Set], inputs: Sequence[Set], features: int) -> None:
        super().__init__()
        self.outputs = tuple(outputs)
        self.inputs = tuple(inputs)
        self.features = features
        self.register_derived()

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        missing = self._members(self.inputs) @ (1 - self._members(self.outputs)).T
        return {"mask": (missing.T == 0).to(torch.get_default_dtype())}

    def _members(self, sets: Sequence[Set]) -> Tensor:
        """Return which features the sets hold, (len(sets), D) of zeros and ones."""
        members = torch.zeros(len(sets), self.features, device="cpu")
        for row, each in zip(members, sets, strict=True):
            row[list(each)] = 1
        return members
