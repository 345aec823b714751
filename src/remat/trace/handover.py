"""The optimizer's part of a step, taken over from a trace of the same step under another plan.

NOTE [ Handover ]
What an optimizer does follows from its parameters and their gradients. Where these are the same
tensors but for their memory, it is the same ops, whatever was recomputed before: they are written
down once, and in later traces of the step stand there again, on the storages of that trace. That
holds only for an optimizer which
1. reads nothing but parameters, buffers, gradients and what it makes itself;
2. lets go of no gradient, and of nothing else that was alive when it began;
3. calls no module, and saves no tensor for backward.
Otherwise it is traced again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from remat.trace.ops import describe, tensors_in
from remat.trace.recorder import Recorder
from remat.trace.records import (
    BASE_KINDS,
    GRADIENTS,
    OPTIMIZER,
    Handover,
    Op,
    StepTrace,
)


def note_gradients(recorder: Recorder, parameters: Iterable[Tensor]) -> Handover:
    """Write down what an optimizer is given: the gradients of a recorded backward."""
    found = [
        (recorder.register_as(tensor, GRADIENTS), describe(tensor))
        for parameter in parameters
        for tensor in tensors_in(parameter.grad)
    ]
    return Handover(
        gradients=tuple(index for index, _ in found),
        metas=tuple(meta for _, meta in found),
        num_storages=len(recorder.storages),
    )


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """What the optimizer did in a trace, and which storages it was given."""

    trace: StepTrace
    handover: Handover
    num_given: int  # storages that are there before the step, the same in each trace of it

    @classmethod
    def of(cls, trace: StepTrace | None) -> OptimizerPart | None:
        """Return that of a trace; `None` where another trace cannot take it over."""
        if trace is None or trace.handover is None:
            return None
        num_given = sum(1 for storage in trace.storages if storage.birth == 0)
        part = cls(trace, trace.handover, num_given)
        return part if part._stands_alone() else None

    def _stands_alone(self) -> bool:
        """Whether the optimizer is one of those in NOTE [ Handover ]."""
        trace, gradients = self.trace, self.handover.gradients
        begin, last = trace.phase_start[OPTIMIZER], trace.num_ticks - 1
        if any(handle.pack >= begin for handle in trace.handles):
            return False
        if any(call.start >= begin for call in trace.calls):
            return False
        for storage in map(trace.storages.__getitem__, gradients):
            if storage.kind != GRADIENTS or storage.intervals[-1][1] != last:
                return False
        before = trace.storages[: self.handover.num_storages]
        if any(begin <= end < last for storage in before for _, end in storage.intervals):
            return False
        read = {s for op in self._ops() for s in (*op.inputs, *op.fresh, *op.mutated)}
        known = {*range(self.num_given), *gradients}
        return all(s in known or s >= self.handover.num_storages for s in read)

    def _ops(self) -> Iterator[Op]:
        return (op for op in self.trace.ops if op.phase == OPTIMIZER)

    def follows(self, handover: Handover) -> bool:
        """Whether an optimizer is given the same gradients, but for their memory."""
        ours = self.handover
        return ours.metas == handover.metas and _ranks(ours) == _ranks(handover)

    def least_peak_bytes(self, op_workspace: Sequence[int]) -> int:
        """Return the most bytes that the optimizer needs alive at once, whatever ran before it.

        `op_workspace` are bytes that kernels take beside, for each op of the trace.
        """
        trace, first = self.trace, self.handover.num_storages
        gradients = {s: trace.storages[s].size_bytes for s in self.handover.gradients}
        changes = np.zeros(trace.num_ticks + 2, dtype=np.int64)
        changes[trace.phase_start[OPTIMIZER]] = trace.base_bytes + sum(gradients.values())
        for storage in trace.storages[first:]:
            if storage.kind not in BASE_KINDS:
                for start, end in storage.intervals:
                    changes[start] += storage.size_bytes
                    changes[end + 1] -= storage.size_bytes
        alive = np.cumsum(changes)
        for op, size in zip(trace.ops, op_workspace, strict=True):
            if op.phase == OPTIMIZER:
                alive[op.tick] += size
        return int(alive.max())

    def take_over(self, recorder: Recorder, handover: Handover) -> None:
        """Write the optimizer's part at the end of a record that has come to its gradients."""
        shift = recorder.tick + 1 - self.trace.phase_start[OPTIMIZER]
        recorder.begin(OPTIMIZER)
        storage_of = dict(zip(self.handover.gradients, handover.gradients, strict=True))
        storage_of.update((given, given) for given in range(self.num_given))
        first = self.handover.num_storages
        for number, storage in enumerate(self.trace.storages[first:], first):
            storage_of[number] = len(recorder.storages)
            recorder.storages.append(
                dataclasses.replace(
                    storage,
                    birth=storage.birth + shift,
                    intervals=[(start + shift, end + shift) for start, end in storage.intervals],
                )
            )
        signatures: dict[int, int] = {}
        for op in self._ops():
            if op.signature not in signatures:
                signatures[op.signature] = recorder.sign(self.trace.signatures[op.signature])
            recorder.ops.append(
                dataclasses.replace(
                    op,
                    tick=op.tick + shift,
                    signature=signatures[op.signature],
                    inputs=tuple(storage_of[s] for s in op.inputs),
                    fresh=tuple(storage_of[s] for s in op.fresh),
                    mutated=tuple(storage_of[s] for s in op.mutated),
                )
            )
        recorder.tick = self.trace.num_ticks - 2 + shift  # the last one closes the record


def _ranks(handover: Handover) -> list[int]:
    """Tell which gradients lie in the same memory."""
    ranks: dict[int, int] = {}
    return [ranks.setdefault(storage, len(ranks)) for storage in handover.gradients]
