"""Folding: options of blocks that are alike decided together, where a model has many blocks.

A programme over hundreds of blocks has thousands of columns, and a search through them takes
minutes that no budget is worth. So consecutive blocks with the same ops on the same shapes are cut
into groups, and each column of the programme stands for one decision about a whole group. That
leaves out plans that treat blocks of a group differently, so what is found is no longer the optimum
over all options, but each choice is one of the unfolded programme, and its peak is exact.

A plan of a whole chain excludes all else that the chain could do. Where all blocks are one chain,
such plans are no columns: they would stand in every row, which makes the search longer, and it
found nothing by them that the plans are not, as candidates. The runs that they are made of stay.
Elsewhere each plan is a column, to be chosen together with what else there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remat.planner.blocks import structure_of
from remat.planner.options import Option
from remat.planner.programme import cliques
from remat.planner.rows import Linear, Row
from remat.trace.records import StepTrace

# Models with at most so many blocks are planned block by block, deeper ones in so many groups.
MOST_GROUPS = 64


@dataclass(frozen=True, slots=True)
class Folding:
    """Columns of a programme, each a set of options (their positions) that are chosen together.

    The members of a column never exclude each other; one option may be in several columns.
    """

    columns: tuple[tuple[int, ...], ...]
    columns_of: tuple[tuple[int, ...], ...]

    @classmethod
    def of_each(cls, num_options: int) -> Folding:
        """Return the folding that has a column for each option, and so every choice."""
        each = tuple((position,) for position in range(num_options))
        return cls(each, each)

    @property
    def has_every_choice(self) -> bool:
        """Whether every choice of options is one of columns."""
        return self.columns == self.columns_of

    def costs(self, costs: Sequence[float]) -> list[float]:
        """Return the seconds of each column."""
        return [sum(costs[p] for p in column) for column in self.columns]

    def cliques(self, options: Sequence[Option]) -> list[tuple[int, ...]]:
        """Return sets of columns of which at most one can be chosen."""
        entries = [(c, p) for c, column in enumerate(self.columns) for p in column]
        found = cliques((options[p].start, options[p].end) for _, p in entries)
        folded = (tuple(sorted({entries[e][0] for e in clique})) for clique in found)
        return [clique for clique in dict.fromkeys(folded) if len(clique) > 1]

    def row(self, row: Row) -> Row:
        """Write a row of options as a row of columns."""
        folded = Row(row.tick, row.constant, row.limit_bytes)
        for position, size in row.coefficients.items():
            for column in self.columns_of[position]:
                folded.add(column, size)
        for join, size in row.joins.items():
            key = frozenset(Linear(e.constant, self._of(e.plus), self._of(e.minus)) for e in join)
            folded.joins[key] = folded.joins.get(key, 0) + size
        return folded

    def _of(self, positions: Iterable[int]) -> frozenset[int]:
        return frozenset(c for p in positions for c in self.columns_of[p])

    def unfolded(self, columns: Iterable[int]) -> frozenset[int]:
        """Return the options of some columns."""
        return frozenset(p for c in columns for p in self.columns[c])

    def folded(self, chosen: frozenset[int]) -> frozenset[int] | None:
        """Return columns that amount to a choice of options, or `None` if there are none."""
        within = {
            c for p in chosen for c in self.columns_of[p] if chosen.issuperset(self.columns[c])
        }
        left, found = set(chosen), set()
        for column in sorted(within, key=lambda c: (-len(self.columns[c]), c)):
            if left.issuperset(self.columns[column]):
                left.difference_update(self.columns[column])
                found.add(column)
        return None if left else frozenset(found)


def fold(
    trace: StepTrace,
    options: Sequence[Option],
    blocks: Sequence[int],
    chains: Sequence[Sequence[frozenset[int]]],
) -> Folding | None:
    """Fold the options of a model with more than `MOST_GROUPS` blocks; `None` if it has fewer.

    Arguments
    ---------
    blocks: calls, in order.
    chains: for each chain, its plans: options that are chosen together.
    """
    if len(blocks) <= MOST_GROUPS:
        return None
    group_of = _groups(trace, blocks)
    starts = [trace.calls[block].start for block in blocks]
    inside = _block_of(trace, options, blocks)
    members: dict[object, list[int]] = {}
    for position, option in enumerate(options):
        block = inside[position]
        if block is not None:
            key = (
                group_of[block], option.start - starts[block], option.end - starts[block],
                option.is_recomputed, option.dropped_ops, option.packed_ops, len(option.parts),
                option.host_bytes, _offloaded(option),
            )  # fmt: skip
            members.setdefault(key, []).append(position)
        else:
            members[position] = [position]
    is_chain = _are_one_chain(options, starts, chains)
    plans = () if is_chain else itertools.chain.from_iterable(chains)
    columns = tuple(
        dict.fromkeys((*map(tuple, members.values()), *(tuple(sorted(plan)) for plan in plans)))
    )
    columns_of: list[list[int]] = [[] for _ in options]
    for number, column in enumerate(columns):
        for position in column:
            columns_of[position].append(number)
    return Folding(columns, tuple(map(tuple, columns_of)))


def _are_one_chain(
    options: Sequence[Option], starts: Sequence[int], chains: Sequence[Sequence[frozenset[int]]]
) -> bool:
    """Whether plans of one chain reach over all blocks; the last one may be kept by all of them."""
    if len(chains) != 1:
        return False
    members = [options[position] for plan in chains[0] for position in plan]
    first = min((option.start for option in members), default=math.inf)
    last = max((option.end for option in members), default=-math.inf)
    return first <= starts[0] and starts[-2] <= last


def _offloaded(option: Option) -> tuple[object, ...]:
    """Return what tells options of one call apart that move the same bytes to the host."""
    offload = option.parts[0].region.offload
    if offload is None:
        return ()
    early = offload.prefetch
    return offload.tensors, None if early is None else early.num_tensors


def _groups(trace: StepTrace, blocks: Sequence[int]) -> list[int]:
    """Return the group of each block: at most `size` consecutive ones that are alike."""
    size = -(-len(blocks) // MOST_GROUPS)
    structures = [structure_of(trace, block) for block in blocks]
    found: list[int] = []
    filled = 0
    for number, structure in enumerate(structures):
        if number and structure == structures[number - 1] and filled < size:
            found.append(found[-1])
            filled += 1
        else:
            found.append(found[-1] + 1 if found else 0)
            filled = 1
    return found


def _block_of(
    trace: StepTrace, options: Sequence[Option], blocks: Sequence[int]
) -> list[int | None]:
    """Return in which block (its place among `blocks`) each option lies, if it lies in one."""
    found: list[int | None] = [None] * len(options)
    place = 0
    for position in sorted(range(len(options)), key=lambda p: options[p].start):
        option = options[position]
        while place < len(blocks) and trace.calls[blocks[place]].end < option.start:
            place += 1
        if place < len(blocks):
            call = trace.calls[blocks[place]]
            if call.start <= option.start and option.end <= call.end:
                found[position] = place
    return found
