"""Weights of trained models as safetensors: of the variant to be served, until it has been."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from remat.errors import RunError
from remat.files import write_bytes_atomically
from remat.runs.records import Variant, VariantKind, VariantStatus

WEIGHTS_FILE = "weights.safetensors"
_ALIVE = (VariantStatus.MEASURED, VariantStatus.FINISHED)


def served_variant(variants: Sequence[Variant]) -> Variant | None:
    """Return the variant to serve: the first plan that can be trained, else the reference."""
    alive = [variant for variant in variants if variant.status in _ALIVE]
    planned = [variant for variant in alive if variant.kind is VariantKind.PLANNED]
    reference = [variant for variant in alive if variant.kind is VariantKind.REFERENCE]
    return next(iter((*planned, *reference)), None)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers to the CPU by name, each once, however many names it has."""
    return {
        name: tensor.detach().to("cpu").contiguous().clone()
        for name, tensor in _tensors(model).items()
    }


def save_weights(model: nn.Module, folder: Path) -> Path:
    """Write the weights into the folder, for `load_weights`."""
    return write_bytes_atomically(folder / WEIGHTS_FILE, save(weights_of(model)))


def drop_weights(folder: Path) -> None:
    """Remove the weights, where there are any."""
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill the model from the folder's weights.

    Raises
    ------
    RunError: if there are none, they cannot be read, or they are those of another model.
    """
    path = folder / WEIGHTS_FILE
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"the trained weights {str(path)!r} cannot be read: {error}.") from error
    mine = _tensors(model)
    if {n: t.shape for n, t in held.items()} != {n: t.shape for n, t in mine.items()}:
        raise RunError(f"the trained weights {str(path)!r} are those of another model.")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(held[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
