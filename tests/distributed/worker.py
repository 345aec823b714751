"""One process of a distributed step under a plan: writes what it found as JSON.

torchrun --nproc-per-node 2 worker.py ddp|fsdp before|after FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

import remat
from remat.cost.allocations import most_allocated
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.models import Block, square_mean


def model_and_batches():
    """The model, and a batch for each process."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(32) for _ in range(4))), torch.randn(2, 512, 32)


def uneven_model_and_batches():
    """A model with parameters that two processes cannot halve, and a batch for each process."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(32) for _ in range(4)), nn.Linear(32, 33))
    return model, torch.randn(2, 512, 32)


def step_of(run, batch, rank):
    """Forward and backward, with the random numbers of one process."""
    torch.manual_seed(7 + rank)
    square_mean(run, batch).backward()


def shard(model):
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def leave():
    """End a process whose work is written, at once.

    A thread of gloo that lets go of its last tensor needs Python for that, and aborts the process
    where Python is just ending ("terminate called without an active exception").
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def main(kind, order, folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, batches = model_and_batches()
    batch = batches[rank]
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    assert len(plan.regions) == len(model)
    wrap = DistributedDataParallel if kind == "ddp" else shard
    if order == "before":
        remat.apply(model, plan)
    wrapped = wrap(model)
    if order == "after":
        remat.apply(model, plan)

    step_of(wrapped, batch, rank)
    model.zero_grad(set_to_none=True)
    peak = most_allocated(lambda: step_of(wrapped, batch, rank))
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        gradients[name] = whole.tolist()
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps({"peak": peak, "gradients": gradients}))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
