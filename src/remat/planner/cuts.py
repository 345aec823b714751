"""Cuts: which results of ops to hold and which to make again, at any price of a byte.

NOTE [ One price ]
At a price p per byte, a stretch of ops costs the seconds of what runs again and p times the bytes
of what is held. A result that backward reads is held or its op runs again; an op that runs again
needs each of its inputs held or made again as well. Of a result that can be held packed (see NOTE
[ Packing ]) the cheaper form at that price counts. That is a minimum cut, so the linear programme
has whole solutions, and as p grows they hold less and less. The cheapest cut at some price is the
cheapest of all that hold no more bytes than it does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import NDArray

_MIB = float(2**20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Ops that may run again, in order, and the memory between them.

    `seconds` are those of each op, `sources` the results that it reads and that do not come for
    free; `makers` say which op makes a result, where one of these does; `sizes` what holding it
    takes, `packed` what it takes packed and the seconds of that, where it can be; `saved` are the
    results that backward reads.
    """

    seconds: Mapping[int, float]
    sources: Mapping[int, tuple[int, ...]]
    makers: Mapping[int, int]
    sizes: Mapping[int, int]
    saved: frozenset[int]
    packed: Mapping[int, tuple[int, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """Ops that run again, results that are packed, the seconds of both, and the bytes held."""

    ops: frozenset[int]
    packed: frozenset[int]
    seconds: float
    held_bytes: int


def find_cuts(stretch: Stretch, most: int) -> list[Cut]:
    """Return cuts that no other beats at some price, from the most bytes to the least.

    At most `most` of them beside the one that runs nothing again; the steps between the found ones
    are halved, the largest first. Each takes one linear programme; of stretches that are alike but
    for their numbers, as in a model of many layers, only the first takes any.
    """
    ops, results = sorted(stretch.seconds), sorted(stretch.sizes)
    op = {key: rank for rank, key in enumerate(ops)}
    result = {key: rank for rank, key in enumerate(results)}
    found = _cuts_of(
        tuple((op[key], seconds) for key, seconds in stretch.seconds.items()),
        tuple((op[key], tuple(result[s] for s in of)) for key, of in stretch.sources.items()),
        tuple((result[s], op[key]) for s, key in stretch.makers.items() if s in result),
        tuple((result[s], size) for s, size in stretch.sizes.items()),
        frozenset(result[s] for s in stretch.saved),
        tuple((result[s], form) for s, form in stretch.packed.items()),
        most,
    )
    return [
        dataclasses.replace(
            cut,
            ops=frozenset(ops[rank] for rank in cut.ops),
            packed=frozenset(results[rank] for rank in cut.packed),
        )
        for cut in found
    ]


@functools.lru_cache(maxsize=256)
def _cuts_of(
    seconds: tuple[tuple[int, float], ...],
    sources: tuple[tuple[int, tuple[int, ...]], ...],
    makers: tuple[tuple[int, int], ...],
    sizes: tuple[tuple[int, int], ...],
    saved: frozenset[int],
    packed: tuple[tuple[int, tuple[int, float]], ...],
    most: int,
) -> tuple[Cut, ...]:
    """Return the cuts of a stretch whose ops and results go by their ranks."""
    stretch = Stretch(
        seconds=dict(seconds), sources=dict(sources), makers=dict(makers), sizes=dict(sizes),
        saved=saved, packed=dict(packed),
    )  # fmt: skip
    programme = _CutProgramme(stretch)
    kept = programme.cheapest(0.0)
    # Dearer than everything together for any single byte that could be spared.
    everything = sum(stretch.seconds.values()) + sum(s for _, s in stretch.packed.values())
    least = programme.cheapest(2.0 * everything + 1.0)
    if least.held_bytes >= kept.held_bytes:
        return ()
    found = [kept, least]
    steps = [(kept, least)]
    while steps and len(found) <= most:
        above, below = steps.pop(0)
        spared = above.held_bytes - below.held_bytes
        price = (below.seconds - above.seconds) / spared
        between = programme.cheapest(price)
        if not below.held_bytes < between.held_bytes < above.held_bytes:
            continue
        found.append(between)
        steps += [(above, between), (between, below)]
        steps.sort(key=lambda pair: pair[1].held_bytes - pair[0].held_bytes)
    return tuple(sorted(found, key=lambda cut: -cut.held_bytes)[1:])


class _CutProgramme:
    """The linear programme of NOTE [ One price ]; only its costs change from price to price."""

    def __init__(self, stretch: Stretch) -> None:
        self._stretch = stretch
        self._ops = list(stretch.seconds)
        self._results = list(stretch.sizes)
        column = {op: c for c, op in enumerate(self._ops)}
        held = {s: c for c, s in enumerate(self._results, len(column))}
        rows: dict[tuple[tuple[int, float], ...], float] = {}
        for s in sorted(stretch.saved):
            rows[(held[s], 1.0), (column[stretch.makers[s]], 1.0)] = 1.0
        for op, sources in stretch.sources.items():
            for s in sources:
                terms = [(held[s], 1.0), (column[op], -1.0)]
                if s in stretch.makers:
                    terms.append((column[stretch.makers[s]], 1.0))
                rows[tuple(terms)] = 0.0
        self._scale = max(sum(stretch.seconds.values()), 1e-12)
        self._seconds = np.array([stretch.seconds[op] for op in self._ops])
        whole = [(stretch.sizes[s], 0.0) for s in self._results]
        packed = [stretch.packed.get(s, form) for s, form in zip(self._results, whole, strict=True)]
        self._forms = np.array([whole, packed], dtype=np.float64).reshape(2, -1, 2)
        self._highs = _programme(len(column) + len(held), rows)

    def cheapest(self, price: float) -> Cut:
        """Return the cheapest cut at a price of seconds per byte."""
        of_forms = price * self._forms[:, :, 0] + self._forms[:, :, 1]
        costs = np.concatenate([self._seconds, of_forms.min(axis=0)]) / self._scale
        # Of cuts that cost the same, the one that runs less.
        costs[: len(self._ops)] += 1e-12
        count = len(costs)
        self._highs.changeColsCost(count, np.arange(count, dtype=np.int32), costs)
        self._highs.run()
        values = np.asarray(self._highs.getSolution().col_value)
        again = {op for op, value in zip(self._ops, values, strict=False) if value > 0.5}
        stretch = self._stretch
        needed = {s for op in again for s in stretch.sources[op]} | stretch.saved
        held = {s for s in needed if stretch.makers.get(s) not in again}
        is_less = of_forms[1] < of_forms[0]
        packed = {s for s, less in zip(self._results, is_less, strict=True) if less and s in held}
        return Cut(
            frozenset(again),
            frozenset(packed),
            sum(stretch.seconds[op] for op in sorted(again))
            + sum(stretch.packed[s][1] for s in sorted(packed)),
            sum(stretch.packed[s][0] if s in packed else stretch.sizes[s] for s in held),
        )


def _programme(num: int, rows: Mapping[tuple[tuple[int, float], ...], float]) -> highspy.Highs:
    programme = highspy.HighsLp()
    programme.num_col_, programme.num_row_ = num, len(rows)
    programme.col_cost_ = np.zeros(num)
    programme.col_lower_ = np.zeros(num)
    programme.col_upper_ = np.ones(num)
    programme.row_lower_ = np.array(list(rows.values()))
    programme.row_upper_ = np.full(len(rows), highspy.kHighsInf)
    programme.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lengths: NDArray[np.int32] = np.array([0, *map(len, rows)], dtype=np.int32)
    programme.a_matrix_.start_ = np.cumsum(lengths, dtype=np.int32)
    terms = [term for row in rows for term in row]
    programme.a_matrix_.index_ = np.array([c for c, _ in terms], dtype=np.int32)
    programme.a_matrix_.value_ = np.array([v for _, v in terms], dtype=np.float64)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.silent()
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("solver", "simplex")
    solver.passModel(programme)
    return solver
