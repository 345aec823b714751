"""Chains: sibling calls of which each is given what the one before returned.

NOTE [ Runs ]
Consecutive calls of a chain can be one region without a change to the code that calls them: the
first one's forward runs them all, and each of the others passes on what it is given. That gives the
same values only where the trace shows that
1. the caller does nothing between two of the calls that an op could see;
2. each call's result holds one tensor, and it is that very object that the next one is given;
3. the other arguments are the same objects, or equal constants, for all of them;
4. nothing else holds on to the tensors in between;
5. each module is called once in a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from remat.trace.records import FORWARD, Call, StepTrace


def find_chains(trace: StepTrace) -> tuple[tuple[int, ...], ...]:
    """Return every longest chain of two or more calls, in order; see NOTE [ Runs ]."""
    calls_of = Counter(call.module for call in trace.calls if call.phase == FORWARD)
    siblings: dict[int, list[int]] = {}
    for number, call in enumerate(trace.calls):
        if call.phase == FORWARD and call.uses_grad and call.stop_op >= 0:
            siblings.setdefault(call.parent, []).append(number)
    found: list[tuple[int, ...]] = []
    for numbers in siblings.values():
        chain: list[int] = []
        for number in numbers:
            call = trace.calls[number]
            may_join = bool(call.module) and calls_of[call.module] == 1
            if chain and not (may_join and _is_next(trace, chain, number)):
                found.append(tuple(chain))
                chain = []
            if may_join:
                chain.append(number)
        found.append(tuple(chain))
    return tuple(chain for chain in found if len(chain) > 1)


def _is_next(trace: StepTrace, chain: list[int], number: int) -> bool:
    """Whether a call continues a chain."""
    before, call = trace.calls[chain[-1]], trace.calls[number]
    passed = _passed(trace, before, call)
    if passed is None or call.first_op != before.stop_op:
        return False
    # The same leaf is passed on all along, so that one rule does for the whole run.
    return len(chain) == 1 or _passed(trace, trace.calls[chain[-2]], before) == passed


def _passed(trace: StepTrace, before: Call, call: Call) -> tuple[int, int] | None:
    """Return which argument takes which leaf of the result before, if nothing else differs."""
    given, now, result = before.arguments, call.arguments, before.results
    if given.nesting != now.nesting or len(result.tensors) != 1:
        return None
    leaf, storage = result.tensors[0], result.storages[0]
    if any(not isinstance(name, tuple) for i, name in enumerate(result.names) if i != leaf):
        return None  # an object whose making the caller may see
    places = [i for i, name in enumerate(now.names) if name == result.names[leaf]]
    if len(places) != 1 or places[0] not in given.tensors:
        return None
    others = [i for i in range(len(now.names)) if i != places[0]]
    if any(given.names[i] != now.names[i] for i in others):
        return None
    if storage not in call.results.storages and any(
        end > call.end for _, end in trace.storages[storage].intervals
    ):
        return None
    return places[0], leaf


def tilings(chain: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield a chain cut into runs of one length, for lengths that grow by about half."""
    length = 2
    while length < len(chain):
        yield tuple(chain[first : first + length] for first in range(0, len(chain), length))
        length = max(length + 1, round(length * 1.5))
    yield (chain,)
