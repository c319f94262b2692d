"""A linear layer masked by a staircase."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterflow.made.staircase import Staircase, linear


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is masked by a staircase (out, in) at each use; see `counterflow.staircase`.

    The weight starts at 0 where it is forbidden and its gradient is exactly 0 there, so that training keeps it there.
    Whatever else may be written into it, by hand, from a file or by a parametrization, has no effect on the layer.
    """

    def __init__(self, mask: Tensor, gain: float = 1.0, more_inputs: int = 0) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = mask.shape
        self.staircase = Staircase(mask)
        # Uniform with variance gain^2 / (inputs that the row sees), so that early features are not drowned.
        spread = gain * torch.sqrt(3.0 / (mask.sum(1, keepdim=True) + more_inputs).clamp_min(1))
        self.weight = nn.Parameter(torch.empty(mask.shape).uniform_(-1, 1) * spread * mask)
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    @property
    def mask(self) -> Tensor:
        """(out, in), numbers or booleans: where the weight has an effect."""
        return self.staircase.mask

    def masked_weight(self) -> Tensor:
        """The weight with its forbidden entries at exactly 0."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias, self.staircase)
