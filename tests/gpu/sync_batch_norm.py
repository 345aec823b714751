"""One process of two, on a GPU each: SyncBN with its blocks recomputed.

torchrun --nproc-per-node 2 sync_batch_norm.py FILE

Each process compares two steps under a plan with two without; the first writes the worse verdict.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.conformance import verdicts
from tests.conformance.cases import square_mean
from tests.conformance.parts import ROWS, WIDTH, Block, Net


def made(device: torch.device) -> nn.Module:
    """The same model in every process, its batch norms shared."""
    torch.manual_seed(0)
    model = Net(lambda: Block(nn.BatchNorm1d(2 * WIDTH)))
    return DistributedDataParallel(
        nn.SyncBatchNorm.convert_sync_batchnorm(model).to(device), device_ids=[device]
    )


def results(model: nn.Module, batch: torch.Tensor) -> verdicts.Results:
    """Two steps, and what they leave."""
    found: verdicts.Results = {}
    for number in range(2):
        model.zero_grad()
        loss = square_mean(model, batch)
        loss.backward()
        found[f"loss {number}"] = loss.detach().clone()
    found |= {n: p.grad.clone() for n, p in model.named_parameters()}
    return found | {n: b.clone() for n, b in model.named_buffers()}


def main(path: str) -> None:
    """Judge, and write what both processes found."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    torch.manual_seed(10 + dist.get_rank())
    batch = torch.randn(ROWS, WIDTH, device=device)
    reference = results(made(device), batch)
    wrapped = made(device)
    plan = plan_policy(wrapped, batch, AllBlocks(), loss=square_mean, optimizer=None)
    with remat.apply(wrapped, plan):
        verdict = verdicts.judged(reference, lambda: results(wrapped, batch))
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, verdict)
    if dist.get_rank() == 0:
        worst = max(found, key=lambda v: v != verdicts.IDENTICAL)
        Path(path).write_text(json.dumps(worst), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
