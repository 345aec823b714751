"""Everything that needs a GPU, in one command and one results file, within eight minutes.

    python benchmarks/gpu.py [--seconds 450] [--out FILE]

On twelve architectures, in float32 and under autocast to bfloat16: predicted against measured bytes
(allocated and reserved) and seconds, by a prediction made on the device and by one made without it
(CPU fakes and the device table); every gradient bit for bit under a plan. On two of them, tokens
per second of what others do, and of our plan at the same peak. Stops at `--seconds`, writes what it
has after each case. `--dry-run` runs the same on tiny models on the CPU, to see that it runs.
"""

# ruff: noqa: E402  its folder is put on the path first, as it is run as a file

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import gc
import itertools
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

ROOT = Path(__file__).parent.parent
for _place in (ROOT, ROOT / "tests"):
    if str(_place) not in sys.path:  # run as a file
        sys.path.insert(0, str(_place))

import remat
from benchmarks.zoo import ZOO
from remat.fit import Fit
from remat.trace.standin import map_tensors
from remat.trace.step import compute_loss

CONTENDED = ("gpt2", "llama")
_TIMED_STEPS = 8


class Subject:
    """One architecture on the device, with a loss under autocast where asked for."""

    def __init__(self, entry: Any, device: torch.device, *, autocast: bool) -> None:
        case = entry.build(device=str(device))
        self.name, self.model, self.batch = entry.name, case.model, case.batch
        self.device, self.autocast = device, autocast
        self._plain = case.loss

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        """Compute the loss as it is trained."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return compute_loss(model, batch, self._plain)

    @property
    def tokens(self) -> int:
        """Count what one step consumes: tokens of text, else examples."""
        sizes: list[tuple[int, bool]] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append((tensor.numel(), tensor.is_floating_point()))
            return tensor

        map_tensors(self.batch, note)
        whole = [size for size, floating in sizes if not floating]
        return max(whole, default=1)


def run_steps(subject: Subject, number: int = _TIMED_STEPS) -> dict[str, Any]:
    """Run warm steps from an empty cache; return peaks by the allocator and the median seconds."""
    device, model = subject.device, subject.model
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    clean(device)
    seconds = []
    for _ in range(number + 2):
        begin = time.perf_counter()
        subject.loss(model, subject.batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        seconds.append(time.perf_counter() - begin)
    found = {"median_seconds": statistics.median(seconds[2:])}
    if device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found


def clean(device: torch.device) -> None:
    """Give the device's cache and the libraries' workspaces back, and forget peaks."""
    gc.collect()
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def wait(device: torch.device) -> None:
    """Wait for the device's work to end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def accuracy(entry: Any, device: torch.device, row: str, *, autocast: bool) -> dict[str, Any]:
    """Compare predictions with a measured step, unplanned and under a plan of 80 %."""
    subject = Subject(entry, device, autocast=autocast)
    fit = Fit(subject.model, subject.batch, loss=subject.loss, device=row)
    keep = fit.policy(_keep_all())
    found: dict[str, Any] = {
        "predicted_allocated": keep.predicted_peak_bytes,
        "predicted_reserved": keep.predicted_reserved_bytes,
        "predicted_seconds": keep.step_seconds,
        "measured": run_steps(subject),
    }
    away = entry.build(device="meta")

    def loss_away(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return compute_loss(model, batch, away.loss)

    plan = Fit(away.model, away.batch, loss=loss_away, device=row).policy(_keep_all())
    found["away_allocated"] = plan.predicted_peak_bytes
    found["away_reserved"] = plan.predicted_reserved_bytes
    with contextlib.suppress(remat.BudgetError):
        plan = fit.plan("80%")
        with remat.apply(subject.model, plan):
            found["planned"] = run_steps(subject) | {
                "budget": plan.budget_bytes,
                "predicted_allocated": plan.predicted_peak_bytes,
                "predicted_reserved": plan.predicted_reserved_bytes,
                "recompute_fraction": plan.recompute_fraction,
            }
        proof = remat.verify(subject.model, subject.batch, plan, loss=subject.loss)
        found["identical"], found["within_noise"] = proof.identical, proof.within_noise
    return found


def _keep_all() -> Any:
    from remat.planner.policies import KeepAll

    return KeepAll()


def contenders(entry: Any, device: torch.device, row: str) -> dict[str, Any]:
    """Time what others do, and our plan at the peak of each of them."""
    found: dict[str, Any] = {}
    subject = Subject(entry, device, autocast=device.type == "cuda")
    fit = Fit(subject.model, subject.batch, loss=subject.loss, device=row)
    for name, context in _others().items():
        subject = Subject(entry, device, autocast=device.type == "cuda")
        try:
            with context(subject):
                measured = run_steps(subject)
        except Exception as error:  # noqa: BLE001  what others do may fail; it is a result
            found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
            continue
        found[name] = measured | {"tokens_per_second": subject.tokens / measured["median_seconds"]}
        if "reserved" not in measured:
            continue
        budget = measured["reserved"] + fit.plain.accounting.outside_bytes
        ours = Subject(entry, device, autocast=device.type == "cuda")
        with contextlib.suppress(remat.BudgetError):
            with remat.apply(ours.model, fit.plan(budget)):
                own = run_steps(ours)
            found[name]["ours"] = own | {"tokens_per_second": ours.tokens / own["median_seconds"]}
    return found


def _others() -> dict[str, Callable[[Subject], contextlib.AbstractContextManager[Any]]]:
    return {
        "keep everything": lambda _subject: contextlib.nullcontext(),
        "all blocks": functools.partial(_blocks, selective=False),
        "save every second matmul": functools.partial(_blocks, selective=True),
        "offload saved tensors": lambda _subject: torch.autograd.graph.save_on_cpu(
            pin_memory=torch.cuda.is_available()
        ),
        "activation_memory_budget 0.5": _compiled,
    }


@contextlib.contextmanager
def _blocks(subject: Subject, *, selective: bool) -> Iterator[None]:
    """Recompute every block of the largest list of modules, as trainers do."""
    lists = [m for m in subject.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    blocks = max(lists, key=len)
    options = {"context_fn": _every_second_matmul} if selective else {}
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _every_second_matmul() -> Any:
    counts = {False: itertools.count(), True: itertools.count()}
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if operator in products and next(counts[context.is_recompute]) % 2 == 0:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@contextlib.contextmanager
def _compiled(subject: Subject) -> Iterator[None]:
    import torch._functorch.config as functorch

    plain = subject.model
    with functorch.patch(activation_memory_budget=0.5):
        subject.model = torch.compile(plain)
        try:
            yield
        finally:
            subject.model = plain
            torch.compiler.reset()


def device_row(device: torch.device) -> str:
    """Name the row of the device table that the device at hand is."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device)
    rows = [row for row in remat.load_devices() if row.split("-")[0] in re.split(r"[ -]", name)]
    memory = torch.cuda.get_device_properties(device).total_memory
    nearest = sorted(rows, key=lambda r: abs(remat.load_devices()[r].available_bytes - memory))
    return nearest[0] if nearest else "cuda"


def main() -> int:
    """Run all cases until the time is up; return 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=450.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; none is here. See --dry-run.")
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    entries = ZOO
    if arguments.dry_run:
        from zoo import TINY

        entries = {name: TINY[name] for name in ("gpt2", "llama")}
    row = device_row(device)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "row": row,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "command": "python benchmarks/gpu.py",
        "cases": {},
        "skipped": [],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / "results" / f"gpu_{slug}_{results['date']}.json"
    deadline = time.monotonic() + arguments.seconds
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{name} {dtype}", functools.partial(accuracy, entry, device, row, autocast=autocast))
        for dtype, autocast in (("fp32", False), ("bf16", True))
        for name, entry in entries.items()
    ]
    contended = [
        (f"{name} contenders", functools.partial(contenders, entries[name], device, row))
        for name in CONTENDED
        if name in entries
    ]
    for name, job in [*jobs[: len(entries)], *contended, *jobs[len(entries) :]]:
        if time.monotonic() > deadline:
            results["skipped"].append(name)
            continue
        try:
            results["cases"][name] = job()
        except Exception as error:  # noqa: BLE001  the other cases are wanted all the same
            results["cases"][name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        clean(device)
        print(name, json.dumps(results["cases"][name])[:300], flush=True)
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
