"""Switches of checkpointing and of its like: those that are on and do nothing, or do harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch._functorch.config as functorch_config
from torch import nn

from remat.planner.records import Hazard, Severity
from remat.prove.hazards import Kind
from remat.trace.found import FoundRegion
from remat.trace.records import FORWARD, StepTrace

# Any: attributes of modules are the user's own.

# Names under which libraries keep the switch (Transformers and diffusers, timm, Swin and others).
_FLAGS = (
    "gradient_checkpointing", "use_gradient_checkpointing", "use_checkpoint", "use_checkpointing",
    "grad_checkpointing", "activation_checkpointing", "checkpoint_activations", "checkpointing",
)  # fmt: skip

IN_EVAL = Kind(
    "inert-in-eval", Severity.WARNING, "Call model.train(), or use a plan of remat, which holds "
    "wherever gradients are recorded.", "diffusers#9850",
)  # fmt: skip
INERT = Kind(
    "inert", Severity.WARNING, "Switch checkpointing on in the module that runs the blocks.",
    "sentence-transformers#2717",
)  # fmt: skip
PARTIAL = Kind(
    "not-reached", Severity.WARNING, "Switch it on there too, or use a plan of remat.",
    "HunyuanVideo-1.5#54",
)  # fmt: skip
USE_CACHE = Kind(
    "use-cache", Severity.NOTE, "Set config.use_cache=False for training.", "transformers#30320"
)
MEMORY_BUDGET = Kind(
    "memory-budget-random", Severity.ERROR, "Set torch._functorch.config.activation_memory_budget "
    "to 1.0, and use a plan of remat.", "pytorch#190758",
)  # fmt: skip


def switch_hazards(
    model: nn.Module, trace: StepTrace, regions: tuple[FoundRegion, ...]
) -> Iterator[Hazard]:
    """Yield switches that are on without effect, do not reach all of the model, or do harm."""
    active = [region for region in regions if region.uses_grad]
    flags = {
        name: (flag, value, module)
        for name, module in model.named_modules()
        for flag, value in _flags_of(module)
    }
    on = [name for name, (_, value, _) in flags.items() if value]
    called = {call.module for call in trace.calls if call.phase == FORWARD and call.uses_grad}
    for name in on:
        if any(_is_within(other, name) for other in on if other != name):
            continue  # what is below says more
        if any(_concerns(region, name) for region in active):
            continue
        flag, _, module = flags[name]
        if not module.training:
            yield IN_EVAL.at(
                name or "the model", f"{flag} is on but the module is in eval mode, so nothing is "
                "checkpointed"
            )  # fmt: skip
        else:
            yield INERT.at(name or "the model", f"{flag} is on but nothing in it is checkpointed")
    for name, (flag, value, _) in flags.items():
        if on and not value and name in called and not any(_concerns(r, name) for r in active):
            yield PARTIAL.at(name or "the model", f"{flag} is off here, and on elsewhere")
    config: Any = getattr(model, "config", None)
    if (active or on) and getattr(config, "use_cache", False) is True:
        yield USE_CACHE.at(
            "config.use_cache", "a cache of keys and values is of no use in training, and "
            "checkpointing switches it off with a warning or fills it twice"
        )  # fmt: skip
    if functorch_config.activation_memory_budget < 1 and any(
        op.is_random and op.phase == FORWARD for op in trace.ops
    ):
        yield MEMORY_BUDGET.at(
            "torch._functorch.config.activation_memory_budget",
            f"it is {functorch_config.activation_memory_budget}: once compiled, the model draws "
            "its random numbers anew in backward",
        )


def _flags_of(module: nn.Module) -> Iterator[tuple[str, bool]]:
    for flag in _FLAGS:
        value = module.__dict__.get(flag, getattr(type(module), flag, None))
        if isinstance(value, bool):
            yield flag, value
            return


def _concerns(region: FoundRegion, name: str) -> bool:
    """Whether a region lies in a module, is called by it, or holds it."""
    places = [region.caller, *region.module.split(" to ")]
    return any(_is_within(place, name) for place in places) or bool(
        region.module and _is_within(name, region.module)
    )


def _is_within(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")
