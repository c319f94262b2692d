"""Encoders and decoders: gated MLPs for rows, gated convolutions for images of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def _gated(linear: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, inputs: float, axis: int = 1) -> list[nn.Module]:
    """Return the layers of h' = (W h + b) * sigmoid(V h + c), for a linear map to both that reads `inputs` numbers.

    An initial variance of 3 / inputs keeps the scale of h from layer to layer, since the gate multiplies the mean
    square by 0.34. With torch's default, (1 / 3) / inputs, twelve such layers shrink h to nothing, and the posterior
    collapses.
    """
    nn.init.normal_(linear.weight, std=math.sqrt(3 / inputs))
    nn.init.zeros_(linear.bias)  # type: ignore[arg-type]  # the layers here have a bias
    return [linear, nn.GLU(axis)]


def mlp(inputs: int, hidden: Sequence[int]) -> nn.Sequential:
    """Return gated layers from inputs to hidden[-1]."""
    sizes = [inputs, *hidden]
    return nn.Sequential(*(layer for i, o in pairwise(sizes) for layer in _gated(nn.Linear(i, 2 * o), i)))


def conv_encoder(data_shape: Sequence[int], channels: int, outputs: int) -> nn.Sequential:
    """Five gated 5x5 convolutions, two of which halve the image, then one gated layer: (B, C, H, W) -> (B, outputs).

    Source: van den Berg et al. 2018, "Sylvester Normalizing Flows for Variational Inference", its network.
    """
    plan = [(data_shape[0], channels, 1), (channels, channels, 2), (channels, 2 * channels, 1)]
    plan += [(2 * channels, 2 * channels, 2), (2 * channels, 2 * channels, 1)]
    layers: list[nn.Module] = []
    for i, o, stride in plan:
        layers += _gated(nn.Conv2d(i, 2 * o, 5, stride, padding=2), 25 * i)
    _, _, (h, w) = _halvings(data_shape)
    return nn.Sequential(*layers, nn.Flatten(), *mlp(2 * channels * h * w, [outputs]))


def conv_decoder(latent: int, data_shape: Sequence[int], channels: int) -> nn.Sequential:
    """The encoder's mirror image, with transposed convolutions: (B, latent) -> (B, C, H, W)."""
    full, half, quarter = _halvings(data_shape)
    plan = [(2 * channels, 2 * channels, 1, quarter, quarter), (2 * channels, 2 * channels, 2, quarter, half)]
    plan += [(2 * channels, channels, 1, half, half), (channels, channels, 2, half, full)]
    plan += [(channels, channels, 1, full, full)]
    layers: list[nn.Module] = [
        *mlp(latent, [2 * channels * quarter[0] * quarter[1]]),
        nn.Unflatten(1, (2 * channels, *quarter)),
    ]
    for i, o, stride, small, large in plan:
        extra = (large[0] - (small[0] - 1) * stride - 1, large[1] - (small[1] - 1) * stride - 1)
        convolution = nn.ConvTranspose2d(i, 2 * o, 5, stride, padding=2, output_padding=extra)
        layers += _gated(convolution, 25 * i / stride**2)
    return nn.Sequential(*layers, nn.Conv2d(channels, data_shape[0], 1))


def _halvings(data_shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the image size, half of it and a quarter of it, rounded up."""
    _, h, w = data_shape
    return (h, w), (-(-h // 2), -(-w // 2)), (-(-h // 4), -(-w // 4))
