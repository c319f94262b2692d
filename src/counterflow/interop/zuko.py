"""Our flows as flows of zuko 1.6, whose transforms map data to noise."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution

from counterflow.checks import require
from counterflow.flows.bases import Base
from counterflow.flows.flow import Flow
from counterflow.transforms.as_torch import AsTorch
from counterflow.transforms.base import Transform
from counterflow.transforms.compose import Inverse

require("zuko", "zuko", "flows of zuko's kind")
from zuko.lazy import Flow as LazyFlow  # noqa: E402
from zuko.lazy import LazyDistribution, LazyTransform  # noqa: E402


class _ZukoTransform(AsTorch):
    """Transform with zuko's `call_and_ladj`; nothing is kept, so that every call has a graph of its own."""

    def __init__(self, transform: Transform, c: Tensor | None) -> None:
        super().__init__(transform, c, cache_size=0)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log|det dy/dx|."""
        return self.transform(x, self.c)

    @property
    def inv(self) -> _ZukoTransform:
        """The inverse transform."""
        return _ZukoTransform(Inverse(self.transform), self.c)


class _LazyTransform(LazyTransform):  # type: ignore[misc]  # zuko is not imported by the type checker
    """Lazy transform from data to noise."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = Inverse(transform)

    def forward(self, c: Tensor | None = None) -> _ZukoTransform:
        return _ZukoTransform(self.transform, c if self.transform.context else None)


class _LazyBase(LazyDistribution):  # type: ignore[misc]
    """Lazy base distribution."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def forward(self, c: Tensor | None = None) -> Distribution:
        return self.base(c if self.base.context else None)


class AdaptedFlow(LazyFlow):  # type: ignore[misc]
    """Flow of ours as a `zuko.lazy.Flow`, made by `to_zuko`.

    Args:
        flow: the flow, whose weights are shared.
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(_LazyTransform(flow.transform), _LazyBase(flow.base))

    def unwrapped(self) -> Flow:
        """Return the flow, with the same weights."""
        return Flow(self.base.base, self.transform.transform.transform)


def to_zuko(flow: Flow) -> AdaptedFlow:
    """Wrap a flow as a `zuko.lazy.Flow`, for code that is written for zuko's flows.

    `adapted(c)` is a `zuko.distributions.NormalizingFlow` with `log_prob`, `sample` and `rsample_and_log_prob`. Its
    `transform` maps data to noise and has `call_and_ladj` and `inv`. Both directions cost about one pass, in whichever
    direction the flow was built. The weights are shared: training one trains the other.

    Args:
        flow: the flow.

    Returns:
        The wrapped flow, a module; `unwrapped()` gives the flow back, and so does `cf.convert`.

    Raises:
        TypeError: not a flow.

    Example:
        >>> import torch, counterflow as cf
        >>> from counterflow.interop.zuko import to_zuko
        >>> flow = cf.MAF(features=3, context=2, layers=2, hidden=(16,), seed=0)
        >>> q = to_zuko(flow)(torch.zeros(5, 2))
        >>> x, log_q = q.rsample_and_log_prob((7,))
        >>> z, log_det = q.transform.call_and_ladj(x)
        >>> x.shape, z.shape, torch.allclose(q.log_prob(x), log_q, atol=1e-5)
        (torch.Size([7, 5, 3]), torch.Size([7, 5, 3]), True)
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"expected a Flow, such as cf.MAF(features=3), got {type(flow).__name__}")
    return AdaptedFlow(flow)
