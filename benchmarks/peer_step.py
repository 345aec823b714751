"""One real training step as any peer runs it: its peak, and whether it left what it should.

The same for every peer: the model without anything is run first from a seed; then the peer's own
from the same parameters, buffers and seed. Loss, gradients, buffers and the final random state are
compared bit for bit, and by how much they differ where they do. The peak is that of a warm step.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.runner import Data
from benchmarks.shapes import Case
from remat.prove.allocator import record_peak, step_tensors
from remat.trace.step import compute_loss

# Any: functions and their results are of many types.

adamw = functools.partial(torch.optim.AdamW, foreach=False)

_SEED = 7
# Compilers order sums anew, which moves a gradient by this much; another dropout mask by 0.1.
ROUNDING = 1e-3

# What is called in place of the model: a wrapped or compiled one, or the model under a plan.
Prepare = Callable[[Case], nn.Module]


@dataclass(slots=True)
class Left:
    """What a step leaves behind."""

    loss: Tensor
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    random_state: Tensor | None = None


class Reference:
    """A case and what its plain step leaves: made once, inherited by every forked child."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._parameters = {n: p.detach().clone() for n, p in case.model.named_parameters()}
        self._buffers = {n: b.detach().clone() for n, b in case.model.named_buffers()}
        self.left = _step(case, case.model)
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters and buffers back, and forget gradients."""
        self.case.model.zero_grad(set_to_none=True)
        for name, parameter in self.case.model.named_parameters():
            parameter.copy_(self._parameters[name])
        for name, buffer in self.case.model.named_buffers():
            buffer.copy_(self._buffers[name])


def examine(
    reference: Reference,
    prepare: Prepare,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] | None = adamw,
) -> Data:
    """Run a peer's step beside the plain one; return verdict and peak.

    The peak is that of a step whose optimizer has its state; `optimizer=None` measures forward and
    backward alone.
    """
    case = reference.case
    called = prepare(case)
    verdict = _verdict(reference.left, _step(case, called))
    stepper = None if optimizer is None else optimizer(case.model.parameters())

    def step() -> None:
        compute_loss(called, case.batch, case.loss).backward()
        if stepper is not None:
            stepper.step()

    if stepper is not None:
        stepper.step()
    case.model.zero_grad(set_to_none=True)
    peak = record_peak(step, step_tensors(case.model, case.batch, stepper), torch.device("cpu"))
    return {"measured_bytes": peak.peak_bytes, "base_bytes": peak.base_bytes, "verdict": verdict}


def step_seconds(case: Case, called: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Time one step."""
    case.model.zero_grad(set_to_none=True)
    begin = time.perf_counter()
    compute_loss(called, case.batch, case.loss).backward()
    optimizer.step()
    return time.perf_counter() - begin


def spread(seconds: list[float]) -> Data:
    """Summarize repeated times."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median_s": middle, "iqr_s": high - low, "rounds": len(seconds)}


def in_child(work: Callable[[], Data], *, limit_s: float) -> Data:
    """Run a function in a forked process, which ends with it; what fails is returned as `error`.

    Forking saves importing torch and building the model each time. It is sound as long as the
    parent runs its kernels on one thread.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        try:
            sender.send_bytes(json.dumps(work()).encode())
        except BaseException as error:  # noqa: BLE001  a peer may fail in any way: it is recorded
            text = f"{type(error).__name__}: {error}".strip()
            traceback.print_exc()
            sender.send_bytes(json.dumps({"error": " ".join(text.split())[:400]}).encode())
        finally:
            sender.close()
            os._exit(0)

    process = context.Process(target=child)
    process.start()
    sender.close()
    begin = time.monotonic()
    try:
        if not receiver.poll(limit_s):
            process.kill()
            return {"error": f"took longer than {limit_s:.0f} s"}
        data: Data = json.loads(receiver.recv_bytes())
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.join()
    return data | {"seconds_in_all": time.monotonic() - begin}


def _step(case: Case, called: nn.Module) -> Left:
    """Run forward and backward from the seed; the gradients stay."""
    case.model.zero_grad(set_to_none=True)
    torch.manual_seed(_SEED)
    loss = compute_loss(called, case.batch, case.loss)
    loss.backward()
    left = Left(loss.detach().clone(), random_state=torch.get_rng_state())
    for name, parameter in case.model.named_parameters():
        left.gradients[name] = None if parameter.grad is None else parameter.grad.clone()
    left.buffers = {n: b.detach().clone() for n, b in case.model.named_buffers()}
    return left


def _verdict(reference: Left, found: Left) -> Data:
    gradients = [
        (name, before, found.gradients[name]) for name, before in reference.gradients.items()
    ]
    identical = all(_same(before, after) for _, before, after in gradients)
    errors = {name: _relative(before, after) for name, before, after in gradients}
    worst = max(errors, key=lambda name: errors[name], default="")
    most = errors.get(worst, 0.0)
    buffers = all(torch.equal(b, found.buffers[n]) for n, b in reference.buffers.items())
    assert reference.random_state is not None
    assert found.random_state is not None
    random = torch.equal(reference.random_state, found.random_state)
    loss = torch.equal(reference.loss, found.loss)
    loss_error = _relative(reference.loss, found.loss)
    return {
        "identical": identical and buffers and random and loss,
        "gradients_identical": identical,
        "largest_gradient_error": most,
        "worst_gradient": worst if most else "",
        "loss_identical": loss,
        "loss_error": loss_error,
        "buffers_identical": buffers,
        "random_state_identical": random,
        # The loss is right and nothing was said, but the gradients are another function's.
        "wrong_in_silence": loss_error <= ROUNDING < most,
    }


def _same(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return before is after
    return torch.equal(before, after)


def _relative(before: Tensor | None, after: Tensor | None) -> float:
    """Return the largest difference over the largest value."""
    if before is None or after is None:
        return 0.0 if before is after else float("inf")
    scale = float(before.abs().max())
    gap = float((before - after).abs().max())
    return gap / scale if scale else float(gap != 0.0)
