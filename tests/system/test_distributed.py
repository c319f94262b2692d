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


def test_two_processes_have_the_gradient_of_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    loss = Loss()
    expected = gradients(loss, *inputs(loss.one_pass, ROWS))
    for rank in range(2):
        for came, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            close(came, wanted)


CONFIG = cf.FitConfig(epochs=4, batch_size=20, warm_up_steps=5, learning_rate=1e-2, ema=0.9)


def trained(checkpoints=None, stop_after=None):
    """The weights and the course of a short training of a MAF."""
    rows = torch.randn(130, 3, generator=torch.Generator().manual_seed(0)).cumsum(1)
    flow = cf.MAF(3, layers=2, hidden=(9,), seed=dist.get_rank() if dist.is_initialized() else 0)

    def on_step(task, done, total):
        if done == stop_after and dist.get_rank() == 1:  # what one is asked, all do after the next step
            raise KeyboardInterrupt

    record = cf.fit(flow, cf.log_likelihood, rows[:100], rows[100:], CONFIG, on_step=on_step, checkpoints=checkpoints)
    return flow.state_dict(), record


def train(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    # the second one has another disk, on which nothing is read or written
    checkpoints = cf.Checkpoints(f"{folder}/checkpoints" if rank == 0 else f"{folder}/elsewhere")
    _, interrupted = trained(checkpoints, stop_after=7)
    assert interrupted.stopped == "interrupted"
    assert checkpoints.load().steps == 8
    for name, again in (("resumed", checkpoints), ("whole", None)):
        weights, record = trained(again)
        torch.save((weights, [(e.train, e.validation) for e in record.epochs]), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_one_does(tmp_path):
    mp.spawn(train, (str(tmp_path),), nprocs=2)
    weights, record = trained()
    read = {file.stem: torch.load(file) for file in tmp_path.glob("*.pt")}
    for came, curve in read.values():
        assert all(torch.equal(came[k], read["whole0"][0][k]) for k in came)  # in both, and after an interruption
        for one, other in zip(curve, record.epochs, strict=True):
            torch.testing.assert_close(one, (other.train, other.validation), rtol=1e-4, atol=0)
    for k, expected in weights.items():
        close(read["whole0"][0][k], expected, 1e-4)
    assert not (tmp_path / "elsewhere").exists()


def refuse(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        cf.fit(cf.MAF(2), cf.log_likelihood, torch.randn(40, 2), torch.randn(9, 2), cf.FitConfig(batch_size=9))
    except ValueError as error:
        assert str(error) == "expected batch_size to be a multiple of the 2 processes, got 9"
        dist.destroy_process_group()
    else:
        raise AssertionError("no error")


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    mp.spawn(refuse, (str(tmp_path),), nprocs=2)
