"""A step under our plan against one under all blocks recomputed, both at the same peak.

    python benchmarks/steptime.py [--models six_blocks gpt2s] [--seconds 120]

For each model the plan is made for the predicted peak of recomputing every block, so that neither
may take more memory than the other. Both steps run in turns in one process on one thread, each
round beginning with another one; the figure is the median over rounds of the ratio of their
processor seconds within a round, with the interval of `benchmarks.overhead`. Ours is no slower
where the interval reaches 1 or lies below. Below 10 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch  # noqa: E402

import remat  # noqa: E402
from benchmarks.core_report import table  # noqa: E402
from benchmarks.overhead import CONFIDENCE, WARM_ROUNDS, median_interval, timed  # noqa: E402
from benchmarks.runner import Data, environment, hardware, where  # noqa: E402
from benchmarks.zoo import ZOO, Entry  # noqa: E402
from remat.files import write_atomically  # noqa: E402
from remat.fit import Fit  # noqa: E402
from remat.planner.policies import AllBlocks  # noqa: E402
from remat.trace.step import compute_loss  # noqa: E402
from remat.units import MIB  # noqa: E402

# Any: losses of models return what they like.

MODELS = ("six_blocks", "gpt2s", "chain32", "vit")
FEWEST_ROUNDS, MOST_ROUNDS = 9, 60

adamw = functools.partial(torch.optim.AdamW, foreach=False)


def compared(entry: Entry, seconds: float) -> Data:
    """Time both steps of one model in turns, for about so many seconds; return one row."""
    case = entry.build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=adamw)
    all_blocks = fit.policy(AllBlocks())
    ours = fit.plan(all_blocks.budget_bytes)
    steps = {name: _step(entry, made) for name, made in (("all", all_blocks), ("ours", ours))}
    begin = time.process_time()
    for step in steps.values():
        step()
    once = time.process_time() - begin
    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / once) - WARM_ROUNDS))
    found = timed(steps, rounds)
    ratio = median_interval(
        [a / b for a, b in zip(found["ours"], found["all"], strict=True)], CONFIDENCE
    )
    return {
        "model": entry.name,
        "rounds": rounds,
        "ratio": ratio,
        "no_slower": ratio["low"] <= 1.0,
        "plans": {
            name: {
                "predicted_peak_bytes": made.predicted_peak_bytes,
                "recompute_fraction": made.recompute_fraction,
                "predicted_step_seconds": made.step_seconds + made.recompute_seconds,
                "step_seconds": median_interval(found[name], CONFIDENCE),
            }
            for name, made in (("all", all_blocks), ("ours", ours))
        },
    }


def _step(entry: Entry, plan: remat.Plan) -> Callable[[], Any]:
    """Build the model again with its optimizer, and return one step of it under a plan."""
    case = entry.build()
    optimizer = adamw(case.model.parameters())
    case.model.train()
    remat.apply(case.model, plan)

    def step() -> None:
        optimizer.zero_grad()
        compute_loss(case.model, case.batch, case.loss).backward()
        optimizer.step()

    return step


def markdown(results: Data) -> str:
    """Write the results as a page."""
    rows = table(
        ("model", "peak MiB, all blocks", "ours", "recomputed, all blocks", "ours",
         "step s, all blocks", "ours", "ratio", f"{CONFIDENCE:.0%} interval", "rounds"),
        (
            (
                row["model"],
                *(f"{row['plans'][n]['predicted_peak_bytes'] / MIB:.1f}" for n in ("all", "ours")),
                *(f"{row['plans'][n]['recompute_fraction']:.3f}" for n in ("all", "ours")),
                *(f"{row['plans'][n]['step_seconds']['median']:.3f}" for n in ("all", "ours")),
                f"{row['ratio']['median']:.3f}",
                f"{row['ratio']['low']:.3f} to {row['ratio']['high']:.3f}",
                row["rounds"],
            )
            for row in results["rows"]
        ),
    )  # fmt: skip
    spoken = (
        "Seconds are the processor's, of one whole training step (AdamW) on one thread; the ratio "
        "is ours over all blocks, within rounds."
    )
    return "\n".join(["# Steps at equal peak", "", where(results), "", spoken, "", *rows]) + "\n"


def main() -> int:
    """Compare, write and print; 1 if a step of ours is slower."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=120.0, help="of steps for each model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    described = environment("steptime.py", 1)
    results: Data = {
        "schema_version": 1,
        "theme": "steptime",
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "environment": described,
        "confidence": CONFIDENCE,
        "rows": [compared(ZOO[name], arguments.seconds) for name in arguments.models],
    }
    stem = arguments.out / f"steptime_{hardware()}_{results['date'][:10]}"
    write_atomically(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(results))
    print(markdown(results))
    return 0 if all(row["no_slower"] for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
