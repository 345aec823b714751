"""The largest size that fits: by the secant, as bytes are nearly affine in it, then by halving."""

from __future__ import annotations

from collections.abc import Callable

# Each example takes a byte or more, and no device of the table has as many.
LARGEST = 2**44
_MOST_GROWTH = 64


def largest_fitting(
    needed: Callable[[int], int],
    available_bytes: int,
    *,
    empty: int = 0,
    at_least: int = 0,
    most: int = LARGEST,
) -> int:
    """Return the largest size of 1 or more that needs no more than what is available, or 0.

    Arguments
    ---------
    needed: bytes by size, non-decreasing. Called for about five sizes, if it is affine.
    empty: bytes that are needed whatever the size; a first guess starts from them.
    at_least: a size that is known to fit, or 0.
    most: the largest size to consider.
    """
    low, high = at_least, most + 1
    points = [(0, empty)]

    def fits(size: int) -> bool:
        nonlocal low, high
        found = needed(size)
        points.append((size, found))
        if found <= available_bytes:
            low = size
            return True
        high = size
        return False

    if not fits(max(1, low)):
        return low  # what was known to fit does so in another way
    halves = False
    while high - low > 1:
        # Nothing is known above the largest size tried: go there in steps.
        bounded = high <= most
        guess = (low + high) // 2 if bounded else 2 * low
        if not halves:
            (a, needs_a), (b, needs_b) = points[-2:]
            slope = (needs_b - needs_a) / (b - a)
            if slope > 0:
                guess = b + int((available_bytes - needs_b) / slope)
        ceiling = high - 1 if bounded else min(high - 1, _MOST_GROWTH * low)
        guess = min(max(guess, low + 1), ceiling)
        before = high - low
        fits(guess)
        # The secant creeps where what is needed has a bend: halve then, in turn.
        halves = bounded and not halves and high - low > before // 2
    return low
