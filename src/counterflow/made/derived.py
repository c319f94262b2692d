"""Buffers that follow from a module's configuration and are not saved with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

# Without public names in torch, as in `made.staircase`.
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import unset_fake_temporarily


def with_values() -> AbstractContextManager[Any]:
    """Return a context in which tensors have values, also under FakeTensorMode. Other modes of torch stay active."""
    return unset_fake_temporarily()


def makes_fakes() -> bool:
    """Return True under FakeTensorMode."""
    return _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None


def in_current_mode(value: Tensor) -> Tensor:
    """Return a tensor that was made `with_values` on the default device, a fake one under FakeTensorMode."""
    device = torch.get_default_device()
    if not makes_fakes():
        return value.to(device)
    with with_values():
        numbers = value.flatten().tolist()
    return torch.tensor(numbers, dtype=value.dtype, device=device).reshape(value.shape)


class Derived(nn.Module):
    """Module with buffers that are computed from its configuration, such as masks and orders of features.

    They are not saved. They are computed again whenever the module moves, because `to_empty`, with which a module
    leaves the meta device, forgets their values. The configuration is kept in Python numbers, so a module can be built
    on the meta device.
    """

    def derived(self) -> Mapping[str, Tensor]:
        """Return the buffers on the CPU, {name: value}; call it `with_values`."""
        raise NotImplementedError

    def register_derived(self) -> None:
        """Register the buffers on the default device."""
        with with_values():
            found = self.derived()
        for name, value in found.items():
            self.register_buffer(name, in_current_mode(value), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        with with_values():
            found = self.derived()
        for name, value in found.items():
            buffer = self._buffers[name]
            if buffer is not None and not buffer.is_meta:
                buffer.copy_(in_current_mode(value) if makes_fakes() else value)
        return self
