"""Forms of a trained model to serve: as it is, with its plan on and off again, and quantized."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from remat.errors import WorkloadError
from remat.evaluation.serving.found import first_line
from remat.evaluation.serving.request import Request, sharing_copy
from remat.planner.records import Plan
from remat.prove.allocator import live_bytes
from remat.regions.apply import apply

TRAINED, ATTACHED, DETACHED = "as trained", "plan attached", "plan detached"
TORCH_INT8 = "int8 dynamic, torch"
_QUANTIZED = {nn.Linear, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell}

# Any: state dictionaries of quantized modules hold what torch packs.

# Builds the model anew, with its trained weights.
Build = Callable[[], nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of the model, ready to answer.

    `start` makes it anew, as a server that starts would; `is_torch` where torch's allocator serves;
    elsewhere `resident_bytes` measures what answering a request takes, in a process of its own.
    """

    name: str
    module: nn.Module
    start: Callable[[], nn.Module]
    size_bytes: int
    is_torch: bool = True
    resident_bytes: Callable[[Request], int] | None = None
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A form that could not be made, and why."""

    name: str
    reason: str


def make_form(name: str, make: Callable[[], Form]) -> Form | Missing:
    """Make a form; whatever torch or an exporter raises is the reason why there is none."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001  exporters raise anything on a model they cannot take
        return Missing(name=name, reason=first_line(error))


def trained_form(model: nn.Module, build: Build) -> Form:
    """Return the model as it is, in eval mode."""
    return Form(
        name=TRAINED, module=model.eval(), start=lambda: build().eval(),
        size_bytes=_size_bytes(model),
    )  # fmt: skip


def attached_form(model: nn.Module, build: Build, plan: Plan) -> Form:
    """Return the model with its plan on: same parameters, modules of its own."""

    def planned(network: nn.Module) -> nn.Module:
        apply(network.train(), plan)
        return network.eval()

    return Form(
        name=ATTACHED, module=planned(sharing_copy(model)), start=lambda: planned(build()),
        size_bytes=_size_bytes(model),
    )  # fmt: skip


def detached_form(model: nn.Module, build: Build, plan: Plan) -> Form:
    """Return the model after its plan was put on and taken off again."""

    def unplanned(network: nn.Module) -> nn.Module:
        apply(network.train(), plan).remove()
        return network.eval()

    return Form(
        name=DETACHED, module=unplanned(sharing_copy(model)), start=lambda: unplanned(build()),
        size_bytes=_size_bytes(model),
    )  # fmt: skip


def torch_int8_form(model: nn.Module, build: Build) -> Form:
    """Quantize the weights of linear and recurrent layers to int8, activations as they come.

    Raises
    ------
    WorkloadError: if the model has no such layer, or is not on the CPU.
    """
    layers = [module for module in model.modules() if type(module) in _QUANTIZED]
    if not layers:
        raise WorkloadError("no linear or recurrent layer to quantize.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise WorkloadError("torch quantizes dynamically on the CPU only.")

    def quantize(network: nn.Module) -> nn.Module:
        with quiet():
            from torch.ao.quantization import quantize_dynamic

            made: nn.Module = quantize_dynamic(  # type: ignore[no-untyped-call]
                network.eval(), _QUANTIZED, dtype=torch.qint8
            )
        return made

    quantized = quantize(copy.deepcopy(model))
    return Form(
        name=TORCH_INT8,
        module=quantized,
        start=lambda: quantize(build()),
        size_bytes=_size_bytes(quantized),
        message=f"torch.ao.quantization, which torch has marked for removal; {len(layers)} layers.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters and quantizers from warning and logging: what matters is in the result."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _size_bytes(model: nn.Module) -> int:
    """Count the bytes of parameters, buffers and what quantized modules pack, each once."""
    plain = [*model.parameters(), *model.buffers()]
    with quiet():
        packed: list[Any] = tree_leaves(
            [
                list(module.state_dict().values())
                for module in model.modules()
                if not any(True for _ in module.children()) and hasattr(module, "_packed_params")
            ]
        )
    return live_bytes(plain) + sum(
        tensor.element_size() * tensor.numel() for tensor in packed if isinstance(tensor, Tensor)
    )
