"""CategoryNetwork: the joint distribution of several categories, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.made.network import MADE

MISSING = -1  # code of a category that is not known


class CategoryNetwork(nn.Module):
    """Joint distribution of J categories, each given those before it and a context, by a masked network.

        p(k | c) = prod_j softmax(log shares_j + logits_j(k_1, ..., k_{j-1}, c))[k_j]

    The categories k (..., J) are codes 0, 1, ..., in the dtype of the weights; they enter the network as indicators. A
    code of -1 is missing: its indicators are zero and its factor is left out. The logits start near zero, so that the
    categories start independent, with the given shares.

    Args:
        shares: for each of the J categories, the probabilities of its codes, positive.
        context: C; 0 for no context.
        hidden: the sizes of the hidden layers.
        activation: the activation of the hidden units, as in `Autoregressive`.

    Attributes:
        sizes: the numbers of codes.

    Raises:
        ValueError: no categories, or shares that are not positive.

    Source: Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation", with one degree for all
    indicators of a category.

    Example:
        >>> import torch
        >>> network = CategoryNetwork([[0.5, 0.5], [0.2, 0.3, 0.5]], hidden=(8,))
        >>> network.log_prob(torch.tensor([[0.0, 2.0], [1.0, -1.0]])).exp().round(decimals=2).tolist()
        [0.25, 0.5]
        >>> network.sample(torch.ones(4, 2, dtype=torch.bool)).shape
        torch.Size([4, 2])
    """

    _log_shares: Tensor

    def __init__(
        self,
        shares: Sequence[Sequence[float]],
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if not shares or any(not each or min(each) <= 0 for each in shares):
            raise ValueError(f"expected positive shares of at least one category, got {shares!r:.200}")
        self.shares = tuple(tuple(each) for each in shares)
        self.sizes = tuple(len(each) for each in self.shares)
        self.context = context
        self.hidden = tuple(hidden)
        self.activation = activation
        degrees = [j for j, size in enumerate(self.sizes, 1) for _ in range(size)]
        self.made = MADE(degrees, 1, hidden, activation, context)
        log_shares = torch.tensor([math.log(share) for each in self.shares for share in each])
        self.register_buffer("_log_shares", log_shares, persistent=False)

    def indicators(self, k: Tensor) -> Tensor:
        """Return the indicators (..., sum of sizes) of codes (..., J), all zero for a missing category."""
        parts = [k[..., j, None] == torch.arange(size, device=k.device) for j, size in enumerate(self.sizes)]
        return torch.cat(parts, -1).to(self._log_shares.dtype)

    def log_probs(self, k: Tensor, c: Tensor | None = None) -> list[Tensor]:
        """Return for each category the log probabilities of its codes, (..., size), given those before it and c."""
        logits = self.made(self.indicators(k), c)[..., 0] + self._log_shares
        return [part.log_softmax(-1) for part in logits.split(self.sizes, -1)]

    def log_prob(self, k: Tensor, c: Tensor | None = None) -> Tensor:
        """Return the log probability (...) of codes (..., J), given a context (..., C), in nats."""
        terms = torch.zeros(k.shape[:-1], dtype=self._log_shares.dtype, device=k.device)
        for j, each in enumerate(self.log_probs(k, c)):
            code = k[..., j, None].long()
            terms = terms + torch.where(code < 0, 0.0, each.gather(-1, code.clamp_min(0)))[..., 0]
        return terms

    @torch.no_grad()
    def sample(self, draw: Tensor, c: Tensor | None = None) -> Tensor:
        """Draw codes (..., J), one after the other, each given those before it and a context (..., C).

        Args:
            draw: True for each code that is drawn (..., J); the others stay missing.
            c: the context.
        """
        k = torch.full(draw.shape, float(MISSING), dtype=self._log_shares.dtype, device=draw.device)
        for j in range(len(self.sizes)):
            drawn = torch.distributions.Categorical(logits=self.log_probs(k, c)[j]).sample().to(k)
            k[..., j] = torch.where(draw[..., j], drawn, k[..., j])
        return k

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "shares": [list(each) for each in self.shares],
            "context": self.context,
            "hidden": list(self.hidden),
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        """Return the sizes as text."""
        return f"sizes={self.sizes}, context={self.context}"
