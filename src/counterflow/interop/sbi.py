"""Our flows inside sbi 0.27: density estimators, variational posteriors, and trained posteriors made fast.

sbi's own wrapper `ZukoFlow` holds a flow of ours by way of `counterflow.interop.zuko`, so that everything that sbi does
with its estimators works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from counterflow.checks import one_of, require
from counterflow.flows.flow import Flow
from counterflow.flows.recipes import RECIPES
from counterflow.interop.conversion.sbi import flow as converted
from counterflow.interop.zuko import to_zuko
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Compose, Inverse
from counterflow.transforms.constant import Standardize
from counterflow.univariate.spline import RationalQuadraticSpline

require("sbi", "sbi", "density estimators of sbi's kind")
from sbi.neural_nets.estimators import NFlowsFlow, ZukoFlow, ZukoUnconditionalFlow  # noqa: E402
from sbi.samplers.vi.vi_utils import TransformedZukoFlow  # noqa: E402
from sbi.utils.sbiutils import standardizing_net, z_standardization  # noqa: E402

Kind = Literal["maf", "nsf", "iaf", "coupling"]
ZScore = Literal["none", "independent", "structured"]
P = TypeVar("P")
# Factor of the initial weights of the last layers but those of splines, which then are about as large as those of sbi's
# networks. A few thousand simulations are few steps, and from near the identity they do not go far.
WIDER = 1000


def estimator(
    kind: Kind = "maf",
    *,
    of: Literal["posterior", "likelihood"] = "posterior",
    layers: int = 5,
    hidden: Sequence[int] = (50, 50, 50),
    embedding_net: nn.Module | None = None,
    z_score: ZScore = "independent",
    z_score_condition: ZScore = "independent",
    **settings: Any,
) -> Callable[[Tensor, Tensor], ZukoFlow]:
    """Return a builder of density estimators for `NPE(density_estimator=...)` or `NLE(density_estimator=...)`.

    sbi calls the builder with the first simulations. It can be pickled, and each call builds a new estimator, with a
    copy of the embedding net. "maf" and "nsf" score in one pass, which is what training does most; "iaf" samples in one
    pass. The other direction is solved, at about the same cost.

    Args:
        kind: "maf" (affine), "nsf" (autoregressive splines), "iaf" or "coupling".
        of: "posterior", p(theta | x) for NPE, or "likelihood", p(x | theta) for NLE.
        layers: number of layers.
        hidden: sizes of the hidden layers of each layer's network; by default those of sbi's, an input layer and two
            blocks.
        embedding_net: network of the condition, before the flow; none when not given.
        z_score: standardization of the modelled variable: of each dimension, of all together, or none.
        z_score_condition: standardization of the condition.
        settings: further arguments of the flow, such as bins; activation is "tanh", as in sbi, unless it is given.

    Returns:
        A function (theta, x) -> `sbi.neural_nets.estimators.ZukoFlow`.

    Raises:
        ValueError: an unknown kind, target or standardization. The builder raises it for a modelled variable, or an
            embedded condition, that is not a vector.

    Example:
        >>> import torch
        >>> from counterflow.interop.sbi import estimator
        >>> theta, x = torch.randn(50, 3), torch.randn(50, 2)
        >>> q = estimator("maf", layers=2, hidden=(16,))(theta, x)          # as NPE(density_estimator=...) does
        >>> q.sample((7,), x[:5]).shape, q.log_prob(theta[None], x).shape
        (torch.Size([7, 5, 3]), torch.Size([1, 50]))
    """
    one_of(kind, "kind", RECIPES)
    one_of(of, "of", ("posterior", "likelihood"))
    one_of(z_score, "z_score", get_args(ZScore))
    one_of(z_score_condition, "z_score_condition", get_args(ZScore))
    make = partial(RECIPES[kind], layers=layers, hidden=tuple(hidden), **{"activation": "tanh", **settings})
    return partial(_estimator, make, of, embedding_net or nn.Identity(), z_score, z_score_condition)


def _estimator(
    make: Callable[[int, int], Flow],
    of: str,
    embedding_net: nn.Module,
    z_score: ZScore,
    z_score_condition: ZScore,
    theta: Tensor,
    x: Tensor,
) -> ZukoFlow:
    """Build an estimator for simulations theta (N, ...) and x (N, ...)."""
    value, condition = (theta, x) if of == "posterior" else (x, theta)
    if value.dim() != 2:
        raise ValueError(
            f"expected {'theta' if of == 'posterior' else 'x'} of shape (N, D), got {tuple(value.shape)}; flatten it"
        )
    embedding = deepcopy(embedding_net).to(condition.device)
    if z_score_condition != "none":
        embedding = nn.Sequential(standardizing_net(condition, z_score_condition == "structured"), embedding)
    with torch.no_grad():
        embedded = embedding(condition[:2])
    if embedded.dim() != 2:
        raise ValueError(
            f"expected an embedded condition of shape (N, C), got {tuple(embedded.shape)}; give an embedding_net that "
            "ends with a vector, such as torch.nn.Flatten()"
        )
    flow = make(value.shape[1], embedded.shape[1]).to(value.device)
    for layer in flow.modules():
        if isinstance(layer, Autoregressive) and not isinstance(layer.univariate, RationalQuadraticSpline):
            with torch.no_grad():
                layer.made.masked_layers()[len(layer.hidden)].weight.mul_(WIDER)
    flow = Flow(flow.base, _destandardized(flow.transform, value, z_score))
    return ZukoFlow(to_zuko(flow), embedding, input_shape=value.shape[1:], condition_shape=condition.shape[1:])


def _destandardized(t: Transform, value: Tensor, z_score: ZScore) -> Transform:
    """Return t, followed by the map from standardized values to values (N, D)."""
    if z_score == "none":
        return t
    mean, std = (v.expand(value.shape[1]) for v in z_standardization(value, z_score == "structured"))
    return Compose([t, Inverse(Standardize(mean, std))])


def variational(
    kind: Kind = "iaf", *, layers: int = 5, hidden: Sequence[int] = (50, 50), **settings: Any
) -> Callable[..., TransformedZukoFlow]:
    """Return a variational family for `VIPosterior(q=...)` or `build_posterior(vi_parameters=...)`.

    An IAF draws, and scores its draws, in one pass, which is what every step of variational inference does. sbi's
    families are MAFs, which take D passes to draw.

    Args:
        kind: "iaf", "maf", "nsf" or "coupling".
        layers: number of layers.
        hidden: sizes of the hidden layers of each layer's network.
        settings: further arguments of the flow.

    Returns:
        A builder that can be pickled. sbi calls it with the event shape, the map to the prior's support and the device.

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> import torch
        >>> from counterflow.interop.sbi import variational
        >>> identity = torch.distributions.transforms.identity_transform
        >>> q = variational("iaf", layers=2, hidden=(16,))(torch.Size([3]), identity, device="cpu")
        >>> theta, log_q = q.sample_and_log_prob((5,))
        >>> theta.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    one_of(kind, "kind", RECIPES)
    return partial(_variational, partial(RECIPES[kind], layers=layers, hidden=tuple(hidden), **settings))


def _variational(
    make: Callable[[int], Flow], event_shape: torch.Size, link_transform: Any, device: str
) -> TransformedZukoFlow:
    flow = ZukoUnconditionalFlow(to_zuko(make(event_shape.numel())), input_shape=event_shape)
    return TransformedZukoFlow(flow, link_transform).to(device)


def convert_posterior(posterior: P) -> P:
    """Return a copy of a trained posterior of sbi whose network is converted to a flow of ours.

    The densities are the same up to rounding, and both directions cost about one pass. An embedding net is kept as it
    is.

    Args:
        posterior: a DirectPosterior, an EnsemblePosterior, or a posterior that samples with a trained likelihood, such
            as MCMCPosterior; its networks are "maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf" or "zuko_nice".

    Raises:
        TypeError: a posterior without such a network, or a network with a layer that cannot be converted.

    Example:
        >>> import torch
        >>> from sbi.inference.posteriors import DirectPosterior
        >>> from sbi.neural_nets import posterior_nn
        >>> from counterflow.interop.sbi import convert_posterior
        >>> theta, x = torch.randn(50, 3), torch.randn(50, 2)
        >>> prior = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        >>> trained = DirectPosterior(posterior_nn("maf", hidden_features=8)(theta, x), prior)
        >>> fast = convert_posterior(trained)
        >>> fast.sample((7,), x=x[:1], show_progress_bars=False).shape
        torch.Size([7, 3])
    """
    new = _shallow_copy(posterior)
    if hasattr(new, "posteriors"):  # of an ensemble
        new.posteriors = [convert_posterior(member) for member in new.posteriors]
        new.potential_fn = _shallow_copy(new.potential_fn)
        new.potential_fn.potential_fns = [member.potential_fn for member in new.posteriors]
        return new
    potential = getattr(new, "potential_fn", None)
    name = next((name for name in ("posterior_estimator", "likelihood_estimator") if hasattr(potential, name)), None)
    if name is None:
        raise TypeError(
            "expected a posterior with a trained density estimator, such as a DirectPosterior or an MCMCPosterior with "
            f"a trained likelihood, got {type(posterior).__name__}"
        )
    new.potential_fn = _shallow_copy(potential)
    setattr(new.potential_fn, name, convert_estimator(getattr(potential, name)))
    if hasattr(new, "posterior_estimator"):
        new.posterior_estimator = new.potential_fn.posterior_estimator
    return new


def _shallow_copy(thing: Any) -> Any:
    """Return a shallow copy; `copy.copy` of sbi's posteriors shares the dictionary of attributes."""
    new = object.__new__(type(thing))
    new.__dict__.update(vars(thing))
    return new


def convert_estimator(foreign: Any) -> ZukoFlow:
    """Return a trained density estimator of sbi as one with a flow of ours, in eval mode; see `convert_posterior`.

    Raises:
        TypeError: not an NFlowsFlow or a ZukoFlow, or a layer that cannot be converted.
    """
    if type(foreign) not in (NFlowsFlow, ZukoFlow):
        raise TypeError(
            f"expected a density estimator NFlowsFlow or ZukoFlow, got {type(foreign).__name__}; train with 'maf', "
            "'maf_rqs', 'nsf', 'zuko_maf', 'zuko_nsf' or 'zuko_nice'"
        )
    embedding = foreign.embedding_net
    bare = copy(foreign)  # without its embedding net, which sbi's wrapper applies before the converted flow
    if type(foreign) is NFlowsFlow:
        bare._modules = {**foreign._modules, "net": copy(foreign.net)}
        bare.net._modules = {**foreign.net._modules, "_embedding_net": nn.Identity()}
    else:
        bare._modules = {**foreign._modules, "_embedding_net": nn.Identity()}
    return ZukoFlow(to_zuko(converted(bare)), embedding, foreign.input_shape, foreign.condition_shape).eval()
