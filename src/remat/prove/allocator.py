"""The allocator's own record of a step: exact bytes on the CPU, peak statistics on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remat.cost.allocations import most_allocated
from remat.trace.ops import tensors_in
from remat.trace.parallel import bucket_likes
from remat.trace.standin import map_tensors

CPU_SOURCE = "CPU allocator events of the autograd profiler"
_REPEATS = 4
CUDA_SOURCE = "torch.cuda.max_memory_allocated"


@dataclass(frozen=True, slots=True)
class Peak:
    """Most bytes alive during a step, those alive before it, and who counted."""

    peak_bytes: int
    base_bytes: int
    source: str


def live_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the storages behind tensors, each once."""
    sizes = {}
    for tensor in tensors_in(list(tensors)):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def step_tensors(
    model: nn.Module, batch: object, optimizer: torch.optim.Optimizer | None
) -> list[Tensor]:
    """List what is alive before a step: parameters, buffers, batch and optimizer state.

    For the buckets of DDP, which nothing gives, tensors of their sizes.
    """
    found: list[Tensor] = [*model.parameters(), *model.buffers(), *bucket_likes(model)]

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    for state in optimizer.state.values() if optimizer is not None else ():
        if isinstance(state, dict):
            found.extend(value for value in state.values() if isinstance(value, Tensor))
    return found


def least_peak(
    step: Callable[[], object],
    clear: Callable[[], None],
    alive: list[Tensor],
    device: torch.device,
) -> Peak:
    """Return the peak of a step that may be repeated, `clear` being called before each.

    Where processes communicate on the CPU, a thread of gloo may hold a buffer for some microseconds
    longer than the step does, and then releases it unseen: it would count to the end. So the least
    of a few runs is taken there.
    """
    is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    peaks = []
    for _ in range(1 if is_alone or device.type != "cpu" else _REPEATS):
        clear()
        peaks.append(record_peak(step, alive, device))
    return min(peaks, key=lambda peak: peak.peak_bytes)


def record_peak(step: Callable[[], object], alive: list[Tensor], device: torch.device) -> Peak:
    """Run a step and return its peak, `alive` included."""
    # Autocast keeps the last step's casts of the weights, which this step would free and make anew.
    torch.clear_autocast_cache()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        # What others hold on the device (a snapshot, another model) is not this step's.
        base = live_bytes(t for t in alive if t.device.type == "cuda")
        peak = torch.cuda.max_memory_allocated(device) - before + base
        return Peak(peak, base, CUDA_SOURCE)
    base = live_bytes(alive)
    return Peak(base + most_allocated(step), base, CPU_SOURCE)
