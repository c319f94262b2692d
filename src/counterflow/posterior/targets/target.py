"""Targets: log densities over unconstrained space, with the map to the model's variables."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from counterflow.checks import positive
from counterflow.posterior.targets.memory import MAX_POINTS, points_at_once

Array = npt.NDArray[Any]
EMPTY: Mapping[str, Any] = MappingProxyType({})

MAX_TRIES = 100  # random draws of a starting point before a model counts as having none, as in Stan
FEW_POINTS = 3  # a batch of no more than this is evaluated at once without measuring memory
INITIAL_RADIUS = 2.0  # starting points are uniform on (-2, 2), as in Stan


class Program(ABC):
    """Interface to a model of one modelling tool with its data, from which `Target` is made.

    theta is float64 and has at least one row, and at most `Target.max_points`. The methods that are not abstract have
    defaults for tools that lack the feature. A program whose model has an initial point, or can be drawn from, has
    another method besides, `initial_points`, which becomes that of `Target`.

    Attributes:
        coordinates: names of the D unconstrained coordinates: "mu", "log(tau)", "theta[3]".
        parameters: names in `constrain` that are free variables.
        discrete: names of the variables that are summed out of the density.
        observed: the data by name, as ArviZ wants them.
        constants: the data that are not observations, such as predictors, by name.
        dims: names of the dimensions of each variable, as ArviZ wants them.
        coords: labels along each dimension, as ArviZ wants them.
    """

    coordinates: tuple[str, ...]
    parameters: tuple[str, ...]
    discrete: tuple[str, ...] = ()
    observed: Mapping[str, Array] = EMPTY
    constants: Mapping[str, Array] = EMPTY
    dims: Mapping[str, Sequence[str]] = EMPTY
    coords: Mapping[str, Sequence[Any]] = EMPTY

    @abstractmethod
    def log_density(self, theta: Tensor) -> Tensor:
        """Return the log density (B,) of theta (B, D), differentiable."""

    @abstractmethod
    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        """Return name -> (S, *shape) at theta (S, D), the parameters first."""

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return theta (S, D) of the parameters, name -> (S, *shape)."""
        raise TypeError(
            "expected a target whose modelling tool maps values back to unconstrained space, got one that does not; "
            "work with theta itself"
        )

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        """Return one draw of new data for each row of theta (S, D): name -> (S, *shape)."""
        return {}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the log likelihood of each observation at theta (S, D): name of the data -> (S, *shape)."""
        return {}

    def sample_discrete(self, theta: Tensor, seed: int) -> dict[str, Tensor]:
        """Return one draw of the discrete variables, given theta (S, D) and the data: name -> (S, *shape)."""
        raise NotImplementedError

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        """Return parameters drawn from the prior, name -> (*shape), and the target of data drawn given them."""
        raise TypeError(
            "expected a model from which parameters and data can be drawn, got one of Stan or of torch; write it for "
            "PyMC, Pyro or NumPyro, or pass simulate= to from_torch"
        )

    def bytes_per_point(self, theta: Tensor) -> float:
        """Return about how much memory each point takes in `log_density` with its gradient.

        Args:
            theta: one point (1, D), at which it may be measured.
        """
        return 0.0

    def explain(self, theta: Tensor) -> str:
        """Return which terms of the log density at theta (D,) are not finite; "" if unknown."""
        return ""


class NoStartingPointError(ValueError):
    """No point with a finite log density and gradient was found."""


@final
class Target:
    """Log density of a model's free variables, moved to unconstrained space, where every theta (D,) is allowed.

        log p(theta) = log joint(x(theta), data) + log |det dx/dtheta|

    x(theta) are the constrained variables. Calling the target with theta (B, D) returns log p (B,) in float64, up to a
    constant, with a gradient by autograd (once: the tools give no second derivatives). Rows are independent. The
    `from_*` functions make targets.

    More than `max_points` points are evaluated in parts, so that memory stays bounded whatever the number of data is.

    Args:
        program: the model.

    Attributes:
        dim: D, the number of unconstrained coordinates.
        coordinates: their names: "mu", "log(tau)", "theta[3]".
        parameters: the names in `constrain` that are free variables; the others are computed from them.
        discrete: the names of the discrete variables, which are summed out of the density.
        observed: the data by name.
        constants: the data that are not observations, such as predictors, by name.
        dims: names of the dimensions of each variable.
        coords: labels along each dimension.
        initial_points: (n, generator) -> n points (n, D) to start from: the model's own initial point first, then draws
            of its prior; None for tools without them. Their log density may be infinite.

    Raises:
        ValueError: the model has no free variable.
    """

    initial_points: Callable[[int, torch.Generator], Tensor] | None

    def __init__(self, program: Program) -> None:
        check_has_free_variables(program.coordinates)
        self.dim = len(program.coordinates)
        self.coordinates = tuple(program.coordinates)
        self.parameters = tuple(program.parameters)
        self.discrete = tuple(program.discrete)
        self.observed = dict(program.observed)
        self.constants = dict(program.constants)
        self.dims = dict(program.dims)
        self.coords = dict(program.coords)
        self.initial_points = getattr(program, "initial_points", None)
        self._program = program
        self._max_points: int | None = None
        self._is_repeatable = False

    @property
    def max_points(self) -> int:
        """Number of points that are evaluated at once: 1024, or fewer where that is faster or keeps within 1 GB.

        It follows from the memory that a point takes, measured at the first evaluation, and may be set.
        """
        if self._max_points is None:
            self._measure(torch.zeros(1, self.dim, dtype=torch.float64))
        return self._max_points or MAX_POINTS

    @max_points.setter
    def max_points(self, value: int) -> None:
        self._max_points = positive(value, "max_points")

    def __call__(self, theta: Tensor) -> Tensor:
        """Return the log density (B,) of theta (B, D), in float64 and in nats, with the Jacobian of the constraints.

        Raises:
            TypeError: theta is not a floating-point tensor.
            ValueError: theta has another shape, or the model has another log density at every call.
        """
        theta = self._checked(theta)
        if not len(theta):
            return theta.sum(-1)
        value = self._log_density(theta)
        if not self._is_repeatable:
            self._check_repeatable(theta[:1].detach(), value[0].item())
        return value

    def constrain(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the model's variables at theta (S, D): name -> (S, *shape), first the parameters, then derived ones.

        Raises:
            TypeError: theta is not a floating-point tensor.
            ValueError: theta has another shape.
        """
        theta = self._checked(theta.detach())
        with torch.no_grad():
            if not len(theta):
                one_row = self._program.constrain(theta.new_zeros(1, self.dim))
                return {name: value[:0] for name, value in one_row.items()}
            parts = [self._program.constrain(part) for part in theta.split(self.max_points)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def unconstrain(self, values: Mapping[str, npt.ArrayLike | Tensor]) -> Tensor:
        """Return theta (S, D) at which the parameters have the values, name -> (S, *shape).

        Raises:
            TypeError: the modelling tool does not offer it.
            ValueError: parameters are missing, or they differ in S.
        """
        missing = [name for name in self.parameters if name not in values]
        if missing:
            raise ValueError(f"expected values of {', '.join(self.parameters)}, got none of {', '.join(missing)}")
        tensors = {name: torch.as_tensor(values[name], dtype=torch.float64) for name in self.parameters}
        if len({tensor.shape[:1] for tensor in tensors.values()}) > 1 or not all(t.dim() for t in tensors.values()):
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise ValueError(f"expected values of shape (S, *shape), with one S for all, got {shapes}")
        with torch.no_grad():
            return self._program.unconstrain(tensors)

    def initial(self, n: int, seed: int, *, radius: float = INITIAL_RADIUS, center: Tensor | float = 0.0) -> Tensor:
        """Return n starting points (n, D), each with a finite log density and gradient.

        Args:
            n: number of points.
            seed: seed of the points.
            radius: half the width of the uniform distribution from which each coordinate is drawn.
            center: its middle, (D,) or 0.

        Raises:
            NoStartingPointError: at least one point was not found; the message names the variables that prevent it.
        """
        generator = torch.Generator().manual_seed(seed)
        theta = torch.empty(n, self.dim, dtype=torch.float64)
        bad = torch.ones(n, dtype=torch.bool)
        for _ in range(MAX_TRIES):
            uniform = torch.rand(int(bad.sum()), self.dim, generator=generator, dtype=theta.dtype)
            theta[bad] = center + radius * (2 * uniform - 1)
            value, gradient = self._value_and_gradient(theta[bad])
            bad[bad.clone()] = ~(value.isfinite() & gradient.isfinite().all(-1))
            if not bad.any():
                return theta
        place = (
            f"in ({-radius:g}, {radius:g})^{self.dim}" if isinstance(center, float) else f"within {radius:g} of a point"
        )
        raise NoStartingPointError(
            f"expected a finite log density and gradient at one of {MAX_TRIES} random points {place}, got none; "
            f"{self.explain(theta[bad][0])}; look for data outside of a support and for wrong bounds"
        )

    def predictive(self, theta: Tensor, seed: int) -> dict[str, Array]:
        """Return one draw of new data for each row of theta (S, D): name -> (S, *shape); empty if the tool has none."""
        theta = self._checked(theta.detach())
        if not len(theta):
            return {}
        parts = theta.split(self.max_points)
        seeds = [seed, *np.random.SeedSequence(seed).generate_state(len(parts) - 1).tolist()]
        with torch.no_grad():
            draws = [self._program.predictive(part, seed) for part, seed in zip(parts, seeds, strict=True)]
        return {name: np.concatenate([part[name] for part in draws]) for name in draws[0]}

    def log_likelihood(self, theta: Tensor) -> dict[str, Tensor]:
        """Return the log likelihood of each observation at theta (S, D), in nats.

        PyMC, Pyro and NumPyro give it for every observed variable without discrete variables that are summed out, a
        Stan program as its generated quantities `log_lik` or `log_lik_...`, and a function of torch by the argument
        log_likelihood of `from_torch`.

        Returns:
            name -> (S, *shape); empty if the model does not give it.

        Raises:
            TypeError: theta is not a floating-point tensor.
            ValueError: theta has another shape.
        """
        theta = self._checked(theta.detach())
        with torch.no_grad():
            parts = [self._program.log_likelihood(part) for part in theta.split(self.max_points)] if len(theta) else []
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def simulate(self, seed: int) -> tuple[dict[str, Tensor], Target]:
        """Draw parameters from the prior and data given them, for simulation-based calibration.

        Args:
            seed: seed of both.

        Returns:
            The parameters, name -> (*shape), and the same model with the data in place of its own. This target may
            change at the next call.

        Raises:
            TypeError: parameters and data cannot be drawn from the model, as from Stan's programs.
            ValueError: an improper prior, or terms of the density that are not those of a variable.
        """
        with torch.no_grad():
            return self._program.simulate(seed)

    def sample_discrete(self, theta: Tensor, seed: int = 0) -> dict[str, Tensor]:
        """Return one draw of the discrete variables from their distribution given theta (S, D) and the data.

        Given draws theta of the posterior, these are draws of the discrete variables from the posterior.

        Returns:
            name -> (S, *shape), in the dtype of the tool; empty for a model without discrete variables.

        Raises:
            TypeError: theta is not a floating-point tensor.
            ValueError: theta has another shape.
        """
        theta = self._checked(theta.detach())
        if not self.discrete or not len(theta):
            return {}
        with torch.no_grad():
            return self._program.sample_discrete(theta, seed)

    def __repr__(self) -> str:
        return f"Target(dim={self.dim}, parameters={self.parameters})"

    def _checked(self, theta: Tensor) -> Tensor:
        if not (isinstance(theta, Tensor) and theta.is_floating_point()):
            kind = f"a tensor of {theta.dtype}" if isinstance(theta, Tensor) else type(theta).__name__
            raise TypeError(
                f"expected theta to be a floating-point tensor, got {kind}; convert it with torch.as_tensor"
            )
        if theta.dim() != 2 or theta.shape[1] != self.dim:
            raise ValueError(f"expected theta of shape (B, {self.dim}), got {tuple(theta.shape)}")
        return theta.to(torch.float64)

    def _value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        leaf = theta.clone().requires_grad_()
        with torch.enable_grad():
            value = self(leaf)
            return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]

    def _log_density(self, theta: Tensor) -> Tensor:
        """Return the log density (B,), in parts of at most `max_points` points."""
        if len(theta) <= FEW_POINTS:  # as many as a measurement takes
            return self._program.log_density(theta)
        if self._max_points is None:
            self._measure(theta[:1].detach())
        if len(theta) <= self.max_points:
            return self._program.log_density(theta)
        parts = theta.split(self.max_points)
        if not (torch.is_grad_enabled() and theta.requires_grad):
            return torch.cat([self._program.log_density(part) for part in parts])
        values, gradients = zip(*(self._value_and_gradient(part.detach()) for part in parts), strict=True)
        return _KnownGradient.apply(theta, torch.cat(values), torch.cat(gradients))

    def _measure(self, theta: Tensor) -> None:
        self._max_points = points_at_once(self._program.bytes_per_point(theta))

    def _check_repeatable(self, theta: Tensor, value: float) -> None:
        """Raise ValueError if another evaluation at a point (1, D) differs from the first, which is finite."""
        if not math.isfinite(value):
            return
        with torch.no_grad():
            again = self._program.log_density(theta).item()
        if not math.isclose(value, again, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"expected the same log density at every call, got {value:g} and then {again:g} at one point: it draws "
                "random numbers, such as a part of the data, or the rows of a batch depend on each other; use all data "
                "and no noise"
            )
        self._is_repeatable = True

    def explain(self, theta: Tensor) -> str:
        """Return why the log density at theta (D,), or its gradient, is not finite: the variables to blame."""
        value, gradient = self._value_and_gradient(theta[None])
        if value.isfinite():
            bad = (~gradient[0].isfinite()).nonzero().flatten().tolist()
            return f"the gradient is not finite for {', '.join(self.coordinates[i] for i in bad)}"
        reason = self._program.explain(theta)
        return reason or f"it is {value.item():g} with parameters {', '.join(self.parameters)}"


def check_has_free_variables(variables: Sequence[Any]) -> None:
    """Raise ValueError for a model without free variables."""
    if not variables:
        raise ValueError(
            "expected a model with a free continuous variable, got none; leave one unobserved, or there is no "
            "posterior to fit"
        )


def check_simulates(terms: Sequence[str], improper: Sequence[str] = ()) -> None:
    """Raise ValueError for a model with terms that are not those of a variable, or with improper priors."""
    if terms or improper:
        kind, names = ("terms that belong to no variable", terms) if terms else ("improper priors", improper)
        raise ValueError(
            f"expected a model from which parameters and data can be drawn, got {kind}: {', '.join(names)}; write them "
            "as variables with distributions"
        )


def describe_nonfinite(terms: Mapping[str, float]) -> str:
    """Return which terms of a log density are infinite or NaN.

    Example:
        >>> describe_nonfinite({"mu": -1.5, "y": -math.inf})
        'log p of y is -inf'
    """
    return ", ".join(f"log p of {name} is {value:g}" for name, value in terms.items() if not math.isfinite(value))


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Set torch's default dtype to float64, so that Python numbers are exact: HalfCauchy(5.0) works in that dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def log_density_with_gradient(value_and_gradient: Callable[[Array], Sequence[Array]], theta: Tensor) -> Tensor:
    """Return the log density (B,) of theta (B, D), differentiable, by one call of a tool's function.

    Args:
        value_and_gradient: theta (B, D) -> (B,) and (B, D), arrays in float64.
        theta: the points.

    Example:
        >>> theta = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        >>> value = log_density_with_gradient(lambda theta: (-(theta**2).sum(1) / 2, -theta), theta)
        >>> torch.autograd.grad(value.sum(), theta)[0]
        tensor([[-1., -1.]], dtype=torch.float64)
    """
    value, gradient = value_and_gradient(np.ascontiguousarray(theta.detach().cpu().numpy()))
    return _KnownGradient.apply(
        theta, torch.as_tensor(value, device=theta.device), torch.as_tensor(gradient, device=theta.device)
    )


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return cotangent[:, None] * gradient, None, None
