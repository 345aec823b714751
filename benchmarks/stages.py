"""Stages of the core benchmark: each runs in a process of its own and writes one JSON file.

`python -m benchmarks.stages STAGE MODEL --work DIR ...`; `benchmarks/core.py` calls them. A stage
reads what earlier ones wrote, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import remat
from benchmarks.runner import Data, path_of, read, write
from benchmarks.shapes import Case
from benchmarks.zoo import ZOO
from remat.cost.devices import find_device
from remat.fit import Fit
from remat.planner.policies import AllBlocks, KeepAll, simple_policies
from remat.units import MIB

DROPOUT = 0.1
# The search ends by its limit on work; this one is for machines that do something else as well.
TIME_LIMIT_S = 300.0
_TIMING_ROUNDS = 5

# What the prototype reached (fraction of the forward cost recomputed), by model and budget in MiB:
# (best of all, every-n, first-k, last-k; blocks and sub-modules). None: nothing fitted.
PROTOTYPE: dict[str, dict[int, tuple[float | None, float | None]]] = {
    "gpt2": {1479: (None, 0.346), 1670: (0.340, 0.164), 1955: (0.170, 0.050)},
    "llama": {867: (0.647, 0.558), 1074: (0.370, 0.285), 1212: (0.185, 0.122)},
    "t5": {768: (0.493, 0.386), 867: (0.283, 0.190)},
    "vit": {380: (0.577, 0.540), 519: (0.346, 0.284), 612: (0.173, 0.154)},
    "resnet50": {468: (None, 0.422), 547: (0.306, 0.160)},
    "convnext": {518: (None, 0.487), 632: (0.231, 0.184)},
    "unet": {131: (0.723, 0.723), 158: (0.281, 0.277)},
    "moe": {633: (0.744, 0.733)},
}
# Its keep-everything peaks in MiB, without the workspace that convolutions take (ours have it).
WITHOUT_WORKSPACE_MIB = {"resnet50": 655.34, "convnext": 788.11, "unet": 194.08}

adamw = functools.partial(torch.optim.AdamW, foreach=False)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=sorted(_STAGES))
    parser.add_argument("model", choices=sorted(ZOO))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--points", type=int, default=8)
    parser.add_argument("--index", type=int, default=0)
    arguments = parser.parse_args()
    _STAGES[arguments.stage](arguments.model, arguments)


# -- planning ---------------------------------------------------------------------------------


def bounds(model: str, arguments: argparse.Namespace) -> None:
    """Find the least reachable and the keep-everything peak, and the budgets between them."""
    case = ZOO[model].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=adamw, time_limit_s=TIME_LIMIT_S)
    least = fit.frontier(1)[0]
    write(
        path_of(arguments.work, model, "bounds"),
        {
            "keep_all_bytes": least.keep_all_peak_bytes,
            "least_budget_bytes": least.budget_bytes,
            "budgets": _between(least, arguments.points),
            "seconds": least.plan_seconds,
        },
    )


def plan(model: str, arguments: argparse.Namespace) -> None:
    """Plan one of the budgets, from nothing, as a user would, and measure a real step under it."""
    budget = read(path_of(arguments.work, model, "bounds"))["budgets"][arguments.index]
    case = ZOO[model].build()
    fit = functools.partial(
        remat.plan, case.model, case.batch, loss=case.loss, optimizer=adamw,
        time_limit_s=TIME_LIMIT_S,
    )  # fmt: skip
    row = _timed(lambda asked: fit(budget=asked), budget)
    row["measured_bytes"] = None
    if "plan" in row:
        remat.apply(case.model, _plan_of(row["plan"]))
        row["measured_bytes"] = _measure(case, steps=1).peak_bytes
    write(path_of(arguments.work, model, "plan", arguments.index), row)


def policies(model: str, arguments: argparse.Namespace) -> None:
    """Look up all, every-n, first-k and last-k for each n and k on the timeline, which is exact."""
    case = ZOO[model].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=adamw)
    program = fit.plain
    rows = []
    for policy in (KeepAll(), *simple_policies(len(program.blocks))):
        chosen = [program.blocks[i] for i in policy.choose(len(program.blocks))]
        recomputed = sum(program.options[p].seconds for p in chosen)
        rows.append(
            {
                "label": policy.label,
                "peak_bytes": program.timeline.curve(chosen).peak_bytes,
                "fraction": recomputed / program.cost.forward_seconds,
                "seconds": program.solver.cost(chosen),
            }
        )
    write(
        path_of(arguments.work, model, "policies"),
        {
            "blocks": [program.options[position].module for position in program.blocks],
            "all_blocks": _text_of(fit.policy(AllBlocks())),
            "rows": rows,
        },
    )


def sweep(model: str, arguments: argparse.Namespace) -> None:
    """Plan many rising budgets, each searched from nothing: more must never cost more."""
    found = read(path_of(arguments.work, model, "bounds"))
    case = ZOO[model].build()
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=adamw, time_limit_s=TIME_LIMIT_S)
    rows = []
    for budget in np.linspace(
        found["least_budget_bytes"], found["keep_all_bytes"], arguments.points
    ):
        row = _timed(fit.plan, int(budget))
        row.pop("plan", None)
        rows.append(row)
    write(path_of(arguments.work, model, "sweep"), {"rows": rows})


def targets(model: str, arguments: argparse.Namespace) -> None:
    """Plan the prototype's budgets, with our prices of regions and with the prototype's."""
    if model not in PROTOTYPE:
        write(path_of(arguments.work, model, "targets"), {"rows": []})
        return
    case = ZOO[model].build()
    # The prototype minimized the recomputed ops and 60 us per region, nothing per saved tensor.
    cheap = dataclasses.replace(
        find_device("cpu"), region_overhead_s=60e-6, saved_tensor_overhead_s=0.0
    )
    keep_all_mib = read(path_of(arguments.work, model, "bounds"))["keep_all_bytes"] / MIB
    workspace_mib = max(0.0, keep_all_mib - WITHOUT_WORKSPACE_MIB.get(model, keep_all_mib))
    fits = [
        Fit(
            case.model, case.batch, loss=case.loss, optimizer=adamw, device=device,
            time_limit_s=TIME_LIMIT_S,
        )
        for device in (None, cheap)
    ]  # fmt: skip
    rows = []
    for asked_mib, (simple, submodules) in PROTOTYPE[model].items():
        budget = int((asked_mib + workspace_mib) * MIB)
        ours, theirs = (_timed(fit.plan, budget) for fit in fits)
        rows.append(
            {
                "asked_mib": asked_mib,
                "workspace_mib": workspace_mib,
                "prototype_simple": simple,
                "prototype": submodules,
                "fraction": ours.get("fraction"),
                "fraction_with_the_prototypes_overheads": theirs.get("fraction"),
                "predicted_bytes": ours.get("predicted_bytes"),
                "error": ours.get("error"),
            }
        )
    write(path_of(arguments.work, model, "targets"), {"rows": rows})


# -- the real thing ---------------------------------------------------------------------------


def unplanned(model: str, arguments: argparse.Namespace) -> None:
    """Measure the peak of one real step without a plan."""
    measured = _measure(ZOO[model].build(), steps=1)
    write(path_of(arguments.work, model, "unplanned"), {"peak_bytes": measured.peak_bytes})


def verify(model: str, arguments: argparse.Namespace) -> None:
    """Plan each budget with dropout on, and compare the planned step with the unplanned one."""
    case = ZOO[model].build(dropout=DROPOUT)
    common = {"loss": case.loss, "optimizer": adamw}
    fit = Fit(case.model, case.batch, **common, time_limit_s=TIME_LIMIT_S)
    rows = []
    for budget in _between(fit.frontier(1)[0], arguments.points):
        made = fit.plan(budget)
        proof = remat.verify(case.model, case.batch, made, **common)
        rows.append(
            {
                "asked_bytes": budget,
                "identical": proof.identical,
                "within_noise": proof.within_noise,
                "passed": proof.passed,
                "num_compared": proof.num_compared,
                "num_regions": len(made.regions),
                "num_random_regions": sum(r.draws_random_numbers for r in made.regions),
                "predicted_bytes": proof.predicted_peak_bytes,
                "measured_bytes": proof.measured_peak_bytes,
                "within_budget": proof.within_budget,
                "differences": [d.model_dump() for d in proof.differences[:5]],
                "hazards": [h.model_dump() for h in made.hazards],
            }
        )
    write(path_of(arguments.work, model, "verify"), {"rows": rows})


def times(model: str, arguments: argparse.Namespace) -> None:
    """Time steps without a plan, with all blocks recomputed and with each plan, interleaved."""
    case = ZOO[model].build()
    contenders: dict[str, str | None] = {
        "nothing": None,
        "all blocks": read(path_of(arguments.work, model, "policies"))["all_blocks"],
    }
    for index in range(arguments.points):
        text = read(path_of(arguments.work, model, "plan", index)).get("plan")
        if text is not None:
            contenders[str(index)] = text
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_TIMING_ROUNDS):
        for name, text in contenders.items():
            handle = None if text is None else remat.apply(case.model, _plan_of(text))
            seconds[name] += _measure(case, steps=1).step_seconds
            if handle is not None:
                handle.remove()
            gc.collect()
    rows = {}
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"median_s": middle, "iqr_s": high - low, "rounds": len(values)}
    write(path_of(arguments.work, model, "times"), rows)


def abstract(model: str, arguments: argparse.Namespace) -> None:
    """Plan a model beyond the machine's memory, built on the meta device."""
    started = time.process_time()
    case = ZOO[model].build(device="meta")
    built = time.process_time()
    made = remat.plan(case.model, case.batch, "70%", loss=case.loss, optimizer=adamw)
    write(
        path_of(arguments.work, model, "abstract"),
        {
            "parameters": sum(p.numel() for p in case.model.parameters()),
            "build_s": built - started,
            "plan_s": time.process_time() - built,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024),
            "keep_all_bytes": made.keep_all_peak_bytes,
            "asked_bytes": made.budget_bytes,
            "predicted_bytes": made.predicted_peak_bytes,
            "fraction": made.recompute_fraction,
            "outcome": made.outcome.value,
            "num_regions": len(made.regions),
        },
    )


# -- what they share --------------------------------------------------------------------------


def _timed(make: Callable[[int], remat.Plan], budget: int) -> Data:
    """Plan, and count the processor's seconds: planning runs on one thread."""
    started = time.process_time()
    try:
        made = make(budget)
    except remat.BudgetError as error:
        return {
            "asked_bytes": budget,
            "error": f"infeasible: least reached {error.minimum_bytes / MIB:.1f} MiB",
            "plan_s": time.process_time() - started,
        }
    return {
        "asked_bytes": budget,
        "predicted_bytes": made.predicted_peak_bytes,
        "fraction": made.recompute_fraction,
        "seconds": made.recompute_seconds,
        "lower_bound_fraction": made.lower_bound_fraction,
        "outcome": made.outcome.value,
        "num_regions": len(made.regions),
        "plan_s": time.process_time() - started,
        "plan": _text_of(made),
    }


def _measure(case: Case, steps: int) -> remat.Measurement:
    return remat.measure(case.model, case.batch, loss=case.loss, optimizer=adamw, steps=steps)


def _between(least: remat.Plan, points: int) -> list[int]:
    """Spread budgets from the least reachable peak to just under the keep-everything peak."""
    return [
        int(budget)
        for budget in np.linspace(least.budget_bytes, least.keep_all_peak_bytes, points + 1)[:-1]
    ]


def _text_of(made: remat.Plan) -> str:
    return made.model_dump_json()


def _plan_of(text: str) -> remat.Plan:
    return remat.Plan.from_data(json.loads(text), source="the benchmark's own plan")


_STAGES: dict[str, Callable[[str, argparse.Namespace], None]] = {
    stage.__name__: stage
    for stage in (bounds, plan, policies, sweep, targets, unplanned, verify, times, abstract)
}

if __name__ == "__main__":
    main()
