"""Linear layer with a staircase mask, and the mask of a graph within it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from counterflow.made.derived import in_current_mode, with_values
from counterflow.made.graph import Subsets
from counterflow.made.staircase import Staircase, linear


class MaskedLinear(nn.Linear):
    """Linear layer whose weight (out, in) is masked at each use; see `counterflow.made.staircase`.

    A forbidden entry of the weight starts at 0 and its gradient is exactly 0, so that training keeps it at 0. A value
    that is written into it, by hand, from a file or by a parametrization, has no effect on the layer.

    Args:
        mask: (out, in), True where the weight has an effect; each row allows the first columns, no fewer than the row
            before.
        gain: standard deviation of the initial weights, times the square root of the number of inputs of a row.
        more_inputs: number of further inputs of each output, from another layer that is added to this one.
        graph: mask of a graph, which allows some of the entries that `mask` allows; all of them when not given.
    """

    def __init__(self, mask: Tensor, gain: float = 1.0, more_inputs: int = 0, graph: Subsets | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = mask.shape
        self.staircase = Staircase(mask)
        self.graph = graph
        # Uniform with variance gain^2 / (inputs of the row): rows with few inputs get as large an output as the others.
        with with_values():
            seen = mask if graph is None else graph.derived()["mask"]
            spread = gain * torch.sqrt(3.0 / (seen.sum(1, keepdim=True) + more_inputs).clamp_min(1)) * seen
        weight = torch.empty(mask.shape).uniform_(-1, 1)
        self.weight = nn.Parameter(weight * in_current_mode(spread))
        self.bias = nn.Parameter(torch.zeros(self.out_features))

    @property
    def mask(self) -> Tensor:
        """Mask (out, in) of numbers or booleans, nonzero where the weight has an effect."""
        return self.staircase.mask if self.graph is None else self.graph.mask

    @property
    def graph_weight(self) -> Tensor:
        """Weight (out, in) for products that leave out what the staircase forbids, 0 where only the graph forbids."""
        return self.weight if self.graph is None else self.weight * self.graph.mask

    def masked_weight(self) -> Tensor:
        """Return the weight with its forbidden entries at exactly 0."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """Return y (..., out) for x (..., in)."""
        return linear(x, self.graph_weight, self.bias, self.staircase)
