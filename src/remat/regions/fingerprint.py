"""What a plan was made for, and the first difference from what it is applied to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import remat
from remat.errors import PlanMismatchError
from remat.planner.records import Fingerprint, TensorSignature

# Any: batches, losses and optimizers are the user's own.


def fingerprint(
    model: nn.Module, batch: Any, loss: Any, optimizer: Any, device_type: str | None = None
) -> Fingerprint:
    """Describe a model, batch, loss and optimizer so that a plan can be told to fit them.

    `device_type` is where the model is to be, if not where it is.
    """
    autocast = None
    device_type = device_type or device_type_of(model)
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        autocast = _dtype(torch.get_autocast_dtype(device_type))
    return Fingerprint(
        model_class=_class_of(model),
        parameters=_signatures(model.named_parameters()),
        buffers=_signatures(model.named_buffers()),
        batch=batch_signature(batch),
        device_type=device_type,
        training=model.training,
        autocast_dtype=autocast,
        loss=_qualified(loss) if loss is not None else "from the model's output",
        optimizer=None if optimizer is None else _qualified(optimizer),
        torch_version=str(torch.__version__),
        remat_version=remat.__version__,
    )


def device_type_of(model: nn.Module) -> str:
    """Return the type of the device that a model's parameters are on; meta counts as the CPU."""
    for tensor in (*model.parameters(), *model.buffers()):
        return "cpu" if tensor.device.type == "meta" else tensor.device.type
    return "cpu"


def batch_signature(batch: Any) -> tuple[TensorSignature, ...]:
    """List path, shape and dtype of every tensor in a batch."""
    return _signatures(_walk(batch, "batch"))


def check_model_matches(model: nn.Module, wanted: Fingerprint) -> None:
    """Refuse a model that a plan was not made for.

    Raises
    ------
    PlanMismatchError: naming the first difference.
    """
    import_versions = (
        ("torch", wanted.torch_version, str(torch.__version__)),
        ("remat", wanted.remat_version, remat.__version__),
    )
    for name, planned, present in import_versions:
        if _minor(planned) != _minor(present):
            raise PlanMismatchError(
                f"the plan was made with {name} {planned}, this is {name} {present}: what a step "
                "keeps may differ. Make the plan again with remat.plan."
            )
    found = _class_of(model)
    if found != wanted.model_class:
        raise PlanMismatchError(
            f"the plan was made for {wanted.model_class}, the model is {found}."
            f"{_unwrap_hint(model)}"
        )
    _compare("parameter", wanted.parameters, _signatures(model.named_parameters()))
    _compare("buffer", wanted.buffers, _signatures(model.named_buffers()))
    if device_type_of(model) != wanted.device_type:
        raise PlanMismatchError(
            f"the plan was made for a model on {wanted.device_type!r}, this one is on "
            f"{device_type_of(model)!r}: make the plan again there."
        )


def check_batch_matches(batch: Any, wanted: Fingerprint) -> None:
    """Refuse a batch of other names, shapes or dtypes than the plan's.

    Raises
    ------
    PlanMismatchError: naming the first difference.
    """
    _compare("entry", wanted.batch, batch_signature(batch))


def _compare(
    what: str, planned: tuple[TensorSignature, ...], present: tuple[TensorSignature, ...]
) -> None:
    for before, now in zip(planned, present, strict=False):
        if before != now:
            raise PlanMismatchError(
                f"the plan does not fit: it was made for {what} {_text(before)}, here it is "
                f"{_text(now)}. Make the plan again with remat.plan."
            )
    if len(planned) != len(present):
        extra = (planned + present)[min(len(planned), len(present))]
        longer = max(planned, present, key=len)
        extra = longer[min(len(planned), len(present))]
        side = "the plan has" if len(planned) > len(present) else "here there is"
        raise PlanMismatchError(
            f"the plan does not fit: {side} one more {what}, {_text(extra)} "
            f"({len(planned)} planned, {len(present)} here)."
        )


def _text(signature: TensorSignature) -> str:
    return f"{signature.name} {list(signature.shape)} {signature.dtype}"


def _signatures(named: Iterable[tuple[str, Tensor]]) -> tuple[TensorSignature, ...]:
    return tuple(
        TensorSignature(name=name, shape=tuple(tensor.shape), dtype=_dtype(tensor.dtype))
        for name, tensor in named
    )


def _walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from _walk(item, f"{path}[{position}]")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _qualified(thing: Any) -> str:
    target = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{target.__module__}.{target.__qualname__}"


def _class_of(model: nn.Module) -> str:
    """Name a model's class; that which `fully_shard` derives from it counts as the same."""
    kind = type(model)
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        kind = kind.__bases__[-1]
    return _qualified(kind)


def _unwrap_hint(model: nn.Module) -> str:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return " Put a plan of the model that DDP wraps onto `model.module`."
    return ""


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
