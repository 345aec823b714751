"""Traces of deep models made from those of shallow ones: field by field their own traces."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from remat.cost.devices import find_device
from remat.prove.accounting import target_of
from remat.sizing.deepening import SHALLOW, deepen
from remat.trace.capture import capture
from remat.trace.records import StepTrace

CONFIGS = {
    "gpt2": ({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "vocab_size": 64}, "2x16"),
    "llama": (
        {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "dtype": "bfloat16",
        },
        "2x16",
    ),
    "vit": (
        {
            "model_type": "vit",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        "2x3x32x32",
    ),
}


class Block(nn.Module):
    """A layer that may do something else than the others."""

    def __init__(self, width: int, *, twice: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.twice = twice

    def forward(self, x):
        inside = torch.nn.functional.gelu(self.up(x))
        return x + self.down(inside.tanh() if self.twice else inside)


def loss(model, x):
    return model(x).square().mean()


def traced(make, depth, device="cpu") -> StepTrace:
    return capture(
        make(depth), torch.empty(4, 8, device="meta"), loss=loss,
        target=target_of(find_device(device), "cpu"),
    )  # fmt: skip


def what_it_says(trace: StepTrace) -> dict[str, object]:
    """Everything in a trace but the shapes that an op over all parameters was called with.

    Nor what a trace of the same step may take over: that is for traces that were recorded.
    """
    fields = {f.name: getattr(trace, f.name) for f in dataclasses.fields(trace)}
    del fields["signatures"], fields["handover"]
    return fields


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "device"),
    [("gpt2", "T4"), ("llama", "H100-80GB"), ("vit", "cpu")],
)
def test_a_deeper_trace_is_the_one_that_its_model_gives(tmp_path, name, device):
    """Nine layers from five and six: ops, storages, saved tensors, calls and names are equal."""
    pytest.importorskip("transformers")
    from remat.architectures import load_architecture

    settings, batch = CONFIGS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))

    def trace(depth):
        made = load_architecture(path, batch, depth=depth)
        return capture(made.model, made.batch, target=target_of(find_device(device), "cpu"))

    made = deepen(trace(SHALLOW), trace(SHALLOW + 1), 9 - SHALLOW)
    assert made is not None
    assert what_it_says(made) == what_it_says(trace(9))


@pytest.mark.parametrize("device", ["cpu", "L4"])
def test_a_plain_chain_is_deepened(device):
    """The optimizer may take one tensor at a time (CPU) or all at once (CUDA)."""

    def make(depth):
        return nn.Sequential(*[Block(8) for _ in range(depth)]).to("meta")

    made = deepen(traced(make, SHALLOW, device), traced(make, SHALLOW + 1, device), 3)
    assert made is not None
    assert what_it_says(made) == what_it_says(traced(make, SHALLOW + 3, device))


def test_layers_that_differ_are_not_deepened():
    """Every other layer does more: nothing is taken for the layers that were not seen."""

    def make(depth):
        return nn.Sequential(*[Block(8, twice=layer % 2 == 1) for layer in range(depth)]).to("meta")

    assert deepen(traced(make, SHALLOW), traced(make, SHALLOW + 1), 3) is None


def test_a_layer_that_only_the_deeper_model_has_is_noticed():
    """Five alike and a sixth that is not: one layer more is not what the copy says."""

    def make(depth):
        return nn.Sequential(*[Block(8, twice=layer == 5) for layer in range(depth)]).to("meta")

    assert deepen(traced(make, SHALLOW), traced(make, SHALLOW + 1), 3) is None
