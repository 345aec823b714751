"""Verify: the planned step against the unplanned one, bit for bit, and its peak to the plan's."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from remat.errors import ApplyError, PlanMismatchError, VerificationError, WorkloadError
from remat.planner.records import Plan, RewriteKind
from remat.prove.allocator import least_peak, step_tensors
from remat.prove.measure import check_real, restored
from remat.prove.records import Difference, Verification
from remat.regions.apply import Handle, apply, check_plan, host_peak_bytes, is_applied
from remat.regions.fingerprint import check_batch_matches, check_model_matches
from remat.regions.recall import gathered
from remat.trace.checkpoints import checkpointing_off
from remat.trace.collectives import local_part
from remat.trace.generators import is_generator, state_of
from remat.trace.standin import random_states, restore_random_states
from remat.trace.step import (
    DEFAULT_OPTIMIZER,
    Loss,
    OptimizerLike,
    advance,
    check_model,
    differentiate,
    make_optimizer,
)

# Any: batches are the user's own types.

_MOST_REPEATS = 5
_GRADIENT = "gradient of "
_HOOK_CALLS = "forward hook calls of"
_AFTER_STEP = "parameter {} after the step"
_CANCELLED = 64.0  # rounding of a sum of 4,096 terms that cancel, in units of its largest term


@dataclass(slots=True)
class StepOutcome:
    """Everything that one step leaves behind, copied."""

    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    hook_calls: dict[str, int] = field(default_factory=dict)
    training: dict[str, bool] = field(default_factory=dict)
    recomputed: dict[str, str] = field(default_factory=dict)


def verify(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerLike = DEFAULT_OPTIMIZER,
) -> Verification:
    """Run one step without and one with the plan from the same state, and compare everything.

    Compared bit for bit: the loss, every gradient (also which are none), every parameter after the
    optimizer's step, every buffer, the final state of each random generator, how often each
    module's forward hooks fired, and every module's training flag. Where they differ, the unplanned
    step is run again: a model that differs from itself as much passes as `within_noise`, unless a
    region saved other values when it ran again than before, of which a sample is compared. Where
    the plan runs modules in slices, the loss and the gradients that it says are summed in another
    order may differ by its tolerance (`within_rounding`), and nothing else may. A plan that
    replaces the model's own checkpointing is compared with the model without any. The planned
    step's peak is measured in a warm step. The model is put back as it was. Where it is wrapped for
    several processes, all of them call this, and each compares what it holds.

    Raises
    ------
    PlanMismatchError: if the plan was made for another model, batch, mode or version.
    ApplyError: if a plan is on the model already.
    WorkloadError: if model, batch, loss or optimizer makes no step, or has no values.
    VerificationError: if the planned step fails.
    """
    check_model(model)
    check_plan(plan)
    device = check_real(model, batch)
    check_model_matches(model, plan.fingerprint)
    check_batch_matches(batch, plan.fingerprint)
    if model.training != plan.fingerprint.training:
        wanted, other = ("train", "eval") if plan.fingerprint.training else ("eval", "train")
        raise PlanMismatchError(
            f"the plan was made for a model in {wanted} mode, this one is in {other} mode: call "
            f"model.{wanted}(), or make the plan again with remat.plan."
        )
    if is_applied(model):
        raise ApplyError(
            "a plan is on this model: call handle.remove() first, verify applies the plan itself."
        )
    step = functools.partial(run_step, model, batch, loss=loss, optimizer=optimizer)

    def plain_step() -> StepOutcome:
        # A plan that takes the place of the model's own checkpointing is held to none at all.
        with checkpointing_off() if plan.replaces_checkpointing else contextlib.nullcontext():
            return step()

    def planned_step() -> StepOutcome:
        with apply(model, plan):
            return step()

    reference = plain_step()
    try:
        planned = planned_step()
    except WorkloadError as error:
        raise VerificationError(
            f"the unplanned step runs, with the plan {str(error).partition(' Check that')[0]} "
            "Make the plan again with remat.plan; if it stays, report it with the model."
        ) from error
    differences = compare(reference, planned)
    noise: tuple[Difference, ...] = ()
    within_noise = False
    within_rounding = bool(differences) and is_within_rounding(reference, differences, plan)
    if differences and not within_rounding:
        noise = noise_between(reference, differences, plain_step)
        # A region that comes back with other values is wrong also where that happens now and then.
        within_noise = not planned.recomputed and is_explained(
            reference, differences, noise, planned_step
        )
    measured, host_bytes = _warm_peak(model, batch, plan, loss, optimizer, device)
    within_budget = measured <= plan.budget_bytes and host_bytes <= (plan.host_budget_bytes or 0)
    return Verification(
        identical=not differences,
        within_noise=within_noise,
        within_rounding=within_rounding,
        tolerance=_tolerance(plan),
        passed=(not differences or within_noise or within_rounding) and within_budget,
        differences=differences,
        noise=noise,
        num_compared=len(reference.tensors) + len(reference.hook_calls) + len(reference.training),
        measured_peak_bytes=measured,
        predicted_peak_bytes=plan.predicted_peak_bytes,
        budget_bytes=plan.budget_bytes,
        peak_error=plan.predicted_peak_bytes / measured - 1,
        within_budget=within_budget,
        measured_host_bytes=host_bytes,
        predicted_host_bytes=plan.host_bytes,
        host_budget_bytes=plan.host_budget_bytes,
        notes=_notes(plan, reference, noise, differences if within_rounding else ()),
    )


def run_step(
    model: nn.Module, batch: Any, *, loss: Loss | None, optimizer: OptimizerLike
) -> StepOutcome:
    """Run one step and copy what it leaves; put the model back."""
    outcome = StepOutcome()
    counts: Counter[str] = Counter()
    with restored(model, batch), _counted_hooks(model, counts):
        stepper = make_optimizer(optimizer, model)
        with gathered() as outcome.recomputed:
            value = differentiate(model, batch, loss)
        tensors: dict[str, Tensor | None] = {"loss": value.detach().clone()}
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            tensors[_GRADIENT + name] = None if gradient is None else local_part(gradient).clone()
        if stepper is not None:
            advance(stepper)
            for name, parameter in model.named_parameters():
                tensors[_AFTER_STEP.format(name)] = local_part(parameter.detach()).clone()
        for name, buffer in model.named_buffers():
            tensors[f"buffer {name}"] = buffer.detach().clone()
        for name, state in _random_tensors(model).items():
            tensors[f"random state of {name}"] = state
        outcome.training = {name: m.training for name, m in model.named_modules()}
    outcome.tensors = tensors
    outcome.hook_calls = dict(counts)
    return outcome


def compare(reference: StepOutcome, other: StepOutcome) -> tuple[Difference, ...]:
    """List everything in which two steps differ, by bits."""
    found = []
    for name, before in reference.tensors.items():
        after = other.tensors.get(name)
        if before is None or after is None:
            if (before is None) != (after is None):
                found.append(_unequal(name, f"{_presence(before)} before, {_presence(after)} now"))
        elif not same_bits(before, after):
            found.append(_difference(name, before, after))
    for label, one, two in (
        (_HOOK_CALLS, reference.hook_calls, other.hook_calls),
        ("training flag of", reference.training, other.training),
    ):
        for name in one.keys() | two.keys():
            if one.get(name) != two.get(name):
                where = name or "the model"
                found.append(
                    _unequal(f"{label} {where}", f"{one.get(name)} before, {two.get(name)} now")
                )
    found += [
        _unequal(f"recomputation of {region}", change)
        for region, change in other.recomputed.items()
    ]
    return tuple(found)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and bits; equal NaNs are equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _difference(name: str, before: Tensor, after: Tensor) -> Difference:
    if before.shape != after.shape or before.dtype != after.dtype:
        return _unequal(
            name,
            f"{before.dtype} {tuple(before.shape)} before, {after.dtype} {tuple(after.shape)} now",
        )
    a, b = before.double(), after.double()
    gap = (a - b).abs()
    largest = float(gap.max()) if gap.numel() else 0.0
    scale = float(a.abs().max()) if a.numel() else 0.0
    return Difference(
        name=name, max_abs=largest, max_rel=largest / scale if scale else float("inf")
    )


def _unequal(name: str, note: str) -> Difference:
    return Difference(name=name, max_abs=float("inf"), max_rel=float("inf"), note=note)


def _presence(tensor: Tensor | None) -> str:
    return "none" if tensor is None else "a tensor"


def noise_between(
    reference: StepOutcome, differences: tuple[Difference, ...], step: Callable[[], StepOutcome]
) -> tuple[Difference, ...]:
    """Return the largest difference of each tensor between any two unplanned steps.

    More unplanned steps are run until they explain the differences or `_MOST_REPEATS` is reached;
    none is wasted on a model that repeats itself exactly.
    """
    runs = [reference]
    worst: dict[str, Difference] = {}
    for _ in range(_MOST_REPEATS):
        again = step()
        for other in runs:
            for found in compare(other, again):
                known = worst.get(found.name)
                if known is None or found.max_rel > known.max_rel:
                    worst[found.name] = found
        runs.append(again)
        if not worst or not _unexplained(differences, tuple(worst.values())):
            break
    return tuple(worst.values())


def is_explained(
    reference: StepOutcome,
    differences: tuple[Difference, ...],
    noise: tuple[Difference, ...],
    step: Callable[[], StepOutcome],
) -> bool:
    """Whether noise explains the differences of a step that may be wrong from one that is right.

    The largest of a few repeats of forty tensors is now and then exceeded by chance, an error is
    there every time: what is not explained is looked at in more runs of the step, as long as it
    stays.
    """
    if not noise:
        return False
    left = _unexplained(differences, noise)
    for _ in range(_MOST_REPEATS):
        if left:
            left &= _unexplained(compare(reference, step()), noise)
    return not left


def _unexplained(differences: tuple[Difference, ...], noise: tuple[Difference, ...]) -> set[str]:
    """Name the tensors that differ by more than twice what they differ by from themselves.

    Twice, because the largest of a few repeats underestimates the noise. A parameter after the step
    follows from its gradient: where that differs, it is judged, not what the optimizer makes of it
    (AdamW's first step turns a gradient of 1e-9 into one of the learning rate's size).
    """
    allowed = {n.name: 2 * n.max_rel for n in noise if not n.note}
    derived = {
        _AFTER_STEP.format(d.name.removeprefix(_GRADIENT))
        for d in differences
        if d.name.startswith(_GRADIENT)
    }
    return {
        d.name
        for d in differences
        if d.note or (d.name not in derived and d.max_rel > allowed.get(d.name, 0.0))
    }


def is_within_rounding(
    reference: StepOutcome, differences: tuple[Difference, ...], plan: Plan
) -> bool:
    """Whether only what the plan sums in another order differs, by no more than rounding.

    Allowed is the plan's tolerance of each tensor's largest value. A gradient that is zero but for
    rounding (of attention's key bias, say) has no size of its own: it may differ by what rounding
    makes of terms as large as the largest gradient.
    """
    names = [name for rewrite in plan.rewrites for name in rewrite.affects]
    gradients = {_GRADIENT + name: reference.tensors.get(_GRADIENT + name) for name in names}
    inside = tuple(
        f"{_HOOK_CALLS} {rewrite.module}."
        for rewrite in plan.rewrites
        if rewrite.kind is not RewriteKind.LOSS_HEAD
    )
    sizes = [float(g.abs().max()) for g in gradients.values() if g is not None and g.numel()]
    for difference in differences:
        name = difference.name
        if name.startswith(inside):
            continue  # a hook inside a sliced call fires for each slice
        if difference.note or not plan.rewrites:
            return False
        before = reference.tensors.get(name)
        if name == "loss" and difference.max_rel <= _tolerance(plan):
            continue
        if name in gradients and before is not None:
            rounding = _CANCELLED * torch.finfo(before.dtype).eps * max(sizes)
            allowed = _tolerance(plan) * float(before.abs().max()) + rounding
            if difference.max_abs <= allowed:
                continue
        elif name in map(_AFTER_STEP.format, names):
            continue  # follows from its gradient, as in `is_within`
        return False
    return True


def _tolerance(plan: Plan) -> float:
    return max((rewrite.tolerance for rewrite in plan.rewrites), default=0.0)


def _warm_peak(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: Loss | None,
    optimizer: OptimizerLike,
    device: torch.device,
) -> tuple[int, int]:
    """Return the peak of a step whose optimizer has its state, with the plan on.

    And the most host memory that the plan has taken by then.
    """
    handle: Handle
    with restored(model, batch), apply(model, plan) as handle:
        stepper = make_optimizer(optimizer, handle.model)

        def step() -> Tensor:
            with gathered():  # told by the comparison
                value = differentiate(model, batch, loss)
            advance(stepper)
            return value

        step()
        clear = functools.partial(model.zero_grad, set_to_none=True)
        peak = least_peak(step, clear, step_tensors(model, batch, stepper), device).peak_bytes
        return peak, host_peak_bytes(model)


@contextlib.contextmanager
def _counted_hooks(model: nn.Module, counts: Counter[str]) -> Iterator[None]:
    """Count how often each module's forward hooks fire, as a user's own hook would see it."""
    handles = []
    for name, module in model.named_modules():

        def count(*_: Any, _name: str = name) -> None:
            counts[_name] += 1

        handles.append(module.register_forward_hook(count))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _random_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copy the state of every global generator, and of those that modules hold."""
    import pickle

    states = random_states()
    restore_random_states(states)
    tensors: dict[str, Tensor] = {}
    for name, state in states.items():
        if isinstance(state, Tensor):
            tensors[name] = state
        elif name == "cuda":
            for number, item in enumerate(state):
                tensors[f"cuda:{number}"] = item
        else:
            tensors[name] = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    for prefix, module in model.named_modules():
        for name, value in module.__dict__.items():
            if is_generator(value):
                state = state_of(value)
                if not isinstance(state, Tensor):
                    state = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
                tensors[f"generator {prefix}.{name}".replace(" .", " ")] = state
    return tensors


def _notes(
    plan: Plan,
    reference: StepOutcome,
    noise: tuple[Difference, ...],
    rounded: tuple[Difference, ...],
) -> tuple[str, ...]:
    notes = []
    if plan.replaces_checkpointing:
        notes.append("Compared with the model without its own checkpointing.")
    if rounded:
        judged = [d.max_rel for d in rounded if d.name == "loss" or d.name.startswith(_GRADIENT)]
        sized = [size for size in judged if size <= _tolerance(plan)]
        cancelled = len(judged) - len(sized)
        also = f" ({cancelled} are zero but for rounding)" if cancelled else ""
        notes.append(
            f"{len(plan.rewrites)} modules run in slices: {len(judged)} tensors{also} differ in "
            f"rounding, by up to {max(sized, default=0.0):.1e} of their largest value (allowed "
            f"{_tolerance(plan):.1e}); everything else is identical."
        )
    missing = [n for n, t in reference.tensors.items() if t is None]
    if missing:
        notes.append(f"{len(missing)} parameters get no gradient, with and without the plan.")
    if noise:
        notes.append(
            f"The unplanned model differs from itself in {len(noise)} tensors, by up to "
            f"{max(n.max_rel for n in noise):.2e} relatively."
        )
    return tuple(notes)
