"""One autoregressive layer in every library, built as a user of that library would build it.

A layer is affine autoregressive: two hidden layers of H relu units compute a shift and a scale for every feature, with
D H + H + H^2 + H + 2 D H + 2 D parameters. Each library bounds the scale in its own way; the docstring of a builder
names any further difference. The layers of a stack alternate the order of the features, with the library's own means.

`parallel` is the direction of one pass and `sequential` the other, whatever the library calls them. Both map (B, D) to
the value (B, D) and log_det (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from counterflow.flows.recipes import IAF
from counterflow.made.network import MADE
from counterflow.transforms.autoregressive import Autoregressive
from counterflow.univariate.affine import Affine, Gated
from counterflow.univariate.base import Univariate
from counterflow.univariate.spline import RationalQuadraticSpline


class TorchFlow(NamedTuple):
    """A flow of a torch library in both directions."""

    module: nn.Module
    parallel: Callable[[Tensor], tuple[Tensor, Tensor]]
    sequential: Callable[[Tensor], tuple[Tensor, Tensor]]


class JaxFlow(NamedTuple):
    """A flow of a JAX library in both directions: pure functions of its weights, which hold inexact arrays only."""

    weights: Any
    parallel: Callable[[Any, Any], tuple[Any, Any]]
    sequential: Callable[[Any, Any], tuple[Any, Any]]


def counterflow(D: int, H: int, layers: int, univariate: Univariate) -> TorchFlow:
    """Build one layer, or the stack of an IAF."""
    if layers == 1:
        layer = Autoregressive(D, hidden=(H, H), univariate=univariate)
        return TorchFlow(layer, layer, layer.inverse)
    stack = IAF(D, layers=layers, hidden=(H, H), univariate=univariate).transform
    return TorchFlow(stack, stack, stack.inverse)


def nflows(D: int, H: int, layers: int) -> TorchFlow:
    """Build the flow in nflows, whose MADE has a hidden layer before its blocks: one block makes two hidden layers."""
    from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, ReversePermutation

    parts: list[nn.Module] = []
    for k in range(layers):
        parts += [ReversePermutation(D)] if k else []
        parts += [MaskedAffineAutoregressiveTransform(D, H, num_blocks=1, use_residual_blocks=False)]
    flow = CompositeTransform(parts)
    return TorchFlow(flow, flow, flow.inverse)


def normflows(D: int, H: int, layers: int) -> TorchFlow:
    """Build the flow in normflows: one block makes two hidden layers, and no relu follows the first of them.

    Its affine layers take one pass in `forward`; its autoregressive splines, not built here, take one in `inverse`.
    """
    from normflows import NormalizingFlow
    from normflows.distributions import DiagGaussian
    from normflows.flows import MaskedAffineAutoregressive, Permute

    parts: list[nn.Module] = []
    for k in range(layers):
        parts += [Permute(D, mode="swap")] if k else []
        parts += [MaskedAffineAutoregressive(D, H, num_blocks=1, use_residual_blocks=False)]
    flow = NormalizingFlow(DiagGaussian(D, trainable=False), parts)
    return TorchFlow(flow, flow.forward_and_log_det, flow.inverse_and_log_det)


def zuko(D: int, H: int, layers: int) -> TorchFlow:
    """Build the flow in zuko, which needs one more pass for the log_det of the sequential direction."""
    from zuko.flows import MAF

    lazy = MAF(D, transforms=layers, hidden_features=(H, H)).transform  # every second layer in reversed order
    # The lazy transform is called for each value, as zuko's distributions do.
    return TorchFlow(lazy, lambda x: lazy().call_and_ladj(x), lambda y: lazy().inv.call_and_ladj(y))


def pyro(D: int, H: int, layers: int) -> TorchFlow:
    """Build the flow in Pyro, which needs H >= D and caches the last x and y; the cache is cleared before each call."""
    from pyro.distributions.transforms import AffineAutoregressive
    from pyro.nn import AutoRegressiveNN

    orders = [torch.arange(D).flip(0) if k % 2 else torch.arange(D) for k in range(layers)]
    parts: Any = nn.ModuleList(AffineAutoregressive(AutoRegressiveNN(D, [H, H], permutation=k)) for k in orders)

    def run(transforms: Iterable[Any], x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for transform in transforms:
            y = transform(x)
            total = total + transform.log_abs_det_jacobian(x, y)
            x = y
        return x, total

    def clear_caches() -> None:
        for part in parts:
            part.clear_cache()

    def parallel(x: Tensor) -> tuple[Tensor, Tensor]:
        clear_caches()
        return run(parts, x)

    def sequential(y: Tensor) -> tuple[Tensor, Tensor]:
        clear_caches()
        return run((part.inv for part in reversed(parts)), y)

    return TorchFlow(parts, parallel, sequential)


def flowjax(D: int, H: int) -> JaxFlow:
    """Build the flow in FlowJAX; vmap maps it over the rows of a batch."""
    import equinox
    import jax
    import paramax
    from flowjax.bijections import Affine, MaskedAutoregressive

    layer = MaskedAutoregressive(jax.random.key(0), transformer=Affine(), dim=D, nn_width=H, nn_depth=2)
    weights, static = equinox.partition(layer, equinox.is_inexact_array)

    def combined(weights: Any) -> Any:
        return paramax.unwrap(equinox.combine(weights, static))

    return JaxFlow(
        weights,
        lambda weights, x: jax.vmap(combined(weights).transform_and_log_det)(x),
        lambda weights, y: jax.vmap(combined(weights).inverse_and_log_det)(y),
    )


def numpyro(D: int, H: int) -> JaxFlow:
    """Build the flow in NumPyro, which needs H >= D and one more pass for the log_det of the sequential direction."""
    import jax
    from numpyro.distributions.flows import InverseAutoregressiveTransform
    from numpyro.nn import AutoregressiveNN

    initial, network = AutoregressiveNN(D, [H, H])

    def parallel(weights: Any, x: Any) -> tuple[Any, Any]:
        transform = InverseAutoregressiveTransform(partial(network, weights))
        y, log_scale = transform.call_with_intermediates(x)
        return y, transform.log_abs_det_jacobian(x, y, log_scale)

    def sequential(weights: Any, y: Any) -> tuple[Any, Any]:
        transform = InverseAutoregressiveTransform(partial(network, weights))
        x = transform.inv(y)
        return x, -transform.log_abs_det_jacobian(x, y)

    return JaxFlow(initial(jax.random.key(0), (D,))[1], parallel, sequential)


def tfp(D: int, H: int) -> JaxFlow:
    """Build the flow in TensorFlow Probability on JAX, with Counterflow's network in place of its own, which is Keras.

    Its `forward` is the sequential direction.
    """
    import jax
    import jax.numpy as jnp
    from tensorflow_probability.substrates.jax.bijectors import MaskedAutoregressiveFlow

    layers = MADE(range(1, D + 1), 2, (H, H), "relu", 0).masked_layers()
    masks = [jnp.asarray(layer.mask.numpy()) for layer in layers]
    weights = [(jnp.asarray(layer.weight.detach()), jnp.asarray(layer.bias.detach())) for layer in layers]

    def network(weights: Any, x: Any) -> Any:
        for k, ((weight, bias), mask) in enumerate(zip(weights, masks, strict=True)):
            x = (jax.nn.relu(x) if k else x) @ (weight * mask).T + bias
        return x.reshape(*x.shape[:-1], D, 2)

    def parallel(weights: Any, x: Any) -> tuple[Any, Any]:
        flow = MaskedAutoregressiveFlow(partial(network, weights))
        return flow.inverse(x), flow.inverse_log_det_jacobian(x)

    def sequential(weights: Any, y: Any) -> tuple[Any, Any]:
        flow = MaskedAutoregressiveFlow(partial(network, weights))
        x = flow.forward(y)
        return x, -flow.inverse_log_det_jacobian(x)

    return JaxFlow(weights, parallel, sequential)


@dataclass(frozen=True)
class Contestant:
    """A library, or a layer of ours, that takes part in the benchmark."""

    build: Callable[..., Any]  # D, H, layers -> TorchFlow; D, H -> JaxFlow
    module: str  # import name
    package: str  # name in the package index
    install: str  # argument of pip install
    jax: bool = False

    @property
    def installed(self) -> bool:
        """Return True if the module can be found; importing it may still fail."""
        return find_spec(self.module) is not None


def _ours(univariate: Univariate) -> Contestant:
    return Contestant(partial(counterflow, univariate=univariate), "counterflow", "counterflow", "counterflow")


OURS = {
    "counterflow": _ours(Affine()),
    "counterflow gated": _ours(Gated()),
    "counterflow spline": _ours(RationalQuadraticSpline(bins=8)),
}
PEERS = {
    "nflows": Contestant(nflows, "nflows", "nflows", "counterflow[bench]"),
    "normflows": Contestant(normflows, "normflows", "normflows", "counterflow[bench]"),
    "zuko": Contestant(zuko, "zuko", "zuko", "counterflow[bench]"),
    "pyro": Contestant(pyro, "pyro", "pyro-ppl", "counterflow[bench]"),
    "flowjax": Contestant(flowjax, "flowjax", "flowjax", "counterflow[bench-jax]", jax=True),
    "numpyro": Contestant(numpyro, "numpyro", "numpyro", "counterflow[bench-jax]", jax=True),
    # tensorflow-probability 0.25 imports with jax 0.6, but no longer with jax 0.10
    "tfp": Contestant(tfp, "tensorflow_probability", "tensorflow-probability", "tensorflow-probability", jax=True),
}
