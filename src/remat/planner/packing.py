"""Packing: results that backward gets back from fewer bits than they have, without loss.

NOTE [ Packing ]
Some results carry fewer bits than their type has, by what is known of the op that makes them, never
by looking at values:
1. What `bernoulli_` drew into an empty tensor is zeros and ones, whatever scalars they were
   multiplied or divided by since (dropout's noise on the CPU): one byte for each element, and the
   same ops on the same zeros and ones.
2. Booleans (the mask of dropout on CUDA, of a comparison) take a byte each and carry one bit.
3. The positions that max pooling remembers lie inside one image plane: as narrow integers.
The packed form is made beside the result, when its op has run, and is alive until backward first
reads the result, which is then made from it at once. Nothing runs a second time; what packing
costs are passes over memory. The idea is that of Gist (Jain et al. 2018,
doi:10.1109/ISCA.2018.00070, section III).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from remat.cost.model import StepCost
from remat.planner.recipes import Recipe
from remat.planner.spans import Facts
from remat.trace.records import EMPTY_OPS, Op, StepTrace, TensorMeta

# Elements that are unpacked at once on a CPU: their bytes stay in its cache from one pass to the
# next, so that all passes together are one over memory.
UNPACKED_AT_ONCE = 2**17

# Ops that may follow a draw: one scalar for every element.
SCALED_BY = ("aten.div_.Scalar", "aten.mul_.Scalar")
_DRAW = "aten.bernoulli_."
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# Ops with a boolean result, and which of their results it is.
_BOOLEANS = {
    "aten.native_dropout.default": 1,
    **{f"aten.{name}.{kind}": 0 for name in _COMPARISONS for kind in ("Scalar", "Tensor")},
}
# Ops that give positions as their second result, and over how many last dimensions these count.
POOLS = {"aten.max_pool2d_with_indices.default": 2, "aten.max_pool3d_with_indices.default": 3}
# Bytes of an integer that holds every position below a bound.
NARROW = ((2**8, 1), (2**15, 2), (2**31, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one result is kept packed, between the tick `kept_from` and its first read.

    `ops` are those that make it, by position. While it is packed it takes `kept_bytes`; at
    `kept_from`, `packing_bytes` more for a moment, and when it comes back `workspace_bytes` beside
    its `size_bytes`. `packing_seconds` are those of both passes. Like a recipe (see
    `remat.planner.recipes`) it brings `results` back, from no `sources` and running nothing again.
    """

    ops: tuple[int, ...]
    results: tuple[int, ...]
    kept_from: int
    kept_bytes: int
    size_bytes: int
    packing_bytes: int
    workspace_bytes: int
    packing_seconds: float
    eager_seconds: float

    draws = False
    seconds = 0.0

    @property
    def sources(self) -> tuple[int, ...]:
        """What it is made from: nothing but its packed form."""
        return ()

    @property
    def key(self) -> int:
        """A name that no recipe has."""
        return key_of(self.results[0])

    @property
    def overhead_seconds(self) -> float:
        """What packing costs in time, with what eager mode adds for finding the ops."""
        return self.packing_seconds + self.eager_seconds


def key_of(storage: int) -> int:
    """Name the packing of a storage."""
    return -1 - storage


def find_packings(facts: Facts, recipes: Iterable[Recipe]) -> dict[int, Packing]:
    """Return how results of a forward that can be made again can be kept packed, by storage.

    See NOTE [ Packing ]. Linear in the ops.
    """
    found: dict[int, Packing] = {}
    for recipe in recipes:
        packing = _draws(facts, recipe) or _booleans(facts, recipe) or _positions(facts, recipe)
        if packing is not None:
            found[packing.results[0]] = packing
    return found


def least_bytes(packings: Mapping[int, Packing], storage: int, size_bytes: int) -> int:
    """Return what a storage takes at least, packed or as it is."""
    packing = packings.get(storage)
    return size_bytes if packing is None else min(size_bytes, packing.kept_bytes)


def _draws(facts: Facts, recipe: Recipe) -> Packing | None:
    trace, cost = facts.trace, facts.cost
    first, *after = (trace.ops[p] for p in recipe.ops)
    if first.name not in EMPTY_OPS or not after or not after[0].name.startswith(_DRAW):
        return None
    drawn = _first_tensor(trace, after[0])
    (storage,) = recipe.results
    size = trace.storages[storage].size_bytes
    if drawn is None or any(op.name not in SCALED_BY for op in after[1:]):
        return None
    number = drawn.num_elements
    if not number or size % number or size == number:
        return None
    chunks = -(-number // UNPACKED_AT_ONCE) if trace.device_type == "cpu" else 1
    passes = number + size
    if trace.device_type != "cpu":  # elsewhere the mask is a pass of its own, and so is each op
        passes += number + size + 2 * size * (len(after) - 1)
    return Packing(
        ops=recipe.ops,
        results=(storage,),
        kept_from=after[0].tick,
        kept_bytes=number,
        size_bytes=size,
        packing_bytes=0,
        workspace_bytes=0,
        packing_seconds=_seconds(cost, passes, 1 + chunks * len(after)),
        eager_seconds=cost.bookkeeping.packed_op * len(recipe.ops),
    )


def _booleans(facts: Facts, recipe: Recipe) -> Packing | None:
    op = facts.trace.ops[recipe.first]
    place = _BOOLEANS.get(op.name)
    if place is None or len(recipe.ops) > 1 or len(op.fresh) <= place:
        return None
    storage = op.fresh[place]
    size = facts.trace.storages[storage].size_bytes
    if size % 8:
        return None
    return Packing(
        ops=recipe.ops,
        results=(storage,),
        kept_from=op.tick,
        kept_bytes=size // 8,
        size_bytes=size,
        packing_bytes=size,
        workspace_bytes=size,
        packing_seconds=_seconds(facts.cost, 12 * size + size // 4, 7),
        eager_seconds=facts.cost.bookkeeping.packed_op * len(recipe.ops),
    )


def _positions(facts: Facts, recipe: Recipe) -> Packing | None:
    op = facts.trace.ops[recipe.first]
    given = _first_tensor(facts.trace, op)
    if op.name not in POOLS or len(recipe.ops) > 1 or len(op.fresh) != 2 or given is None:
        return None
    bound = 1
    for length in given.shape[-POOLS[op.name] :]:
        bound *= length
    width = next((width for most, width in NARROW if bound <= most), None)
    size = facts.trace.storages[op.fresh[1]].size_bytes
    if width is None:
        return None
    packed = size // 8 * width
    return Packing(
        ops=recipe.ops,
        results=(op.fresh[1],),
        kept_from=op.tick,
        kept_bytes=packed,
        size_bytes=size,
        packing_bytes=0,
        workspace_bytes=0,
        packing_seconds=_seconds(facts.cost, 2 * (size + packed), 2),
        eager_seconds=facts.cost.bookkeeping.packed_op * len(recipe.ops),
    )


def _first_tensor(trace: StepTrace, op: Op) -> TensorMeta | None:
    arguments = trace.signatures[op.signature].arguments
    return next((a for a in arguments if isinstance(a, TensorMeta)), None)


def _seconds(cost: StepCost, moved_bytes: int, kernels: int) -> float:
    added = cost.bookkeeping
    return moved_bytes * added.packing_byte + kernels * added.packing_kernel
