"""Processes that torchrun starts: join them, and end with torchrun."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from counterflow.commands import console

POLL_SECONDS = 0.2  # between two checks that torchrun is alive


def is_torchrun() -> bool:
    """Return True if torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_restarted() -> bool:
    """Return True if torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the other processes if torchrun has started several; all but rank 0 are silent."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun keeps its store, where new processes would meet dead ones
        store = PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=size)
    console.out.quiet = console.err.quiet = rank > 0
    try:
        with _ending_with_torchrun() if dist.is_torchelastic_launched() else nullcontext():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _ending_with_torchrun() -> Iterator[None]:
    """Send SIGTERM to this process when torchrun, its parent, is killed and can no longer do so.

    Processes without their launcher would wait for each other forever, or write beside those that are started next.
    """
    torchrun = os.getppid()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            if os.getppid() != torchrun:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        if os.getppid() != torchrun:  # rank 0 reports it even if another process saw it first
            console.warn("torchrun was killed: ending this process as well")
