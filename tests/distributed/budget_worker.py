"""One process that plans wrapped models, and measures them: writes what it found as JSON.

torchrun --nproc-per-node 2 budget_worker.py FOLDER

Without a folder, started alone: what the first of two processes would predict.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[2]))

import remat
from tests.distributed.worker import leave, step_of, uneven_model_and_batches
from tests.models import square_mean


def shard(model, **options):
    for block in model[:-1]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def prefetching(model):
    """Compute in bfloat16, and gather two blocks ahead in forward, and two behind in backward."""
    shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    for number in range(len(model) - 3):
        model[number].set_modules_to_forward_prefetch([model[number + 1], model[number + 2]])
        model[number + 2].set_modules_to_backward_prefetch([model[number + 1], model[number]])
    return model


def left_gathered(model):
    """Shard, and leave parameters gathered by a forward without backward."""
    wrapped = shard(model, reshard_after_forward=False)
    with torch.no_grad():
        wrapped(torch.randn(2, 32))
    return wrapped


def split_layers(model):
    """Spread the two linear layers of each block over the processes (tensor parallel)."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[:-1]:
        parallelize_module(block, mesh, {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()})
    return model


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "ddp views": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "fsdp": shard,
    "fsdp kept": left_gathered,
    "fsdp bf16": prefetching,
    "tensor parallel": split_layers,
}


def several_peaks(model, batch):
    """Measure steps: gloo's threads release what they sent when they get to it, so peaks differ."""
    return [remat.measure(model, batch, loss=square_mean, steps=1).peak_bytes for _ in range(4)]


def tried(wrap, rank):
    model, batches = uneven_model_and_batches()
    wrapped, batch = wrap(model), batches[rank]
    names = [name for name, _ in wrapped.named_parameters()]
    plan = remat.plan(wrapped, batch, "70%", loss=square_mean)
    assert names == [name for name, _ in wrapped.named_parameters()]
    proof = remat.verify(wrapped, batch, plan, loss=square_mean)
    with remat.apply(wrapped, plan):
        peaks = [proof.measured_peak_bytes, *several_peaks(wrapped, batch)]
        wrapped.zero_grad()
        step_of(wrapped, batch, rank)
    gradients = [p.grad for p in wrapped.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return {
        "regions": [region.module for region in plan.regions],
        "identical": proof.identical,
        "compared": proof.num_compared,
        "predicted": plan.predicted_peak_bytes,
        "measured": peaks,
        "budget": plan.budget_bytes,
        "keep_all": plan.keep_all_peak_bytes,
        "plain": several_peaks(wrapped, batch),
        "breakdown": plan.breakdown,
        "gradients": [gradient.tolist() for gradient in whole],
    }


def refusals():
    """What each kind of wrapping or order that is not planned is told."""

    def told(attempt):
        model, (batch, _) = uneven_model_and_batches()
        try:
            attempt(model, batch)
        except remat.RematError as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def plan(model, batch, **options):
        return remat.plan(model, batch, "80%", loss=square_mean, **options)

    def plan_inner(model, batch):
        remat.apply(DistributedDataParallel(model), plan(model, batch))

    return {
        "fsdp1": told(
            lambda m, x: plan(FullyShardedDataParallel(m, device_id=torch.device("cpu")), x)
        ),
        "offload": told(
            lambda m, x: plan(shard(m, offload_policy=CPUOffloadPolicy(pin_memory=False)), x)
        ),
        "chunks": told(lambda m, x: plan(DistributedDataParallel(m), x, chunks=True)),
        "inner": told(plan_inner),
    }


def alone():
    """Predictions of the first of two processes, where there is no second one."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    found = {}
    for name, wrap in WRAPPERS.items():
        if wrap is not left_gathered:  # which a forward would have to communicate for
            model, (batch, _) = uneven_model_and_batches()
            plan = remat.plan(wrap(model), batch, "70%", loss=square_mean)
            found[name] = plan.predicted_peak_bytes
    print(json.dumps(found))
    dist.destroy_process_group()


def main(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: tried(wrap, rank) for name, wrap in WRAPPERS.items()}
    found["refusals"] = refusals()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else alone()
