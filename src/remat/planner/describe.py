"""A plan in words: the figures, what fills the peak, and the decisions with their reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remat.cost.calibration import ErrorBar
from remat.planner.records import Fingerprint, Plan, Region, TensorSignature
from remat.units import format_bytes, format_seconds

# Decisions on blocks that are alike differ in the last digits where seconds were measured.
_ALIKE = 0.05
_MOST_RUNS_SPELLED_OUT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionGroup:
    """Regions that are alike but for one number in their names, told as one decision."""

    label: str
    count: int
    freed_bytes: int
    recompute_seconds: float
    reason: str


def describe_plan(plan: Plan, width: int = 80) -> str:
    """Write a plan as plain text, at most `width` columns wide; `print(plan)` shows it.

    Identical decisions on numbered blocks are told once, as `h.0 … h.7`.
    """
    sections = [
        textwrap.wrap(f"Plan for {describe_subject(plan.fingerprint)}", width),
        _aligned(list(figures(plan)), width),
        ["At the peak", *_indented(_breakdown(plan, width - 2))],
        [regions_title(plan), *_indented(_regions(plan, width - 2))],
    ]
    remarks = [f"{hazard.code} at {hazard.where}: {hazard.message}" for hazard in plan.hazards]
    remarks += plan.notes
    if remarks:
        listed = (textwrap.wrap(f"- {remark}", width - 2) for remark in remarks)
        sections.append(["To know", *_indented(line for lines in listed for line in lines)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_subject(made_for: Fingerprint) -> str:
    """Say what the plan was made for: model, batch, optimizer, mode and device."""
    batch = ", ".join(_describe_tensor(entry) for entry in made_for.batch)
    autocast = f", autocast to {made_for.autocast_dtype}" if made_for.autocast_dtype else ""
    mode = "training" if made_for.training else "evaluation"
    optimizer = "no optimizer step"
    if made_for.optimizer is not None:
        optimizer = f"optimizer {made_for.optimizer.rpartition('.')[2]}"
    name = made_for.model_class.rpartition(".")[2]
    return f"{name} on {made_for.device_type} in {mode} mode{autocast}, batch {batch}, {optimizer}"


def figures(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield label, figure and remark of each line of the plan's head."""
    on = f" on {plan.device}" if plan.predicted_reserved_bytes is not None else ""
    yield "budget", format_bytes(plan.budget_bytes), f"{plan.budget_bytes} bytes{on}"
    share = plan.predicted_peak_bytes / plan.budget_bytes
    margin = f", {format_bytes(plan.margin_bytes)} kept free" if plan.margin_bytes else ""
    yield (
        "predicted peak",
        format_bytes(plan.predicted_peak_bytes),
        f"{share:.1%} of the budget{margin}",
    )
    held = plan.predicted_peak_bytes
    if plan.predicted_reserved_bytes is not None:
        held = plan.predicted_reserved_bytes + plan.outside_bytes + plan.margin_bytes
        remark = f"{held / plan.budget_bytes:.1%} of the budget, with the context's "
        remark += f"{format_bytes(plan.outside_bytes)} and the margin"
        yield "reserved", format_bytes(plan.predicted_reserved_bytes), remark
    saved = plan.keep_all_peak_bytes - held
    remark = f"{format_bytes(saved)} more than planned" if saved > 0 else "the same"
    yield "keep-everything peak", format_bytes(plan.keep_all_peak_bytes), remark
    if plan.rewrites:
        count = len(plan.rewrites)
        told = f"{plan.rewrites[0].module}: {plan.rewrites[0].reason}"
        yield "in slices", f"{count} {'module' if count == 1 else 'modules'}", told
    if plan.host_budget_bytes is not None:
        allowed = f"of {format_bytes(plan.host_budget_bytes)} allowed"
        copies = f"{format_seconds(plan.transfer_seconds)} of copies that nothing hides"
        yield "host memory", format_bytes(plan.host_bytes), f"{allowed}; {copies}"
    if plan.packed_bytes:
        passes = f"{format_seconds(plan.packing_seconds)} of the overhead"
        remark = f"draws, masks and positions in fewer bits, without loss: {passes}"
        yield "packed", format_bytes(plan.packed_bytes), remark
    source = f" ({plan.cost_source})" if plan.cost_source else ""
    extra = (
        f"{format_seconds(plan.recompute_seconds)} more than" if plan.regions else "no more than"
    )
    yield (
        "recomputed",
        f"{plan.recompute_fraction:.1%}",
        f"of the forward pass: {extra} the {format_seconds(plan.step_seconds)} of a step{source}",
    )
    if plan.step_error_bar is not None:
        yield "step time", *_step_time(plan, plan.step_error_bar)
    yield (
        "lower bound",
        f"{plan.lower_bound_fraction:.1%}",
        f"no recomputation of any kind can cost less; gap {plan.gap:.1%}",
    )
    yield "outcome", plan.outcome.value.replace("_", " "), plan.outcome.sentence


def _step_time(plan: Plan, bar: ErrorBar) -> tuple[str, str]:
    predicted = plan.predicted_step_seconds
    low, high = (format_seconds(ratio * predicted) for ratio in (bar.low_ratio, bar.high_ratio))
    remark = f"where {bar.level:.0%} of measurements lie, by {bar.num_trials} earlier ones; "
    return f"{low} \N{EN DASH} {high}", f"{remark}predicted {format_seconds(predicted)}"


def peak_shares(plan: Plan) -> list[tuple[str, int, float]]:
    """List kind, bytes and share of the predicted peak, the largest first, without empty kinds."""
    total = sum(plan.breakdown.values()) or 1
    largest_first = sorted(plan.breakdown.items(), key=lambda item: -item[1])
    return [(kind, size, size / total) for kind, size in largest_first if size > 0]


def regions_title(plan: Plan) -> str:
    """Say how many module calls are recomputed, and how many are offloaded instead."""
    if not plan.regions:
        return "Recomputed: nothing; every activation is kept"
    again = sum(region.is_recomputed for region in plan.regions)
    moved = len(plan.regions) - again
    title = f"Recomputed: {_counted(again, 'region') if again or not moved else 'nothing'}"
    return f"{title}; offloaded: {_counted(moved, 'call')}" if moved else title


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def group_regions(plan: Plan) -> list[RegionGroup]:
    """Put decisions together that are alike on modules whose names differ in their first number.

    Alike: the same module path but for that number, the same call, as many calls as one region,
    and bytes and seconds within 5%. Groups come in the order of their first region.
    """
    groups: list[list[tuple[int | None, Region]]] = []
    open_groups: dict[tuple[object, ...], list[list[tuple[int | None, Region]]]] = {}
    for region in plan.regions:
        template, number = _split_number(region.module)
        kind = (
            len(region.followers), region.is_nested, region.draws_random_numbers,
            region.is_recomputed, region.offload is None, len(region.dropped_ops),
            len(region.packed_ops),
        )  # fmt: skip
        similar = open_groups.setdefault((template, region.call, *kind), [])
        home = next((group for group in similar if _alike(group[0][1], region)), None)
        if home is None or number is None:
            home = []
            similar.append(home)
            groups.append(home)
        home.append((number, region))
    return [_as_group(group) for group in groups]


def _as_group(members: list[tuple[int | None, Region]]) -> RegionGroup:
    first = members[0][1]
    template, _ = _split_number(first.module)
    numbers = sorted(number for number, _ in members if number is not None)
    label = _label(template, numbers) if len(members) > 1 else first.module or "the whole model"
    if first.num_calls > 1:
        label += f" (call {first.call + 1} of {first.num_calls})"
    if first.followers:
        each = "each " if len(members) > 1 else ""
        label += f" ({each}with the {len(first.followers)} after it, as one)"
    if first.is_nested:
        label = f"inside: {label}"
    same = len({region.reason for _, region in members}) == 1
    reason = first.reason.removeprefix("recomputed: ")  # that is said above all of them
    if len(members) > 1 and reason:
        reason = f"each {reason}" if same else f"each, about: {reason}"
    return RegionGroup(
        label=label,
        count=len(members),
        freed_bytes=sum(region.freed_bytes for _, region in members),
        recompute_seconds=sum(region.recompute_seconds for _, region in members),
        reason=reason,
    )


def _split_number(module: str) -> tuple[str, int | None]:
    """Cut the first number out of a module path: `h.3.mlp` is (`h.*.mlp`, 3)."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return module, None


def _label(template: str, numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) > _MOST_RUNS_SPELLED_OUT:
        listed = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        return template.replace("*", "{" + listed + "}", 1)
    return ", ".join(
        template.replace("*", str(run[0]), 1)
        if len(run) == 1
        else f"{template.replace('*', str(run[0]), 1)} … {template.replace('*', str(run[-1]), 1)}"
        for run in runs
    )


def _alike(one: Region, other: Region) -> bool:
    return _close(one.freed_bytes, other.freed_bytes) and _close(
        one.recompute_seconds, other.recompute_seconds
    )


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _ALIKE * max(abs(one), abs(other))


def _describe_tensor(entry: TensorSignature) -> str:
    sizes = "x".join(str(size) for size in entry.shape) or "scalar"
    name = entry.name.removeprefix("batch").removeprefix(".")  # as the line says "batch" itself
    return f"{name} {sizes} {entry.dtype.removeprefix('torch.')}".strip()


def _aligned(rows: list[tuple[str, str, str]], width: int) -> list[str]:
    first = max(len(label) for label, _, _ in rows)
    second = max(len(figure) for _, figure, _ in rows)
    return [
        line
        for label, figure, remark in rows
        for line in textwrap.wrap(
            f"{label:<{first}}  {figure:>{second}}  {remark}",
            width - 2,
            initial_indent="  ",
            subsequent_indent=" " * (first + second + 6),
            drop_whitespace=True,
        )
    ]


def _breakdown(plan: Plan, width: int) -> list[str]:
    shares = peak_shares(plan)
    if not shares:
        return ["unknown"]
    label = max(len(kind) for kind, _, _ in shares)
    room = max(width - label - 22, 10)
    return [
        f"{kind:<{label}}  {format_bytes(size):>10}  {share:>4.0%}  " + "█" * round(share * room)
        for kind, size, share in shares
    ]


def _regions(plan: Plan, width: int) -> Iterator[str]:
    groups = group_regions(plan)
    if not groups:
        return
    room = width - 30
    yield f"{'module':<{room}}{'calls':>6}{'frees':>12}{'costs':>12}"
    for group in groups:
        *above, label = textwrap.wrap(group.label, room - 1) or [group.label]
        yield from above
        yield (
            f"{label:<{room}}{group.count:>6}{format_bytes(group.freed_bytes):>12}"
            f"{format_seconds(group.recompute_seconds):>12}"
        )
        yield from textwrap.wrap(
            group.reason, width, initial_indent="    ", subsequent_indent="    "
        )


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
