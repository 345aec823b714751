"""What a checkpointed region gets wrong or wastes, read from a trace in which it runs plainly."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from remat.planner.records import Hazard, Severity
from remat.trace.found import FoundRegion
from remat.trace.records import Op, StepTrace


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of hazard: its code, how bad it is, what to do, and who met it before."""

    code: str
    severity: Severity
    fix: str
    thread: str = ""

    def at(self, where: str, message: str) -> Hazard:
        """Return a hazard of this kind at one place."""
        return Hazard(
            code=self.code, where=where, message=message, severity=self.severity, fix=self.fix,
            thread=self.thread,
        )  # fmt: skip


_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
_DOCS = "documentation of torch.utils.checkpoint"

RANDOM_STATE = Kind(
    "random-state", _ERROR, "Leave preserve_rng_state at True for this call.", "OLMo-core#828"
)
GENERATOR = Kind(
    "generator", _ERROR, "Draw outside the checkpointed call and pass the result in.", _DOCS
)
PYTHON_RANDOM = Kind(
    "python-random", _ERROR, "Draw outside the checkpointed call and pass the result in.", _DOCS
)
RRELU = Kind("rrelu", _ERROR, "Leave RReLU out of the checkpointed call.", "pytorch#193671")
BUFFERS = Kind(
    "buffers-twice", _ERROR,
    "Keep the layer out of the checkpointed call, or use a plan of remat, which updates once.",
    "pytorch#96136",
)  # fmt: skip
POWER_ITERATION = Kind(
    "power-iteration", _ERROR,
    "Keep the layer out of the checkpointed call, or use a plan of remat, which iterates once.",
    "pytorch#96136",
)  # fmt: skip
INPUT = Kind("input-changed", _ERROR, "Write the op out of place: x = x + y for x += y.")
OUTSIDE = Kind("outside-changed", _ERROR, "Write to it outside the checkpointed call.", _DOCS)
LATER = Kind(
    "changed-before-backward", _ERROR, "Write to it after backward, or to a copy of it.", _DOCS
)
STATE = Kind(
    "state-changed", _ERROR, "Return what is new instead of changing an object.",
    "transformers#46572",
)  # fmt: skip
CACHE = Kind("cache", _ERROR, "Set config.use_cache=False for training.", "transformers#28056")
NO_GRADIENT = Kind(
    "reentrant-without-gradient", _ERROR,
    "Pass use_reentrant=False, or call model.enable_input_require_grads().", "peft#137",
)  # fmt: skip
NESTED_INPUT = Kind("reentrant-nested-input", _ERROR, "Pass use_reentrant=False.", _DOCS)
ROUTING = Kind(
    "routing", _NOTE,
    "Save the op (context_fn with MUST_SAVE), or use a plan of remat, which keeps what is chosen.",
    "torchtitan#3146",
)  # fmt: skip
DOUBLED = Kind(
    "doubled", _WARNING, "Switch checkpointing on in one place only.", "transformers#34928"
)
NESTED = Kind("nested", _WARNING, "Checkpoint either the outer or the inner call.", "pytorch#77284")
HOOKS = Kind(
    "hooks-twice", _WARNING, "Register the hook on a module outside the checkpointed call.",
    "pytorch#134310",
)  # fmt: skip
NOTHING_SAVED = Kind(
    "saves-nothing", _WARNING, "Leave this call as it is: checkpoint larger parts.",
    "pytorch#102600",
)  # fmt: skip

_POWER_ITERATION_BUFFER = re.compile(r"(\._|_)[uv]$")


def region_hazards(trace: StepTrace, regions: tuple[FoundRegion, ...]) -> Iterator[Hazard]:
    """Yield what is wrong with each checkpointed call."""
    reader = _Reader(trace)
    open_regions: list[FoundRegion] = []
    for region in regions:
        open_regions = open_regions[: region.depth]
        if region.uses_grad:
            yield from reader.hazards(region)
            yield from _nesting(region, open_regions)
        open_regions.append(region)


class _Reader:
    def __init__(self, trace: StepTrace) -> None:
        self.trace = trace
        self.packs = [h.pack for h in trace.handles]
        self.births = [s.birth for s in trace.storages]
        self.writes: dict[int, list[int]] = {}
        for op in trace.ops:
            for storage in op.mutated:
                self.writes.setdefault(storage, []).append(op.tick)

    def hazards(self, region: FoundRegion) -> Iterator[Hazard]:
        """Yield the hazards of one region by itself."""
        where = region.where
        ops = self.trace.ops[region.first_op : region.stop_op]
        yield from self._random(region, ops)
        yield from self._written(region, ops)
        choosing = [op for op in ops if self.trace.chooses(op)]
        if choosing:
            yield ROUTING.at(
                region.where, f"{_ops(choosing)} chooses again when it is run again: on a device "
                "whose kernels do not repeat, close scores may choose otherwise"
            )  # fmt: skip
        if region.changed_state:
            is_cache = region.has_cache or "past_key_values" in region.changed_state
            yield (CACHE if is_cache else STATE).at(
                where, f"it changes {region.changed_state}, which is changed again when it is run "
                "again"
            )  # fmt: skip
        if region.is_reentrant and region.outputs_need_grad and not region.inputs_need_grad:
            yield NO_GRADIENT.at(
                where, "none of its inputs requires a gradient, so reentrant checkpointing gives "
                "its parameters, and all that comes before, no gradient"
            )  # fmt: skip
        if region.is_reentrant and region.nested_inputs_need_grad:
            yield NESTED_INPUT.at(
                where, "a tensor that requires a gradient reaches it inside a container or a "
                "closure, where reentrant checkpointing does not see it"
            )  # fmt: skip
        if self.freed_bytes(region) == 0:
            yield NOTHING_SAVED.at(
                where, "it frees nothing: all that backward needs of it is kept anyway"
            )

    def _random(self, region: FoundRegion, ops: list[Op]) -> Iterator[Hazard]:
        drawn = [op for op in ops if op.is_random]
        own = [op for op in drawn if _has_generator(self.trace, op)]
        rrelu = [op for op in drawn if op.name.startswith("aten.rrelu_with_noise")]
        if rrelu and not region.is_reentrant:
            yield RRELU.at(region.where, "the noise of RReLU is lost before it is saved")
        if own:
            yield GENERATOR.at(
                region.where, f"{_ops(own)} draws from a generator of its own, whose state "
                "checkpointing does not restore"
            )  # fmt: skip
        if region.draws_python_random:
            yield PYTHON_RANDOM.at(
                region.where, "it draws from Python's or NumPy's generator, whose state "
                "checkpointing does not restore"
            )  # fmt: skip
        if len(drawn) > len(own) and not region.preserves_random_state:
            rest = [op for op in drawn if op not in own]
            yield RANDOM_STATE.at(
                region.where, f"{_ops(rest)} draws other numbers when it is run again, as random "
                "state is not preserved"
            )  # fmt: skip

    def _written(self, region: FoundRegion, ops: list[Op]) -> Iterator[Hazard]:
        names = self.trace.buffer_names
        written = dict.fromkeys(
            s for op in ops for s in op.mutated if not self._is_inside(region, s)
        )
        buffers = [names[s][0] for s in written if s in names]
        powers = [name for name in buffers if _POWER_ITERATION_BUFFER.search(name)]
        others = [name for name in buffers if name not in powers]
        for kind, found in ((POWER_ITERATION, powers), (BUFFERS, others)):
            if found:
                # Named within the region, so that what is true of every block is said once.
                inside = [name.removeprefix(f"{region.module}.") for name in found]
                yield kind.at(
                    region.where, f"{_some(inside)} {_is(found)} updated again when it is run again"
                )
        if any(s in region.inputs for s in written if s not in names):
            yield INPUT.at(region.where, "it writes to its own input, which is read again later")
        if any(s not in region.inputs for s in written if s not in names):
            yield OUTSIDE.at(
                region.where, "it writes to a tensor from outside that is no buffer, again when it "
                "is run again"
            )  # fmt: skip
        read = {s for op in ops for s in op.inputs if not self._is_inside(region, s)}
        release = self.trace.phase_start.get("optimizer", self.trace.num_ticks)
        if any(
            region.end < tick < release
            for s in read - set(written)
            for tick in self.writes.get(s, ())
        ):
            yield LATER.at(
                region.where, "what it reads is written to after it and before backward, so that "
                "it is run again with other values"
            )  # fmt: skip

    def _is_inside(self, region: FoundRegion, storage: int) -> bool:
        return region.start < self.births[storage] <= region.end

    def freed_bytes(self, region: FoundRegion) -> int:
        """Return the bytes made inside that nothing but the region saves for backward."""
        first, stop = (
            bisect_right(self.packs, region.start),
            bisect_left(self.packs, region.end + 1),
        )
        handles = self.trace.handles
        inside = {h.storage for h in handles[first:stop] if self._is_inside(region, h.storage)}
        outside = {h.storage for h in (*handles[:first], *handles[stop:])}
        return sum(self.trace.storages[s].size_bytes for s in inside - outside)


def _nesting(region: FoundRegion, around: list[FoundRegion]) -> Iterator[Hazard]:
    if not around:
        return
    if region.module and around[-1].module == region.module:
        yield DOUBLED.at(region.where, "it is checkpointed twice over, and so run three times")
    else:
        yield NESTED.at(
            region.where, f"it lies in {around[-1].where}, which is checkpointed too: it is run "
            "three times"
        )  # fmt: skip


def merged(hazards: Iterable[Hazard]) -> tuple[Hazard, ...]:
    """Join hazards that say the same of several places."""
    places: dict[Hazard, list[str]] = {}
    for hazard in hazards:
        places.setdefault(hazard.model_copy(update={"where": ""}), []).append(hazard.where)
    order = list(Severity)
    return tuple(
        sorted(
            (
                hazard.model_copy(update={"where": _some(list(dict.fromkeys(where)))})
                for hazard, where in places.items()
            ),
            key=lambda hazard: order.index(hazard.severity),
        )
    )


def _some(names: list[str]) -> str:
    """Name the first of many."""
    rest = len(names) - 3
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:3])} and {rest} more"


def _is(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _ops(ops: list[Op]) -> str:
    return _some(list(dict.fromkeys(op.name.rpartition(".")[0] for op in ops)))


def _has_generator(trace: StepTrace, op: Op) -> bool:
    signature = trace.signatures[op.signature]
    values = (*signature.arguments, *(value for _, value in signature.keywords))
    return any(isinstance(v, str) and v == "<Generator>" for v in values)
