"""A flow for pocoMC 1.2, which takes flows of zuko's kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from counterflow.checks import one_of
from counterflow.flows.recipes import RECIPES
from counterflow.interop.zuko import AdaptedFlow, to_zuko


def flow(
    n_dim: int,
    kind: Literal["nsf", "maf"] = "nsf",
    *,
    layers: int = 6,
    hidden: Sequence[int] | None = None,
    **settings: Any,
) -> AdaptedFlow:
    """Return a flow for `pocomc.Sampler(flow=...)`, in the place of its "nsf6".

    pocoMC trains the flow on its particles, in one pass, and moves them in the flow's base space: every step of its
    Markov chains maps all walkers back to the data. Under zuko's flows that takes n_dim passes, here about one.

    Args:
        n_dim: number of parameters.
        kind: "nsf" (splines) or "maf" (affine).
        layers: number of layers.
        hidden: sizes of the hidden layers; when not given pocoMC's own, three layers of the smallest power of two that
            is at least 3 n_dim and 32.
        settings: further arguments of the flow, such as bins or activation.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> import torch
        >>> from counterflow.interop.pocomc import flow
        >>> adapted = flow(5, layers=2)                     # pocomc.Sampler(prior, likelihood, flow=flow(5))
        >>> u, log_det = adapted().transform.call_and_ladj(torch.randn(7, 5))
        >>> u.shape, log_det.shape
        (torch.Size([7, 5]), torch.Size([7]))
    """
    one_of(kind, "kind", ("nsf", "maf"))
    if hidden is None:
        hidden = (max(1 << (3 * n_dim - 1).bit_length(), 32),) * 3
    return to_zuko(RECIPES[kind](n_dim, layers=layers, hidden=hidden, **settings))
