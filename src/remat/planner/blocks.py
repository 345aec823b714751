"""Blocks: the repeated module calls that people checkpoint, found by structure and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

from remat.trace.records import FORWARD, StepTrace

# A repeated call counts as a block from this many ops on: single layers repeat as well.
_LEAST_OPS = 4


def structure_of(trace: StepTrace, call: int) -> int:
    """Return a digest of a call's ops with their shapes: equal for identical blocks."""
    record = trace.calls[call]
    return hash(tuple(op.signature for op in trace.ops[record.first_op : record.stop_op]))


def find_blocks(trace: StepTrace) -> tuple[int, ...]:
    """Return the calls that make up the model's chain of blocks, in order.

    From the root downwards: where at least two calls made by one parent are identical (same ops on
    same shapes), they are blocks, and so are their siblings of at least half their cost in ops
    (the first block of a stage often has an extra projection). Elsewhere the search descends; a
    branch in which nothing repeats yields its calls that have children which are all leaves.
    """
    children: dict[int, list[int]] = {}
    for number, call in enumerate(trace.calls):
        if call.phase == FORWARD and call.stop_op >= 0:
            children.setdefault(call.parent, []).append(number)

    def num_ops(number: int) -> int:
        return trace.calls[number].stop_op - trace.calls[number].first_op

    def is_compound(number: int) -> bool:
        return number in children and num_ops(number) >= _LEAST_OPS

    @cache
    def repeats(number: int) -> bool:
        """Whether blocks are found somewhere below a call."""
        return bool(repeated_below(number)) or any(repeats(c) for c in children.get(number, ()))

    def repeated_below(number: int) -> list[int]:
        found = [c for c in children.get(number, ()) if is_compound(c)]
        counts = Counter(structure_of(trace, c) for c in found)
        twins = [c for c in found if counts[structure_of(trace, c)] > 1]
        if not twins:
            return []
        least = min(num_ops(c) for c in twins) / 2
        return [c for c in found if num_ops(c) >= least]

    def walk(numbers: Iterable[int]) -> list[int]:
        blocks: list[int] = []
        for number in numbers:
            repeated = repeated_below(number)
            if repeated:
                blocks += repeated
                rest = [c for c in children[number] if c not in set(repeated)]
                blocks += walk(c for c in rest if repeats(c))
            elif repeats(number) or not is_compound(number):
                blocks += walk(children.get(number, ()))
            elif any(is_compound(c) for c in children[number]):
                blocks += walk(children[number])
            else:
                blocks.append(number)
        return blocks

    roots = children.get(-1, [])
    found = repeated_roots(trace, roots, is_compound) or walk(roots)
    # A model that is one block, or calls no submodule, has nothing to choose from.
    found = [c for c in found if trace.calls[c].module]
    return tuple(sorted(found, key=lambda c: trace.calls[c].start))


def repeated_roots(trace: StepTrace, roots: list[int], is_compound: object) -> list[int]:
    """Return the top-level calls if they themselves are identical blocks called by the loss."""
    assert callable(is_compound)
    named = [c for c in roots if trace.calls[c].module and is_compound(c)]
    counts = Counter(structure_of(trace, c) for c in named)
    return [c for c in named if counts[structure_of(trace, c)] > 1]
