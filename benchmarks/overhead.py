"""What the bookkeeping of regions, and a guard, add to a step, as shares of the step's time.

    python benchmarks/overhead.py [--rounds 60] [--width 192] [--tokens 256]
                                  [-o benchmarks/results/overhead_HARDWARE_DATE.json]

The same training step four ways, every block recomputed in the last three:

    pure    without checkpointing; in backward, where a block's recomputation would begin, the block
            runs once more on its input, and the result is dropped: the ops of recomputation alone
    torch   torch.utils.checkpoint around each block
    plan    a plan of remat
    guard   that plan behind `guard.step`, after its measured steps

Bookkeeping is the time of a step under a plan less that of `pure`: what saving, dropping and
restoring cost beside the ops. Most of it is torch's own checkpoint, on which regions are built, so
its share is given as well, and what a plan adds to it. (Recomputation under torch stops at the last
tensor that is needed, and so leaves out one addition per block that `pure` runs.)

Bookkeeping is the same number of calls for tensors of any size, so that its share falls as the step
gets longer: `--width` and `--tokens` make it longer. So it is measured twice, as above, where
it drowns in the noise of the ops, and on tensors so small that little else is left of a step. These
`bookkeeping_seconds`, over the seconds of the step asked for, are its `shares_by_calls`.

Seconds are those of the processor, on one thread, so that waiting for it does not count. A round
runs each way once, first one way and then another; the figure is the median over rounds of the
ratio of two ways within a round, so that a machine that slows down for a while slows down both.
The interval is that of the order statistics, which holds whatever the noise is like. The number of
Python calls per step beside it has no noise at all. Below 5 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import operator
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

# Any: ways wrap steps that return nothing; documents are JSON.

SHAPE = {"blocks": 6, "width": 192, "heads": 4, "batch": 2, "tokens": 256, "dropout": 0.1}
# The same blocks with next to nothing to compute.
TINY = {"width": 16, "heads": 2, "batch": 1, "tokens": 8}
WARM_ROUNDS = 3
TINY_ROUNDS = 400
CONFIDENCE = 0.95
ALLOWED = 0.01
PAIRS = {
    "bookkeeping": ("plan", "pure"),
    "bookkeeping_of_torch": ("torch", "pure"),
    "plan_over_torch": ("plan", "torch"),
    "guard_over_plan": ("guard", "plan"),
}


def trained(way: Callable[..., Callable[[], Any]], **shape: Any) -> Callable[[], Any]:
    """Build the model and its optimizer; `way` puts checkpointing on and may wrap the step."""
    torch.manual_seed(0)
    model, batch, loss = prenorm_blocks(**(SHAPE | shape))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    return way(model, batch, loss, optimizer, step)


def by_running_again(model, _batch, _loss, _optimizer, step):
    """Run each block once more in backward, and keep everything."""
    for block in model:
        block.forward = functools.partial(_run_and_run_again, block.forward)
    return step


def _run_and_run_again(forward, x):
    output = forward(x)

    def again(_):
        with torch.enable_grad():
            forward(x.detach().requires_grad_())

    output.register_hook(again)
    return output


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


WAYS = {"pure": by_running_again, "torch": by_torch, "plan": by_plan, "guard": by_guard}


def timed(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run each way once per round, each round beginning with another; return seconds by round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds + WARM_ROUNDS):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            begin = time.process_time()
            ways[name]()
            if number >= WARM_ROUNDS:
                seconds[name].append(time.process_time() - begin)
    return seconds


def median_interval(values: list[float], confidence: float = CONFIDENCE) -> dict[str, float]:
    """Return the median and its interval between two order statistics.

    The median lies below the k-th smallest of n values with the probability of fewer than k heads
    in n tosses (David and Nagaraja 2003, Order Statistics, section 7.1): k is the largest with at
    most half of 1 - `confidence` on each side. With too few values the interval is their range.
    """
    ordered, count = sorted(values), len(values)
    below, k = 0.0, 0
    while k < count // 2:
        below += math.comb(count, k) / 2**count
        if below > (1 - confidence) / 2:
            break
        k += 1
    k = max(k, 1)
    return {
        "median": statistics.median(ordered),
        "low": ordered[k - 1],
        "high": ordered[count - k],
    }


def compared(
    seconds: dict[str, list[float]], compare: Callable[[float, float], float]
) -> dict[str, dict[str, float]]:
    """Compare the two ways of each pair within rounds."""
    return {
        name: median_interval(
            [compare(a, b) for a, b in zip(seconds[one], seconds[other], strict=True)]
        )
        for name, (one, other) in PAIRS.items()
    }


def python_calls(step: Callable[[], Any]) -> int:
    """Count the calls of Python functions in one warm step, as most are: no values are compared."""
    for _ in range(WARM_ROUNDS):
        step()
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    """Measure, print, and write a file where one is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    for name in ("width", "tokens"):
        parser.add_argument(f"--{name}", type=int, default=SHAPE[name])
    parser.add_argument("-o", "--out", type=Path, help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPE | {"width": arguments.width, "tokens": arguments.tokens}
    ways = {name: trained(way, **shape) for name, way in WAYS.items()}
    seconds = timed(ways, arguments.rounds)
    tiny = {name: trained(way, **TINY) for name, way in WAYS.items()}
    alone = compared(timed(tiny, TINY_ROUNDS), operator.sub)
    step = statistics.median(seconds["pure"])
    by_calls = {
        name: {end: value / step for end, value in found.items()} for name, found in alone.items()
    }
    document = {
        "shares": compared(seconds, lambda a, b: a / b - 1),
        "bookkeeping_seconds": alone,
        "shares_by_calls": by_calls,
        "confidence": CONFIDENCE,
        "within_one_percent": {name: share["high"] <= ALLOWED for name, share in by_calls.items()},
        "step_seconds": {
            name: dict(zip(("q1", "median", "q3"), statistics.quantiles(s, n=4), strict=True))
            for name, s in seconds.items()
        },
        "python_calls_per_step": {name: python_calls(step) for name, step in ways.items()},
        "shape": shape,
        "rounds": arguments.rounds,
        "warm_rounds": WARM_ROUNDS,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "remat": remat.__version__,
    }
    text = json.dumps(document, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
