"""Our flows inside Pyro 1.9: a transform for its guides and distributions, and an automatic guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from counterflow.checks import require
from counterflow.flows.recipes import stack
from counterflow.transforms.as_torch import AsTorch
from counterflow.transforms.base import Transform
from counterflow.univariate.base import Univariate

require("pyro", "pyro", "guides and transforms of Pyro's kind")
from pyro.distributions import TransformModule  # noqa: E402
from pyro.infer.autoguide import AutoNormalizingFlow  # noqa: E402


class PyroTransform(AsTorch, TransformModule):  # type: ignore[misc]  # Pyro is not imported by the type checker
    """Transform as a `pyro.distributions.TransformModule`, whose weights Pyro finds and trains.

    The last pair (x, y) is kept, so that the density of a draw costs no second pass.

    Args:
        transform: the transform, from x (..., D) to y (..., D).
        c: the context (..., C), or None.
        cache_size: 1 to keep the last pair, 0 to keep nothing.

    Example:
        >>> import torch, pyro.distributions as dist, counterflow as cf
        >>> from counterflow.interop.pyro import PyroTransform
        >>> t = PyroTransform(cf.IAF(3, layers=2, hidden=(16,), seed=0).transform)
        >>> q = dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [t])
        >>> q.log_prob(q.rsample((5,))).shape
        torch.Size([5])
    """

    def __init__(self, transform: Transform, c: Tensor | None = None, cache_size: int = 1) -> None:
        super().__init__(transform, c, cache_size)


class AutoIAF(AutoNormalizingFlow):  # type: ignore[misc]
    """Automatic guide: an inverse autoregressive flow over all latent variables of a model, unconstrained.

    It takes the place of `AutoIAFNormal`. Each step of SVI draws from the flow, and scores the draw, in one pass. The
    guide works with `SVI`, `Predictive` and `NeuTraReparam`, and its density of other points costs one pass as well.

    Args:
        model: model of Pyro.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of each layer's network, or a function of the number of latent variables;
            two layers, each twice as wide as the number of latent variables and at least 32, when not given.
        univariate: map of one feature; cf.Affine() when not given.
        activation: activation of the hidden units.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from counterflow.interop.pyro import AutoIAF
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Gamma(torch.tensor(2.0), x.exp()))
        >>> guide = AutoIAF(model, layers=2)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), pyro.infer.Trace_ELBO())
        >>> isinstance(svi.step(), float), sorted(guide())
        (True, ['x', 'y'])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        layers: int = 3,
        hidden: Sequence[int] | Callable[[int], Sequence[int]] | None = None,
        *,
        univariate: Univariate | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__(model, partial(_transform, layers, hidden or _default_hidden, univariate, activation))


def _default_hidden(features: int) -> tuple[int, int]:
    return (max(32, 2 * features),) * 2


def _transform(
    layers: int,
    hidden: Sequence[int] | Callable[[int], Sequence[int]],
    univariate: Univariate | None,
    activation: str,
    features: int,
) -> PyroTransform:
    """Build the transform of `AutoIAF` for this number of latent variables."""
    sizes = hidden(features) if callable(hidden) else hidden
    return PyroTransform(stack(features, 0, layers, sizes, univariate, activation))
