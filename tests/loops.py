"""Training loops over batches of changing shapes, each step measured by the allocator's record."""

from __future__ import annotations

import torch

from remat.prove.allocator import record_peak, step_tensors


def measured_step(model, batch, optimizer, run) -> int:
    """Run a step, gradients of earlier ones counted as long as they live; return its peak."""

    def with_gradients_in_the_record():
        # The record knows when a block is freed only if it saw it allocated; DDP's buckets stay.
        for parameter in model.parameters():
            if parameter.grad is not None and not is_in_bucket(parameter.grad):
                parameter.grad = parameter.grad.clone()
        run()

    alive = step_tensors(model, batch, optimizer)
    return record_peak(with_gradients_in_the_record, alive, torch.device("cpu")).peak_bytes


def is_in_bucket(gradient) -> bool:
    """Whether a gradient is a view of a larger tensor, as with DDP's `gradient_as_bucket_view`."""
    return type(gradient) is torch.Tensor and gradient.untyped_storage().nbytes() > gradient.nbytes


def train(model, batches, loss, optimizer, *, prepare=None, seed=7, accumulate=1):
    """Train on the batches; return losses and, where shapes are prepared, each step's peak."""
    torch.manual_seed(seed)
    losses, peaks = [], []
    for number, batch in enumerate(batches):

        def step(batch=batch, number=number):
            value = loss(model, batch)
            (value / accumulate).backward()
            losses.append(value.item())
            if (number + 1) % accumulate == 0:
                optimizer.step()

        if prepare is None:
            step()
        else:
            prepare(batch)
            peaks.append(measured_step(model, batch, optimizer, step))
        if (number + 1) % accumulate == 0:
            optimizer.zero_grad()
    return losses, peaks


def same_state(a, b) -> bool:
    """Whether two state dictionaries have the same keys and the same bits."""
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def forwards_replaced(model) -> list[str]:
    """List the modules on whose instances something has replaced the forward."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]
