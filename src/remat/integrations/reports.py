"""What the integrations have in common: figures, other checkpointing off, refusals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from remat.adapting.adapt import Planned
from remat.trace.parallel import sharding_states

# Where Transformers and diffusers, and timm, keep their switch: on each module that reads it.
_SWITCHES: Final = ("gradient_checkpointing", "grad_checkpointing")

SWITCHED_OFF: Final = (
    "gradient checkpointing of the library is switched off in %d modules while remat plans what to "
    "recompute, and comes back at the end"
)


def figures(planned: Planned) -> dict[str, float]:
    """Return what a plan decided and predicts, as metrics."""
    plan = planned.plan
    return {
        "remat/regions": float(len(plan.regions)),
        "remat/budget_bytes": float(plan.budget_bytes),
        "remat/predicted_peak_bytes": float(plan.predicted_peak_bytes),
        "remat/keep_all_peak_bytes": float(plan.keep_all_peak_bytes),
        "remat/recompute_fraction": plan.recompute_fraction,
        "remat/planning_seconds": planned.seconds,
    }


def unplanned_accumulation(model: nn.Module, accelerator: Any) -> str | None:
    """Say why micro-steps of a sharded model are not planned; `None` where they are, or need not.

    By default Accelerate reduces gradients once for all micro-steps, and until then they are whole
    on each device, whichever way the parameters are sharded.
    """
    if not sharding_states(model):
        return None
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        return None
    return (
        "gradient accumulation under FSDP2 that reduces gradients once, as they are whole until "
        "then: reduce them in each micro-step with sync_each_batch=True (Trainer: "
        'accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}})'
    )


@dataclass(slots=True)
class LibraryCheckpointing:
    """A library's own gradient checkpointing, off until `restore`."""

    _were_on: list[tuple[nn.Module, str]] = field(default_factory=list)

    def switch_off(self, model: nn.Module) -> int:
        """Switch it off; return in how many modules it was on."""
        found = [
            (module, name)
            for module in model.modules()
            for name in _SWITCHES
            if getattr(module, name, None) is True
        ]
        for module, name in found:
            setattr(module, name, False)
        self._were_on += found
        return len(found)

    def restore(self) -> None:
        """Switch it on again where it was on."""
        for module, name in self._were_on:
            setattr(module, name, True)
        self._were_on = []
