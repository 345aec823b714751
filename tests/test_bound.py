"""The lower bound against every recomputation of single ops, simulated by independent code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from remat.fit import Fit
from remat.planner.bound import lower_bound_seconds
from remat.program import Program
from remat.trace.records import BASE_KINDS, FORWARD
from tests.models import Block, square_mean

ROWS = 256


class Gated(nn.Module):
    """Two branches of one input, multiplied, with a skip around them: shared reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)

    def forward(self, x):
        wide = self.up(x)
        return x + self.down(torch.tanh(wide) * torch.sigmoid(wide))


class InPlace(nn.Module):
    """Convolution-like stage whose activation overwrites its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU(inplace=True),
            nn.Linear(2 * width, width),
        )  # fmt: skip

    def forward(self, x):
        return self.stage(x) + 1


# The widest layer is the last: elsewhere the peak is where everything is needed, and nothing helps.
MODELS = {
    "chain": lambda: nn.Sequential(
        nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.Sigmoid(), nn.Linear(16, 96)
    ),
    "gated": lambda: nn.Sequential(Gated(8), nn.Linear(8, 96)),
    "in_place": lambda: nn.Sequential(InPlace(16), nn.Linear(16, 96)),
    "pointwise": lambda: nn.Sequential(
        nn.Linear(8, 64), nn.GELU(), nn.SiLU(), nn.Tanh(), nn.Softmax(-1), nn.Linear(64, 8)
    ),
}


class Recomputation:
    """Every plan that drops results of single ops, without any region, on one recorded step.

    A dropped result is made again when backward first reads it, from what is there at that moment;
    what is not there is made again as well, for this moment only or from then on. Results that
    nothing saved may be kept on purpose. The working set of recomputation is left out, so that
    plans look cheaper than they are: the bound must hold all the same.
    """

    def __init__(self, fit: Program) -> None:
        self.trace, self.seconds = fit.trace, fit.cost.op_seconds
        self.keep_all = fit.timeline.curve(()).alive
        self.maker = {
            s: position
            for position, op in enumerate(self.trace.ops)
            if op.phase == FORWARD
            for s in op.fresh
            if self.trace.storages[s].kind not in BASE_KINDS
        }
        self.held: dict[int, list[tuple[int, int, int]]] = {}
        for handle in self.trace.handles:
            if handle.storage in self.maker and handle.unpack >= 0:
                self.held.setdefault(handle.storage, []).append(
                    (handle.pack, handle.unpack, handle.end)
                )
        large = [s for s in self.maker if self.trace.storages[s].size_bytes >= 4096]
        self.saved = [s for s in large if s in self.held]
        self.others = [s for s in large if s not in self.held]

    def is_natural(self, storage: int, tick: int) -> bool:
        return any(a <= tick <= b for a, b in self.trace.storages[storage].intervals)

    def alive(self, storage: int, dropped, kept, again: dict[int, int]) -> set[int]:
        """Ticks at which a storage is alive beyond the program's own references."""
        spans = self.held.get(storage, ())
        if storage in kept:
            first = min(a for a, _ in self.trace.storages[storage].intervals)
            return set(range(first, max(end for s in self.held for *_, end in self.held[s]) + 1))
        if storage not in dropped:
            return {t for pack, _, end in spans for t in range(pack, end + 1)}
        last = max(end for *_, end in spans)
        return set(range(min(again[storage], min(u for _, u, _ in spans)), last + 1))

    def plans(self):
        """Yield (peak bytes, seconds) of each plan."""
        for choice in itertools.product("kdc", repeat=len(self.saved)):
            dropped = {s for s, c in zip(self.saved, choice, strict=True) if c != "k"}
            cached = {s for s, c in zip(self.saved, choice, strict=True) if c == "c"}
            for bits in itertools.product((0, 1), repeat=len(self.others)):
                kept = {s for s, bit in zip(self.others, bits, strict=True) if bit}
                yield self.evaluate(dropped, cached, kept)

    def evaluate(self, dropped, cached, kept):
        again = dict.fromkeys(dropped, math.inf)
        spent = 0.0
        for storage in sorted(dropped, key=lambda s: min(u for _, u, _ in self.held[s])):
            tick = min(u for _, u, _ in self.held[storage])
            if again[storage] <= tick:
                continue
            spent += self.remake(storage, tick, dropped, cached, kept, again, set())
            again[storage] = tick
        memory = self.keep_all.copy()
        for storage in self.saved + self.others:
            size = self.trace.storages[storage].size_bytes
            before = self.alive(storage, set(), set(), {})
            after = self.alive(storage, dropped, kept, again)
            for tick in before ^ after:
                if not self.is_natural(storage, tick):
                    memory[tick] += size if tick in after else -size
        return int(memory.max()), spent

    def remake(self, storage, tick, dropped, cached, kept, again, made) -> float:
        """Seconds of making a storage at a tick, with whatever is missing for it."""
        position = self.maker[storage]
        if position in made:
            return 0.0
        made.add(position)
        spent = self.seconds[position]
        for source in set(self.trace.ops[position].inputs):
            if source == storage or source not in self.maker or self.is_natural(source, tick):
                continue
            is_there = source in kept or (
                again[source] <= tick
                if source in dropped
                else any(pack <= tick <= end for pack, _, end in self.held.get(source, ()))
            )
            if not is_there:
                spent += self.remake(source, tick, dropped, cached, kept, again, made)
                if source in cached:
                    again[source] = min(again[source], tick)
        return spent


@pytest.mark.parametrize("name", MODELS)
def test_bound_is_below_every_recomputation_of_single_ops(name):
    """No choice of ops to run again is cheaper than the bound at its own peak."""
    model = MODELS[name]()
    width = next(model.parameters()).shape[1]
    batch = torch.randn(ROWS, width, requires_grad=True)
    fit = Fit(model, batch, loss=square_mean, optimizer=None).plain
    found = sorted(set(Recomputation(fit).plans()))
    front = []
    for peak, seconds in found:
        if not front or seconds < front[-1][1]:
            front.append((peak, seconds))
    assert len(found) > 10
    bounds = [lower_bound_seconds(fit.timeline, fit.cost, peak) for peak, _ in front]
    for bound, (peak, seconds) in zip(bounds, front, strict=True):
        assert bound <= seconds * (1 + 1e-9), (bound, seconds, peak)
    assert bounds == sorted(bounds, reverse=True)
    # Not an empty truth: at some budget the bound is most of the best plan's cost.
    assert max(b / s for b, (_, s) in zip(bounds, front, strict=True) if s) > 0.5


def test_bound_grows_as_the_budget_falls():
    """Less memory never costs less, and no memory at all is out of reach of any plan."""
    model = nn.Sequential(*(Block(32) for _ in range(4)))
    fit = Fit(model, torch.randn(ROWS, 32), loss=square_mean).plain
    most = fit.keep_all_peak_bytes
    bounds = [lower_bound_seconds(fit.timeline, fit.cost, most * k // 20) for k in range(20, 5, -1)]
    assert bounds[0] == 0.0
    assert bounds == sorted(bounds)
    assert lower_bound_seconds(fit.timeline, fit.cost, fit.trace.base_bytes) == math.inf


def test_bound_charges_what_an_op_reads():
    """Where inputs are gone, making a result again needs them made again: more than its own op."""
    model = MODELS["pointwise"]()
    fit = Fit(model, torch.randn(ROWS, 8), loss=square_mean, optimizer=None).plain
    best = min(
        seconds
        for peak, seconds in Recomputation(fit).plans()
        if peak <= fit.keep_all_peak_bytes * 0.7
    )
    bound = lower_bound_seconds(fit.timeline, fit.cost, int(fit.keep_all_peak_bytes * 0.7))
    assert 0.3 * best < bound <= best
