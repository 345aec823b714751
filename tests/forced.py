"""Plans that hold whatever kind of decision is asked for, if it pays or not."""

from __future__ import annotations

import random

import remat
from remat.cost.devices import find_device
from remat.cost.model import CostModel
from remat.fit import Fit
from remat.trace.capture import capture
from tests.models import square_mean


def slow_fit(model, batch, loss=square_mean, **more) -> Fit:
    """The options of a step of which every op takes long, so that packing is worth it."""
    more = {"optimizer": None, "chunks": False} | more
    trace = capture(model, batch, loss=loss, optimizer=more["optimizer"])
    seconds = dict.fromkeys(trace.signatures, 1.0)
    cost = CostModel(device=find_device("cpu"), seconds=seconds, copies_overlap=True)
    return Fit(model, batch, loss=loss, cost=cost, **more)


def apart(fit, positions) -> list[int]:
    """Pick options that do not exclude each other, the first ones first."""
    options, found = fit.plain.options, []
    for p in positions:
        if not any(options[p].excludes(options[q]) for q in found):
            found.append(p)
    return found


def plan_of(fit, chosen) -> remat.Plan:
    """A plan of chosen options, whatever they take."""
    return fit.plan("1000%").model_copy(
        update={"regions": fit.plain.regions(chosen), "budget_bytes": 10**12}
    )


def _is_early(option) -> bool:
    return any(p.region.offload is not None and p.region.offload.prefetch for p in option.parts)


# Which options are of a kind, and which of them to take first.
_KINDS = {
    "packed": (lambda o: o.packed_ops, lambda o: -len(o.packed_ops)),
    "packed inside": (lambda o: o.packed_ops, lambda o: o.end - o.start),
    "dropped": (lambda o: o.dropped_ops, lambda o: -len(o.dropped_ops)),
    "dropped inside": (lambda o: o.dropped_ops, lambda o: o.end - o.start),
    "regions": (lambda o: o.is_recomputed, lambda o: o.start - o.end),
    "regions inside": (lambda o: o.is_recomputed, lambda o: o.end - o.start),
    "offloaded": (lambda o: o.host_bytes, lambda o: o.start - o.end),
    "fetched early": (_is_early, lambda o: o.end - o.start),
}


def forced(fit) -> dict[str, list[int]]:
    """Options of each kind that the step has, and of all kinds in a random order."""
    options = fit.plain.options
    found = {}
    for kind, (is_one, order) in _KINDS.items():
        those = [p for p, option in enumerate(options) if is_one(option)]
        found[kind] = apart(fit, sorted(those, key=lambda p: order(options[p])))
    mixed = list(range(len(options)))
    random.Random(1).shuffle(mixed)
    found["mixed"] = apart(fit, mixed)
    return {kind: chosen for kind, chosen in found.items() if chosen}
