"""Peaks that others measured on GPUs, predicted without one: one command, one table.

    python benchmarks/published.py [--json FILE]

Each case states model, batch, dtype, card and source. What a process holds outside torch's
allocator is taken from the source where it says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from remat.planner.records import Region
from remat.prove.reserved import replay_step
from remat.regions.apply import install, remove
from remat.trace.capture import capture
from remat.trace.records import GRADIENTS
from remat.trace.target import Target

MIB = 2**20
V100 = Target(device_type="cuda", compute_capability=(7, 0))
A100 = Target(device_type="cuda", compute_capability=(8, 0))
CUBLAS_BYTES = 8_519_680  # see the device table
_BERT_SOURCE = (
    "Transformers documentation v4.18, 'Performance and Scalability' (huggingface.co/docs/"
    "transformers/v4.18.0/en/performance): bert-large-uncased classification, 512 tokens, float32, "
    "AdamW, V100 16 GB; nvidia-smi's total, of which 1,343 MiB before any tensor; the version of "
    "PyTorch is not stated, and 1.10, where softmax keeps its input, gives the figures"
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published peak, how it is predicted, and how far off the prediction may be."""

    name: str
    published_bytes: float
    source: str
    predict: Callable[[], int]
    tolerance: float = 0.1


class SoftmaxOfThen(torch.autograd.Function):
    """Softmax as PyTorch had it up to 1.10: backward keeps the input too, without a use for it.

    See pytorch/pytorch issue 64000 and pull request 66018, of October 2021.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the softmax over the last dimension."""
        result = torch._softmax(x, -1, False)
        ctx.save_for_backward(x, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Return the gradient of the input."""
        x, result = ctx.saved_tensors
        return torch._softmax_backward_data(grad, result, -1, x.dtype)


def bert_large(batch: int, *, recomputes: bool = False) -> int:
    """Predict what nvidia-smi shows for a step of BERT-large of that time.

    Attention is written out, its softmax keeps what it is given, the optimizer takes one tensor at
    a time, and gradients are kept from step to step, as `zero_grad` then filled them with zeros.
    """
    import transformers

    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config).train()
    inputs = {
        "input_ids": torch.zeros(batch, 512, dtype=torch.int64, device="meta"),
        "labels": torch.zeros(batch, dtype=torch.int64, device="meta"),
    }
    layers = [f"bert.encoder.layer.{number}" for number in range(24 if recomputes else 0)]
    install(model, tuple(Region(module=layer, draws_random_numbers=True) for layer in layers))
    softmax = mock.patch.object(
        nn.functional, "softmax", lambda x, **_others: SoftmaxOfThen.apply(x)
    )
    try:
        with softmax:
            trace = capture(
                model, inputs, optimizer=partial(torch.optim.AdamW, foreach=False),
                drop_saved=False, target=V100,
            )  # fmt: skip
    finally:
        remove(model)
    for storage in trace.storages:
        if storage.kind == GRADIENTS:
            storage.intervals = [(1, trace.num_ticks - 1)]
    return replay_step(trace, library_bytes=CUBLAS_BYTES).reserved_bytes + 1343 * MIB


def vit_large() -> int:
    """Predict what is allocated at the peak of a step of ViT-L/16 with Adam, one image."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        num_labels=1000,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(config).train()
    image = torch.empty(1, 3, 224, 224, device="meta")

    def loss(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        return network(pixel_values=pixels).logits.sum()

    trace = capture(
        model, image, loss=loss, optimizer=torch.optim.Adam, drop_saved=False, target=A100
    )
    return replay_step(trace).allocated_bytes


CASES = {
    case.name: case
    for case in (
        Published(
            name="ViT-L/16, one image, Adam",
            published_bytes=6e9,
            source="PyTorch tutorial 'How to save memory by fusing the optimizer step into the "
            "backward pass' (2023): vit_l_16, 1 x 3 x 224 x 224, float32, '~6GB of peak memory'",
            predict=vit_large,
        ),
        Published(
            name="BERT-large, batch 1, layers recomputed",
            published_bytes=6775 * MIB,
            source=_BERT_SOURCE,
            predict=partial(bert_large, 1, recomputes=True),
        ),
        Published(
            name="BERT-large, batch 1",
            published_bytes=8681 * MIB,
            source=_BERT_SOURCE,
            predict=partial(bert_large, 1),
        ),
        Published(
            name="BERT-large, batch 4",
            published_bytes=14949 * MIB,
            source=_BERT_SOURCE,
            predict=partial(bert_large, 4),
        ),
    )
}


def main() -> None:
    """Predict every case, and print and write how far off each is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    rows = []
    for case in CASES.values():
        predicted = case.predict()
        error = predicted / case.published_bytes - 1
        rows.append(
            {
                "name": case.name,
                "published_bytes": case.published_bytes,
                "predicted_bytes": predicted,
                "error": error,
                "source": case.source,
            }
        )
        print(
            f"{case.name:42} published {case.published_bytes / 1e9:6.2f} GB, "
            f"predicted {predicted / 1e9:6.2f} GB, {error:+.1%}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
