"""Flows of other libraries converted to ours (`convert`), and ours inside other libraries.

The submodules `zuko`, `sbi`, `pyro`, `pocomc` and `nessai` adapt our flows to the library of that name, `hub` saves
them for the Hugging Face Hub. `pymc` fits models of PyMC.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.distributions import TransformedDistribution

from counterflow.flows.flow import Flow
from counterflow.lazy import on_first_use

LIBRARIES = ("nflows", "normflows", "pyro", "sbi", "zuko")
ADAPTERS = ("hub", "nessai", "pocomc", "pymc", "pyro", "sbi", "zuko")  # submodules, imported when they are used
__getattr__, __dir__ = on_first_use(__name__, {name: f"{__name__}.{name}:" for name in ADAPTERS})


def convert(foreign: Any) -> Flow:
    """Convert a trained flow of nflows, normflows, Pyro, sbi or zuko to a `Flow`.

    From the same base noise the samples are the same, and log_prob agrees up to rounding, in float64 within 1e-10. Both
    directions cost about one pass, also the one for which the other library needs D passes. The weights are copied, in
    their dtype and on their device. The result is in eval mode, whatever mode the given flow is in: dropout is inactive
    and batch norm uses its running statistics. The inputs that the flow is conditioned on are the context:
    q = flow(c).

    A flow that cannot be converted exactly is refused. Learned constants (LU layers, ActNorm, batch norm, mean and
    scale of the base) become constants; everything that a network computes can be trained further.

    Files are not read, because the other libraries save pickles, which can run code. Load a file that you trust with
    the library that wrote it, convert the flow, and save it with `cf.save`.

    Args:
        foreign: nflows: a Flow. zuko: a Flow, such as MAF, NSF, NICE. normflows: a NormalizingFlow or a
            ConditionalNormalizingFlow. Pyro: a TransformedDistribution or a ConditionalTransformedDistribution of
            AffineAutoregressive, AffineCoupling and the like. sbi: a density estimator NFlowsFlow or ZukoFlow, or a
            DirectPosterior, of which only the density estimator is converted: sbi rejects samples outside of the
            support of the prior and divides the density by the share that remains.

    Returns:
        The flow, in eval mode.

    Raises:
        TypeError: the object, or one of its layers, is of a class that is not supported.
        ValueError: a layer of a supported class has a setting that is not.

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
            library = "pyro"  # its transforms also work in torch's class
        if library in LIBRARIES:
            with torch.random.fork_rng(devices=[]):  # initial weights, replaced at once, must not move it
                flow: Flow = import_module(f"{__name__}.conversion.{library}").flow(foreign)
            return flow.eval()
    hint = ""
    if isinstance(foreign, nn.Module) and not isinstance(foreign, Flow):
        hint = "; give the flow itself, not a model that holds one"
    raise TypeError(
        f"expected a flow of {', '.join(LIBRARIES)}, got {type(foreign).__module__}.{type(foreign).__name__}{hint}"
    )
