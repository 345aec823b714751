"""One process of the rows that need two: each tool's verdict, on gloo.

torchrun --nproc-per-node 2 processes.py FILE

Every process has the same weights and a batch of its own; each compares its own gradients with
those of the wrapped model without checkpointing, bit for bit. The first writes the verdicts.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.trace.collectives import local_part
from tests.conformance import verdicts
from tests.conformance.cases import square_mean
from tests.conformance.parts import ROWS, WIDTH, Block, Net
from tests.distributed.worker import leave


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Make each block a unit of FSDP2, and the rest another."""
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def with_unused(model: nn.Module) -> nn.Module:
    """Wrap in DDP a model that has a parameter that no step uses, in a graph said to be static."""
    model.unused = nn.Linear(WIDTH, WIDTH)
    return DistributedDataParallel(model, static_graph=True)


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """One row of the table that needs several processes."""

    row: int
    title: str
    thread: str
    wrap: Callable[[nn.Module], nn.Module]
    is_compiled: bool = False

    @property
    def name(self) -> str:
        """Row and title, as in the table."""
        return f"{self.row} {self.title}"


WRAPPINGS = (
    Wrapping(row=22, title="FSDP2's casts in mixed precision", thread="pytorch#159359",
             wrap=lambda m: shard(m, mp_policy=MixedPrecisionPolicy(torch.bfloat16))),
    Wrapping(row=26, title="FSDP2 inside a checkpointed module", thread="pytorch#82203",
             wrap=shard),
    Wrapping(row=27, title="DDP that looks for unused parameters", thread="pytorch#24005",
             wrap=lambda m: DistributedDataParallel(m, find_unused_parameters=True)),
    Wrapping(row=28, title="DDP's static graph, an unused parameter", thread="pytorch#79171",
             wrap=with_unused),
    Wrapping(row=41, title="DDP that is compiled", thread="pytorch#144035",
             wrap=DistributedDataParallel, is_compiled=True),
)  # fmt: skip


def made() -> nn.Module:
    """The same model in every process."""
    torch.manual_seed(0)
    return Net(lambda: Block(nn.Dropout(0.5)))


def results(case: Wrapping, model: nn.Module, batch: torch.Tensor) -> verdicts.Results:
    """Two steps, as some faults show in the second; what each process holds after them."""
    run = model
    if case.is_compiled:
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager")
    torch.manual_seed(1 + dist.get_rank())
    found: verdicts.Results = {}
    for number in range(2):
        model.zero_grad()
        loss = square_mean(run, batch)
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name.removeprefix("module.")] = (
            None if gradient is None else local_part(gradient).clone()
        )
    found["state of torch"] = torch.get_rng_state()
    return found


def by_torch(case: Wrapping, batch: torch.Tensor, *, reentrant: bool) -> verdicts.Results:
    """Checkpoint each block before wrapping, as the documentation of torch says."""
    model = made()
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
    return results(case, case.wrap(model), batch)


def by_remat(case: Wrapping, batch: torch.Tensor) -> verdicts.Results:
    """Plan the wrapped model, every block recomputed."""
    wrapped = case.wrap(made())
    plan = plan_policy(wrapped, batch, AllBlocks(), loss=square_mean, optimizer=None)
    assert len(plan.regions) == 2, plan.regions
    with remat.apply(wrapped, plan):
        return results(case, wrapped, batch)


def main(path: str) -> None:
    """Judge every row under every tool, and write what the first process found."""
    dist.init_process_group("gloo")
    torch.manual_seed(10 + dist.get_rank())
    batch = torch.randn(ROWS, WIDTH)
    found = {}
    for case in WRAPPINGS:
        reference = results(case, case.wrap(made()), batch)
        found[case.name] = {
            "remat": verdicts.judged(reference, lambda case=case: by_remat(case, batch)),
            **{
                name: verdicts.judged(
                    reference, lambda case=case, r=reentrant: by_torch(case, batch, reentrant=r)
                )
                for name, reentrant in (("torch", False), ("torch, reentrant", True))
            },
        }
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
