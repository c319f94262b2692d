"""Coupling layer with a dense network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.checks import positive
from counterflow.made.activations import activation_named
from counterflow.made.architecture import check_links
from counterflow.made.derived import Derived
from counterflow.transforms.base import Transform, prepare
from counterflow.univariate.affine import Affine
from counterflow.univariate.base import Univariate


class CouplingLayer(Derived, Transform):
    """Coupling layer of RealNVP: it keeps some features and moves the others, y_i = g(x_i; params_i(kept, c)).

    Both directions are one pass through a dense network:

        h_k = gate_k (W_k out_{k-1} + b_k) + h_{skips[k]},    gate_k = sigmoid(V_k c + v_k) if k is in gates, else 1
        out_k = f(h_k), or h_k if k is in linear,    out_{-1} = [kept, c]
        params = W out_last + b

    `cf.Coupling` is another construction: a whole flow, whose layers are `Autoregressive` with two degrees. Their
    networks are masked, and the first half of the features passes through a univariate map as well, where this layer
    copies it. This layer stands alone, and flows of other libraries are converted to it.

    Args:
        features: D.
        moved: indices of the features that move; their parameters depend on all other features.
        context: C; 0 for no context.
        hidden: sizes of the hidden layers; () for parameters that are linear in [kept, c]. If no features are kept and
            there is no context, the parameters are D P trained numbers and hidden has to be ().
        univariate: map of one feature; Affine() when not given.
        activation: activation of the hidden units: relu, leaky_relu, elu, tanh, sigmoid, silu or softplus.
        skips: for each hidden layer, the index of an earlier hidden layer of the same size that is added to it, or
            None; () for no skip connections.
        linear: indices of the hidden layers whose output is not activated.
        gates: indices of the hidden layers that are scaled by a gate of the context.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: sizes below 1, features that do not exist, skips that do not fit, or gates without a context.

    Source: Dinh et al. 2017, "Density estimation using Real NVP"; the gated residual network is that of Durkan et al.
    2019, "Neural Spline Flows".

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.transforms.CouplingLayer(features=3, moved=[2], hidden=(8, 8))
        >>> x = torch.randn(5, 3)
        >>> y, log_det = t(x)
        >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(t.inverse(y)[0], x, atol=1e-6)
        (True, True)
    """

    moves: Tensor
    stays: Tensor

    def __init__(
        self,
        features: int,
        moved: Sequence[int],
        context: int = 0,
        hidden: Sequence[int] = (256, 256),
        univariate: Univariate | None = None,
        activation: str = "relu",
        *,
        skips: Sequence[int | None] = (),
        linear: Sequence[int] = (),
        gates: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.context = positive(context, "context") if context else 0
        self.univariate = Affine() if univariate is None else univariate
        if not isinstance(self.univariate, Univariate):
            raise TypeError(f"expected univariate to be an instance such as cf.Affine(), got {univariate!r}")
        self.activation = activation
        self.moved = tuple(moved)
        if not self.moved or len(set(self.moved)) < len(self.moved) or not set(self.moved) <= set(range(features)):
            raise ValueError(f"expected moved to be different features of 0..{features - 1}, got {self.moved}")
        kept = [i for i in range(features) if i not in set(self.moved)]
        self.hidden = tuple(positive(size, f"hidden[{k}]") for k, size in enumerate(hidden))
        self.skips = tuple(skips)
        self.linear = tuple(sorted(linear))
        self.gates = tuple(sorted(gates))
        self._check(len(kept) + self.context)
        self._links = check_links(self.hidden, self.skips, self.linear, alike="size")
        self._kept = tuple(kept)
        self.register_derived()
        self._f = activation_named(activation).f

        sizes = [len(kept) + self.context, *self.hidden]
        outputs = len(self.moved) * self.univariate.parameters
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, self.hidden, strict=False))
        self.gating = nn.ModuleDict({str(k): nn.Linear(self.context, self.hidden[k]) for k in self.gates})
        self.last = nn.Linear(sizes[-1], outputs) if sizes[-1] else None
        self.constant = None if sizes[-1] else nn.Parameter(torch.zeros(outputs))
        if self.last is not None:  # parameters start near zero, as in MADE
            nn.init.normal_(self.last.weight, std=3e-4 / sizes[-1] ** 0.5)
            nn.init.zeros_(self.last.bias)

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        moves, stays = (torch.tensor(v, dtype=torch.long, device="cpu") for v in (self.moved, self._kept))
        return {"moves": moves, "stays": stays}

    def _check(self, inputs: int) -> None:
        activation_named(self.activation)
        if self.hidden and not inputs:
            raise ValueError(
                f"expected hidden=(), since no features are kept and there is no context, got hidden={self.hidden}"
            )
        if self.gates and not self.context:
            raise ValueError(f"expected gates=() without a context, got gates={self.gates}")
        if not set(self.gates) <= set(range(len(self.hidden))):
            raise ValueError(
                f"expected gates to hold indices of the {len(self.hidden)} hidden layers, got {self.gates}"
            )

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y (..., D) and log|det dy/dx| (...). One pass."""
        x = prepare(self, x, c)
        y, log_slope = self.univariate.forward(x[..., self.moves], self._params(x, c))
        return self._merge(x, y), log_slope.sum(-1)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x (..., D) and log|det dx/dy| (...). One pass: the kept features give the same parameters."""
        y = prepare(self, y, c, "y")
        x, log_slope = self.univariate.inverse(y[..., self.moves], self._params(y, c))
        return self._merge(y, x), log_slope.sum(-1)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`; the terms of kept features are 0."""
        x = prepare(self, x, c)
        y, log_slope = self.univariate.forward(x[..., self.moves], self._params(x, c))
        return self._merge(x, y), total.index_add(-1, self.moves, log_slope)

    def _merge(self, kept: Tensor, moved: Tensor) -> Tensor:
        """Return kept (..., D) with the moved features replaced."""
        return kept.index_copy(-1, self.moves, moved)

    def _params(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Return the parameters (..., moved, P)."""
        shape = (*x.shape[:-1], len(self.moved), self.univariate.parameters)
        if self.last is None:
            return self.constant.reshape(shape[-2:]).expand(shape)  # type: ignore[union-attr]  # None only if self.last is not
        h = x[..., self.stays]
        if c is not None:
            c = c.expand(*x.shape[:-1], self.context)
            h = torch.cat([h, c], -1)

        def affine(k: int, v: Tensor) -> Tensor:
            out: Tensor = self.layers[k](v)
            return out * torch.sigmoid(self.gating[str(k)](c)) if k in self.gates else out

        _, out = self._links.propagate(affine, h, self._f)
        return self.last(out).to(x.dtype).reshape(shape)  # autocast may have lowered the precision

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "features": self.features,
            "moved": list(self.moved),
            "context": self.context,
            "hidden": list(self.hidden),
            "univariate": self.univariate,
            "activation": self.activation,
            "skips": list(self.skips),
            "linear": list(self.linear),
            "gates": list(self.gates),
        }

    def __repr__(self) -> str:
        moved = list(self.moved) if self.features <= 8 else len(self.moved)
        return (
            f"CouplingLayer(features={self.features}, moved={moved}, context={self.context}, hidden={self.hidden}, "
            f"univariate={self.univariate}, activation={self.activation!r})"
        )
