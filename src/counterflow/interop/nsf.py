"""The networks that nflows and normflows both have from the code of Durkan et al. 2019, "Neural Spline Flows"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from counterflow.interop.common import Layer, batch_norm, linear_layer, name_of, of_library
from counterflow.univariate.spline import RationalQuadraticSpline

Context = Literal["added", "activated", "gate"]


def residual_net(net: Any) -> tuple[list[Layer], Layer, str]:
    """Hidden layers, last layer and activation of a ResidualNet, dense, fed with [features, context]."""
    if getattr(net, "preprocessing", None) is not None:
        raise ValueError(
            f"expected a network that reads the features, got {type(net.preprocessing).__name__} before it"
        )
    layers = blocks_of(linear_layer(net.initial_layer, linear=True), net.blocks, "gate")
    return layers, linear_layer(net.final_layer), activation_of(net.blocks)


def made(net: Any, first: Context, in_blocks: Context) -> tuple[list[Layer], Layer, str]:
    """Return hidden layers, last layer and activation of a masked network.

    first and in_blocks say how the context enters the first layer and the residual blocks.
    """
    library = type(net).__module__.partition(".")[0]
    blocks = ("MaskedResidualBlock", "MaskedFeedforwardBlock")
    if library not in ("nflows", "normflows") or not all(of_library(b, library, *blocks) for b in net.blocks):
        raise TypeError(
            f"expected a MADE of nflows or normflows as the network, got {type(net).__module__}.{type(net).__name__}; "
            "what another network computes cannot be read from its weights"
        )
    if not isinstance(getattr(net, "preprocessing", torch.nn.Identity()), torch.nn.Identity):
        raise ValueError("expected features that enter the network as they are, got periodic ones; use linear tails")
    initial = linear_layer(net.initial_layer, linear=True)
    if (context := getattr(net, "context_layer", None)) is not None:
        initial = with_context(initial, context, first)
    if all(hasattr(block, "linear_layers") for block in net.blocks):
        layers = blocks_of(initial, net.blocks, in_blocks)
    else:
        layers = [replace(initial, linear=first == "added"), *map(feedforward, net.blocks)]
    return layers, linear_layer(net.final_layer), activation_of([*net.blocks, net])


def activation_of(blocks: Sequence[Any]) -> str:
    """The activation that all blocks have."""
    names = {name_of(block.activation) for block in blocks if hasattr(block, "activation")}
    if len(names) > 1:
        raise ValueError(f"expected one activation in all blocks, got {', '.join(sorted(names))}")
    return names.pop() if names else "relu"  # without blocks nothing is activated


def with_context(layer: Layer, module: Any, how: Context) -> Layer:
    """The layer, and a linear map of the context that enters it."""
    V, v = module.weight.detach(), module.bias.detach()
    if how == "gate":
        return replace(layer, gate=(V, v))
    if how == "activated":
        return replace(layer, context=V, context_bias=v)
    return replace(layer, context=V, bias=layer.bias + v)


def feedforward(block: Any) -> Layer:
    """The layer of a block without a skip; its batch norm stands before the linear map."""
    layer = linear_layer(block.linear)
    return layer if block.batch_norm is None else layer.fed_with(*batch_norm(block.batch_norm))


def blocks_of(initial: Layer, blocks: Sequence[Any], how: Context) -> list[Layer]:
    """The layers of h -> h + W f(V f(h)), with batch norm before each f where a block has it."""
    layers, stream = [initial], 0  # the layer that holds h
    for block in blocks:
        inner, outer = map(linear_layer, block.linear_layers)
        if (context := getattr(block, "context_layer", None)) is not None:
            inner, outer = (
                (inner, with_context(outer, context, how))
                if how == "gate"
                else (with_context(inner, context, how), outer)
            )
        if block.use_batch_norm:
            scale, shift = batch_norm(block.batch_norm_layers[0])
            eye = torch.eye(len(scale), dtype=torch.bool, device=scale.device)
            layers.append(Layer(torch.diag(scale), shift, eye))
            inner = inner.scaled(*batch_norm(block.batch_norm_layers[1]))
        else:
            layers[-1] = replace(layers[-1], linear=False)
        layers += [inner, replace(outer, skip=stream, linear=True)]
        stream = len(layers) - 1
    return layers


def spline(module: Any, bins: int) -> RationalQuadraticSpline:
    """The map of a rational-quadratic layer with linear tails."""
    if module.tails != "linear":
        raise ValueError(
            f"expected tails='linear', got {module.tails!r}, a map of an interval; train with linear tails and a bound "
            "that holds the data"
        )
    least = {module.min_bin_width, module.min_bin_height, module.min_derivative}
    if len(least) > 1 or not isinstance(module.tail_bound, int | float):
        raise ValueError(
            "expected one number as min_bin_width, min_bin_height and min_derivative, and one tail_bound, "
            f"got {sorted(least)} and {module.tail_bound}"
        )
    return RationalQuadraticSpline(bins, float(module.tail_bound), least.pop())


def spline_params(last: Layer, spline: RationalQuadraticSpline, net: Any) -> Layer:
    """The last layer with our raw widths, heights and slopes: see `RationalQuadraticSpline`."""
    size = getattr(net, "hidden_features", None)  # both libraries divide shares by its root, where there is one
    shares, inner = [1 / size**0.5 if size else 1.0] * (2 * spline.bins), spline.bins - 1
    rows = torch.arange(len(last.bias)).reshape(-1, spline.parameters)
    return last.rows(rows, shares + [1.0] * inner, [0.0] * (2 * spline.bins) + [-spline.softplus_offset] * inner)


def unconditional_spline(module: Any, spline: RationalQuadraticSpline) -> torch.Tensor:
    """Our params (features, P) of a spline whose params are trained numbers."""
    slopes = module.unnormalized_derivatives - spline.softplus_offset
    raw = (module.unnormalized_widths, module.unnormalized_heights, slopes)
    return torch.cat(raw, -1).detach()
