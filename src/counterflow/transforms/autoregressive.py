"""Autoregressive transform: MADE computes the parameters of a univariate map, and substitution inverts both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from counterflow.checks import positive
from counterflow.engine.chain import Pass, Stage, supports
from counterflow.engine.contract import Body, Layout, Solution, System
from counterflow.engine.solve import body_for, check_solver, is_transformed, solve, univariate_forward, without_autocast
from counterflow.made.architecture import Architecture
from counterflow.made.derived import Derived
from counterflow.made.graph import check_adjacency, longest_paths
from counterflow.made.network import MADE
from counterflow.made.staircase import Staircase
from counterflow.transforms.base import Transform, prepare
from counterflow.transforms.chain import joined
from counterflow.univariate.affine import Affine
from counterflow.univariate.base import Univariate


class Autoregressive(Derived, Transform):
    """Invertible map with a triangular Jacobian, y_i = g(x_i; params_i(x_j with d_j < d_i, c)).

    `forward` is one pass through a masked network, with log_det = sum_i log dy_i/dx_i. `inverse` is forward
    substitution: it solves for the features degree by degree, reads each weight once, and costs about one pass as well.
    Both are differentiable in x or y, the context and every weight; the inverse only once.

    Args:
        features: D.
        context: C; 0 for no context.
        hidden: sizes of the hidden layers.
        univariate: map of one feature; Affine() when not given.
        degrees: D degrees d_i that use every number of 1..G; 1, 2, ..., D when not given. Features of equal degree do
            not depend on each other, so that degrees (1, 1, 2, 2) give a coupling layer.
        activation: activation of the hidden units: relu, leaky_relu, elu, tanh, sigmoid, silu or softplus.
        architecture: connections between the layers, such as `Architecture.residual(blocks=2)`; a plain sequence of
            layers when not given.
        adjacency: (D, D), nonzero at [i, j] if y_i depends on x_j, for a graph without cycles; the diagonal does not
            count. The degrees are then the lengths of the longest paths, so a solve takes as many steps as the longest
            path has features. In a chain of such layers a feature sees its ancestors.

    Attributes:
        solver: implementation of the substitution: "cpu", compiled with Numba, for Affine, Gated,
            RationalQuadraticSpline and ForeignAffine; "sliced", in torch operations, for any device and any univariate
            map; "gpu", Triton kernels for CUDA (see docs/gpu.md); "reference", D passes, the definition; or "auto",
            which is "cpu" if it supports the map and the device and "sliced" otherwise.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: sizes below 1, degrees with gaps, an unknown activation, an architecture that does not fit, a graph
            with a cycle, or fewer hidden units than different sets of parents.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow", section 3;
    Papamakarios et al. 2017, "Masked Autoregressive Flow for Density Estimation", section 3. The solve is described in
    docs/engine.md.

    Example:
        >>> import torch, counterflow as cf
        >>> t = cf.Autoregressive(features=3, hidden=(16, 16))
        >>> y, log_det = t(torch.randn(5, 3))
        >>> x, inverse_log_det = t.inverse(y)
        >>> torch.allclose(t(x)[0], y, atol=1e-6), torch.allclose(log_det, -inverse_log_det, atol=1e-6)
        (True, True)
    """

    inverse_cost = "forward substitution"

    order: Tensor
    places: Tensor

    def __init__(
        self,
        features: int,
        context: int = 0,
        hidden: Sequence[int] = (256, 256),
        univariate: Univariate | None = None,
        degrees: Sequence[int] | None = None,
        activation: str = "relu",
        *,
        architecture: Architecture | None = None,
        adjacency: Sequence[Sequence[int]] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.features = positive(features, "features")
        self.context = positive(context, "context") if context else 0
        self.univariate = Affine() if univariate is None else univariate
        if not isinstance(self.univariate, Univariate):
            raise TypeError(f"expected univariate to be an instance such as cf.Affine(), got {univariate!r}")
        self.parents = None if adjacency is None else check_adjacency(adjacency, features)
        if self.parents is not None:
            if degrees is not None:
                raise ValueError("expected degrees or adjacency, which gives degrees of its own, got both")
            degrees = longest_paths(self.parents)
        self.degrees = _check_degrees(degrees, features)
        self.activation = activation
        # The network and the solver use the features sorted by degree; x and y keep their order.
        self._sorted = sorted(self.degrees) == list(self.degrees)
        self.register_derived()
        P = self.univariate.parameters
        self.made = MADE(sorted(self.degrees), P, hidden, activation, self.context, architecture, self._sorted_parents)
        self.hidden, self.architecture = tuple(hidden), architecture
        self._layout = Layout(self.made.ends, self.made.activation, self.univariate, self.made.links)
        self._pass = Pass(self._layout, self._sorting[0], self.context)
        self.solver = "auto"

    def derived(self) -> dict[str, Tensor]:
        """See `Derived`."""
        order, places = (torch.tensor(indices, device="cpu") for indices in self._sorting)
        return {"order": order, "places": places}

    @property
    def _sorting(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Features in order of degree, and the place of each in that order."""
        order = sorted(range(self.features), key=self.degrees.__getitem__)
        return tuple(order), tuple(sorted(range(self.features), key=order.__getitem__))

    @property
    def _sorted_parents(self) -> list[tuple[int, ...]] | None:
        """Parents in the network, whose features are sorted by degree."""
        if self.parents is None:
            return None
        order, places = self._sorting
        return [tuple(sorted(places[j] for j in self.parents[i])) for i in order]

    @property
    def solver(self) -> str:
        """Name of the implementation of the substitution."""
        return self._solver

    @solver.setter
    def solver(self, name: str) -> None:
        self._solver = check_solver(name)

    @property
    def _staircases(self) -> tuple[Staircase, ...]:
        return tuple(layer.staircase for layer in self.made.masked_layers())

    def _body(self, y: Tensor, system: System) -> Body:
        return body_for(self._solver, self._layout, y, *system.weights, *system.biases)

    def forward(self, x: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y (..., D) and log|det dy/dx| (...). One pass."""
        x = self._prepare(x, c, "x")
        compiled = joined(self, x, c)
        if compiled is not None:
            return compiled.forward(x, c)
        y, log_slope = self._forward(x, c)
        return y, log_slope.sum(-1)

    def stages(self, inverse: bool) -> tuple[list[Stage], list[Tensor]] | None:
        """See `Transform.stages`."""
        layers, contexts = self.made.masked_layers(), tuple(self.made.contexts.values())
        modules = (self, self.made, *layers, *contexts)
        if (
            inverse
            or self._solver not in ("auto", "cpu")
            or type(self) is not Autoregressive
            or any(m._forward_hooks or m._forward_pre_hooks for m in modules)
            or not self._is_compiled
        ):
            return None
        tensors: list[Any] = [layer.weight for layer in contexts]
        for layer in layers:
            tensors += [layer.graph_weight, layer.bias]
        return [self._pass], tensors

    @cached_property
    def _is_compiled(self) -> bool:
        """True if `engine.chain` can run this layer: a plain network, with the context in its first layer."""
        architecture = self.architecture or Architecture()
        usual = tuple(architecture.contexts) == (0,) and not architecture.activated_contexts
        return (usual or not self.context) and supports(self._pass)

    def forward_by_feature(self, x: Tensor, total: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Transform.forward_by_feature`."""
        x = self._prepare(x, c, "x")
        compiled = joined(self, x, c)
        if compiled is not None:
            return compiled.by_feature(x, total, c)
        y, log_slope = self._forward(x, c)
        return y, total + self._unsort(log_slope)

    def inverse(self, y: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x (..., D) with f(x) = y, and log|det dx/dy| (...). One forward substitution.

        It runs in at least float32, also under autocast, since an error in an early feature would grow through the
        later ones. The results have the dtype of the weights.
        """
        y = self._prepare(y, c, "y")
        dtype = torch.promote_types(y.dtype, self.made.dtype)
        with without_autocast(y.device.type):
            y, c = _at_least_float32(y), None if c is None else c.to(self.made.dtype)
            if is_transformed():
                x, log_det = self.inverse_by_passes(y, c)
                return x.to(dtype), log_det.to(dtype)
            flat = self._sort(y).reshape(-1, self.features)
            system = self._system(y, c)
            x, log_det = solve(self._body(y, system), system, self._staircases, flat)
        return self._unsort(x.reshape(y.shape)).contiguous().to(dtype), log_det.reshape(y.shape[:-1]).to(dtype)

    def inverse_by_passes(self, y: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `inverse` returns, by one pass per degree: operations that torch.func transforms and exports."""
        target = self._sort(y)
        x = torch.zeros_like(target)
        for _ in range(self._layout.groups):
            x, log_slope = self.univariate.inverse(target, self.made(x.to(self.made.dtype), c).to(x.dtype))
        return self._unsort(x), log_slope.sum(-1)

    def push_score(self, x: Tensor, score: Tensor, c: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Transform.push_score`; one pass, then one back substitution."""
        x = self._prepare(x, c, "x")
        compiled = joined(self, x, c)
        if compiled is not None:
            return compiled.push_score(x, score, c)
        flat = self._sort(x).reshape(-1, self.features)
        rows = None if c is None else c.expand(*x.shape[:-1], self.context).reshape(-1, self.context)
        params, hidden = self.made.run(flat, rows)
        params = params.to(flat.dtype)  # autocast may have lowered the precision, also of hidden
        y, log_slope = self.univariate.forward(flat, params)
        log_det = log_slope.sum(1)
        with torch.no_grad(), without_autocast(x.device.type):
            wide = _at_least_float32(flat)
            solution = Solution(wide, -log_det.to(wide), params.to(wide), tuple(a.to(wide) for a in hidden))
            v = self._sort(score.expand(x.shape)).reshape(flat.shape).to(wide)
            w = torch.ones_like(solution.log_det)
            system = self._system(wide, rows)
            u = self._body(wide, system).back_substitution(system, solution, v, w).u.to(x.dtype)
        return self._unsort(y.reshape(x.shape)), log_det.reshape(x.shape[:-1]), self._unsort(u.reshape(x.shape))

    def _prepare(self, x: Tensor, c: Tensor | None, name: str) -> Tensor:
        """Call `prepare`, and raise TypeError if x or c has another dtype than the weights."""
        expanded = prepare(self, x, c, name)
        dtype = self.made.dtype
        for label, value in ((name, x), ("c", c)):
            if value is not None and value.dtype != dtype and not torch.is_autocast_enabled(value.device.type):
                raise TypeError(
                    f"expected {label} of {dtype}, got {value.dtype}; convert it with .to({dtype}), or the flow"
                )
        return expanded

    def _forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._sort(x)
        y, log_slope = univariate_forward(self._solver, self.univariate, x, self.made(x, c).to(x.dtype))
        return self._unsort(y), log_slope

    def _system(self, like: Tensor, c: Tensor | None) -> System:
        """Return the system for the rows of `like` (..., D), its batch shape flattened, in at least float32."""
        layers = self.made.masked_layers()
        biases: list[Tensor] = [layer.bias for layer in layers]
        if self.made.skip_to_output is not None:  # both of the last layers compute the parameters
            biases[-2:] = [biases[-2] + biases[-1]]
        for k, shift in self.made.shifts(c).items():
            bias = biases[k] + shift
            biases[k] = bias.expand(*like.shape[:-1], -1).reshape(-1, bias.shape[-1])
        weights = (_at_least_float32(layer.graph_weight) for layer in layers)
        return System(self._layout, tuple(weights), tuple(_at_least_float32(bias) for bias in biases))

    def _sort(self, x: Tensor) -> Tensor:
        return x if self._sorted else x[..., self.order]

    def _unsort(self, x: Tensor) -> Tensor:
        return x if self._sorted else x[..., self.places]

    @property
    def adjacency(self) -> list[list[int]] | None:
        """Matrix (D, D), 1 at [i, j] if y_i depends on x_j in its parameters; None for a layer without a graph."""
        if self.parents is None:
            return None
        return [[int(j in seen) for j in range(self.features)] for seen in self.parents]

    def config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        natural = self.degrees == tuple(range(1, self.features + 1))
        return {
            "features": self.features,
            "context": self.context,
            "hidden": list(self.hidden),
            "univariate": self.univariate,
            "degrees": None if natural or self.parents is not None else list(self.degrees),
            "activation": self.activation,
            "architecture": self.architecture,
            "adjacency": self.adjacency,
        }

    def __repr__(self) -> str:
        groups = self._layout.groups
        degrees = "" if groups == self.features else f", degrees 1..{groups}"
        if self.parents is not None:
            degrees = f", graph of {sum(map(len, self.parents))} edges{degrees}"
        return (
            f"Autoregressive(features={self.features}, context={self.context}, hidden={self.hidden}, "
            f"univariate={self.univariate}, activation={self.activation!r}{degrees}, solver={self._solver!r})"
        )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_degrees(degrees: Sequence[int] | None, features: int) -> tuple[int, ...]:
    if degrees is None:
        return tuple(range(1, features + 1))
    given = tuple(degrees)
    if any(d != int(d) for d in given) or len(given) != features or min(given) < 1 or len(set(given)) != max(given):
        raise ValueError(
            f"expected {features} degrees that use every number of 1..G, got {given}; "
            "for example (1, 1, 2, 2) for a coupling layer of four features"
        )
    return given
