"""Base class of the univariate maps.

A univariate map is elementwise: x, y and log dy/dx are (...), and params is (..., P).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Partials(NamedTuple):
    """First derivatives of y = g(x; params) and of l = log dy/dx."""

    dy_dx: Tensor  # (...)
    dy_dparams: Tensor  # (..., P)
    dl_dx: Tensor  # (...)
    dl_dparams: Tensor  # (..., P)


class Univariate(ABC):
    """Strictly increasing map of one feature with P parameters, y = g(x; params).

    With zero parameters it is the identity or close to it. Subclasses are frozen dataclasses whose fields are their
    constants.
    """

    parameters: int  # P

    @abstractmethod
    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = g(x; params) and log dy/dx."""

    @abstractmethod
    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with g(x; params) = y, and log dx/dy."""

    def partials(self, x: Tensor, params: Tensor) -> Partials:
        """Return the derivatives that back substitution needs.

        This default uses autograd; a subclass may override it with a closed form, which is faster.
        """
        with torch.enable_grad():
            x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
            y, log_slope = self.forward(x, params)
            if not y.requires_grad:
                raise RuntimeError(
                    f"expected partials() of {self!r} in closed form inside torch.compile, where autograd does not "
                    "record; write the method, or leave the solve out of the compiled function"
                )
            dy = torch.autograd.grad(y.sum(), (x, params), retain_graph=True)
            dl = torch.autograd.grad(log_slope.sum(), (x, params), materialize_grads=True)
        return Partials(dy[0], dy[1], dl[0], dl[1])

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return asdict(self)  # type: ignore[call-overload]  # every concrete subclass is a dataclass
