"""Architecture of a MADE network: hidden degrees, skip connections, contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


def hidden_degrees(size: int, top: int, lowest: int) -> list[int]:
    """Sorted degrees of `size` hidden units, spread evenly over lowest..top; with few units, both ends are kept.

    Example:
        >>> hidden_degrees(6, top=3, lowest=1), hidden_degrees(2, top=9, lowest=1), hidden_degrees(1, top=9, lowest=0)
        ([1, 1, 2, 2, 3, 3], [1, 9], [9])
    """
    levels = top - lowest + 1
    if size >= levels:
        return [lowest + k * levels // size for k in range(size)]
    return [top - round(k * (levels - 1) / max(size - 1, 1)) for k in reversed(range(size))]


@dataclass(frozen=True)
class Architecture:
    """How the layers of a MADE are joined, where it is more than a chain; what every field allows keeps the degrees.

    With h the hidden layers before their activation f, x the features and c the context:

        h_k = W_k fed_{k-1} + b_k + V_k c + h_{skips[k]}, where fed_{k-1} = f(h_{k-1}), or h_{k-1} if linear[k-1]
        params = W fed_last + b + direct x

    A residual network has skips of two layers: with skips=(None, None, 0, None, 2) and
    linear=(False, False, False, False, True) it has two blocks, and the last sum is not activated.

    Args:
        hidden_degrees: of each hidden layer, in ascending order; spread evenly when not given. A unit of degree e sees
            the features of degree e and below.
        skips: for each hidden layer an earlier one of the same degrees that is added to it, or None.
        linear: for each hidden layer whether what it feeds on is itself, without the activation.
        contexts: the hidden layers that receive the context.
        activated_contexts: those of them to which f(V c + v) is added in place of V c.
        direct: whether the features (and the context) lead straight to the parameters as well.

    Raises:
        ValueError: layers that do not exist, degrees out of order.

    Source: residual networks, He et al. 2016, "Identity Mappings in Deep Residual Networks"; in a MADE, Durkan and Nash
    2019, "Autoregressive Energy Machines".

    Example:
        >>> import counterflow as cf
        >>> architecture = Architecture(skips=(None, None, 0), linear=(False, False, True))
        >>> cf.Autoregressive(3, hidden=(16, 16, 16), architecture=architecture).inverse_cost
        'forward substitution'
    """

    hidden_degrees: Sequence[Sequence[int]] | None = None
    skips: Sequence[int | None] = ()
    linear: Sequence[bool] = ()
    contexts: Sequence[int] = (0,)
    activated_contexts: Sequence[int] = ()
    direct: bool = False

    def __post_init__(self) -> None:
        for name in ("skips", "linear", "contexts", "activated_contexts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.hidden_degrees is not None:
            object.__setattr__(self, "hidden_degrees", tuple(map(tuple, self.hidden_degrees)))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return asdict(self)

    def degrees(self, sizes: Sequence[int], G: int, lowest: int) -> list[list[int]]:
        """The degrees of hidden layers of these sizes; ValueError where the architecture does not fit to them."""
        if self.hidden_degrees is None:
            found = [hidden_degrees(size, G - 1, lowest) for size in sizes]
        else:
            found = [list(level) for level in self.hidden_degrees]
        layers = range(len(sizes))
        if [len(level) for level in found] != list(sizes) or any(
            level != sorted(level) or not 0 <= level[0] <= level[-1] < G for level in found
        ):
            raise ValueError(
                f"expected hidden_degrees in ascending order from 0..{G - 1} for hidden layers of {tuple(sizes)} "
                f"units, got {self.hidden_degrees!r}"
            )
        if any(field and len(field) != len(sizes) for field in (self.skips, self.linear)) or not (
            set(self.activated_contexts) <= set(self.contexts) <= set(layers)
        ):
            raise ValueError(f"expected a architecture of {len(sizes)} hidden layers, got {self!r}")
        for k, source in enumerate(self.skips):
            if source is not None and not (source in range(k) and found[source] == found[k]):
                raise ValueError(
                    f"expected skips[{k}] as an earlier hidden layer of the same degrees, got {source}; a sum of units "
                    "of other degrees would break the order of the features"
                )
        return found


class Links(NamedTuple):
    """What substitution has to know of a architecture, which says what these are; the tuples have every hidden layer."""

    skips: tuple[int | None, ...]
    linear: tuple[bool, ...]
    direct: bool

    def added_to(self, k: int) -> list[int]:
        """The hidden layers to which layer k is added."""
        return [later for later, source in enumerate(self.skips) if source == k]
