"""Transformers architectures from a `config.json`, without weights, memory or a workload file."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remat.errors import MissingPackageError, WorkloadError

if TYPE_CHECKING:
    import torch
    from torch import nn

_TEXT_BATCH = re.compile(r"([0-9]+)x([0-9]+)")
_IMAGE_BATCH = re.compile(r"([0-9]+)x([0-9]+)x([0-9]+)x([0-9]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model on the meta device (shapes only), and a batch that gives it a loss."""

    name: str
    model: nn.Module
    batch: dict[str, torch.Tensor]


def load_architecture(
    config: str | os.PathLike[str],
    batch: str,
    *,
    depth: int | None = None,
    image_size: int | None = None,
) -> Architecture:
    """Build the model that a Transformers configuration describes, in training mode, on meta.

    Arguments
    ---------
    config: a `config.json`, or the directory it lies in. Its `architectures` names the class;
        without it, the class with a language or image classification head is taken. The cache of
        keys and values is switched off, as in training it only costs memory.
    batch: `"4x1024"` (sequences x tokens), or `"8x3x224x224"` (images) where the model sees images.
    depth: number of hidden layers, instead of the configuration's.
    image_size: side of the images in pixels, where the configuration states one.

    Raises
    ------
    MissingPackageError: if Transformers is not installed.
    WorkloadError: if the file, the architecture or the batch cannot be used.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError("transformers", "text", "A model from a config file") from error
    import torch

    settings = _read_settings(Path(config))
    source = f"config {os.fspath(config)!r}"
    known = list(transformers.CONFIG_MAPPING)
    if settings["model_type"] not in known:
        near = ", ".join(difflib.get_close_matches(settings["model_type"], known)) or "none"
        raise WorkloadError(
            f"{source}: model_type {settings['model_type']!r} is not one that Transformers "
            f"{transformers.__version__} knows (of similar name: {near})."
        )
    try:
        configuration = transformers.AutoConfig.for_model(**settings)
    except Exception as error:  # Transformers validates in many ways
        raise WorkloadError(
            f"{source}: Transformers refuses its values: {_in_short(error)}"
        ) from error
    configuration.use_cache = False
    if depth is not None:
        _set_depth(configuration, depth)
    if image_size is not None and hasattr(configuration, "image_size"):
        configuration.image_size = image_size
    model_class = _model_class(transformers, configuration, source)
    try:
        with torch.device("meta"):
            model = model_class._from_config(configuration)  # as AutoModel...from_config does
    except Exception as error:  # a head count that does not divide the width, and the like
        raise WorkloadError(
            f"{source}: {model_class.__name__} cannot be built: {_in_short(error)}"
        ) from error
    _check_shift(configuration, source)
    model.train()
    return Architecture(
        name=model_class.__name__, model=model, batch=_make_batch(model, batch, source)
    )


def depth_of(model: nn.Module) -> int:
    """Return the number of hidden layers of a model that `load_architecture` made.

    Raises
    ------
    WorkloadError: if its configuration states none.
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not isinstance(depth, int) or depth < 1:
        raise WorkloadError(
            f"{type(model).__name__} states no number of hidden layers, so its depth cannot be "
            "sized. Size its batch instead."
        )
    return depth


def _set_depth(configuration: Any, depth: int) -> None:
    """Change the number of layers. Any: each architecture has a configuration class of its own."""
    configuration.num_hidden_layers = depth
    if hasattr(configuration, "num_decoder_layers"):
        configuration.num_decoder_layers = depth
    kinds = getattr(configuration, "layer_types", None)
    if isinstance(kinds, list) and kinds:
        configuration.layer_types = [kinds[layer % len(kinds)] for layer in range(depth)]


def _read_settings(path: Path) -> dict[str, Any]:  # Any: values of a JSON file
    if path.is_dir():
        path = path / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(f"config {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # not JSON, or not text
        raise WorkloadError(f"config {str(path)!r} is damaged: not JSON ({error}).") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise WorkloadError(
            f'config {str(path)!r} has no "model_type": expected the config.json of a Transformers '
            'model, such as {"model_type": "gpt2", "n_layer": 12}.'
        )
    return settings


def _model_class(transformers: Any, configuration: Any, source: str) -> Any:
    """Choose the class with a loss. Any: Transformers makes its classes and mappings lazily."""
    kind = type(configuration)
    mappings = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,  # before causal: BERT is in both, GPT-2 is not
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    )
    found = {mapping[kind].__name__: mapping[kind] for mapping in mappings if kind in mapping}
    # A bare "...Model" has no loss: its language model or classifier is meant.
    named = [name for name in configuration.architectures or () if "For" in name or name in found]
    if not found or (named and named[0] not in found):
        raise WorkloadError(
            f"{source}: {named[0] if named else configuration.model_type!r} is no language model "
            "or image classifier of Transformers. Write a workload file for it instead."
        )
    return found[named[0]] if named else next(iter(found.values()))


def _check_shift(configuration: Any, source: str) -> None:
    """Refuse an encoder and decoder that cannot make the decoder's input from the labels."""
    if not configuration.is_encoder_decoder:
        return
    for field in ("decoder_start_token_id", "pad_token_id"):
        if getattr(configuration, field, None) is None:
            raise WorkloadError(
                f"{source} has no {field!r}, which {configuration.model_type} needs to make the "
                f'decoder\'s input from the labels: add it, such as "{field}": 0.'
            )


def _make_batch(model: Any, batch: str, source: str) -> dict[str, torch.Tensor]:
    """Make the inputs and labels on meta. Any: the class comes from Transformers."""
    import torch

    if model.main_input_name == "pixel_values":
        match = _IMAGE_BATCH.fullmatch(batch)
        expected = "IMAGESxCHANNELSxHEIGHTxWIDTH, such as 8x3x224x224"
    elif model.main_input_name == "input_ids":
        match = _TEXT_BATCH.fullmatch(batch)
        expected = "SEQUENCESxTOKENS, such as 4x1024"
    else:
        raise WorkloadError(
            f"{source}: {type(model).__name__} reads {model.main_input_name!r}, neither text nor "
            "images. Write a workload file for it instead."
        )
    shape = tuple(int(size) for size in match.groups()) if match else ()
    if not shape or min(shape) < 1:
        raise WorkloadError(
            f"batch {batch!r} is not one for {type(model).__name__}: expected {expected}."
        )
    if model.main_input_name == "pixel_values":
        return {
            "pixel_values": torch.empty(shape, device="meta", dtype=model.dtype),
            "labels": torch.zeros(shape[0], dtype=torch.int64, device="meta"),
        }
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < shape[1]:
        raise WorkloadError(
            f"batch {batch!r} has {shape[1]} tokens, but {source} allows {longest}: choose fewer, "
            "or raise the number of positions in the config."
        )
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": torch.zeros_like(tokens)}


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."
