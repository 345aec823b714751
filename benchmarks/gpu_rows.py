"""What `benchmarks/gpu.py` measures: one function for each kind of row, and what others do.

Every prediction is made without the device, on CPU fakes and by the device table, but for the rows
that ask whether one made on the device is the same.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import remat
from benchmarks.runner import Data
from benchmarks.shapes import Entry
from remat.cost.model import CostModel
from remat.fit import Fit
from remat.planner.policies import KeepAll
from remat.planner.records import Plan
from remat.trace.standin import map_tensors
from remat.trace.step import compute_loss

# Any: batches and models' outputs are the models' own types.

TWELVE = (
    "gpt2", "gpt2v", "llama", "llamav", "t5", "vit", "resnet50", "convnext", "unet", "moe",
    "chain32", "vgg19",
)  # fmt: skip
# How far a prediction may be off, as a share of what is measured.
LIMITS = {"allocated": 0.02, "reserved": 0.05, "seconds": 0.15}

_TIMED_STEPS = 8
_SEARCH_SECONDS = 3.0


class Subject:
    """One architecture on a device, with its loss under autocast to bfloat16 where asked for."""

    def __init__(self, entry: Entry, device: torch.device, *, autocast: bool) -> None:
        case = entry.build(device=str(device))
        self.model, self.batch, self.device = case.model, case.batch, device
        self.loss = functools.partial(_loss, device.type, autocast, case.loss)

    @property
    def tokens(self) -> int:
        """Count what one step consumes: tokens of text, else examples."""
        sizes: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            sizes.append(len(tensor) if tensor.is_floating_point() else tensor.numel())
            return tensor

        map_tensors(self.batch, note)
        return max(sizes)

    def steps(self, number: int = _TIMED_STEPS) -> dict[str, float]:
        """Run warm steps from an empty cache; return their peaks in bytes and median seconds."""
        clean(self.device)
        optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)
        seconds = []
        for _ in range(number + 2):
            begin = time.perf_counter()
            self.loss(self.model, self.batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _wait(self.device)
            seconds.append(time.perf_counter() - begin)
        found: dict[str, float] = {"seconds": statistics.median(seconds[2:])}
        if self.device.type == "cuda":
            found["allocated"] = torch.cuda.max_memory_allocated(self.device)
            found["reserved"] = torch.cuda.max_memory_reserved(self.device)
        else:
            measured = remat.measure(self.model, self.batch, loss=self.loss, steps=1)
            found["allocated"] = measured.peak_bytes
        return found


def _loss(device_type: str, autocast: bool, plain: Any, model: Any, batch: Any) -> Tensor:
    with torch.autocast(device_type, torch.bfloat16, enabled=autocast):
        return compute_loss(model, batch, plain)


def clean(device: torch.device) -> None:
    """Give the device's cache and the libraries' workspaces back, and forget peaks."""
    gc.collect()
    if device.type == "cuda":
        # Private, and the only way: without it what an earlier step took is not taken again.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(kw_only=True)
class Bench:
    """What is measured where, and the predictions that several rows share."""

    device: torch.device
    cost: CostModel
    entries: dict[str, Entry]

    def __post_init__(self) -> None:
        self._away: dict[tuple[str, bool], Fit] = {}

    def subject(self, name: str, *, autocast: bool) -> Subject:
        """Build an architecture on the device."""
        return Subject(self.entries[name], self.device, autocast=autocast)

    def away(self, name: str, *, autocast: bool) -> Fit:
        """Return what is predicted of an architecture without the device, traced once."""
        key = (name, autocast)
        if key not in self._away:
            case = self.entries[name].build(device="meta")
            loss = functools.partial(_loss, self.device.type, autocast, case.loss)
            self._away[key] = self._fit(case.model, case.batch, loss)
        return self._away[key]

    def here(self, subject: Subject) -> Fit:
        """Return what is predicted of a model on the device."""
        return self._fit(subject.model, subject.batch, subject.loss)

    def _fit(self, model: Any, batch: Any, loss: Any) -> Fit:
        return Fit(model, batch, loss=loss, cost=self.cost, time_limit_s=_SEARCH_SECONDS)

    # -- rows -------------------------------------------------------------------------------------

    def unplanned(self, name: str, *, autocast: bool) -> Data:
        """Compare the step as it is written with what was predicted without the device."""
        keep = self.away(name, autocast=autocast).policy(KeepAll())
        return self.judged(keep, self.subject(name, autocast=autocast).steps())

    def predicted_here(self, name: str, *, autocast: bool) -> Data:
        """Compare it with what is predicted on the device."""
        subject = self.subject(name, autocast=autocast)
        keep = self.here(subject).policy(KeepAll())
        return self.judged(keep, subject.steps())

    def planned(self, name: str, *, autocast: bool) -> Data:
        """Run a plan made without the device, halfway from the least peak to keeping everything."""
        plan = halfway(self.away(name, autocast=autocast))
        subject = self.subject(name, autocast=autocast)
        with remat.apply(subject.model, plan):
            measured = subject.steps()
        found = self.judged(plan, measured)
        taken = int(measured.get("reserved", measured["allocated"])) + plan.outside_bytes
        found["checks"].append(
            {"what": "budget", "limit": plan.budget_bytes, "measured": taken,
             "passed": taken <= plan.budget_bytes}
        )  # fmt: skip
        clean(self.device)
        proof = remat.verify(subject.model, subject.batch, plan, loss=subject.loss)
        passed = proof.identical or proof.within_noise
        found["checks"].append({"what": "gradients", "passed": passed})
        found |= {"identical": proof.identical, "within_noise": proof.within_noise}
        return found | {"recompute_fraction": plan.recompute_fraction}

    def rival(self, name: str, rival: str) -> Data:
        """Time what others do."""
        subject = self.subject(name, autocast=True)
        with RIVALS[rival](subject):
            measured = subject.steps()
        return {
            "outcome": "measured",
            "measured": measured,
            "tokens_per_second": subject.tokens / measured["seconds"],
        }

    def ours(self, name: str, rival: str, theirs: Data) -> Data:
        """Time our plan at the measured peak of what others do; compiled, where theirs is."""
        measured = theirs["measured"]
        fit = self.away(name, autocast=True)
        outside = fit.plain.accounting.outside_bytes
        peak = int(measured.get("reserved", measured["allocated"])) + outside
        plan = fit.plan(peak)
        subject = self.subject(name, autocast=True)
        alike = _compiled(subject, 1.0) if rival in COMPILED else contextlib.nullcontext()
        with remat.apply(subject.model, plan), alike:
            own = subject.steps()
        tokens_per_second = subject.tokens / own["seconds"]
        return {
            "outcome": "measured",
            "measured": own,
            "budget": peak,
            "tokens_per_second": tokens_per_second,
            "times_theirs": tokens_per_second / theirs["tokens_per_second"],
        }

    def judged(self, plan: Plan, measured: dict[str, float]) -> Data:
        """Set predictions beside what was measured, with the verdict on each."""
        predicted = {
            "allocated": plan.predicted_peak_bytes,
            "reserved": plan.predicted_reserved_bytes,
            "seconds": plan.step_seconds + plan.recompute_seconds,
        }
        checks = []
        for what, limit in LIMITS.items():
            value, wanted = measured.get(what), predicted[what]
            if value is None or wanted is None:
                continue
            error = wanted / value - 1
            # Tiny steps on a busy CPU tell nothing of time; they show that this runs.
            is_judged = what != "seconds" or self.device.type == "cuda"
            checks.append(
                {"what": what, "predicted": wanted, "measured": value, "error": error,
                 "limit": limit, "passed": abs(error) <= limit if is_judged else None}
            )  # fmt: skip
        return {"outcome": "measured", "measured": measured, "checks": checks}


def halfway(fit: Fit) -> Plan:
    """Return the plan halfway between the least peak and keeping everything.

    A share of the peak is no budget that every model can keep: where the optimizer's step is the
    highest moment, even 80 % is below all that can be reached.
    """
    _, least = fit.plain.least_peak()
    return fit.plan((fit.plain.needed(least) + fit.keep_all_peak_bytes + 1) // 2)


# -- what others do -------------------------------------------------------------------------------


@contextlib.contextmanager
def _blocks(subject: Subject, options: dict[str, Any], around: Callable[[], Any]) -> Iterator[None]:
    """Recompute every block of the longest list of modules, as trainers do."""
    lists = [m for m in subject.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    blocks = max(lists, key=len)

    def wrapped(forward: Any) -> Any:
        def run(*arguments: Any, **keywords: Any) -> Any:
            with around():
                return checkpoint(forward, *arguments, use_reentrant=False, **options, **keywords)

        return run

    for block in blocks:
        block.forward = wrapped(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _on_host() -> Any:
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())


def _every_second_matmul() -> Any:
    counts = {False: itertools.count(), True: itertools.count()}
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operator in products and next(counts[context.is_recompute]) % 2 == 0:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextlib.contextmanager
def _compiled(subject: Subject, fraction: float) -> Iterator[None]:
    """Compile the model by inductor, with a share of what it would keep for its budget."""
    import torch._functorch.config as functorch

    plain = subject.model
    with functorch.patch(activation_memory_budget=fraction):
        subject.model = torch.compile(plain)
        try:
            yield
        finally:
            subject.model = plain
            torch.compiler.reset()


RIVALS: dict[str, Callable[[Subject], contextlib.AbstractContextManager[None]]] = {
    "keep everything": lambda _subject: contextlib.nullcontext(),
    "all blocks": lambda s: _blocks(s, {}, contextlib.nullcontext),
    "save every second matmul": lambda s: _blocks(
        s, {"context_fn": _every_second_matmul}, contextlib.nullcontext
    ),
    # A checkpoint's inputs are saved tensors outside it, so that these alone go to the host.
    "all blocks, inputs on the host": lambda s: _blocks(s, {}, _on_host),
    "saved tensors on the host": lambda _subject: _on_host(),
    "activation_memory_budget 0.5": lambda s: _compiled(s, 0.5),
}
COMPILED = frozenset({"activation_memory_budget 0.5"})
