"""CouplingLayer: some features move, by a univariate map whose parameters a network computes from those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from counterflow.checks import positive
from counterflow.made.activations import activation_named
from counterflow.made.architecture import check_links
from counterflow.transforms.base import Transform, prepare
from counterflow.univariate.affine import Affine
from counterflow.univariate.base import Univariate


class CouplingLayer(Transform):
    """A map that keeps some features and moves the others: y_i = g(x_i; params_i(kept features, c)).

    Both directions are one pass through the network, whose layers hold a_0 ... a_last before activation:

        t_0 = W_0 [kept, c] + b_0,    t_k = W_k f(a_(k-1)) + b_k
        a_k = gate_k t_k + a_(skips[k]),    gate_k = sigmoid(V_k c + v_k)
        params = W f(a_last) + b

    A layer that is not in `gates` has a gate of 1, one whose skip is None adds nothing, and a layer in `linear` is
    fed on without its activation f. The weights are dense, where those of a coupling made by `Autoregressive` with two
    degrees are masked; and kept features stay as they are, where that one moves them as well.

    Args:
        features: D.
        moved: the indices of the features that move; their params see all other features.
        context: C; 0 for none.
        hidden: sizes of the hidden layers; () for params that are linear in [kept, c]. With neither kept features
            nor a context, params are D P trained numbers and hidden has to be ().
        univariate: the map of one feature; Affine() when not given.
        activation: of the hidden units: relu, leaky_relu, elu, tanh, sigmoid, silu or softplus.
        skips: for each hidden layer an earlier one of its size, or None; () for none.
        linear: hidden layers that are fed on as they are.
        gates: hidden layers that the context scales.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: sizes below 1, features that do not exist, skips that do not fit, gates without a context.

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
            raise TypeError(f"expected univariate as an instance such as cf.Affine(), got {univariate!r}")
        self.activation = activation
        self.moved = tuple(moved)
        if not self.moved or len(set(self.moved)) < len(self.moved) or not set(self.moved) <= set(range(features)):
            raise ValueError(f"expected moved as different features of 0..{features - 1}, got {self.moved}")
        kept = [i for i in range(features) if i not in set(self.moved)]
        self.hidden = tuple(positive(size, f"hidden[{k}]") for k, size in enumerate(hidden))
        self.skips, self.linear, self.gates = tuple(skips), tuple(sorted(linear)), tuple(sorted(gates))
        self._check(len(kept) + self.context)
        self._links = check_links(self.hidden, self.skips, self.linear, alike="size")
        self.register_buffer("moves", torch.tensor(self.moved), persistent=False)
        self.register_buffer("stays", torch.tensor(kept, dtype=torch.long), persistent=False)
        self._f = activation_named(activation).f

        sizes = [len(kept) + self.context, *self.hidden]
        outputs = len(self.moved) * self.univariate.parameters
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, self.hidden, strict=False))
        self.gating = nn.ModuleDict({str(k): nn.Linear(self.context, self.hidden[k]) for k in self.gates})
        self.last = nn.Linear(sizes[-1], outputs) if sizes[-1] else None
        self.constant = None if sizes[-1] else nn.Parameter(torch.zeros(outputs))
        if self.last is not None:  # starts where the univariate map with zero parameters is, or near it, as in MADE
            nn.init.normal_(self.last.weight, std=3e-4 / sizes[-1] ** 0.5)
            nn.init.zeros_(self.last.bias)

    def _check(self, inputs: int) -> None:
        activation_named(self.activation)
        if self.hidden and not inputs:
            raise ValueError(f"expected hidden=() where nothing is kept and there is no context, got {self.hidden}")
        if self.gates and not self.context:
            raise ValueError(f"expected gates=() without a context, got {self.gates}")
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
        """Return x (..., D) and log|det dx/dy| (...). One pass as well: what is kept gives the same params."""
        y = prepare(self, y, c, "y")
        x, log_slope = self.univariate.inverse(y[..., self.moves], self._params(y, c))
        return self._merge(y, x), log_slope.sum(-1)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`: what is kept adds nothing."""
        x = prepare(self, x, c)
        y, log_slope = self.univariate.forward(x[..., self.moves], self._params(x, c))
        return self._merge(x, y), total.index_add(-1, self.moves, log_slope)

    def _merge(self, whole: Tensor, moved: Tensor) -> Tensor:
        return whole.index_copy(-1, self.moves, moved)

    def _params(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Parameters (..., moved, P)."""
        shape = (*x.shape[:-1], len(self.moved), self.univariate.parameters)
        if self.last is None:
            return self.constant.reshape(shape[-2:]).expand(shape)  # type: ignore[union-attr]  # one of both is there
        h = x[..., self.stays]
        if c is not None:
            c = c.expand(*x.shape[:-1], self.context)
            h = torch.cat([h, c], -1)

        def affine(k: int, v: Tensor) -> Tensor:
            out: Tensor = self.layers[k](v)
            return out * torch.sigmoid(self.gating[str(k)](c)) if k in self.gates else out

        _, out = self._links.propagate(affine, h, self._f)
        return self.last(out).to(x.dtype).reshape(shape)  # lower under autocast

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
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
