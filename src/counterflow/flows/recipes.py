"""Flows with common architectures: IAF, MAF, NSF and Coupling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, get_args

import torch

from counterflow.checks import one_of, positive
from counterflow.flows.bases import StandardNormal
from counterflow.flows.flow import Flow
from counterflow.made.derived import with_values
from counterflow.random import seeded
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Permute
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline

Order = Literal["reversed", "random", "same"]


def stack(
    features: int,
    context: int,
    layers: int,
    hidden: Sequence[int],
    univariate: Univariate | None = None,
    activation: str = "relu",
    order: Order = "reversed",
    seed: int | None = None,
    *,
    degrees: Sequence[int] | None = None,
) -> Compose:
    """Compose autoregressive layers, and permutations between them unless order is "same".

    Args:
        features: D.
        context: C; 0 for no context.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of the network of each layer.
        univariate: map of one feature; cf.Affine() when not given.
        activation: activation of the hidden units.
        order: change of the order of the features between layers: "reversed", "random" or "same".
        seed: seed of the initial weights and of random orders; torch's global generator when not given.
        degrees: degrees of the features in every layer, see `Autoregressive`; 1, 2, ..., D when not given.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: a size below 1, or a name that does not exist.
    """
    one_of(order, "order", get_args(Order))
    positive(features, "features")
    transforms: list[Transform] = []
    with nullcontext() if seed is None else seeded(seed):
        for k in range(positive(layers, "layers")):
            if k and order != "same":
                transforms.append(Permute(range(features)[::-1] if order == "reversed" else _shuffled(features)))
            transforms.append(Autoregressive(features, context, hidden, univariate, degrees, activation))
    return Compose(transforms)


def _shuffled(n: int) -> list[int]:
    with with_values():
        return torch.randperm(n, device="cpu").tolist()


def IAF(
    features: int,
    context: int = 0,
    layers: int = 5,
    hidden: Sequence[int] = (256, 256),
    *,
    univariate: Univariate | None = None,
    activation: str = "relu",
    order: Order = "reversed",
    seed: int | None = None,
) -> Flow:
    """Inverse autoregressive flow: samples in one pass, scores by forward substitution.

        z = f_layers(... f_1(eps; c) ...; c),    eps ~ N(0, I),    log q(z) = log N(eps; 0, I) - sum of the log_det

    Use it for variational inference, which needs samples and their log density. The density of another point costs
    about one pass as well, where other libraries take D passes.

    Args:
        features: D.
        context: C, the size of the context c; 0 for no context.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of the network of each layer.
        univariate: map of one feature: cf.Affine() when not given, cf.Gated(), cf.RationalQuadraticSpline(), ...
        activation: activation of the hidden units, for example "relu", "elu", "silu" or "tanh".
        order: change of the order of the features between layers: "reversed", "random" or "same".
        seed: seed of the initial weights and of random orders; torch's global generator when not given.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: a size below 1, or a name that does not exist.

    Source: Kingma et al. 2016, "Improving Variational Inference with Inverse Autoregressive Flow", algorithm 1.

    Example:
        >>> import counterflow as cf
        >>> q = cf.IAF(features=4, layers=2, hidden=(32,), seed=0)()
        >>> z, log_q = q.rsample_and_log_prob((100,))
        >>> z.shape, log_q.shape
        (torch.Size([100, 4]), torch.Size([100]))
    """
    transform = stack(features, context, layers, hidden, univariate, activation, order, seed)
    return Flow(StandardNormal(features), transform)


def MAF(
    features: int,
    context: int = 0,
    layers: int = 5,
    hidden: Sequence[int] = (256, 256),
    *,
    univariate: Univariate | None = None,
    activation: str = "relu",
    order: Order = "reversed",
    seed: int | None = None,
) -> Flow:
    """Masked autoregressive flow: scores in one pass, samples by forward substitution.

        eps = f_layers(... f_1(x; c) ...; c),    log p(x) = log N(eps; 0, I) + sum of the log_det

    Use it for density estimation.

    Args:
        features: D.
        context: C, the size of the context c; 0 for no context.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of the network of each layer.
        univariate: map of one feature: cf.Affine() when not given, cf.Gated(), cf.RationalQuadraticSpline(), ...
        activation: activation of the hidden units, for example "relu", "elu", "silu" or "tanh".
        order: change of the order of the features between layers: "reversed", "random" or "same".
        seed: seed of the initial weights and of random orders; torch's global generator when not given.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: a size below 1, or a name that does not exist.

    Source: Papamakarios et al. 2017, "Masked Autoregressive Flow for Density Estimation", section 3.

    Example:
        >>> import torch, counterflow as cf
        >>> flow = cf.MAF(features=4, layers=2, hidden=(32,), seed=0)
        >>> flow().log_prob(torch.zeros(7, 4)).shape
        torch.Size([7])
    """
    transform = stack(features, context, layers, hidden, univariate, activation, order, seed)
    return Flow(StandardNormal(features), Inverse(transform))


def NSF(
    features: int,
    context: int = 0,
    layers: int = 3,
    hidden: Sequence[int] = (256, 256),
    *,
    bins: int = 8,
    bound: float = 5.0,
    univariate: Univariate | None = None,
    activation: str = "relu",
    order: Order = "reversed",
    seed: int | None = None,
) -> Flow:
    """Neural spline flow: a `MAF` whose univariate map is a rational-quadratic spline on [-bound, bound].

        eps = f_layers(... f_1(x; c) ...; c),    log p(x) = log N(eps; 0, I) + sum of the log_det

    Standardize the data first, since each layer is the identity outside the bound.

    Args:
        features: D.
        context: C, the size of the context c; 0 for no context.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of the network of each layer.
        bins: number of bins of the spline.
        bound: the spline covers [-bound, bound].
        univariate: map of one feature; cf.RationalQuadraticSpline(bins, bound) when not given. If it is given, bins
            and bound are not used.
        activation: activation of the hidden units, for example "relu", "elu", "silu" or "tanh".
        order: change of the order of the features between layers: "reversed", "random" or "same".
        seed: seed of the initial weights and of random orders; torch's global generator when not given.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: a size below 1, bins or a bound that the spline refuses, or a name that does not exist.

    Source: Durkan et al. 2019, "Neural Spline Flows", the autoregressive variant, RQ-NSF (AR).

    Example:
        >>> import torch, counterflow as cf
        >>> cf.NSF(features=2, layers=1, hidden=(16,), bins=4)().log_prob(torch.zeros(2)).shape
        torch.Size([])
    """
    if univariate is None:
        univariate = RationalQuadraticSpline(bins, bound)
    return MAF(features, context, layers, hidden, univariate=univariate, activation=activation, order=order, seed=seed)


def Coupling(
    features: int,
    context: int = 0,
    layers: int = 8,
    hidden: Sequence[int] = (256, 256),
    *,
    univariate: Univariate | None = None,
    activation: str = "relu",
    order: Order = "reversed",
    seed: int | None = None,
) -> Flow:
    """Coupling flow: a `MAF` with two degrees, so that the second half of the features depends on the first half.

        eps = f_layers(... f_1(x; c) ...; c),    log p(x) = log N(eps; 0, I) + sum of the log_det

    It scores in one pass and samples by a substitution of two steps. The first half of the features is not copied as in
    RealNVP, but passes through a univariate map that depends only on the context.

    `cf.transforms.CouplingLayer` is another construction: a single layer with a dense network, which copies the kept
    features as RealNVP does and takes any set of moved features. Flows of other libraries are converted to it.

    Args:
        features: D.
        context: C, the size of the context c; 0 for no context.
        layers: number of autoregressive layers.
        hidden: sizes of the hidden layers of the network of each layer.
        univariate: map of one feature: cf.Affine() when not given, cf.Gated(), cf.RationalQuadraticSpline(), ...
        activation: activation of the hidden units, for example "relu", "elu", "silu" or "tanh".
        order: change of the order of the features between layers: "reversed", "random" or "same".
        seed: seed of the initial weights and of random orders; torch's global generator when not given.

    Raises:
        TypeError: univariate is not a univariate map.
        ValueError: a size below 1, or a name that does not exist.

    Source: Dinh et al. 2017, "Density estimation using Real NVP", section 3.2.

    Example:
        >>> import torch, counterflow as cf
        >>> cf.Coupling(features=5, layers=2, hidden=(16,))().sample((3,)).shape
        torch.Size([3, 5])
    """
    first = max(positive(features, "features") // 2, 1)
    degrees = [1] * first + [2] * (features - first)
    transform = stack(features, context, layers, hidden, univariate, activation, order, seed, degrees=degrees)
    return Flow(StandardNormal(features), Inverse(transform))


RECIPES: dict[str, Callable[..., Flow]] = {"maf": MAF, "nsf": NSF, "iaf": IAF, "coupling": Coupling}
