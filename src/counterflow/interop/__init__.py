"""Trained flows of other libraries become flows of this one: the same numbers, both directions in one pass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributions import TransformedDistribution

from counterflow.flows.flow import Flow

LIBRARIES = ("nflows", "normflows", "pyro", "sbi", "zuko")


def convert(foreign: Any) -> Flow:
    """A trained flow of nflows, normflows, Pyro, sbi or zuko as a `Flow`: the same log_prob, the same samples.

    From the same base noise the samples are the same; log_prob differs by rounding alone, in float64 by less than
    1e-10. Both directions cost about one pass, whichever the other library takes D passes for. The weights are
    copied, in their dtype and on their device, and the result is in eval mode: dropout is inactive and batch norm uses
    its running statistics, whatever mode the given flow is in. What it was conditioned on is the context: q = flow(c).

    What cannot be converted exactly is refused. Learned constants (LU layers, ActNorm, batch norm, a base's mean and
    scale) come over as constants; everything that a network computes can be trained further.

    Nothing is read from files: the other libraries save pickles, which can run code. Load your own file with the
    library that wrote it, convert, and `counterflow.save`; there is no command that would do it unseen.

    Args:
        foreign: nflows: a Flow. zuko: a Flow, such as MAF, NSF, NICE. normflows: a NormalizingFlow or a
            ConditionalNormalizingFlow. Pyro: a TransformedDistribution or a ConditionalTransformedDistribution of
            AffineAutoregressive, AffineCoupling and the like. sbi: a density estimator NFlowsFlow or ZukoFlow, or a
            DirectPosterior, of which the density estimator is converted: sbi rejects samples outside of the
            prior's support and divides by the share that remains; the flow does neither.

    Raises:
        TypeError: an object or a layer of a class that is not converted; which one, why, and what to do instead.
        ValueError: a layer of a class that is, with a setting that is not.

    Example:
        >>> import torch, nflows.transforms as T, counterflow as cf
        >>> from nflows.distributions import StandardNormal
        >>> from nflows.flows import Flow
        >>> trained = Flow(T.MaskedAffineAutoregressiveTransform(4, 16), StandardNormal([4]))
        >>> flow, x = cf.convert(trained), torch.randn(7, 4)
        >>> torch.allclose(flow().log_prob(x), trained.log_prob(x), atol=1e-4)
        True
    """
    for cls in type(foreign).__mro__:
        library = cls.__module__.partition(".")[0]
        if library == "torch" and issubclass(cls, TransformedDistribution):
            library = "pyro"  # whose transforms work in torch's class as well
        if library in LIBRARIES:
            with torch.random.fork_rng(devices=[]):  # for first weights that nobody will see
                flow: Flow = import_module(f"{__name__}.{library}").flow(foreign)
            return flow.eval()
    hint = ""
    if isinstance(foreign, nn.Module) and not isinstance(foreign, Flow):
        hint = "; give the flow itself, not a model that holds one"
    raise TypeError(
        f"expected a flow of {', '.join(LIBRARIES)}, got {type(foreign).__module__}.{type(foreign).__name__}{hint}"
    )
