"""Data, models and optimizers that the frameworks train in these tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.loops import measured_step
from tests.models import Block

WIDTH = 32


class MeasuredAdamW(torch.optim.AdamW):
    """AdamW that records the peak of each of its steps, a closure's forward and backward included.

    `model` is set before training, `batch` before each step; a copy, with which a step is traced,
    has none and records nothing. `peaks` are bytes.
    """

    model: nn.Module | None = None

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options)
        self.peaks: list[int] = []
        self.batch: object = ()

    def step(self, closure=None):
        if self.model is None:
            return super().step(closure)
        results, run = [], super().step
        peak = measured_step(self.model, self.batch, self, lambda: results.append(run(closure)))
        self.peaks.append(peak)
        return results[0]


class Classifier(nn.Module):
    """Blocks with dropout and batch norm over rows of numbers, with a loss of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH, nn.BatchNorm1d(WIDTH)) for _ in range(2)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.head(self.blocks(x)), labels)}


def rows(count: int) -> torch.utils.data.Dataset:
    """Random rows with labels; the same each time."""
    generator = torch.Generator().manual_seed(11)
    return torch.utils.data.TensorDataset(
        torch.randn(count, WIDTH, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
    )


def tiny_gpt2(seed: int = 0):
    """A GPT-2 of two layers with dropout; the same weights each time."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=64, n_positions=64, use_cache=False,
            bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
        )
    )  # fmt: skip


def texts(lengths) -> list[dict[str, torch.Tensor]]:
    """Random token sequences of given lengths; the same each time."""
    generator = torch.Generator().manual_seed(12)
    made = [torch.randint(1, 64, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": ids} for ids in made]
