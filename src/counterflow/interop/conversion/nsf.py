"""Networks and splines that nflows and normflows share: the code of Durkan et al. 2019, "Neural Spline Flows"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from counterflow.interop.conversion.common import Layer, activation_name, batch_norm, is_from_library, layer_of
from counterflow.univariate.spline import RationalQuadraticSpline

Context = Literal["added", "activated", "gate"]


def residual_net(net: Any) -> tuple[list[Layer], Layer, str]:
    """Return hidden layers, last layer and activation of a dense ResidualNet, which receives [features, context]."""
    if getattr(net, "preprocessing", None) is not None:
        raise ValueError(
            f"expected a network that reads the features, got {type(net.preprocessing).__name__} before it"
        )
    layers = residual_layers(layer_of(net.initial_layer, linear=True), net.blocks, "gate")
    return layers, layer_of(net.final_layer), block_activation(net.blocks)


def masked_net(net: Any, first: Context, in_blocks: Context) -> tuple[list[Layer], Layer, str]:
    """Return hidden layers, last layer and activation of a masked network.

    first and in_blocks say how the context enters the first layer and the residual blocks.
    """
    library = type(net).__module__.partition(".")[0]
    blocks = ("MaskedResidualBlock", "MaskedFeedforwardBlock")
    if library not in ("nflows", "normflows") or not all(is_from_library(b, library, *blocks) for b in net.blocks):
        raise TypeError(
            f"expected a MADE of nflows or normflows as the network, got {type(net).__module__}.{type(net).__name__}; "
            "what another network computes cannot be read from its weights"
        )
    if not isinstance(getattr(net, "preprocessing", torch.nn.Identity()), torch.nn.Identity):
        raise ValueError("expected features that enter the network as they are, got periodic ones; use linear tails")
    initial = layer_of(net.initial_layer, linear=True)
    if (context := getattr(net, "context_layer", None)) is not None:
        initial = add_context(initial, context, first)
    if all(hasattr(block, "linear_layers") for block in net.blocks):
        layers = residual_layers(initial, net.blocks, in_blocks)
    else:
        layers = [replace(initial, linear=first == "added"), *map(feedforward, net.blocks)]
    return layers, layer_of(net.final_layer), block_activation([*net.blocks, net])


def block_activation(blocks: Sequence[Any]) -> str:
    """Return the name of the activation of the blocks; ValueError if they have several."""
    names = {activation_name(block.activation) for block in blocks if hasattr(block, "activation")}
    if len(names) > 1:
        raise ValueError(f"expected one activation in all blocks, got {', '.join(sorted(names))}")
    return names.pop() if names else "relu"  # any name: without blocks, nothing is activated


def add_context(layer: Layer, module: Any, how: Context) -> Layer:
    """Return the layer with a linear map of the context: added, activated and added, or as a gate."""
    V, v = module.weight.detach(), module.bias.detach()
    if how == "gate":
        return replace(layer, gate=(V, v))
    if how == "activated":
        return replace(layer, context=V, context_bias=v)
    return replace(layer, context=V, bias=layer.bias + v)


def feedforward(block: Any) -> Layer:
    """Return the layer of a block without a skip, in which batch norm, if any, precedes the linear map."""
    layer = layer_of(block.linear)
    return layer if block.batch_norm is None else layer.after_affine(*batch_norm(block.batch_norm))


def residual_layers(initial: Layer, blocks: Sequence[Any], how: Context) -> list[Layer]:
    """Return the layers of blocks h -> h + W f(V f(h)), in which batch norm may precede each f."""
    layers, stream = [initial], 0  # stream is the index of the layer that holds h
    for block in blocks:
        inner, outer = map(layer_of, block.linear_layers)
        if (context := getattr(block, "context_layer", None)) is not None:
            if how == "gate":
                outer = add_context(outer, context, how)
            else:
                inner = add_context(inner, context, how)
        if block.use_batch_norm:
            scale, shift = batch_norm(block.batch_norm_layers[0])
            eye = torch.eye(len(scale), dtype=torch.bool, device=scale.device)
            layers.append(Layer(torch.diag(scale), shift, eye))
            inner = inner.before_affine(*batch_norm(block.batch_norm_layers[1]))
        else:
            layers[-1] = replace(layers[-1], linear=False)
        layers += [inner, replace(outer, skip=stream, linear=True)]
        stream = len(layers) - 1
    return layers


def spline(module: Any, bins: int) -> RationalQuadraticSpline:
    """Return the univariate map of a rational-quadratic layer; ValueError unless its tails are linear."""
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
    """Return the layer of our raw widths, heights and slopes, see `RationalQuadraticSpline`."""
    size = getattr(net, "hidden_features", None)  # both libraries divide widths and heights by its root, if it exists
    shares, inner = [1 / size**0.5 if size else 1.0] * (2 * spline.bins), spline.bins - 1
    rows = torch.arange(len(last.bias)).reshape(-1, spline.parameters)
    return last.params(rows, shares + [1.0] * inner, [0.0] * (2 * spline.bins) + [-spline.softplus_offset] * inner)


def unconditional_spline(module: Any, spline: RationalQuadraticSpline) -> torch.Tensor:
    """Return our params (features, P) of a spline whose params do not depend on its input."""
    slopes = module.unnormalized_derivatives - spline.softplus_offset
    raw = (module.unnormalized_widths, module.unnormalized_heights, slopes)
    return torch.cat(raw, -1).detach()
