"""Loss heads: projections whose result goes into a cross entropy, found in a trace."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from remat.trace.records import FORWARD, Call, StepTrace

# More slices than this free little more: what is left at the peak is no longer the logits.
MOST_SLICES = 8
# Below this many rows a slice reads the weight from memory for too little arithmetic.
LEAST_ROWS = 64
# Logits below this share of the keep-everything peak are not worth another program.
LEAST_SHARE = 0.01

# What copies logits without mixing them, between a head and its loss.
_COPIES = ("aten._to_copy", "aten.clone")
_PROBABILITIES = ("aten._log_softmax",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossHead:
    """A module whose result, `num_rows` rows of `row_bytes`, goes into a cross entropy.

    `sources` are the storages that its input follows from: parameters among them may get other
    gradients, in their last bits, when the head runs in slices.
    """

    module: str
    num_rows: int
    row_bytes: int
    sources: frozenset[int]

    @property
    def num_slices(self) -> int:
        """How many slices to run it in; below 2 it is too short."""
        return min(MOST_SLICES, self.num_rows // LEAST_ROWS)


def find_heads(trace: StepTrace, linear: dict[str, tuple[int, int]]) -> tuple[LossHead, ...]:
    """List the loss heads among the linear modules of a trace.

    Arguments
    ---------
    linear: number of classes and bytes per element of each module that may be one.
    """
    heads: dict[str, LossHead] = {}
    for call in trace.calls:
        if call.phase != FORWARD or call.module not in linear or call.stop_op < 0:
            continue
        if not call.uses_grad or not _reaches_loss(trace, call):
            continue
        classes, itemsize = linear[call.module]
        size = sum(trace.storages[s].size_bytes for s in call.outputs)
        head = LossHead(
            module=call.module,
            num_rows=size // (classes * itemsize),
            row_bytes=classes * itemsize,
            sources=_sources(trace, call),
        )
        # Called several times, the shortest call decides.
        known = heads.get(call.module)
        if known is None or head.num_rows < known.num_rows:
            heads[call.module] = head
    return tuple(head for head in heads.values() if head.num_slices > 1)


def rounding_tolerance(
    epsilon: float, sum_epsilon: float, num_summands: int, num_slices: int
) -> float:
    """Bound how far sums in another order differ, relative to the largest value.

    The error of a sum of n rounded terms grows as sqrt(n) with high probability (Higham and Mary
    2019, "A new approach to probabilistic rounding error analysis"); sums inside a kernel are
    rounded to `sum_epsilon`, the slices' partial results to `epsilon`. Two such sums are compared,
    each twice as far off as expected at most: a factor of four.
    """
    return 4 * (sum_epsilon * math.sqrt(num_summands) + epsilon * math.sqrt(num_slices))


def _reaches_loss(trace: StepTrace, call: Call) -> bool:
    logits = set(call.outputs)
    for op in trace.ops[call.stop_op :]:
        if op.phase != FORWARD:
            return False
        if logits.isdisjoint(op.inputs):
            continue
        if op.name.startswith(_PROBABILITIES):
            return True
        if op.name.startswith(_COPIES):
            logits.update(op.fresh)
    return False


def _sources(trace: StepTrace, call: Call) -> frozenset[int]:
    """Return every storage that a call's arguments and results follow from."""
    wanted = set(call.inputs) | set(call.outputs)
    for op in reversed(trace.ops[: call.stop_op]):
        made: Collection[int] = (*op.fresh, *op.mutated)
        if not wanted.isdisjoint(made):
            wanted.update(op.inputs)
    return frozenset(wanted)
