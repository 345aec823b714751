"""Stages of the peers benchmark: each peer's rows on one model, in processes of their own.

`python -m benchmarks.peer_stages STAGE MODEL --work DIR`; `benchmarks/peers.py` calls them. Stages
named `...-plan` decide, the others measure what was decided: every row in a fresh process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

import remat
from benchmarks.compiled import as_data, compiled, memory_budget
from benchmarks.peer_step import (
    Prepare,
    Reference,
    adamw,
    examine,
    in_child,
    spread,
    step_seconds,
)
from benchmarks.peers_report import SAME_PEAK_BYTES
from benchmarks.rotor import (
    Rotor,
    Scheduled,
    chain_stages,
    in_slots,
    peak_of,
    plan_as_data,
    plan_from_data,
    seconds_again,
    seconds_stopped,
)
from benchmarks.runner import Data, path_of, read, read_if_there, write
from benchmarks.shapes import Case
from benchmarks.zoo import ZOO
from remat.cost.model import CostModel, cost_step
from remat.fit import Fit
from remat.planner.policies import EveryNth, FirstK, KeepAll, LastK, simple_policies
from remat.units import MIB

DROPOUT = 0.1
# Name of a row -> (model of the zoo, dropout). Models train with dropout where they have any.
CASES: dict[str, tuple[str, float]] = {
    "six_blocks": ("six_blocks", 0.0),
    "six_blocks_dropout": ("six_blocks", DROPOUT),
    "chain32": ("chain32", 0.0),
    "chain200": ("chain200", 0.0),
    **{
        name: (name, DROPOUT)
        for name in ("gpt2s", "gpt2", "llama", "t5", "vit", "convnext", "unet", "moe")
    },
    "resnet50": ("resnet50", 0.0),
    "chain6": ("chain6", 0.0),
}
CHAINS = ("six_blocks", "six_blocks_dropout", "chain6", "chain32", "chain200")
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2, 0.1, 0.0)
REFERENCE_FRACTIONS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.0)
MEASURED = ("fixed", "amb-aot_eager-dp", "amb-aot_eager-ilp", "amb-inductor-dp", "sac", "rotor")
_MOST_POLICIES = 3  # of each kind, spread
_SLOTS = 2000
_TIMING_ROUNDS = 7
CHILD_LIMIT_S = 300.0


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=sorted(_STAGES))
    parser.add_argument("model", choices=sorted(CASES))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--points", type=int, default=8)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = _STAGES[arguments.stage](arguments.model, arguments)
    write(path_of(arguments.work, arguments.model, arguments.stage), {"rows": rows})


# -- rules of thumb and ours ------------------------------------------------------------------


def fixed_plan(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Decide nothing, all, every-n, first-k and last-k blocks."""
    del arguments
    fit = _fit(model)
    blocks = len(fit.plain.blocks)
    rules = simple_policies(blocks)
    chosen = [KeepAll(), rules[0]]
    for kind in (EveryNth, FirstK, LastK):
        same = [rule for rule in rules if isinstance(rule, kind)]
        picked = sorted({round(x) for x in np.linspace(0, len(same) - 1, _MOST_POLICIES)})
        chosen += [same[i] for i in picked] if same else []
    return [
        {"setting": rule.label, "asked_bytes": None} | _decided(fit.policy(rule)) for rule in chosen
    ]


def fixed(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Measure the rules of thumb."""
    return _measure_plans(model, arguments, "fixed")


def ours_plan(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Plan budgets from the least reachable to keeping everything, and at each peer's own peak.

    There twice: as users plan, and with no price on anything but recomputation, as peers plan.
    """
    fit = _fit(model)
    ops_alone = _fit(model, dataclasses.replace(fit.plain.cost_model, counts_bookkeeping=False))
    least = fit.frontier(1)[0].budget_bytes
    budgets = np.linspace(least, fit.keep_all_peak_bytes, arguments.points + 1)[:-1]
    rows = [_asked(fit, int(budget), "budget") for budget in budgets]
    peaks = {
        row["measured_bytes"]
        for name in MEASURED
        for row in (read_if_there(path_of(arguments.work, model, name)) or {"rows": []})["rows"]
        if row.get("measured_bytes")
    }
    done: list[int] = []
    for peak in sorted(peaks):
        # Peaks that agree to a thousandth are one: ours then keeps the lower of them.
        budget = peak + SAME_PEAK_BYTES
        if budget < fit.keep_all_peak_bytes and (not done or budget > done[-1] * 1.001):
            done.append(budget)
            rows += [_asked(f, budget, "peer's peak") for f in (fit, ops_alone)]
    return [*rows, _asked(fit, fit.keep_all_peak_bytes, "keep everything")]


def ours(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Measure our plans at the budgets; those at the peers' peaks are simulated, to the byte."""
    return _measure_plans(model, arguments, "ours")


def _asked(fit: Fit, budget: int, kind: str) -> Data:
    begin = time.monotonic()
    row: Data = {"setting": kind, "asked_bytes": budget}
    try:
        made = fit.plan(budget)
    except remat.BudgetError as error:
        return row | {
            "error": f"infeasible: least reached {error.minimum_bytes / MIB:.1f} MiB",
            "plan_s": time.monotonic() - begin,
        }
    return row | _decided(made)


def _decided(made: remat.Plan) -> Data:
    return {
        "predicted_bytes": made.predicted_peak_bytes,
        "fraction": made.recompute_fraction,
        "seconds": made.recompute_seconds,
        "plan_s": made.plan_seconds,
        "num_regions": len(made.regions),
        "plan": made.model_dump_json(),
    }


def _measure_plans(model: str, arguments: argparse.Namespace, peer: str) -> list[Data]:
    rows = read(path_of(arguments.work, model, f"{peer}-plan"))["rows"]
    for number, row in enumerate(rows):
        text = row.pop("plan", None)
        if text is not None and row["setting"] != "peer's peak":
            prepare = functools.partial(_under_plan, text=text)
            row.update(_in_child(model, arguments, f"{peer}-row", number, prepare))
    return rows


def _under_plan(case: Case, text: str) -> nn.Module:

    made = remat.Plan.from_data(json.loads(text), source="the benchmark's own plan")
    if made.regions:
        remat.apply(case.model, made)
    return case.model


# -- activation_memory_budget -----------------------------------------------------------------


def _amb(backend: str, solver: str) -> Callable[[str, argparse.Namespace], list[Data]]:
    def stage(model: str, arguments: argparse.Namespace) -> list[Data]:
        forward_s = read(path_of(arguments.work, model, "facts"))["rows"][0]["forward_seconds"]
        rows: list[Data] = []
        for number, fraction in enumerate(FRACTIONS):
            work = functools.partial(_compiled_row, model, backend, solver, fraction, forward_s)
            name = f"amb-{backend}-{solver}-row"
            rows.append({"setting": f"{fraction:g}"} | _kept(model, arguments, name, number, work))
        # A fraction is of the activations that its own 1.0 keeps: that is what was asked.
        whole = rows[0].get("measured_bytes")
        for row, fraction in zip(rows, FRACTIONS, strict=True):
            if whole and row.get("base_bytes"):
                row["asked_bytes"] = int(
                    row["base_bytes"] + fraction * (whole - row["base_bytes"])
                )  # fmt: skip
        return rows

    return stage


def _compiled_row(model: str, backend: str, solver: str, fraction: float, forward_s: float) -> Data:
    begin = time.monotonic()
    with memory_budget(backend, fraction, solver) as twice:
        found = examine(_reference(model), functools.partial(compiled, backend=backend))
    return found | as_data(twice, forward_s) | {"plan_s": time.monotonic() - begin}


def reference(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Repeat the published table: forward and backward alone, what is alive before excluded."""
    rows: list[Data] = []
    for number, fraction in enumerate(REFERENCE_FRACTIONS):
        work = functools.partial(_reference_row, model, fraction)
        row = _kept(model, arguments, "reference-row", number, work)
        if "measured_bytes" in row:
            row["above_base_mib"] = (row["measured_bytes"] - row["base_bytes"]) / MIB
        rows.append({"setting": f"{fraction:g}"} | row)
    return rows


def _reference_row(model: str, fraction: float) -> Data:
    with memory_budget("aot_eager", fraction, "dp"):
        prepare = functools.partial(compiled, backend="aot_eager")
        return examine(_reference(model), prepare, optimizer=None)


# -- sac_milp ---------------------------------------------------------------------------------


def sac_plan(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Let `sac_milp` plan; its peak leaves out the optimizer's state, which is added."""
    from benchmarks.sac_milp import PATCHED, SacMilp

    facts = read(path_of(arguments.work, model, "facts"))["rows"][0]
    begin = time.monotonic()
    name, dropout = CASES[model]
    tool = SacMilp(ZOO[name], dropout)
    statistics_s = time.monotonic() - begin
    beside = facts["optimizer_state_bytes"]
    rows = []
    for share in np.linspace(1.0, 0.2, arguments.points + 1):
        begin = time.monotonic()
        budget = int(tool.keep_all_bytes() * share)
        row = {"setting": f"{share:.0%}", "asked_bytes": budget + beside, "patched": PATCHED}
        row |= tool.plan(budget)
        row["plan_s"] = statistics_s + time.monotonic() - begin
        if "predicted_bytes" in row:
            row["predicted_bytes"] += beside
            row["fraction"] = row["recompute_s"] / facts["forward_seconds"]
        rows.append(row)
    return rows


def sac(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Measure what `sac_milp` decided."""
    from benchmarks.sac_milp import apply

    rows = read(path_of(arguments.work, model, "sac-plan"))["rows"]
    for number, row in enumerate(rows):
        saved = row.pop("saved", None)
        if saved is not None:
            prepare = functools.partial(apply, saved=saved)
            found = _in_child(model, arguments, "sac-row", number, prepare)
            if "has been mutated" in found.get("error", ""):
                whole = {name: [0] * len(policy) for name, policy in saved.items()}
                prepare = functools.partial(apply, saved=whole)
                found = _in_child(model, arguments, "sac-whole-row", number, prepare)
                row["setting"] += ", its modules whole: torch refuses its ops"
                row["fraction"] *= row["whole_s"] / row["recompute_s"]
            row.update(found)
    return rows


# -- rotor ------------------------------------------------------------------------------------


def rotor_plan(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Plan a chain of blocks by rotor's dynamic programme."""
    begin = time.monotonic()
    fit = _fit(model).plain
    calls = [fit.options[p].call for p in fit.blocks]
    stages, outside = chain_stages(fit.timeline, fit.cost, calls)
    most = fit.keep_all_peak_bytes - outside
    slots = _SLOTS if len(calls) < 64 else _SLOTS // 4
    slot = -(-most // slots)
    table = Rotor(in_slots(stages, slot), slots)
    table_s = time.monotonic() - begin
    least = next(m for m in range(slots + 1) if table.solve(m) is not None) * slot
    rows = []
    for memory in np.linspace(least, most, arguments.points + 1)[:-1]:
        found = table.solve(int(memory) // slot)
        assert found is not None
        seconds, plan = found
        rows.append(
            {
                "setting": "budget",
                "asked_bytes": int(memory) + outside,
                "predicted_bytes": peak_of(stages, plan) + outside,
                "fraction": (seconds_again(stages, plan) - seconds_stopped(stages, plan))
                / fit.cost.forward_seconds,
                "seconds": seconds,
                "plan_s": table_s,
                "slot_bytes": slot,
                "schedule": plan_as_data(plan),
            }
        )
    return rows


def rotor(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Measure rotor's schedules, run as nested checkpoints."""
    rows = read(path_of(arguments.work, model, "rotor-plan"))["rows"]
    for number, row in enumerate(rows):
        prepare = functools.partial(_scheduled, schedule=row["schedule"])
        row.update(_in_child(model, arguments, "rotor-row", number, prepare))
    return rows


def _scheduled(case: Case, schedule: list) -> Scheduled:
    return Scheduled(case.model, plan_from_data(schedule))  # type: ignore[arg-type]


# -- facts and times --------------------------------------------------------------------------


def facts(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Note what every peer's figures are relative to."""
    del arguments
    fit = _fit(model).plain
    state = sum(s.size_bytes for s in fit.trace.storages if s.kind == "optimizer")
    return [
        {
            "forward_seconds": cost_step(fit.trace, fit.cost_model).forward_seconds,
            "keep_all_bytes": fit.keep_all_peak_bytes,
            "base_bytes": fit.trace.base_bytes,
            "optimizer_state_bytes": state,
            "num_blocks": len(fit.blocks),
            "num_ops": len(fit.trace.ops),
        }
    ]


def times(model: str, arguments: argparse.Namespace) -> list[Data]:
    """Time steps of several contenders, one of each in turn, after a warm-up of each."""
    contenders = _contenders(model, arguments)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, Callable[[], float]] = {}
    for name, prepare in contenders.items():
        case = _build(model)
        called = prepare(case)
        stepper = adamw(case.model.parameters())
        steps[name] = functools.partial(step_seconds, case, called, stepper)
        steps[name]()
        steps[name]()
    for _ in range(_TIMING_ROUNDS):
        for name, step in steps.items():
            seconds[name].append(step())
            gc.collect()
    return [{"setting": name} | spread(values) for name, values in seconds.items()]


def _contenders(model: str, arguments: argparse.Namespace) -> dict[str, Prepare]:
    """Nothing, all blocks, ours at the peak of all blocks, and ours at each budget."""
    rules = read(path_of(arguments.work, model, "fixed-plan"))["rows"]
    whole = next(row for row in rules if row["setting"] == "all blocks")
    found: dict[str, Prepare] = {
        "nothing": lambda case: case.model,
        "all blocks": functools.partial(_under_plan, text=whole["plan"]),
    }
    plans = [
        row for row in read(path_of(arguments.work, model, "ours-plan"))["rows"] if "plan" in row
    ]
    fits = [row for row in plans if row["predicted_bytes"] <= whole["predicted_bytes"]]
    if fits:
        cheapest = min(fits, key=lambda row: row["seconds"])
        found["ours at the peak of all blocks"] = functools.partial(
            _under_plan, text=cheapest["plan"]
        )
    for row in plans:
        if row["setting"] == "budget":
            name = f"ours at {row['asked_bytes'] / MIB:.1f} MiB"
            found[name] = functools.partial(_under_plan, text=row["plan"])
    return found


# -- what they share --------------------------------------------------------------------------


def _fit(model: str, cost: CostModel | None = None) -> Fit:
    case = _build(model)
    limit_s = 4.0 if model == "chain200" else 8.0
    return Fit(
        case.model, case.batch, loss=case.loss, optimizer=adamw, cost=cost, time_limit_s=limit_s
    )


def _build(model: str) -> Case:
    name, dropout = CASES[model]
    return ZOO[name].build(dropout=dropout)


def _in_child(
    model: str, arguments: argparse.Namespace, name: str, number: int, prepare: Prepare
) -> Data:
    return _kept(model, arguments, name, number, lambda: examine(_reference(model), prepare))


@functools.cache
def _reference(model: str) -> Reference:
    return Reference(_build(model))


def _kept(
    model: str, arguments: argparse.Namespace, name: str, number: int, work: Callable[[], Data]
) -> Data:
    """Do one row's work in a fresh process, unless it was done before; note the signed error."""
    target = path_of(arguments.work, model, name, number)
    found = read_if_there(target)
    if found is None:
        _reference(model)  # before the fork
        found = in_child(work, limit_s=CHILD_LIMIT_S)
        write(target, found)
        print(model, name, number, found.get("error", "done"), file=sys.stderr, flush=True)
    return found


_STAGES: dict[str, Callable[[str, argparse.Namespace], list[Data]]] = {
    "facts": facts,
    "fixed-plan": fixed_plan,
    "fixed": fixed,
    "ours-plan": ours_plan,
    "ours": ours,
    "sac-plan": sac_plan,
    "sac": sac,
    "rotor-plan": rotor_plan,
    "rotor": rotor,
    "reference": reference,
    "times": times,
    **{
        f"amb-{backend}-{solver}": _amb(backend, solver)
        for backend in ("aot_eager", "inductor")
        for solver in ("dp", "ilp")
    },
}

if __name__ == "__main__":
    main()
