"""A chain of one-pass layers, permutations and constant scales as one function with one gradient.

`transforms` describes a chain by a tuple of stages and the tensors that they use, in order. `run` computes its value
and log_det in one call of compiled code, and their pullback in another. A score goes
through it in one more call. Derivatives of higher order go through `_in_torch`, which computes the same in torch
operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

# Without a public name; see `made.staircase`.
from torch._C import _are_functorch_transforms_active as functions_are_transformed
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.jit import is_tracing  # type: ignore[attr-defined]  # documented, but not in its __all__

from counterflow.engine import reference
from counterflow.engine.contract import Layout, System


@dataclass(unsafe_hash=True)  # by value: flows of one shape share a plan; not frozen, for walkers that set attributes
class Pass:
    """One pass through an autoregressive layer.

    Its tensors are the weight of the context (H1, C) if there is one, and the weight and the bias of each layer of the
    network in turn.

    Args:
        layout: see `Layout`. The network has no skip connections.
        order: for each feature in order of degree, its place in x and y.
        context: C.
    """

    layout: Layout
    order: tuple[int, ...]
    context: int

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return 2 * len(self.layout.ends) + (self.context > 0)


@dataclass(unsafe_hash=True)  # by value: flows of one shape share a plan; not frozen, for walkers that set attributes
class Permutation:
    """Features in another order: y_i = x_order[i]. It has no tensors."""

    order: tuple[int, ...]
    tensors = 0


@dataclass(unsafe_hash=True)  # by value: flows of one shape share a plan; not frozen, for walkers that set attributes
class Scale:
    """Constant shift and scale: y = (x - before) * scale + after.

    Its tensor (4 D,) holds scale, before, after and log scale.
    """

    features: int
    tensors = 1


Stage = Pass | Permutation | Scale

# Widest hidden layer that is compiled. Compiled code takes this part of the CPU time of torch's products, forward and
# forward plus gradients (float32, one thread of an EPYC 7003, minima on a busy machine; D/H/B): 8/64/256 0.65, 0.86;
# 64/256/256 0.85, 0.91; 64/512/256 0.66, 0.90; 784/1024/100 0.94, 1.22; 256/2048/128 0.98, 1.69.
MAX_HIDDEN = 512


def supports(stage: Stage) -> bool:
    """Return True if the stage is compiled."""
    if not isinstance(stage, Pass):
        return True
    links = stage.layout.links
    plain = not links.linear and not links.skip_to_output and all(skip is None for skip in links.skips)
    narrow = max(ends[-1] for ends in stage.layout.ends[1:]) <= MAX_HIDDEN
    return plain and narrow and bool(import_module("counterflow.engine.cpu").supports(stage.layout))


def accepts(x: Tensor, c: Tensor | None, tensors: Sequence[Tensor]) -> bool:
    """Return True if compiled code can run here and now: plain tensors of one dtype on the CPU, no tracing."""
    dtype = x.dtype
    return (
        (dtype is torch.float32 or dtype is torch.float64)
        and x.is_cpu
        and not is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not functions_are_transformed()
        and not dispatch_modes()
        and forward_ad._current_level < 0
        and not is_tracing()
        and type(x) in _ORDINARY
        and (c is None or (c.dtype is dtype and c.is_cpu and type(c) in _ORDINARY))
        and all(t.dtype is dtype and t.is_cpu and type(t) in _ORDINARY for t in tensors)
    )


_ORDINARY = (Tensor, torch.nn.Parameter)


def is_ready(stages: tuple[Stage, ...], dtype: torch.dtype) -> bool:
    """Return True if the chain's compiled code can run at once; False while another process compiles it."""
    return bool(import_module("counterflow.engine.cpu.chain").is_ready(stages, dtype))


def run(
    stages: tuple[Stage, ...],
    tensors: Sequence[Tensor],
    x: Tensor,
    c: Tensor | None,
    *,
    score: Tensor | None = None,
    by_feature: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute a chain at x (N, D) and c (N, C), differentiably as often as needed.

    Args:
        stages: the chain.
        tensors: the tensors of its stages in order.
        x: (N, D).
        c: (N, C) or None.
        score: gradient of log q_x at x, (N, D), to carry through the chain; see `Transform.push_score`.
        by_feature: return log_det split into one term for each feature of y.

    Returns:
        y (N, D), log_det (N,) or its terms (N, D), and the score at y (N, D), without a gradient, if one was given.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or (c is not None and c.requires_grad) or any(t.requires_grad for t in tensors)
    ):
        found: tuple[Tensor, Tensor, Tensor | None] = _Chain.apply(stages, by_feature, score, x, c, *tensors)
        return found
    y, log_det, _, score = _forward(stages, tensors, x, c, score, by_feature, keep=score is not None)
    return y, log_det, score


def _forward(
    stages: tuple[Stage, ...],
    tensors: Sequence[Tensor],
    x: Tensor,
    c: Tensor | None,
    score: Tensor | None,
    by_feature: bool,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Any, Tensor | None]:
    """Return y, log_det, the tape and the score at y."""
    compiled = import_module("counterflow.engine.cpu.chain")
    y, log_det, tape = compiled.forward(stages, tensors, x, c, keep=keep, by_feature=by_feature)
    return y, log_det, tape, None if score is None else compiled.push(stages, tensors, tape, score)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stages: tuple[Stage, ...],
        by_feature: bool,
        score: Tensor | None,
        x: Tensor,
        c: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y, log_det, tape, score = _forward(stages, tensors, x, c, score, by_feature, keep=True)
        if score is not None:
            ctx.mark_non_differentiable(score)
        ctx.stages = stages
        ctx.by_feature = by_feature
        ctx.save_for_backward(x, c, tape, *tensors)
        return y, log_det, score

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor, log_det_bar: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, c, tape, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not accepts(y_bar, log_det_bar, ()) or _is_batched(y_bar, log_det_bar):
            inputs, bars = (x, c, *tensors), (y_bar, log_det_bar)
            return None, None, None, *_gradients_in_torch(ctx.stages, ctx.by_feature, needed, inputs, bars)
        back = import_module("counterflow.engine.cpu.chain").back
        return None, None, None, *back(ctx.stages, tensors, needed, x, c, tape, y_bar, log_det_bar)


def _is_batched(*cotangents: Tensor) -> bool:
    """Return True for the cotangents of a vectorised Jacobian, which have no memory of their own."""
    try:
        for t in cotangents:
            t.untyped_storage()
    except NotImplementedError:
        return True
    return False


def _gradients_in_torch(
    stages: tuple[Stage, ...],
    by_feature: bool,
    needed: Sequence[bool],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of a chain, differentiable themselves where grad mode is on."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        x, c, *tensors = inputs if differentiable else [None if t is None else t.detach() for t in inputs]
        if not differentiable:
            for t, wanted in zip((x, c, *tensors), needed, strict=True):
                if wanted and t is not None:
                    t.requires_grad_()
        outputs = _in_torch(stages, tensors, x, c, by_feature)  # type: ignore[arg-type]  # only c may be None
        wanted_inputs = [t for t, wanted in zip((x, c, *tensors), needed, strict=True) if wanted]
        found = iter(
            torch.autograd.grad(
                outputs,
                wanted_inputs,  # type: ignore[arg-type]
                list(cotangents),
                create_graph=differentiable,
                allow_unused=True,
            )
        )
    return [next(found) if wanted else None for wanted in needed]


def _in_torch(
    stages: tuple[Stage, ...], tensors: Sequence[Tensor], x: Tensor, c: Tensor | None, by_feature: bool
) -> tuple[Tensor, Tensor]:
    """Compute a chain in torch operations, with dense products."""
    terms = torch.zeros_like(x)
    at = 0
    for stage in stages:
        own = tensors[at : at + stage.tensors]
        at += stage.tensors
        if isinstance(stage, Permutation):
            order = list(stage.order)
            x, terms = x[:, order], terms[:, order]
        elif isinstance(stage, Scale):
            scale, before, after, log_scale = own[0].unflatten(0, (4, stage.features))
            x = (x - before) * scale + after
            terms = terms + log_scale
        else:
            x, log_slope = _pass_in_torch(stage, own, x, c)
            terms = terms + log_slope
    return x, terms if by_feature else terms.sum(1)


def _pass_in_torch(stage: Pass, tensors: Sequence[Tensor], x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    order = torch.tensor(stage.order, device=x.device)
    places = torch.argsort(order)
    layers = tensors[1:] if stage.context else tensors
    biases = list(layers[1::2])
    if stage.context:
        biases[0] = biases[0] + c @ tensors[0].T  # type: ignore[operator]  # there is a context
    x = x[:, order]
    params, _ = reference.network(System(stage.layout, tuple(layers[::2]), tuple(biases)), x)
    y, log_slope = stage.layout.univariate.forward(x, params)
    return y[:, places], log_slope[:, places]
