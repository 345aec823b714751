"""Cuts against every choice of what to hold, on small graphs."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from remat.planner.cuts import Stretch, find_cuts


@st.composite
def stretches(draw):
    """Up to six ops, each reading earlier results or what is given (100 and up)."""
    num = draw(st.integers(1, 6))
    sources = {}
    for op in range(num):
        earlier = draw(st.sets(st.integers(0, op - 1), max_size=2)) if op else set()
        given_results = draw(st.sets(st.integers(100, 102), max_size=1))
        sources[op] = tuple(sorted(earlier | given_results))
    saved = draw(st.sets(st.integers(0, num - 1), min_size=1))
    used = {s for reads in sources.values() for s in reads} | saved
    packable = draw(st.sets(st.integers(0, num - 1), max_size=3))
    return Stretch(
        seconds={op: draw(st.integers(1, 9)) * 0.01 for op in range(num)},
        sources=sources,
        makers={op: op for op in range(num)},
        sizes={s: draw(st.integers(1, 9)) * 1000 for s in sorted(used | set(range(num)))},
        saved=frozenset(saved),
        packed={
            s: (draw(st.integers(1, 9)) * 100, draw(st.integers(1, 9)) * 0.003)
            for s in sorted(packable)
        },
    )


def every_choice(stretch):
    """Yield (bytes held, seconds) of every set of ops that run again, and of what is packed."""
    ops = list(stretch.seconds)
    for bits in itertools.product((0, 1), repeat=len(ops)):
        again = {op for op, bit in zip(ops, bits, strict=True) if bit}
        needed = set(stretch.saved) | {s for op in again for s in stretch.sources[op]}
        held = [s for s in sorted(needed) if stretch.makers.get(s) not in again]
        seconds = sum(stretch.seconds[op] for op in again)
        forms = [
            [(stretch.sizes[s], 0.0), *([stretch.packed[s]] if s in stretch.packed else [])]
            for s in held
        ]
        for chosen in itertools.product(*forms):
            yield sum(size for size, _ in chosen), seconds + sum(s for _, s in chosen)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(stretch=stretches())
def test_cuts_are_the_cheapest_at_their_bytes(stretch):
    """No choice holds as little for less, and the least possible is among them."""
    choices = list(every_choice(stretch))
    cuts = find_cuts(stretch, 8)
    for cut in cuts:
        best = min(seconds for held, seconds in choices if held <= cut.held_bytes)
        assert cut.seconds <= best + 1e-9
        assert (cut.held_bytes, round(cut.seconds, 9)) in {(h, round(s, 9)) for h, s in choices}
    held = [cut.held_bytes for cut in cuts]
    assert held == sorted(set(held), reverse=True)
    least, most = min(choices)[0], min(choices, key=lambda c: (c[1], c[0]))[0]
    if least < most:
        assert held[-1] == least
    else:
        assert not cuts
