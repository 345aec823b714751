"""Check: hazards in a model, and in checkpointing that its author already wrote."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from remat.cost.devices import find_device
from remat.cost.model import cost_step
from remat.cost.usual import usual_cost
from remat.errors import ApplyError, CaptureError, WorkloadError
from remat.planner.options import find_options
from remat.planner.records import Hazard, Severity
from remat.planner.spans import Facts
from remat.prove.hazards import HOOKS, Kind, merged, region_hazards
from remat.prove.records import CheckReport, Difference
from remat.prove.simulate import simulate
from remat.prove.switches import switch_hazards
from remat.prove.verify import StepOutcome, compare, is_explained, noise_between, run_step
from remat.regions.apply import is_applied
from remat.trace.capture import is_abstract
from remat.trace.checkpoints import SwitchOff, checkpointing_off, visited
from remat.trace.found import FoundRegion, trace_without_checkpointing
from remat.trace.records import StepTrace
from remat.trace.saved import versions_unchecked
from remat.trace.step import DEFAULT_OPTIMIZER, Loss, OptimizerLike
from remat.units import format_bytes

# Any: batches are the user's own types.

_FIX = "Replace the model's checkpointing by a plan of remat: `remat check WORKLOAD --fix FILE`."

FAILS = Kind("step-fails", Severity.ERROR, _FIX)
DIFFERENT = Kind("different-result", Severity.ERROR, _FIX)
LAST = Kind(
    "last-region", Severity.WARNING, "Leave the last region out: it is run again at once, when "
    "memory is fullest."
)  # fmt: skip
NO_GAIN = Kind("no-gain", Severity.WARNING, _FIX)

_BUFFER_CODES = ("buffers-twice", "power-iteration")
# Whether these do harm hangs on whether recomputation gets that far before it stops.
_SEEN_IN_RESULTS = (*_BUFFER_CODES, "rrelu", "random-state")
_BUFFER = "buffer "
_HOOK_CALLS = "forward hook calls of"


def check(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> CheckReport:
    """Find what is wrong with a model's checkpointing, and what would be under any.

    The step is traced under fake tensors with the model's own calls of torch's checkpoint run
    plainly, which shows what each of them runs again; it is simulated as it stands; and where model
    and batch have values, it runs for real both ways, and everything that it leaves is compared bit
    for bit as `verify` does. Checkpointing that does not go through `torch.utils.checkpoint` is not
    seen. The model is put back as it was.

    Raises
    ------
    ApplyError: if a plan is on the model.
    WorkloadError, CaptureError: if the step fails without its checkpointing, too.

    Example
    -------
    ```python
    for hazard in remat.check(model, batch):
        print(hazard.code, hazard.where, hazard.message, hazard.fix, hazard.thread)
    ```
    """
    if isinstance(model, nn.Module) and is_applied(model):
        raise ApplyError(
            "a plan is on this model: call handle.remove() first; remat.verify checks the plan."
        )
    step = {"loss": loss, "optimizer": optimizer}
    with versions_unchecked():
        trace, regions = trace_without_checkpointing(model, batch, **step)  # type: ignore[arg-type]
    with checkpointing_off(), versions_unchecked():
        plain_peak = simulate(model, batch, workspace={}, **step).peak_bytes  # type: ignore[arg-type]
    found = [*region_hazards(trace, regions), *switch_hazards(model, trace, regions)]
    notes = list(trace.notes)
    differences: tuple[Difference, ...] = ()
    peak: int | None = plain_peak
    was_compared = not is_abstract(model, batch)
    if any(region.uses_grad for region in regions):
        try:
            with warnings.catch_warnings():  # what torch warns of is told as a hazard
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
                peak, wasted = _peaks(model, batch, len(regions), plain_peak, step, regions)
                found += wasted
                if was_compared:
                    differences = _differences(model, batch, step)
        except (WorkloadError, CaptureError) as error:
            peak, was_compared = None, False
            message = str(error).partition(" Check that")[0]
            found.append(FAILS.at("the model", f"as it stands, {message[0].lower()}{message[1:]}"))
        if was_compared:
            found = [*_confirmed(found, differences), *_hooks_twice(model, differences)]
            differences = tuple(d for d in differences if not d.name.startswith(_HOOK_CALLS))
    if not was_compared and peak is not None:
        notes.append("Model or batch has no values, so no real step was compared.")
    found += _of_the_model(trace, found)
    return CheckReport(
        hazards=merged(found), num_regions=len(regions), was_compared=was_compared,
        identical=was_compared and not differences, differences=differences, peak_bytes=peak,
        plain_peak_bytes=plain_peak, notes=tuple(notes),
    )  # fmt: skip


def _peaks(
    model: nn.Module,
    batch: Any,
    count: int,
    plain_peak: int,
    step: dict[str, Any],
    regions: tuple[FoundRegion, ...],
) -> tuple[int, list[Hazard]]:
    """Return the peak as the model stands, and whether it, or its last region, is for nothing."""
    run = functools.partial(simulate, model, batch, workspace={}, **step)
    peak = run().peak_bytes
    if peak >= plain_peak:
        return peak, [
            NO_GAIN.at("the model", f"its checkpointing saves no memory: the peak is "
            f"{format_bytes(peak)} with it and {format_bytes(plain_peak)} without it")
        ]  # fmt: skip
    if count < 2:
        return peak, []
    outermost = [n for n, region in enumerate(regions) if region.depth == 0]
    last = max(outermost, key=lambda n: regions[n].end)
    with visited(SwitchOff(frozenset(range(last, count)))):
        without_last = run().peak_bytes
    if without_last > peak:
        return peak, []
    return peak, [
        LAST.at(regions[last].where, f"it frees nothing: the peak is {format_bytes(without_last)} "
        f"without it and {format_bytes(peak)} with it")
    ]  # fmt: skip


def _differences(model: nn.Module, batch: Any, step: dict[str, Any]) -> tuple[Difference, ...]:
    """Return what the model's checkpointing changes, beyond what changes from run to run."""
    with checkpointing_off():
        plain = run_step(model, batch, **step)
    own_step = functools.partial(run_step, model, batch, **step)
    found = compare(plain, own_step())
    results = tuple(d for d in found if not d.name.startswith(_HOOK_CALLS))
    if not results:
        return found

    def again() -> StepOutcome:
        with checkpointing_off():
            return run_step(model, batch, **step)

    if is_explained(plain, results, noise_between(plain, results, again), own_step):
        return tuple(d for d in found if d not in results)
    return found


def _confirmed(found: list[Hazard], differences: tuple[Difference, ...]) -> Iterator[Hazard]:
    """Yield hazards as the real step bears them out, and one that says what differs."""
    results = [d for d in differences if not d.name.startswith(_HOOK_CALLS)]
    for hazard in found:
        prefix = _BUFFER if hazard.code in _BUFFER_CODES else ""
        is_seen = any(d.name.startswith(prefix) for d in results)
        if hazard.code in _SEEN_IN_RESULTS and not is_seen:
            text = f"{hazard.message} (this step shows no difference)"
            yield hazard.model_copy(update={"severity": Severity.NOTE, "message": text})
        else:
            yield hazard
    if results:
        worst = max(results, key=lambda d: (d.name.startswith("gradient of"), d.max_rel))
        by = worst.note or f"by {worst.max_rel:.2g} relatively"
        yield DIFFERENT.at(
            worst.name, f"{len(results)} of the step's results are not those of the model without "
            f"its checkpointing; this one differs: {by}"
        )  # fmt: skip


def _of_the_model(trace: StepTrace, found: list[Hazard]) -> Iterator[Hazard]:
    """Yield, as notes, the smallest modules that no checkpointing may run again."""
    cost = cost_step(trace, usual_cost(find_device(trace.device_type)))
    hazards = find_options(Facts(trace, cost)).hazards
    named = {hazard.where for hazard in found}
    for hazard in hazards:
        inside = f"{hazard.where}." if hazard.where else ""
        if hazard.where in named or any(
            h.where != hazard.where and h.where.startswith(inside) for h in hazards
        ):
            continue
        yield hazard


def _hooks_twice(model: nn.Module, differences: tuple[Difference, ...]) -> Iterator[Hazard]:
    """Yield the modules whose forward hooks, other than torch's own, fire when run again."""
    again = {d.name.removeprefix(f"{_HOOK_CALLS} ") for d in differences}
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        is_users = any(not (getattr(h, "__module__", "") or "").startswith("torch.") for h in hooks)
        if is_users and name in again:
            yield HOOKS.at(name, "its forward hooks fire again when it is run again in backward")
