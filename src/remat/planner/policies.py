"""Policies: the rules of thumb that people use today, as choices of blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


class AbstractPolicy(ABC):
    """Which of a model's blocks are recomputed, decided by their number alone."""

    @property
    @abstractmethod
    def label(self) -> str:
        """Name of the policy for tables and pictures."""

    @abstractmethod
    def choose(self, num_blocks: int) -> Sequence[int]:
        """Return the positions of the blocks that are recomputed."""


@dataclass(frozen=True)
class KeepAll(AbstractPolicy):
    """Recompute nothing."""

    @property
    def label(self) -> str:
        """Name of the policy."""
        return "keep everything"

    def choose(self, num_blocks: int) -> Sequence[int]:
        """Choose no block."""
        del num_blocks
        return range(0)


@dataclass(frozen=True)
class AllBlocks(AbstractPolicy):
    """Recompute every block: what a library's switch does."""

    @property
    def label(self) -> str:
        """Name of the policy."""
        return "all blocks"

    def choose(self, num_blocks: int) -> Sequence[int]:
        """Choose every block."""
        return range(num_blocks)


@dataclass(frozen=True)
class EveryNth(AbstractPolicy):
    """Recompute blocks 0, n, 2n, ..."""

    n: int

    @property
    def label(self) -> str:
        """Name of the policy."""
        return f"every {self.n} blocks"

    def choose(self, num_blocks: int) -> Sequence[int]:
        """Choose each n-th block."""
        return range(0, num_blocks, self.n)


@dataclass(frozen=True)
class FirstK(AbstractPolicy):
    """Recompute the first k blocks."""

    k: int

    @property
    def label(self) -> str:
        """Name of the policy."""
        return f"first {self.k} blocks"

    def choose(self, num_blocks: int) -> Sequence[int]:
        """Choose the first k blocks."""
        return range(min(self.k, num_blocks))


@dataclass(frozen=True)
class LastK(AbstractPolicy):
    """Recompute the last k blocks."""

    k: int

    @property
    def label(self) -> str:
        """Name of the policy."""
        return f"last {self.k} blocks"

    def choose(self, num_blocks: int) -> Sequence[int]:
        """Choose the last k blocks."""
        return range(max(0, num_blocks - self.k), num_blocks)


def simple_policies(num_blocks: int) -> tuple[AbstractPolicy, ...]:
    """Return all, every-n, first-k and last-k for every n and k that differ."""
    return (
        AllBlocks(),
        *(EveryNth(n) for n in range(2, num_blocks)),
        *(FirstK(k) for k in range(1, num_blocks)),
        *(LastK(k) for k in range(1, num_blocks)),
    )
