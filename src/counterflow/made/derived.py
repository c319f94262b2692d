"""Buffers that follow from a module's configuration and are not saved with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Derived(nn.Module):
    """Module with buffers that are computed from its configuration, such as masks and orders of features.

    They are not saved. They are computed again whenever the module moves, because `to_empty`, with which a module
    leaves the meta device, forgets their values. The configuration is kept in Python numbers, so a module can be built
    on the meta device.
    """

    def derived(self) -> Mapping[str, Tensor]:
        """Return the buffers on the CPU, {name: value}."""
        raise NotImplementedError

    def register_derived(self) -> None:
        """Register the buffers on the default device."""
        for name, value in self.derived().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name, value in self.derived().items():
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                buffer.copy_(value)
        return self
