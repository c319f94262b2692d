"""Adam, AdamW and Adamax on a few long vectors.

The results are those of torch.optim, which takes longer for a step of a model with many small tensors and imports
torch's compiler, which takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

FIRST, SECOND, EPS = 0.9, 0.999, 1e-8  # decay of the first and the second moment, and eps: the defaults of torch.optim


class Optimizer:
    """One of three optimizers with a first moment m of the gradient g and a second moment v, from 0.

        adam, adamw    m <- m + (1 - b1) (g - m),  v <- b2 v + (1 - b2) g^2
                       x <- x - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
        adamax         m <- m + (1 - b1) (g - m),  v <- max(b2 v, |g| + eps)
                       x <- x - lr / (1 - b1^t) m / v

    in step t = 1, 2, ... Weight decay comes before: g <- g + weight_decay x, for adamw x <- (1 - lr weight_decay) x.

    Args:
        kind: "adam", "adamw" or "adamax".
        vectors: the weights x, updated in place.
        weight_decay: an L2 penalty, decoupled from the gradient for adamw.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithms 1 and 2; Loshchilov and Hutter
    2019, "Decoupled Weight Decay Regularization", algorithm 2.
    """

    def __init__(
        self, kind: Literal["adam", "adamw", "adamax"], vectors: Sequence[Tensor], weight_decay: float = 0.0
    ) -> None:
        self.kind = kind
        self.vectors = list(vectors)
        self.weight_decay = weight_decay
        self.first = [torch.zeros_like(x) for x in self.vectors]
        self.second = [torch.zeros_like(x) for x in self.vectors]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Update the weights by the gradient of each vector; the gradients stay as they are."""
        self.steps += 1
        update = UPDATES[self.kind]
        for x, g, first, second in zip(self.vectors, gradients, self.first, self.second, strict=True):
            if self.weight_decay and self.kind == "adamw":
                x.mul_(1 - learning_rate * self.weight_decay)
            elif self.weight_decay:
                g = g.add(x, alpha=self.weight_decay)
            update(x, g, first, second, self.steps, learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return the moments and the number of steps by name."""
        moments = {f"first.{i}": m for i, m in enumerate(self.first)}
        moments |= {f"second.{i}": m for i, m in enumerate(self.second)}
        return {**moments, "steps": torch.tensor(self.steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            first.copy_(state[f"first.{i}"])
            second.copy_(state[f"second.{i}"])
        self.steps = int(state["steps"])


def _adam(x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int, learning_rate: float) -> None:
    """Update one vector and its moments in place."""
    first.lerp_(g, 1 - FIRST)
    second.mul_(SECOND).addcmul_(g, g, value=1 - SECOND)
    scale = second.sqrt().div_(math.sqrt(1 - SECOND**t)).add_(EPS)
    x.addcdiv_(first, scale, value=-learning_rate / (1 - FIRST**t))


def _adamax(x: Tensor, g: Tensor, first: Tensor, second: Tensor, t: int, learning_rate: float) -> None:
    """Update one vector and its moments in place."""
    first.lerp_(g, 1 - FIRST)
    torch.maximum(second.mul_(SECOND), g.abs().add_(EPS), out=second)
    x.addcdiv_(first, second, value=-learning_rate / (1 - FIRST**t))


UPDATES: dict[str, Callable[..., None]] = {"adam": _adam, "adamw": _adam, "adamax": _adamax}
