"""Processes that train together: what they share, and the numbers that travel with the gradients."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Workers:
    """The processes of the default torch.distributed group, or this process alone.

    Every method with communication is a collective: all processes must call it, in the same order.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Workers:
        """Return the group of torch.distributed if it is initialized, else a group of one."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, total: int, name: str) -> int:
        """Return each process's share of a total; ValueError if the processes do not divide it."""
        if total % self.size:
            raise ValueError(f"expected {name} to be a multiple of the {self.size} processes, got {total}")
        return total // self.size

    def rank_seed(self, seed: int) -> int:
        """Return a different seed for each process; rank 0 keeps the given one."""
        return seed + 1_000_003 * self.rank

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return total.tolist()

    def any_rank(self, *values: bool) -> list[bool]:
        """Return for each value if it is true in at least one process."""
        return [total > 0 for total in self.sum(*map(float, values))]

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, which have one shape, on the CPU."""
        if self.size == 1:
            return [mine]
        every = [torch.empty_like(mine, device=self._device) for _ in range(self.size)]
        dist.all_gather(every, mine.to(self._device))
        return [each.cpu() for each in every]

    def broadcast_value(self, value: float) -> float:
        """Return the value that rank 0 was given."""
        return self.sum(value if self.rank == 0 else 0.0)[0]

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Return the bytes that rank 0 was given."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content), device=self._device)
        dist.broadcast(length, 0)
        every = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.rank == 0 and content:
            every.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(every, 0)
        return every.cpu().numpy().tobytes()

    def broadcast_result(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 only and return its result in all processes, for they may see different disks.

        The result must be JSON serializable.

        Raises:
            ValueError: the function raised ValueError or OSError on rank 0.
        """
        found: dict[str, Any] = {}
        if self.rank == 0:
            try:
                found = {"value": function()}
            except (ValueError, OSError) as error:
                if self.size == 1:
                    raise
                found = {"error": str(error)}
        found = json.loads(self.broadcast_bytes(json.dumps(found).encode()))
        if "error" in found:
            raise ValueError(found["error"])
        return found["value"]

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"


class Mailbox(nn.Module):
    """Numbers that the processes exchange once a step, as the gradient of a parameter that stays 0.

    They travel with the gradients of the weights, since an exchange of their own would wait for the slowest process
    once more.

    Args:
        slots: the number of values.
        like: a parameter of the model, for the device and the dtype.
        workers: the processes.
    """

    def __init__(self, slots: int, like: Tensor, workers: Workers) -> None:
        super().__init__()
        self.workers = workers
        self.values: Sequence[Tensor | float] = ()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.slots = nn.Parameter(like.new_zeros(slots, dtype=dtype), requires_grad=workers.size > 1)

    def send(self, loss: Tensor, *values: Tensor | float) -> Tensor:
        """Return the loss plus a term that is 0 and whose gradient is the values."""
        self.values = values
        if self.workers.size == 1:
            return loss
        self.slots.grad = None
        return loss + (self.slots * torch.stack([torch.as_tensor(v).to(self.slots) for v in values])).sum()

    def receive(self) -> list[float]:
        """Return the mean of each value over the processes, once the backward pass has averaged the gradients."""
        if self.workers.size == 1:
            return [float(value) for value in self.values]
        return self.slots.grad.tolist()  # type: ignore[union-attr]  # send gave it one
