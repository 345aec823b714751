"""Measure one device for a minute: ops, regions, copies, the allocator, and steps to check by."""

from __future__ import annotations

import contextlib
import datetime as dt
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from remat.calibrating.curves import TimedOp, curves_of
from remat.calibrating.hardware import at_hand
from remat.calibrating.probes import Probe, half_of, held_out, probes
from remat.cost.calibration import (
    AllocatorFacts,
    Calibration,
    Check,
    WorkspaceFact,
    calibration_path,
)
from remat.cost.devices import Device
from remat.cost.families import family_of, work_of
from remat.cost.measured import time_host_copies, time_op
from remat.cost.model import CostModel, cost_step
from remat.cost.replay import moved_bytes
from remat.cost.usual import threads_of
from remat.cost.workspace import measure_workspace
from remat.errors import WorkloadError
from remat.prove.measure import measure
from remat.trace.capture import capture
from remat.trace.records import OpSignature, StepTrace
from remat.trace.standin import random_states, restore_random_states

ProgressFunction = Callable[[str, int, int | None], None]

DEFAULT_SECONDS = 60.0
_LEAST_SECONDS = 5.0
# How the time is shared out: most of it goes to ops, whose curves carry every prediction.
_SHARE_OF_OPS, _SHARE_OF_HALF_OPS, _SHARE_OF_REGIONS, _SHARE_OF_CHECKS = 0.4, 0.15, 0.1, 0.25
_FEWEST_STEPS, _MOST_STEPS = 3, 9
_STEPS_BESIDE = 3  # of a measurement: to warm up, and to record the peak
# The smallest of each kind is timed whatever the time: without it there would be no curve.
_MUST_PROBES = 2


def calibrate(
    device: Device | str | None = None,
    *,
    seconds: float = DEFAULT_SECONDS,
    save: bool = True,
    progress: ProgressFunction | None = None,
) -> Calibration:
    """Measure the device at hand; every later plan for it uses the result.

    Ops of small training steps of two kinds, transformer and convolution, are timed one by one at
    rising sizes, in float32 and in 16 bits, and a curve of seconds against work is drawn for each
    family of ops and dtype. Overheads of regions come from chains of tiny modules with and without
    a plan, copies and the allocator are measured, and steps of other sizes, also under autocast,
    are predicted and then measured.

    Arguments
    ---------
    device: row of the device table that is at hand, or its name; found by itself unless given.
    seconds: about how long to measure.
    save: keep the result in the user's cache (`REMAT_CACHE`, else `~/.cache/remat`).
    progress: called with stage, done and total.

    Raises
    ------
    DeviceError: if no row of the device table stands for this machine's GPU.
    WorkloadError: if `seconds` is not a number of at least five.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise WorkloadError(f"seconds must be a number, got {seconds!r}.")
    if not seconds >= _LEAST_SECONDS:
        raise WorkloadError(f"seconds must be at least {_LEAST_SECONDS:g}, got {seconds!r}.")
    progress = progress or (lambda _stage, _done, _total: None)
    row, place, hardware = at_hand(device)
    states = random_states()
    try:
        timed, seen = _time_probes(
            place, torch.float32, _SHARE_OF_OPS * seconds, progress
        )  # fmt: skip
        in_half, _ = _time_probes(place, half_of(place), _SHARE_OF_HALF_OPS * seconds, progress)
        progress("overheads of regions", 0, None)
        region_s, saved_s = region_overheads(place, _SHARE_OF_REGIONS * seconds)
        progress("copies and allocator", 0, None)
        found = Calibration(
            device=row.name,
            hardware=hardware,
            num_threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            curves=curves_of([*timed, *in_half]),
            region_overhead_s=region_s,
            saved_tensor_overhead_s=saved_s,
            host_bytes_per_s=time_host_copies(place, time.perf_counter),
            allocator=_allocator_facts(place),
            workspaces=_workspaces(seen, place),
        )
        checks = _checks(found, row, place, _SHARE_OF_CHECKS * seconds, progress)
        found = found.model_copy(update={"checks": checks})
    finally:
        restore_random_states(states)
    if save:
        found.save(calibration_path(row.name, threads_of(row)))
    return found


def _time_probes(
    place: torch.device, dtype: torch.dtype, seconds: float, progress: ProgressFunction
) -> tuple[list[TimedOp], set[OpSignature]]:
    """Time each op shape of the probes once; small probes first, so that time runs out on large.

    What an op takes follows from the last one of its family: one that would not end in time is left
    out, as 16 bits may be a hundred times slower where a CPU emulates them.
    """
    stage = f"time ops in {str(dtype).removeprefix('torch.')}"
    listed = list(probes(place, dtype))
    deadline = time.perf_counter() + seconds
    timed: list[TimedOp] = []
    seen: set[OpSignature] = set()
    pace: dict[str, float] = {}  # seconds by work
    for done, probe in enumerate(listed):
        progress(stage, done, len(listed))
        is_optional = done >= _MUST_PROBES
        if is_optional and time.perf_counter() > deadline:
            break
        trace = _trace(probe)
        for op in trace.ops:
            signature = trace.signatures[op.signature]
            family = family_of(op.name)
            work = work_of(signature, op.flops, op.moved_bytes)
            # Run once to warm up, and once or more to be timed.
            end = time.perf_counter() + 2 * pace.get(family, 0.0) * work
            if op.is_view or signature in seen or (is_optional and end > deadline):
                continue
            seen.add(signature)
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
                took = time_op(signature, place, time.perf_counter)
                if took is not None:
                    timed.append(TimedOp(op=op, signature=signature, seconds=took))
                    pace[family] = took / max(work, 1.0)
    progress(stage, len(listed), len(listed))
    return timed, seen


def _trace(probe: Probe) -> StepTrace:
    model, batch = probe.build()
    return capture(model, batch, loss=probe.loss)


def _checks(
    found: Calibration,
    row: Device,
    place: torch.device,
    seconds: float,
    progress: ProgressFunction,
) -> tuple[Check, ...]:
    """Predict and measure steps, as many of each as there is time for."""
    listed = list(held_out(place))
    checks = []
    for done, probe in enumerate(listed):
        progress("predict and measure other steps", done, len(listed))
        trace = _trace(probe)
        calibrated_s = _predicted(trace, CostModel(device=row, calibration=found))
        affordable = int(seconds / len(listed) / calibrated_s) - _STEPS_BESIDE
        model, batch = probe.build()
        took = measure(
            model, batch, loss=probe.loss,
            steps=min(max(affordable, _FEWEST_STEPS), _MOST_STEPS),
        )  # fmt: skip
        checks.append(
            Check(
                name=probe.name,
                calibrated_seconds=calibrated_s,
                roofline_seconds=_predicted(trace, CostModel(device=row)),
                measured_seconds=took.median_seconds,
            )
        )
    progress("predict and measure other steps", len(listed), len(listed))
    return tuple(checks)


def _predicted(trace: StepTrace, cost: CostModel) -> float:
    return cost_step(trace, cost).step_seconds


# -- regions --------------------------------------------------------------------------------------


class _Chain(nn.Module):
    """Tiny layers in blocks: a step of it is dispatch and bookkeeping, and little else."""

    def __init__(self, num_blocks: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))) for _ in range(num_blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


_NUM_BLOCKS = 16
_FEW, _MANY = 1, 5
_FEWEST_ROUNDS = 5


def region_overheads(place: torch.device, seconds: float) -> tuple[float, float]:
    """Return the seconds that a region adds, and each tensor that is saved in one.

    A block of n linear layers saves n tensors, so that what checkpointing it adds beyond running
    it again is `region + n * saved`: two chains, with one layer and with five in each block, give
    both. With, without and forward alone are timed in turn, and medians of differences count.
    """
    few, many = (_added(place, layers, seconds / 2) for layers in (_FEW, _MANY))
    saved = max(0.0, (many - few) / (_MANY - _FEW))
    return max(0.0, few - _FEW * saved), saved


def _added(place: torch.device, layers: int, seconds: float) -> float:
    """Time a step with regions minus one without, minus the blocks' forward, for each block."""
    from torch.utils.checkpoint import checkpoint

    model = _Chain(_NUM_BLOCKS, layers).to(place)
    x = torch.randn(2, 4, device=place, requires_grad=True)

    def plain() -> None:
        torch.autograd.backward(model(x))

    def planned() -> None:
        value = x
        for block in model.blocks:
            value = checkpoint(block, value, use_reentrant=False, preserve_rng_state=False)
        torch.autograd.backward(value.sum())

    def forward() -> None:
        model(x)

    differences: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(differences) < _FEWEST_ROUNDS or time.perf_counter() < deadline:
        without, with_regions, again = (_timed(f, place) for f in (plain, planned, forward))
        differences.append(with_regions - without - again)
    return statistics.median(differences) / _NUM_BLOCKS


def _timed(run: Callable[[], None], place: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter() - begin


# -- memory ---------------------------------------------------------------------------------------


def _allocator_facts(place: torch.device) -> AllocatorFacts:
    """Measure how allocations are rounded: on CUDA by the allocator's own counts."""
    if place.type != "cuda":
        return AllocatorFacts(rounding_bytes=1)  # what is asked for is what counts on a CPU
    torch.cuda.empty_cache()
    with _fresh_bytes(place, "allocated_bytes.all.current") as rounding:
        kept = [torch.empty(1, dtype=torch.uint8, device=place)]
    torch.cuda.empty_cache()
    with _fresh_bytes(place, "reserved_bytes.all.current") as small:
        kept.append(torch.empty(2**20 - 512, dtype=torch.uint8, device=place))
    with _fresh_bytes(place, "reserved_bytes.all.current") as large:
        kept.append(torch.empty(2**20 + 512, dtype=torch.uint8, device=place))
    del kept
    return AllocatorFacts(
        rounding_bytes=rounding[0],
        small_segment_bytes=small[0] or None,
        large_segment_bytes=large[0] or None,
    )


@contextlib.contextmanager
def _fresh_bytes(place: torch.device, count: str) -> Iterator[list[int]]:
    grown: list[int] = []
    before = torch.cuda.memory_stats(place)[count]
    yield grown
    grown.append(torch.cuda.memory_stats(place)[count] - before)


def _workspaces(seen: set[OpSignature], place: torch.device) -> tuple[WorkspaceFact, ...]:
    if place.type != "cpu":
        return ()
    convolutions = [signature for signature in seen if "convolution" in signature.name]
    measured = measure_workspace(convolutions)
    facts = [
        WorkspaceFact(
            operation=signature.name,
            operand_bytes=moved_bytes(signature),
            workspace_bytes=measured.get(signature, 0),
        )
        for signature in convolutions
    ]
    return tuple(sorted(facts, key=lambda fact: (fact.operation, fact.operand_bytes)))
