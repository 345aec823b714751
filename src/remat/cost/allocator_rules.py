"""Settings and sizes of CUDA's caching allocator, as PyTorch has them.

NOTE [ The allocator's rules ]
From `c10/cuda/CUDACachingAllocator.cpp` of PyTorch (read at commit 001074d2, 2025), one stream:
1. A size is rounded up to 512 bytes, or to a division between powers of two where asked for.
2. Rounded sizes up to 1 MiB come from the small pool, the rest from the large one.
3. The smallest free block that is large enough is taken, the lowest address among equals.
4. Without one, a segment is reserved: 2 MiB in the small pool; 20 MiB below 10 MiB; above, the size
   rounded up to 2 MiB.
5. The rest of a block is split off if at least 512 bytes (small pool, expandable segments), or if
   more than 1 MiB (large pool).
6. A freed block merges with its free neighbours in the segment. Segments are kept.
7. Blocks of `max_split_size_bytes` or more are never split, serve no smaller request, and serve a
   larger one only if less than 20 MiB are wasted.
8. With expandable segments a pool has one segment, which grows at its end by pages of 2 MiB (small
   pool) or 20 MiB (large pool).
9. At the limit, cached blocks go back to the device and the allocation is tried again. Above the
   garbage collection threshold, unused segments that are older than the average go back earlier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from remat.errors import DeviceError
from remat.units import MIB

SMALLEST_BLOCK: Final = 512
SMALL_SIZE: Final = MIB
SMALL_SEGMENT: Final = 2 * MIB
LARGE_SEGMENT: Final = 20 * MIB
LEAST_LARGE: Final = 10 * MIB
LARGE_ROUNDING: Final = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorOptions:
    """The settings of `PYTORCH_ALLOC_CONF` that change what is reserved.

    Arguments
    ---------
    max_split_size_bytes: blocks of this size or larger are not split (rule 7); `None`: no limit.
    expandable_segments: one growing segment for each pool (rule 8).
    garbage_collection_threshold: share of `limit_bytes` above which unused segments are given back
        (rule 9), 0 for never. As in PyTorch it does nothing without a limit.
    roundup_power2_divisions: divisions between powers of two that sizes are rounded up to (rule 1).
    limit_bytes: the most that may be reserved; `None`: no limit.

    Raises
    ------
    DeviceError: for a setting that PyTorch would refuse.
    """

    max_split_size_bytes: int | None = None
    expandable_segments: bool = False
    garbage_collection_threshold: float = 0.0
    roundup_power2_divisions: int = 0
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_split_size_bytes is not None and self.max_split_size_bytes <= LARGE_SEGMENT:
            raise DeviceError(
                f"max_split_size_bytes is {self.max_split_size_bytes}, expected more than "
                f"{LARGE_SEGMENT} (20 MiB)."
            )
        if not 0 <= self.garbage_collection_threshold < 1:
            raise DeviceError(
                f"garbage_collection_threshold is {self.garbage_collection_threshold}, expected a "
                "share from 0 to below 1."
            )
        divisions = self.roundup_power2_divisions
        if divisions < 0 or divisions & (divisions - 1):
            raise DeviceError(
                f"roundup_power2_divisions is {divisions}, expected 0 or a power of two."
            )
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            raise DeviceError(f"limit_bytes is {self.limit_bytes}, expected a positive number.")


def parse_alloc_conf(text: str, device_bytes: int) -> AllocatorOptions:
    """Read settings as `PYTORCH_ALLOC_CONF` has them, for a device of so much memory.

    Raises
    ------
    DeviceError: for a setting that is not known or whose value cannot be; says which are.

    Example
    -------
    >>> found = parse_alloc_conf("expandable_segments:True,max_split_size_mb:64", 2**34)
    >>> found.expandable_segments, found.max_split_size_bytes
    (True, 67108864)
    """
    found: dict[str, Any] = {}  # Any: a field's own type
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (part.strip() for part in entry.partition(":"))
        if key not in _SETTINGS:
            raise DeviceError(
                f"allocator setting {entry!r} is not modelled: expected NAME:VALUE with commas "
                f"between, of {', '.join(_SETTINGS)}."
            )
        field, read, expected = _SETTINGS[key]
        try:
            found[field] = read(value)
        except (ValueError, KeyError) as error:
            raise DeviceError(f"allocator setting {entry!r}: expected {expected}.") from error
    fraction = found.pop("fraction", None)
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise DeviceError(
                f"per_process_memory_fraction is {fraction}, expected a share above 0, at most 1."
            )
        found["limit_bytes"] = int(fraction * device_bytes)
    return AllocatorOptions(**found)


_SETTINGS: Final[dict[str, tuple[str, Callable[[str], Any], str]]] = {
    "max_split_size_mb": ("max_split_size_bytes", lambda v: int(v) * MIB, "a whole number of MiB"),
    "expandable_segments": (
        "expandable_segments", {"True": True, "False": False}.__getitem__, "True or False",
    ),
    "garbage_collection_threshold": ("garbage_collection_threshold", float, "a share below 1"),
    "roundup_power2_divisions": ("roundup_power2_divisions", int, "a power of two"),
    "per_process_memory_fraction": ("fraction", float, "a share above 0, at most 1"),
}  # fmt: skip


def round_size(size: int, divisions: int = 0) -> int:
    """Round a request up as the allocator does (rule 1).

    With `divisions`, sizes go up to the next of so many steps between two powers of two.

    >>> round_size(1), round_size(513), round_size(1200 * 1024, divisions=4) // 1024
    (512, 1024, 1280)
    """
    if size < SMALLEST_BLOCK:
        return SMALLEST_BLOCK
    if divisions > 1 and size > SMALLEST_BLOCK * divisions:
        power = 1 << (size.bit_length() - 1)
        return size if size == power else -(-size // (power // divisions)) * (power // divisions)
    return -(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK


def segment_size(size: int) -> int:
    """Return the bytes of the segment that is reserved for a rounded size (rule 4)."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < LEAST_LARGE:
        return LARGE_SEGMENT
    return -(-size // LARGE_ROUNDING) * LARGE_ROUNDING
