"""What a guard and the bookkeeping of regions add to a step, as shares of the step's time.

    python benchmarks/overhead.py [--rounds 40]

The same training step three ways, in turns within one process, every block recomputed each time:
through torch's own checkpoint; under a plan of remat; and under that plan behind `guard.step`,
after its measured steps. Prints one JSON document with medians and quartiles in seconds, the
shares, and the machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if str(ROOT := Path(__file__).parent.parent) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

import torch
from torch.utils.checkpoint import checkpoint

import remat
from benchmarks.shapes import prenorm_blocks
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks


def timed(ways: dict[str, object], rounds: int) -> dict[str, dict[str, float]]:
    """Run each way once per round, in turns; give median and quartiles in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, run in ways.items():
            begin = time.perf_counter()
            run()
            if number >= 3:  # warm
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: dict(zip(("q1", "median", "q3"), statistics.quantiles(found, n=4), strict=True))
        for name, found in seconds.items()
    }


def trained(way: Callable[..., Callable[[], Any]]) -> Callable[[], Any]:
    """Build the model and its optimizer; `way` puts checkpointing on and may wrap the step."""
    torch.manual_seed(0)
    model, batch, loss = prenorm_blocks(
        blocks=6, width=96, heads=4, batch=4, tokens=96, dropout=0.1
    )
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return way(model, batch, loss, optimizer, step)


def by_torch(model, _batch, _loss, _optimizer, step):
    """Checkpoint each block through torch."""
    for block in model:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return step


def by_plan(model, batch, loss, optimizer, step):
    """Recompute each block under a plan."""
    plan = plan_policy(model, batch, AllBlocks(), loss=loss, optimizer=optimizer)
    assert len(plan.regions) == len(model)
    remat.apply(model, plan)
    return step


def by_guard(model, batch, loss, optimizer, step):
    """Recompute each block under a guarded plan."""
    plan = plan_policy(model, batch, AllBlocks(), loss=loss, optimizer=optimizer)
    guard = remat.guard(model, batch, plan, loss=loss, optimizer=optimizer, steps=0)
    return lambda: guard.step(step)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    ways = {"torch": trained(by_torch), "plan": trained(by_plan), "guard": trained(by_guard)}
    seconds = timed(ways, rounds)
    median = {name: found["median"] for name, found in seconds.items()}
    document = {
        "seconds": seconds,
        "plan_over_torch": median["plan"] / median["torch"] - 1,
        "guard_over_plan": median["guard"] / median["plan"] - 1,
        "rounds": rounds,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
