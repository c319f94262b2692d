"""What a posterior is fitted to: a log density over unconstrained space, and the way back to the model's variables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Array = npt.NDArray[Any]

TRIES = 100  # starting points that are drawn before a model is said to have none, as in Stan
RADIUS = 2.0  # they are uniform on (-2, 2), as in Stan


@final
class Target:
    """The log density of a model's free variables, moved to unconstrained space, where every theta (D,) is allowed.

        log p(theta) = log joint(x(theta), data) + log |det dx/dtheta|

    x(theta) are the constrained variables. Calling the target with theta (B, D) gives log p (B,) in float64, up to a
    constant, with a gradient by autograd (once: the tools give no second derivatives). The rows do not see each other.

    Arguments, which the `from_*` functions fill in:
        log_density   theta (B, D) -> (B,), differentiable; theta is float64 and B at least 1
        constrain     theta (S, D) -> name -> (S, *shape), the parameters first; S is at least 1
        unconstrain   the other way, from the parameters alone; None where the tool has none
        predictive    (theta, seed) -> name -> draws (S, *shape) of new data; None where the tool has none
        explain       theta (D,) -> which variables make log p there infinite or NaN, in words
        observed, dims, coords   the data by name, the dimensions' names of each variable, and the coordinates' labels,
                                 as ArviZ wants them

    Attributes:
        dim           D, the number of unconstrained coordinates
        coordinates   their names: "mu", "log(tau)", "theta[3]"
        parameters    the names in `constrain` that are free variables; the others are computed from them
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        constrain: Callable[[Tensor], dict[str, Tensor]],
        *,
        coordinates: tuple[str, ...],
        parameters: tuple[str, ...],
        unconstrain: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        predictive: Callable[[Tensor, int], dict[str, Array]] | None = None,
        explain: Callable[[Tensor], str] | None = None,
        observed: Mapping[str, Array] = MappingProxyType({}),
        dims: Mapping[str, Sequence[str]] = MappingProxyType({}),
        coords: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ) -> None:
        check_free(coordinates)
        self.dim, self.coordinates, self.parameters = len(coordinates), coordinates, parameters
        self.observed, self.dims, self.coords = dict(observed), dict(dims), dict(coords)
        self._log_density, self._constrain, self._unconstrain = log_density, constrain, unconstrain
        self._predictive, self._explain = predictive, explain

    def __call__(self, theta: Tensor) -> Tensor:
        """Log density (B,) of theta (B, D), in float64 and in nats, with the Jacobian of the constraints.

        Raises ValueError or TypeError for a theta of another shape or kind.
        """
        theta = self._checked(theta)
        return self._log_density(theta) if len(theta) else theta.sum(-1)

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        """The model's variables at theta (S, D): name -> (S, *shape), first the parameters, then what they imply."""
        theta = self._checked(theta.detach())
        with torch.no_grad():
            if len(theta):
                return self._constrain(theta)
            return {name: value[:0] for name, value in self._constrain(theta.new_zeros(1, self.dim)).items()}

    def unconstrain(self, values: Mapping[str, npt.ArrayLike | Tensor]) -> Tensor:
        """theta (S, D) at which the parameters have these values, name -> (S, *shape).

        Raises TypeError where the modelling tool does not offer it, and ValueError for parameters that are missing or
        differ in S.
        """
        if self._unconstrain is None:
            raise TypeError(
                "expected a target whose modelling tool maps values back to unconstrained space, got one that does "
                "not; work with theta itself"
            )
        missing = [name for name in self.parameters if name not in values]
        if missing:
            raise ValueError(f"expected values of {', '.join(self.parameters)}, got none of {', '.join(missing)}")
        tensors = {name: torch.as_tensor(values[name], dtype=torch.float64) for name in self.parameters}
        if len({tensor.shape[:1] for tensor in tensors.values()}) > 1 or not all(t.dim() for t in tensors.values()):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"expected values of shape (S, *shape), with one S for all, got {shapes}")
        with torch.no_grad():
            return self._unconstrain(tensors)

    def initial(self, n: int, seed: int) -> Tensor:
        """n starting points (n, D), uniform on (-2, 2), each with a finite log density and gradient.

        Raises ValueError when one of them is not found in 100 tries; it says which variables stood in the way.
        """
        generator = torch.Generator().manual_seed(seed)
        theta = torch.empty(n, self.dim, dtype=torch.float64)
        bad = torch.ones(n, dtype=torch.bool)
        for _ in range(TRIES):
            theta[bad] = RADIUS * (2 * torch.rand(int(bad.sum()), self.dim, generator=generator, dtype=theta.dtype) - 1)
            value, gradient = self._value_and_gradient(theta[bad])
            bad[bad.clone()] = ~(value.isfinite() & gradient.isfinite().all(-1))
            if not bad.any():
                return theta
        raise ValueError(
            f"expected a finite log density and gradient at one of {TRIES} random points in (-2, 2)^{self.dim}, got "
            f"none; {self._reason(theta[bad][0])}; look for data outside of a support and for wrong bounds"
        )

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        """Draws of new data, one for each row of theta (S, D): name -> (S, *shape); empty where the tool has none."""
        theta = self._checked(theta.detach())
        with torch.no_grad():
            return self._predictive(theta, seed) if self._predictive and len(theta) else {}

    def __repr__(self) -> str:
        return f"Target(dim={self.dim}, parameters={self.parameters})"

    def _checked(self, theta: Tensor) -> Tensor:
        if not (isinstance(theta, Tensor) and theta.is_floating_point()):
            came = f"a tensor of {theta.dtype}" if isinstance(theta, Tensor) else type(theta).__name__
            raise TypeError(
                f"expected theta to be a floating-point tensor, got {came}; convert it with torch.as_tensor"
            )
        if theta.dim() != 2 or theta.shape[1] != self.dim:
            raise ValueError(f"expected theta of shape (B, {self.dim}), got {tuple(theta.shape)}")
        return theta.to(torch.float64)

    def _value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        leaf = theta.clone().requires_grad_()
        with torch.enable_grad():
            value = self(leaf)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def _reason(self, theta: Tensor) -> str:
        value, gradient = self._value_and_gradient(theta[None])
        if value.isfinite():
            bad = (~gradient[0].isfinite()).nonzero().flatten().tolist()
            return f"the gradient is not finite for {', '.join(self.coordinates[i] for i in bad)}"
        reason = self._explain(theta) if self._explain else ""
        return reason or f"it is {value.item():g} with parameters {', '.join(self.parameters)}"


def check_free(variables: Sequence[Any]) -> None:
    """Raise ValueError for a model that leaves nothing to fit."""
    if not variables:
        raise ValueError(
            "expected a model with a free continuous variable, got none; leave one unobserved, or there is no "
            "posterior to fit"
        )


@dataclass(frozen=True)
class Layout:
    """Which coordinates of theta (..., D) are whose: the variables one after another, each flattened.

    shapes   name -> the shape of the variable's unconstrained form

        >>> layout = Layout({"mu": (), "theta": (2, 1)})
        >>> layout.split(torch.arange(3.0))
        {'mu': tensor(0.), 'theta': tensor([[1.], [2.]])}
        >>> layout.coordinates({"mu": "log(mu)"})
        ('log(mu)', 'theta[0,0]', 'theta[1,0]')
    """

    shapes: Mapping[str, tuple[int, ...]]

    def split(self, theta: Any) -> dict[str, Any]:
        """theta (..., D), a tensor or an array of any tool -> name -> (..., *shape)."""
        pieces, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            pieces[name] = theta[..., start:stop].reshape((*theta.shape[:-1], *shape))
            start = stop
        return pieces

    def join(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """name -> (S, *shape) becomes theta (S, D)."""
        return torch.cat([pieces[name].reshape(-1, math.prod(shape)) for name, shape in self.shapes.items()], -1)

    def coordinates(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        """D names, each variable called by its label, or by its own name where there is none."""
        return tuple(
            bracketed(labels.get(name, name), index)
            for name, shape in self.shapes.items()
            for index in np.ndindex(*shape)
        )


def bracketed(name: str, index: tuple[int, ...]) -> str:
    """An element of a variable: "theta[0,1]"; the name alone for an empty index."""
    return f"{name}[{','.join(map(str, index))}]" if index else name


def not_finite(terms: Mapping[str, float]) -> str:
    """Which terms of a log density are to blame, in words.

    >>> not_finite({"mu": -1.5, "y": -math.inf})
    'log p of y is -inf'
    """
    return ", ".join(f"log p of {name} is {value:g}" for name, value in terms.items() if not math.isfinite(value))


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Let torch make float64 of Python's numbers for a while: HalfCauchy(5.0) would else work in float32 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compiled(value_and_gradient: Callable[[Array], Sequence[Array]]) -> Callable[[Tensor], Tensor]:
    """A differentiable log density out of a tool's function, which is called once for the value and the gradient.

    value_and_gradient takes theta (B, D) and returns (B,) and (B, D), all in float64.

        >>> half_square = compiled(lambda theta: (-(theta**2).sum(1) / 2, -theta))
        >>> theta = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        >>> torch.autograd.grad(half_square(theta).sum(), theta)[0]
        tensor([[-1., -1.]], dtype=torch.float64)
    """

    def log_density(theta: Tensor) -> Tensor:
        return _Compiled.apply(theta, value_and_gradient)

    return log_density


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, value_and_gradient: Callable[[Array], Sequence[Array]]) -> Tensor:
        value, gradient = value_and_gradient(np.ascontiguousarray(theta.detach().cpu().numpy()))
        ctx.save_for_backward(torch.as_tensor(gradient, device=theta.device))
        return torch.as_tensor(value, device=theta.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return cotangent[:, None] * gradient, None
