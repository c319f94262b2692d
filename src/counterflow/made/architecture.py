"""Connections between the layers of a network: hidden degrees, skip connections and contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from counterflow.checks import positive


def hidden_degrees(size: int, top: int, lowest: int) -> list[int]:
    """Return sorted degrees of `size` hidden units, spread evenly over lowest..top.

    With fewer units than degrees, the highest and the lowest degree are kept.

    Example:
        >>> hidden_degrees(6, top=3, lowest=1), hidden_degrees(2, top=9, lowest=1), hidden_degrees(1, top=9, lowest=0)
        ([1, 1, 2, 2, 3, 3], [1, 9], [9])
    """
    levels = top - lowest + 1
    if size >= levels:
        return [lowest + k * levels // size for k in range(size)]
    return [top - round(k * (levels - 1) / max(size - 1, 1)) for k in reversed(range(size))]


@dataclass(frozen=True, slots=True)
class Links:
    """Connections between the hidden layers of a network, checked.

    Attributes:
        skips: for each hidden layer, the index of the earlier hidden layer that is added to it, or None.
        linear: indices of the hidden layers whose output is not activated.
        skip_to_output: True if the inputs also reach the parameters through one layer of their own.
    """

    skips: tuple[int | None, ...]
    linear: tuple[int, ...]
    skip_to_output: bool = False

    def added_to(self, k: int) -> list[int]:
        """Return the hidden layers to which layer k is added."""
        return [later for later, source in enumerate(self.skips) if source == k]

    def propagate(
        self, affine: Callable[[int, Tensor], Tensor], x: Tensor, f: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Pass x through the hidden layers.

            h_k = affine(k, out_{k-1}) + h_{skips[k]},    out_k = f(h_k), or h_k if k is in linear,    out_{-1} = x

        Args:
            affine: affine(k, v) is layer k, without skip and activation, applied to v.
            x: inputs (..., units).
            f: the activation.

        Returns:
            Every h_k, the values before the activation, and the output of the last hidden layer; x itself if there is
            no hidden layer.
        """
        hidden: list[Tensor] = []
        out = x
        for k, skip in enumerate(self.skips):
            h = affine(k, out)
            if skip is not None:
                h = h + hidden[skip]
            hidden.append(h)
            out = h if k in self.linear else f(h)
        return tuple(hidden), out


def check_links(
    units: Sequence[object],
    skips: Sequence[int | None],
    linear: Sequence[int],
    skip_to_output: bool = False,
    *,
    alike: str,
) -> Links:
    """Return the connections of the hidden layers; raise ValueError if they do not fit.

    Args:
        units: a description of each hidden layer; a skip may join two layers only if theirs are equal.
        skips: an entry for each hidden layer, or () for no skips.
        linear: indices of hidden layers.
        skip_to_output: see `Links`.
        alike: name of the description, for the error message.
    """
    layers = len(units)
    if skips and len(skips) != layers:
        raise ValueError(
            f"expected skips to have an entry for each of the {layers} hidden layers, got {len(skips)}: {tuple(skips)}"
        )
    for k, source in enumerate(skips):
        if source is not None and not (source in range(k) and units[source] == units[k]):
            raise ValueError(
                f"expected skips[{k}] to be None or an earlier hidden layer of the same {alike}, got {source!r}"
            )
    if not set(linear) <= set(range(layers)):
        raise ValueError(f"expected linear to hold indices of the {layers} hidden layers, got {tuple(linear)}")
    return Links(tuple(skips) or (None,) * layers, tuple(sorted(linear)), skip_to_output)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Connections between the layers of a MADE network, for networks that are not a plain sequence of layers.

    With h_k the hidden layers before their activation f, x the features and c the context:

        h_k = W_k out_{k-1} + b_k + V_k c + h_{skips[k]},    out_k = f(h_k), or h_k if k is in linear,    out_{-1} = x
        params = W out_last + b + S x + T c                  (S and T only with skip_to_output)

    Every choice keeps the order of the features. `Architecture.residual` builds a residual network.

    Args:
        hidden_degrees: degrees of the units of each hidden layer, in ascending order; spread evenly when not given. A
            unit of degree e sees the features of degrees up to e.
        skips: for each hidden layer, the index of an earlier hidden layer of the same degrees that is added to it, or
            None; () for no skip connections.
        linear: indices of the hidden layers whose output is not activated.
        contexts: indices of the hidden layers that receive the context.
        activated_contexts: indices of the layers among `contexts` that receive f(V c + v) instead of V c.
        skip_to_output: True if the features and the context also reach the parameters through a linear layer of their
            own.

    Raises:
        ValueError: degrees out of order, or layers that do not exist. Raised when the network is built, since the
            sizes of its hidden layers are known only then.

    Source: residual networks, He et al. 2016, "Identity Mappings in Deep Residual Networks"; in a MADE, Durkan and Nash
    2019, "Autoregressive Energy Machines".

    Example:
        >>> import counterflow as cf
        >>> architecture = Architecture(contexts=(0, 1), skip_to_output=True)
        >>> cf.Autoregressive(3, context=2, hidden=(16, 16), architecture=architecture).inverse_cost
        'forward substitution'
    """

    hidden_degrees: Sequence[Sequence[int]] | None = None
    skips: Sequence[int | None] = ()
    linear: Sequence[int] = ()
    contexts: Sequence[int] = (0,)
    activated_contexts: Sequence[int] = ()
    skip_to_output: bool = False

    def __post_init__(self) -> None:
        for name in ("skips", "linear", "contexts", "activated_contexts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.hidden_degrees is not None:
            object.__setattr__(self, "hidden_degrees", tuple(map(tuple, self.hidden_degrees)))

    @classmethod
    def residual(cls, blocks: int = 2) -> Architecture:
        """Build a residual network: one input layer, then blocks of two layers, for 1 + 2 blocks hidden layers.

            h_0 = W_0 x + b_0 + V_0 c
            h_{2b+2} = h_{2b} + W f(W' f(h_{2b}) + b' + V c) + b''    for b = 0..blocks - 1

        The context enters the input layer and every block. The output of the last block is not activated. All hidden
        layers have to be of one size.

        Args:
            blocks: the number of residual blocks.

        Raises:
            ValueError: blocks is not a whole number of at least 1.

        Example:
            >>> import counterflow as cf
            >>> architecture = cf.transforms.Architecture.residual(blocks=2)
            >>> t = cf.Autoregressive(features=3, context=2, hidden=(32,) * 5, architecture=architecture)
            >>> len(t.made.links.skips), t.inverse_cost
            (5, 'forward substitution')
        """
        positive(blocks, "blocks")
        skips: list[int | None] = [None]
        for b in range(blocks):
            skips += [None, 2 * b]
        return cls(skips=skips, linear=(2 * blocks,), contexts=(0, *range(1, 2 * blocks, 2)))

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)

    def degrees(self, sizes: Sequence[int], G: int, lowest: int) -> list[list[int]]:
        """Return the degrees of hidden layers of these sizes.

        Args:
            sizes: the number of units of each hidden layer.
            G: the highest degree of a feature.
            lowest: the lowest degree of a hidden unit, for degrees that are spread evenly.

        Raises:
            ValueError: hidden_degrees that do not fit the sizes.
        """
        if self.hidden_degrees is None:
            found = [hidden_degrees(size, G - 1, lowest) for size in sizes]
        else:
            found = [list(level) for level in self.hidden_degrees]
        if [len(level) for level in found] != list(sizes) or any(
            level != sorted(level) or not 0 <= level[0] <= level[-1] < G for level in found
        ):
            raise ValueError(
                f"expected hidden_degrees in ascending order from 0..{G - 1} for hidden layers of {tuple(sizes)} "
                f"units, got {self.hidden_degrees!r}"
            )
        return found

    def links(self, degrees: Sequence[Sequence[int]]) -> Links:
        """Return the connections of hidden layers of these degrees.

        Raises:
            ValueError: skips, linear or contexts that do not fit the number of layers, or a skip between layers of
                different degrees: a sum of units of different degrees would break the order of the features.
        """
        links = check_links(degrees, self.skips, self.linear, self.skip_to_output, alike="degrees")
        if not set(self.activated_contexts) <= set(self.contexts) <= set(range(len(degrees))):
            raise ValueError(
                f"expected contexts to hold indices of the {len(degrees)} hidden layers and activated_contexts some of "
                f"contexts, got contexts={self.contexts} and activated_contexts={self.activated_contexts}"
            )
        return links
