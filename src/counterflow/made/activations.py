"""Activations and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from counterflow.checks import one_of


@dataclass(frozen=True, slots=True)  # with slots, no walker of objects tries to rebuild it
class Activation:
    """An elementwise function and its derivative, both as functions of the value before the activation."""

    f: Callable[[Tensor], Tensor]
    df: Callable[[Tensor], Tensor]


def _df_relu(a: Tensor) -> Tensor:
    return (a > 0).to(a.dtype)


def _df_leaky_relu(a: Tensor) -> Tensor:
    return torch.where(a > 0, torch.ones_like(a), 0.01)


def _df_elu(a: Tensor) -> Tensor:
    return torch.exp(a.clamp_max(0))


def _df_tanh(a: Tensor) -> Tensor:
    return 1 - torch.tanh(a).square()


def _df_sigmoid(a: Tensor) -> Tensor:
    return torch.sigmoid(a) * torch.sigmoid(-a)


def _df_silu(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _df_softplus(a: Tensor) -> Tensor:
    return torch.where(a > 20, torch.ones_like(a), torch.sigmoid(a))  # torch's softplus is linear above 20


# Named functions instead of lambdas, so that modules that hold them can be pickled for worker processes.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, _df_relu),
    "leaky_relu": Activation(F.leaky_relu, _df_leaky_relu),
    "elu": Activation(F.elu, _df_elu),
    "tanh": Activation(torch.tanh, _df_tanh),
    "sigmoid": Activation(torch.sigmoid, _df_sigmoid),
    "silu": Activation(F.silu, _df_silu),
    "softplus": Activation(F.softplus, _df_softplus),
}


def activation_named(name: str) -> Activation:
    """Return the activation of that name; raise ValueError with the list of names if there is none."""
    one_of(name, "activation", sorted(ACTIVATIONS))
    return ACTIVATIONS[name]
