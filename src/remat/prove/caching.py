"""A model of CUDA's caching allocator: what a device reserves for given allocations and frees.

Rules are those of NOTE [ The allocator's rules ] in `allocator_rules`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

from remat.cost.allocator_rules import (
    LARGE_SEGMENT,
    SMALL_SEGMENT,
    SMALL_SIZE,
    SMALLEST_BLOCK,
    AllocatorOptions,
    round_size,
    segment_size,
)

# Address space between expandable segments: more than any device has.
_FAR = 1 << 50


class OutOfReservedMemoryError(MemoryError):
    """An allocation that does not fit under the limit, with everything cached given back."""


@dataclass(eq=False, slots=True)
class Block:
    """A stretch of a segment, free or in use; neighbours are linked."""

    address: int
    size: int
    is_small: bool
    previous: Block | None = None
    next: Block | None = None
    is_used: bool = False
    is_mapped: bool = True
    requested: int = 0
    age: int = 0  # the pool's count of searches when the block became free

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None


@dataclass(slots=True)
class _Pool:
    """Free blocks by size, then address (rule 3)."""

    is_small: bool
    keys: list[tuple[int, int]] = field(default_factory=list)
    blocks: dict[int, Block] = field(default_factory=dict)
    tail: Block | None = None  # of the expandable segment: what is not mapped yet
    searches: int = 0

    def insert(self, block: Block) -> None:
        block.age = self.searches
        bisect.insort(self.keys, (block.size, block.address))
        self.blocks[block.address] = block

    def remove(self, block: Block) -> None:
        del self.keys[bisect.bisect_left(self.keys, (block.size, block.address))]
        del self.blocks[block.address]

    def smallest(self, size: int) -> Block | None:
        position = bisect.bisect_left(self.keys, (size, 0))
        return self.blocks[self.keys[position][1]] if position < len(self.keys) else None


class CachingAllocator:
    """Serve allocations and frees by the rules above, and count bytes.

    `requested_bytes`, `allocated_bytes` and `reserved_bytes` are those of
    `torch.cuda.memory_stats`: what was asked for, the blocks in use, and the segments.
    `on_segment` is told of each segment that comes or goes, by PyTorch's name for the event.
    """

    def __init__(
        self,
        options: AllocatorOptions | None = None,
        on_segment: Callable[[str, int, int], None] = lambda _action, _address, _size: None,
    ) -> None:
        self.options = options or AllocatorOptions()
        self._on_segment = on_segment
        self.requested_bytes = self.allocated_bytes = self.reserved_bytes = 0
        self.peak_requested_bytes = self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.segments: dict[int, Block] = {}  # address -> first block
        self._pools = {True: _Pool(True), False: _Pool(False)}
        self._next_address = 1 << 32
        self._most_unsplit = self.options.max_split_size_bytes or 1 << 62

    def allocate(self, num_bytes: int) -> Block:
        """Return a block of at least `num_bytes` (1 or more).

        Raises
        ------
        OutOfReservedMemoryError: if the limit would be passed.
        """
        size = round_size(num_bytes, self.options.roundup_power2_divisions)
        pool = self._pools[size <= SMALL_SIZE]
        block = self._take(pool, size) or self._reserve(pool, size)
        if self._splits(block, size):
            self._split(pool, block, size)
        block.is_used, block.requested = True, num_bytes
        self.requested_bytes += num_bytes
        self.allocated_bytes += block.size
        self.peak_requested_bytes = max(self.peak_requested_bytes, self.requested_bytes)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool, merged with its free neighbours (rule 6)."""
        assert block.is_used, "the block is free already"
        pool = self._pools[block.is_small]
        block.is_used = False
        self.requested_bytes -= block.requested
        self.allocated_bytes -= block.size
        for neighbour in (block.previous, block.next):
            self._merge(pool, block, neighbour)
        pool.insert(block)

    def release_cached(self) -> None:
        """Give all unused segments back to the device, as `torch.cuda.empty_cache` does."""
        for pool in self._pools.values():
            for block in list(pool.blocks.values()):
                if self.options.expandable_segments:
                    self._unmap(pool, block)
                elif not block.is_split:
                    self._release(pool, block)

    # -- finding and reserving --------------------------------------------------------------------

    def _take(self, pool: _Pool, size: int) -> Block | None:
        """Take the best free block, or none (rules 3 and 7)."""
        pool.searches += 1
        block = pool.smallest(size)
        if block is None:
            return None
        if pool.tail is not None and block.next is pool.tail:
            # The growing end counts with what it may grow to: any other block is a better fit.
            position = bisect.bisect_right(pool.keys, (block.size, block.address))
            if position < len(pool.keys):
                block = pool.blocks[pool.keys[position][1]]
        if size < self._most_unsplit <= block.size:
            return None
        if size >= self._most_unsplit and block.size >= size + LARGE_SEGMENT:
            return None
        pool.remove(block)
        return block

    def _reserve(self, pool: _Pool, size: int) -> Block:
        """Get a new block from the device (rules 4, 8 and 9)."""
        options = self.options
        if options.garbage_collection_threshold > 0 and options.limit_bytes is not None:
            self._collect_garbage(int(options.garbage_collection_threshold * options.limit_bytes))
        grow = self._grow if options.expandable_segments else self._new_segment
        block = grow(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = grow(pool, size)
        if block is None:
            self.release_cached()
            block = grow(pool, size)
        if block is None:
            raise OutOfReservedMemoryError(
                f"{size} bytes do not fit: {self.reserved_bytes} of {options.limit_bytes} bytes "
                f"are reserved, {self.allocated_bytes} in use."
            )
        return block

    def _new_segment(self, pool: _Pool, size: int) -> Block | None:
        total = segment_size(size)
        if not self._may_reserve(total):
            return None
        block = Block(self._next_address, total, pool.is_small)
        self.segments[block.address] = block
        # Segments lie apart, so that blocks of two are never taken for neighbours.
        self._next_address += total + SMALL_SEGMENT
        self._add_reserved(total)
        self._on_segment("segment_alloc", block.address, total)
        return block

    def _grow(self, pool: _Pool, size: int) -> Block | None:
        """Map more pages at the end of the pool's expandable segment (rule 8)."""
        if pool.tail is None:
            address = self._next_address
            self._next_address += _FAR
            pool.tail = Block(address, _FAR, pool.is_small, is_mapped=False)
            self.segments[address] = pool.tail
        tail = pool.tail
        end = tail.previous if tail.previous is not None and not tail.previous.is_used else None
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        if end is not None and end.size >= size:  # refused before only for its size (rule 7)
            pool.remove(end)
            return end
        missing = size - (end.size if end is not None else 0)
        mapped = -(-missing // page) * page
        if not self._may_reserve(mapped):
            return None
        fresh = Block(tail.address, mapped, pool.is_small, previous=tail.previous, next=tail)
        if tail.previous is not None:
            tail.previous.next = fresh
        else:
            self.segments[fresh.address] = fresh
        tail.previous = fresh
        tail.address += mapped
        self._add_reserved(mapped)
        self._on_segment("segment_map", fresh.address, mapped)
        self._merge(pool, fresh, fresh.previous)
        return fresh

    def _may_reserve(self, size: int) -> bool:
        limit = self.options.limit_bytes
        return limit is None or self.reserved_bytes + size <= limit

    def _add_reserved(self, size: int) -> None:
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    # -- splitting and merging --------------------------------------------------------------------

    def _splits(self, block: Block, size: int) -> bool:
        rest = block.size - size
        if block.is_small or self.options.expandable_segments:
            return rest >= SMALLEST_BLOCK
        return size < self._most_unsplit and rest > SMALL_SIZE

    def _split(self, pool: _Pool, block: Block, size: int) -> None:
        """Shorten a block to `size`; the rest becomes a free block behind it (rule 5)."""
        rest = Block(
            block.address + size, block.size - size, block.is_small,
            previous=block, next=block.next,
        )  # fmt: skip
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size = rest, size
        pool.insert(rest)

    def _merge(self, pool: _Pool, block: Block, other: Block | None) -> None:
        """Take a free neighbour into a block that is in no pool (rule 6)."""
        if other is None or other.is_used or not other.is_mapped:
            return
        pool.remove(other)
        if other is block.previous:
            if other.address in self.segments:
                self.segments[other.address] = block
            block.address, block.previous = other.address, other.previous
            if block.previous is not None:
                block.previous.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.previous = block
        block.size += other.size

    # -- giving back ------------------------------------------------------------------------------

    def _release(self, pool: _Pool, block: Block) -> None:
        pool.remove(block)
        del self.segments[block.address]
        self.reserved_bytes -= block.size
        self._on_segment("segment_free", block.address, block.size)

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Give unsplittable blocks back until the request may fit, the largest first (rule 7)."""
        if self.options.max_split_size_bytes is None or self.options.expandable_segments:
            return False
        wanted = max(size, self._most_unsplit)
        single = pool.smallest(wanted)
        if single is not None:
            if single.is_split:
                return False
            self._release(pool, single)
            return True
        released = 0
        for length, address in reversed(list(pool.keys)):
            if released >= wanted or length < self._most_unsplit:
                break
            if not pool.blocks[address].is_split:
                self._release(pool, pool.blocks[address])
                released += length
        return released >= wanted

    def _unmap(self, pool: _Pool, block: Block) -> None:
        """Give the whole pages at the end of an expandable segment back.

        PyTorch also unmaps pages in the middle, which come back at the lowest address; here only
        the growing end shrinks, so what is reserved is never told too low.
        """
        tail = pool.tail
        if tail is None or block.next is not tail:
            return
        page = SMALL_SEGMENT if pool.is_small else LARGE_SEGMENT
        whole = block.size // page * page
        if whole == 0:
            return
        pool.remove(block)
        self.reserved_bytes -= whole
        tail.address -= whole
        self._on_segment("segment_unmap", tail.address, whole)
        if block.size == whole:
            tail.previous = block.previous
            if block.previous is not None:
                block.previous.next = tail
            else:
                self.segments[tail.address] = tail
        else:
            block.size -= whole
            pool.insert(block)

    def _collect_garbage(self, threshold: int) -> None:
        """Give back unused large segments of at least average age (rule 9)."""
        target = self.reserved_bytes - threshold
        pool = self._pools[False]
        while target > 0:
            unused = [b for b in pool.blocks.values() if not b.is_split]
            if not unused:
                return
            ages = {b.address: pool.searches - b.age for b in unused}
            average = sum(ages.values()) / len(unused)
            for block in unused:
                if ages[block.address] >= average:
                    self._release(pool, block)
                    target -= block.size
