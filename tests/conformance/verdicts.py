"""What becomes of a case: under a plan of remat, torch's checkpointing, and its memory budget."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch._functorch.config as functorch_config
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.fit import Fit
from remat.planner.policies import AllBlocks
from remat.prove.measure import restored
from remat.trace.checkpoints import CheckpointCall, SwitchOff, visited
from tests.conformance.cases import Case, Results, square_mean
from tests.forced import forced, plan_of, slow_fit
from tests.models import least_of

IDENTICAL = "identical"
KEPT = "kept"
REFUSED = "refused"
RAISES = "raises"
WRONG = "WRONG"
INERT = "inert"
ROUNDING = "rounding"

_PARTITIONER = "aot_eager_decomp_partition"


def run(case: Case, model: nn.Module, batch: object, wanted=None) -> Results:
    """Run the case's step from one random state; the model is put back after."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  what users' code draws from
    torch.manual_seed(1)
    with restored(model, batch):
        results = case.step(wanted if wanted is not None else model, batch)
        results |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        results |= {f"{n} trains": m.training for n, m in model.named_modules()}
        for name, module in model.named_modules():
            if hasattr(module, "seen"):
                results[f"cache of {name}"] = len(module.seen)
            generator = getattr(module, "generator", None)
            if isinstance(generator, torch.Generator):
                results[f"generator of {name}"] = generator.get_state()
            elif generator is not None:
                results[f"generator of {name}"] = str(generator.bit_generator.state)
        results["state of torch"] = torch.get_rng_state()
        results["state of Python"] = random.getstate()
        results["state of NumPy"] = str(np.random.get_state())  # noqa: NPY002  as above
    return results


def differing(before: Results, after: Results) -> list[str]:
    """Name everything in which two results differ, by bits."""
    return [n for n in before.keys() | after.keys() if not _same(before.get(n), after.get(n))]


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return same_kind and torch.equal(*bits)
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def by_hand(model: nn.Module, case: Case, *, reentrant: bool) -> Iterator[None]:
    """Checkpoint each block through torch, as users do."""

    def run_again(forward, *args, **kwargs):
        return checkpoint(
            functools.partial(forward, **kwargs), *args, use_reentrant=reentrant,
            preserve_rng_state=case.preserve,
        )  # fmt: skip

    for block in model.blocks:
        block.__dict__["forward"] = functools.partial(run_again, block.forward)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.__dict__["forward"]


def judged(reference: Results, step) -> str:
    """Say how a step compares with the reference."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = step()
    except Exception as error:  # noqa: BLE001  whatever torch raises is the verdict
        return f"{RAISES} {type(error).__name__}"
    different = differing(reference, found)
    if not different:
        return IDENTICAL
    return ROUNDING if all(_is_rounding(reference[n], found[n]) for n in different) else WRONG


def _is_rounding(a: object, b: object) -> bool:
    """Whether two gradients or losses differ by no more than a few units in the last place."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    if a.shape != b.shape or not a.is_floating_point():
        return False
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max())


def of_torch(case: Case, *, reentrant: bool) -> str:
    """Verdict on torch's own checkpointing of each block."""
    model, batch = _made(case)
    reference = run(case, model, batch)
    with by_hand(model, case, reentrant=reentrant):
        return judged(reference, lambda: run(case, model, batch))


class _Counts(SwitchOff):
    """Counts the calls that are checkpointed, and switches none off."""

    def __init__(self) -> None:
        super().__init__(frozenset())
        self.number = 0

    def enter(self, call: CheckpointCall) -> bool:
        self.number += 1
        return super().enter(call)


def of_transformers(case: Case) -> str:
    """Verdict on Transformers' own switch."""
    model, batch = _made(case)
    reference = run(case, model, batch)
    model.inner.activation_checkpointing_enable()
    counts = _Counts()
    with visited(counts):
        verdict = judged(reference, lambda: run(case, model, batch))
    return verdict if counts.number else INERT


def of_memory_budget(case: Case) -> str:
    """Verdict on `activation_memory_budget`, against the same graphs compiled without it."""
    if not case.is_compiled:
        return "n/a"
    model, batch = _made(case)

    def compiled(budget):
        torch._dynamo.reset()
        with functorch_config.patch(activation_memory_budget=budget):
            return run(case, model, batch, torch.compile(model, backend=_PARTITIONER))

    try:
        reference = compiled(1.0)
    except Exception as error:  # noqa: BLE001  the verdict is on compiling
        return f"{RAISES} {type(error).__name__}"
    finally:
        torch._dynamo.reset()
    return judged(reference, lambda: compiled(0.2))


def plans_of(model: nn.Module, batch: object) -> list[remat.Plan]:
    """Every block recomputed, the least peak in reach, and single results packed or dropped."""
    fit = Fit(model, batch, loss=square_mean, optimizer=None, chunks=False)
    slow = slow_fit(model, batch)
    kinds = forced(slow)
    single = [plan_of(slow, kinds[kind]) for kind in ("packed", "dropped") if kind in kinds]
    return [fit.policy(AllBlocks()), least_of(fit), *single]


def of_remat(case: Case) -> str:
    """Verdict on plans of remat: the worst of them."""
    model, batch = _made(case)
    reference = run(case, model, batch)
    verdicts = [_of_plan(case, model, batch, plan, reference) for plan in plans_of(model, batch)]
    order = (IDENTICAL, KEPT, REFUSED, RAISES, WRONG)
    return max(verdicts, key=lambda v: order.index(v.split()[0]))


def of_remat_compiled(case: Case) -> str:
    """Verdict on a plan of remat compiled with aot_eager, against the same without a plan."""
    if not case.is_compiled:
        return "n/a"
    model, batch = _made(case)

    def compiled():
        torch._dynamo.reset()
        return run(case, model, batch, torch.compile(model, backend="aot_eager"))

    try:
        reference = compiled()
        with remat.apply(model, plans_of(model, batch)[0]):
            return judged(reference, compiled)
    except remat.RematError as error:
        return f"{REFUSED} {type(error).__name__}"
    finally:
        torch._dynamo.reset()


def _of_plan(case, model, batch, plan, reference) -> str:
    is_kept = any("blocks" in h.where for h in plan.hazards)
    with remat.apply(model, plan):
        try:
            found = run(case, model, batch)
        except remat.RematError as error:
            return f"{REFUSED} {type(error).__name__}"
        except Exception as error:  # noqa: BLE001  an error that is not ours is a fault of ours
            return f"{RAISES} {type(error).__name__}"
    if differing(reference, found):
        return WRONG
    return KEPT if is_kept else IDENTICAL


def _made(case: Case) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    return case.build(), case.batch()
