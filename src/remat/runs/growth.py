"""What grew between two runs, and where: peaks by module, and the decisions of two plans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from remat.files import Record
from remat.planner.records import Plan, Region
from remat.runs.records import Variant
from remat.units import format_bytes

# What of a region is a decision; the rest is what it was expected to cost and why.
_DECISIONS = frozenset(
    {"module", "call", "followers", "saved_ops", "is_nested", "is_recomputed", "offload"}
)
_MOST_NAMED = 5


class Share(Record):
    """How much of a change lies in one module, or in one kind of bytes (in brackets)."""

    where: str
    before_bytes: int
    after_bytes: int

    @property
    def grown_bytes(self) -> int:
        """Bytes more than before; fewer are negative."""
        return self.after_bytes - self.before_bytes


def plan_id(plan: Plan) -> str:
    """Return the content address of a plan's decisions: the same for the same decisions.

    The budget counts and what the plan was made for; times, predictions and versions do not.
    """
    made_for = plan.fingerprint.model_dump(mode="json", exclude={"torch_version", "remat_version"})
    data = {
        "budget": plan.budget_bytes,
        "made_for": made_for,
        "regions": sorted(json.dumps(_decision(region)) for region in plan.regions),
        "rewrites": [(r.kind.value, r.module, r.num_slices) for r in plan.rewrites],
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def peak_shares(before: Variant, after: Variant) -> tuple[Share, ...]:
    """Share a change of the peak out among modules and kinds, what changed most first.

    From the simulated peaks of both. Runs that were recorded without the bytes by module are
    compared by kind, at the highest moment of their recorded memory curves; without those, by
    nothing.
    """
    old = before.peak_by_module or _by_kind(before)
    new = after.peak_by_module or _by_kind(after)
    if bool(before.peak_by_module) != bool(after.peak_by_module):
        old, new = _by_kind(before), _by_kind(after)
    if not (old and new):
        return ()
    shares = [
        Share(where=where, before_bytes=old.get(where, 0), after_bytes=new.get(where, 0))
        for where in dict.fromkeys((*old, *new))
    ]
    changed = [share for share in shares if share.grown_bytes]
    return tuple(sorted(changed, key=lambda share: (-abs(share.grown_bytes), share.where)))


def describe_growth(before: Variant, after: Variant) -> str:
    """Say in one line what grew and where, such as "+212 MiB, 190 MiB of it in `blocks.7.mlp`"."""
    old, new = before.measured_peak_bytes or 0, after.measured_peak_bytes or 0
    parts = [_signed(new - old)]
    largest = [s for s in peak_shares(before, after) if s.grown_bytes * (new - old) > 0][:2]
    if largest:
        named = " and ".join(f"{format_bytes(abs(s.grown_bytes))} in `{s.where}`" for s in largest)
        parts.append(named.replace(" in ", " of it in ", 1))
    differences = list(plan_differences(before.plan, after.plan))
    if before.plan is not None:
        since = f"since plan {plan_id(before.plan)[:4]}"
        parts.append(f"{since}, which {differences[0]}" if differences else since)
    return ", ".join(parts)


def plan_differences(before: Plan | None, after: Plan | None) -> Iterator[str]:
    """Yield what the plan before decided otherwise, in words, at most some of it."""
    if before is None or after is None:
        return
    old, new = _by_place(before), _by_place(after)
    dropped = [place for place in old if place not in new]
    added = [place for place in new if place not in old]
    changed = [
        place for place in old if place in new and _decision(old[place]) != _decision(new[place])
    ]
    if dropped:
        yield f"recomputed {_named(dropped)}"
    if added:
        yield f"kept {_named(added)}"
    if changed:
        yield f"recomputed {_named(changed)} in another way"
    if before.rewrites != after.rewrites:
        yield f"ran {len(before.rewrites)} modules in slices instead of {len(after.rewrites)}"


def _decision(region: Region) -> Mapping[str, object]:
    decision = region.model_dump(mode="json", include=set(_DECISIONS))
    # Plans made before these could be chosen keep their names.
    ops = region.model_dump(mode="json", include={"dropped_ops", "packed_ops"})
    return decision | {name: named for name, named in ops.items() if named}


def _by_place(plan: Plan) -> dict[str, Region]:
    return {
        f"{region.module}{'' if region.num_calls == 1 else f' (call {region.call})'}": region
        for region in plan.regions
    }


def _named(places: list[str]) -> str:
    more = len(places) - _MOST_NAMED
    listed = ", ".join(f"`{place}`" for place in places[:_MOST_NAMED])
    return f"{listed} and {more} more" if more > 0 else listed


def _by_kind(variant: Variant) -> dict[str, int]:
    """Bytes by kind at the highest recorded moment."""
    if not variant.timeline:
        return {}
    highest = max(variant.timeline, key=lambda sample: sum(sample.bytes_by_kind.values()))
    return {f"({kind})": size for kind, size in highest.bytes_by_kind.items()}


def _signed(size: int) -> str:
    return f"{'+' if size > 0 else ''}{format_bytes(size)}"
