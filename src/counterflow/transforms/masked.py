"""MaskedAutoregressive: an autoregressive layer on those features that a mask selects."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform, prepare


class MaskedAutoregressive(Transform):
    """Autoregressive layer on the features that a mask m selects; the others neither change nor matter.

        y_i = g(x_i; m_i params_i(m_j x_j with d_j < d_i, c)),    c = (m, the rest of the context)

    Its univariate map is the identity with zero parameters. The density of the selected features is that of the flow
    without the terms of the others: a flow of such layers is a density of every subset of the features.

    `forward` is one pass, `inverse` one pass per degree.

    Args:
        layer: the layer, whose context begins with the mask, D numbers that are 0 or 1.

    Raises:
        ValueError: a layer whose context is too small for a mask.

    Example:
        >>> import torch, counterflow as cf
        >>> t = MaskedAutoregressive(cf.Autoregressive(2, context=2, hidden=(8,)))
        >>> y, log_det = t(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]))
        >>> y[0, 1].item()
        2.0
    """

    inverse_cost = "forward substitution"

    def __init__(self, layer: Autoregressive) -> None:
        super().__init__()
        if layer.context < layer.features:
            raise ValueError(
                f"expected a layer whose context begins with a mask of {layer.features} numbers, got "
                f"context={layer.context}"
            )
        self.layer = layer
        self.features = layer.features
        self.context = layer.context

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        y, terms = self.forward_by_feature(x, torch.zeros_like(x), c)
        return y, terms.sum(-1)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log|det dx/dy|."""
        y = prepare(self, y, c, "y")
        x = torch.zeros_like(y)
        log_slope = x
        for _ in range(max(self.layer.degrees)):
            x, log_slope = self.layer.univariate.inverse(y, self._params(x, c))
        return x, log_slope.sum(-1)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`; the terms of the other features are those of the identity."""
        x = prepare(self, x, c)
        y, log_slope = self.layer.univariate.forward(x, self._params(x, c))
        return y, total + log_slope

    def _params(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Return the parameters (..., D, P) of the univariate map, zero for the features that are not selected."""
        mask = cast(Tensor, c)[..., : self.features]  # `prepare` has refused None
        params = self.layer.made((x * mask)[..., self.layer.order], c)[..., self.layer.places, :]
        return params * mask[..., None]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"layer": self.layer}
