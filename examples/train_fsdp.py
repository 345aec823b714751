"""Digits on several processes: FSDP2 shards the model, and each process keeps a budget of its own.

    torchrun --nproc-per-node 2 examples/train_fsdp.py
    torchrun --nproc-per-node 2 examples/train_fsdp.py --budget 50% --steps 60

Runs on CPUs with gloo. Model and images are those of `digits_vit.py`. The order is: shard, plan,
apply, then build the optimizer. Exits with 1 if a process exceeds its budget, or its prediction is
off by more than a hundredth.
"""

import argparse
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset

import remat
from digits_vit import VisionTransformer, loss, make_optimizer, read_digits


def read_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", default="60%", help="peak of one process (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps to train (default: 20)")
    parser.add_argument("--batch-size", type=int, default=64, help="per process (default: 64)")
    return parser.parse_args()


def sharded_model():
    """Build the same model in every process, and keep one part of it in each."""
    torch.manual_seed(0)
    model = VisionTransformer()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def batches_of(rank, num_processes, batch_size):
    """Yield batches of this process's share of the images, without end."""
    data, _ = read_digits()
    share = Subset(data, range(rank, len(data) - len(data) % num_processes, num_processes))
    while True:
        yield from DataLoader(share, batch_size, shuffle=True, drop_last=True)


def train(model, batches, num_steps):
    """Train, and return the mean loss over processes at each step."""
    optimizer = make_optimizer(model.parameters())
    losses = []
    for _ in range(num_steps):
        value = loss(model, next(batches))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = value.detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def main():
    arguments = read_arguments()
    dist.init_process_group("gloo")
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    model = sharded_model()
    torch.manual_seed(1 + rank)
    batches = batches_of(rank, num_processes, arguments.batch_size)
    batch = next(batches)

    plan = remat.plan(model, batch, arguments.budget, loss=loss, optimizer=make_optimizer)
    with remat.apply(model, plan):
        measured = remat.measure(model, batch, loss=loss, optimizer=make_optimizer, steps=1)
        losses = train(model, batches, arguments.steps)

    error = plan.predicted_peak_bytes / measured.peak_bytes - 1
    kept = measured.peak_bytes <= plan.budget_bytes
    said = [None] * num_processes
    dist.all_gather_object(said, (plan, measured.peak_bytes, kept and abs(error) <= 0.01))
    if rank == 0:
        for number, (made, peak_bytes, _) in enumerate(said):
            print(
                f"rank {number}: budget {made.budget_bytes:,} bytes, predicted "
                f"{made.predicted_peak_bytes:,}, measured {peak_bytes:,}, without a plan "
                f"{made.keep_all_peak_bytes:,}; {len(made.regions)} regions"
            )
        shown = ", ".join(f"{value:.3f}" for value in losses[:: max(1, len(losses) // 8)])
        print(f"loss: {shown}, at the end {losses[-1]:.3f}")
    dist.destroy_process_group()
    time.sleep(0.2)  # a thread of gloo that lets go of its last tensor while Python ends aborts
    return 0 if all(passed for *_, passed in said) else 1


if __name__ == "__main__":
    sys.exit(main())
