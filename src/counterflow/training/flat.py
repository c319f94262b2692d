"""Parameters of a model as a few long vectors, so that a training step is a few operations instead of a few hundred."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors  # cat of reshape(-1) in C++, half the time of it in Python

# Numbers in one vector. On a CPU 256 KiB in float32, so that the operations of an update find the vector in the L2
# cache; elsewhere the number of kernel launches counts, not the cache (not measured).
CPU_SIZE, OTHER_SIZE = 1 << 16, 1 << 24


class FlatParameters:
    """Parameters as views of a few vectors.

    Parameters of one dtype and device share vectors of limited size: their data move there, and each parameter becomes
    a view of its part. A parameter that is longer than the limit stays where it is, and its vector is a view of it.

    Args:
        parameters: the parameters that are trained.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.groups = _groups(self.parameters)
        self.vectors = [_vector(group) for group in self.groups]

    def gradients(self) -> list[Tensor]:
        """Return the gradient of each vector. A parameter without a gradient counts as one with a zero gradient."""
        found = []
        for group in self.groups:
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            found.append(_flat(parts[0]) if len(parts) == 1 else _flatten_dense_tensors(parts))
        return found

    def clear_gradients(self) -> None:
        """Set the gradient of each parameter to None."""
        for p in self.parameters:
            p.grad = None

    def close(self) -> None:
        """Give each parameter memory of its own again."""
        for group in self.groups:
            if len(group) > 1:
                for p in group:
                    p.data = p.data.clone()


def clip_norm(gradients: Sequence[Tensor], bound: float) -> float:
    """Scale gradients in place so that their joint 2-norm is at most bound, and return the norm before.

    A norm that is not finite scales nothing. Reading it is the one wait for the device.
    """
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    norm = (norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))).item()
    if math.isfinite(norm) and norm > bound:
        for g in gradients:
            g.mul_(bound / norm)
    return norm


class WeightAverage:
    """Exponential moving average of a model's weights, held by a copy of the model.

        average <- average + (1 - d_n) (weights - average),    d_n = min(decay, (1 + n) / (10 + n)),    n = 1, 2, ...

    The first update copies the weights. The smaller decay of the first updates forgets the initial weights sooner.

    Args:
        model: the model whose parameters are those of `weights`.
        weights: its parameters that are trained.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, weights: FlatParameters, decay: float) -> None:
        self.model = copy.deepcopy(model)
        self.weights = weights
        self.averages = FlatParameters([p for p in self.model.parameters() if p.requires_grad])
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        for average, vector in zip(self.averages.vectors, self.weights.vectors, strict=True):
            average.lerp_(vector, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the model, such as running statistics, which are not averaged."""
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        """Return the averaged weights and the number of updates by name."""
        weights = {f"module.{name}": value for name, value in self.model.state_dict().items()}
        return {"n_averaged": torch.tensor(self.updates), **weights}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        for name, value in self.model.state_dict().items():
            value.copy_(state[f"module.{name}"])
        self.updates = int(state["n_averaged"])


def _groups(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters of one dtype and device up to the size of a vector; complex ones stay alone."""
    groups: list[list[nn.Parameter]] = []
    open_group: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        limit = CPU_SIZE if p.device.type == "cpu" else OTHER_SIZE
        group = open_group.get((p.dtype, p.device), [])
        if p.is_complex() or not group or sum(each.numel() for each in group) + p.numel() > limit:
            group = []
            groups.append(group)
        if not p.is_complex():
            open_group[p.dtype, p.device] = group
        group.append(p)
    return groups


def _vector(group: list[nn.Parameter]) -> Tensor:
    """Return the vector of a group, of which its parameters are views."""
    if len(group) == 1 and group[0].is_contiguous():
        return _flat(group[0].detach())
    vector = torch.cat([_flat(p.detach()) for p in group])
    for p, part in zip(group, vector.split([p.numel() for p in group]), strict=True):
        p.data = part.view(p.shape)
    return vector


def _flat(t: Tensor) -> Tensor:
    """Return a tensor as a real vector, a view if it is contiguous."""
    return (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
