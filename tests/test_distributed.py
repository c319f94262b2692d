"""Both directions inside DistributedDataParallel: two processes come to the gradient of one."""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from registry import close, inputs, stir
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import counterflow as cf

ROWS = 12


class Loss(nn.Module):
    """One pass through a MAF, one solve of another: what DistributedDataParallel wraps must be a module."""

    def __init__(self):
        super().__init__()
        self.one_pass = stir(cf.MAF(5, 2, layers=2, hidden=(9, 7)))
        self.solved = stir(cf.IAF(5, 2, layers=2, hidden=(9, 7), univariate=cf.RationalQuadraticSpline(bins=4)))

    def forward(self, x, c):
        return -(self.one_pass(c).log_prob(x) + self.solved(c).log_prob(x)).mean()


def gradients(module, x, c):
    module(x, c).backward()
    return [p.grad for p in module.parameters()]


def work(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    x, c = (v[rank::2] for v in inputs(Loss().one_pass, ROWS))
    torch.save(gradients(DistributedDataParallel(Loss()), x, c), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_come_to_the_gradient_of_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    loss = Loss()
    expected = gradients(loss, *inputs(loss.one_pass, ROWS))
    for rank in range(2):
        for came, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            close(came, wanted)
