"""Group: the processes that train together, as torch.distributed has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """The processes that train together, and what they tell each other; one process is a group as well."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Workers:
        """That of torch.distributed, if it has been set up."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def share(self, whole: int, name: str) -> int:
        """This process' part of a number; ValueError where it cannot be divided."""
        if whole % self.size:
            raise ValueError(f"expected {name} as a multiple of the {self.size} processes, got {whole}")
        return whole // self.size

    def seed(self, seed: int) -> int:
        """A seed of its own for each process; that of the first one is the seed itself."""
        return seed + 1_000_003 * self.rank

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, *values: bool) -> list[bool]:
        """Whether it is so in one process at least."""
        return [total > 0 for total in self.sum(*map(float, values))]

    def first(self, value: float) -> float:
        """What the first process has."""
        return self.sum(value if self.rank == 0 else 0.0)[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum(0.0)

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape."""
        if self.size == 1:
            return [mine]
        every = [torch.empty_like(mine, device=self._device) for _ in range(self.size)]
        dist.all_gather(every, mine.to(self._device))
        return [each.cpu() for each in every]

    def broadcast(self, content: bytes) -> bytes:
        """What the first process gave."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content), device=self._device)
        dist.broadcast(length, 0)
        every = torch.zeros(int(length), dtype=torch.uint8, device=self._device)
        if self.rank == 0 and content:
            every.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(every, 0)
        return every.cpu().numpy().tobytes()

    def told_by_first(self, look: Callable[[], Any]) -> Any:
        """What the first process finds, as JSON has it, or the error that it meets, in all: they may see other disks.

        Raises:
            ValueError: the first process meets that or an OSError.
        """
        found: dict[str, Any] = {}
        if self.rank == 0:
            try:
                found = {"value": look()}
            except (ValueError, OSError) as error:
                if self.size == 1:
                    raise
                found = {"error": str(error)}
        found = json.loads(self.broadcast(json.dumps(found).encode()))
        if "error" in found:
            raise ValueError(found["error"])
        return found["value"]

    @property
    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"
