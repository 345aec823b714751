"""Small models for tests: the published architectures in tiny, and odd ones written by hand.

`TINY` has the architectures, `ODD` what training steps do that planners get wrong, `ALL` both. Each
entry's `build(dropout=..., device=...)` gives (model, batch, loss); one step takes well under a
second.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# The shapes' functions are shared with the benchmarks, which are no part of the installed package.
if (_ROOT := str(Path(__file__).parent.parent)) not in sys.path:
    sys.path.append(_ROOT)

from benchmarks import shapes
from benchmarks.shapes import (
    Case,
    Entry,
    MLPBlock,
    PreNormBlock,
    classification_loss,
    mean_loss,
    regression_loss,
)

__all__ = ["ALL", "ODD", "TINY", "Case", "Entry"]

_WIDTH = 16
_ROWS = 32

TINY: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="gpt2",
            make=lambda dropout: shapes.gpt2(
                layers=3, width=32, heads=2, vocabulary=97, batch=2, tokens=32, dropout=dropout
            ),
        ),
        Entry(
            name="llama",
            make=lambda dropout: shapes.llama(
                layers=3, width=32, inner=64, heads=4, key_value_heads=2, vocabulary=97, batch=2,
                tokens=32, dropout=dropout,
            ),
        ),
        Entry(
            name="t5",
            make=lambda dropout: shapes.t5(
                layers=2, width=32, inner=64, heads=2, vocabulary=97, batch=2, tokens=24,
                dropout=dropout,
            ),
        ),
        Entry(
            name="vit",
            make=lambda dropout: shapes.vit(
                layers=3, width=32, inner=64, heads=2, pixels=32, patch=8, labels=7, batch=4,
                dropout=dropout,
            ),
        ),
        Entry(
            name="resnet",
            make=lambda _dropout: shapes.resnet(
                pixels=32, labels=7, batch=4, embedding=8, widths=(16, 32), depths=(2, 2)
            ),
        ),
        Entry(
            name="convnext",
            make=lambda dropout: shapes.convnext(
                pixels=32, labels=7, batch=4, widths=(8, 16), depths=(2, 2), dropout=dropout
            ),
        ),
        Entry(
            name="unet",
            make=lambda dropout: shapes.unet(
                levels=3, width=4, pixels=32, batch=2, dropout=dropout
            ),
        ),
        Entry(
            name="moe",
            make=lambda dropout: shapes.moe(
                layers=2, width=32, inner=32, heads=2, key_value_heads=1, experts=4, used=2,
                vocabulary=97, batch=2, tokens=16, dropout=dropout,
            ),
        ),
        Entry(
            name="chain",
            make=lambda dropout: shapes.chain(
                blocks=12, width=_WIDTH, rows=_ROWS, dropout=dropout
            ),
        ),
        Entry(
            name="blocks",
            make=lambda dropout: shapes.prenorm_blocks(
                blocks=4, width=_WIDTH, heads=2, batch=2, tokens=16, dropout=dropout
            ),
        ),
    )
}  # fmt: skip


# -- odd ones -----------------------------------------------------------------------------------


class Chain(nn.Module):
    """Blocks one after the other, then a linear head: a frame for odd blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(_WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class RecurrentDepth(nn.Module):
    """One block called several times: recomputing call 0 must not touch call 1."""

    def __init__(self, calls: int, dropout: float) -> None:
        super().__init__()
        self.calls = calls
        self.block = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)
        self.head = nn.Linear(_WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Run the same block again and again."""
        for _ in range(self.calls):
            x = self.block(x)
        return self.head(x)


class Siamese(nn.Module):
    """One tower, two inputs."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tower = nn.Sequential(*(MLPBlock(_WIDTH, 4 * _WIDTH, dropout) for _ in range(3)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return one similarity per pair."""
        return F.cosine_similarity(self.tower(left), self.tower(right))


class TiedLanguageModel(nn.Module):
    """Embedding and output are one parameter, whose gradient has two sources."""

    def __init__(self, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, _WIDTH)
        self.blocks = nn.ModuleList(MLPBlock(_WIDTH, 4 * _WIDTH, dropout) for _ in range(3))
        self.output = nn.Linear(_WIDTH, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return scores (batch, vocabulary, tokens)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.output(x).transpose(1, 2)


class ViewBlock(nn.Module):
    """Views of views, and ops in place on the block's own intermediates."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Gate one half of a buffer by the other, reshaping on the way."""
        gate, value = self.both(x).chunk(2, dim=-1)
        mixed = value.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)
        y = self.out(mixed * torch.sigmoid(gate))
        y[..., 0].mul_(0.5)
        return y.add_(x).relu_()


class InPlaceOnInputBlock(nn.Module):
    """Writes over its own input: recomputing it alone would see the new values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the input in place, without a copy."""
        return x.add_(torch.tanh(self.linear(2 * x)))


class Teacher(nn.Module):
    """A part that runs without gradients inside the step, and a detached target."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.student = nn.Sequential(*(MLPBlock(_WIDTH, 4 * _WIDTH, dropout) for _ in range(3)))
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x: Tensor) -> Tensor:
        """Return the distance of the student to the teacher and to its own past."""
        with torch.no_grad():
            target = self.teacher(x)
        y = self.student(x)
        return F.mse_loss(y, target) + 0.1 * F.mse_loss(y[1:], y[:-1].detach())


class NestedInputs(nn.Module):
    """Takes a mapping of tuples, lists and plain values, and gives a mapping."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TupleBlock(dropout) for _ in range(3))

    def forward(
        self, pair: tuple[Tensor, Tensor], *, extra: dict[str, Any], scale: float
    ) -> dict[str, Any]:
        """Pass a pair of tensors from block to block."""
        state = pair
        for block in self.blocks:
            state = block(state, options={"scale": scale, "shift": extra["shifts"][0]})
        return {"loss": F.mse_loss(state[0], extra["target"]) + state[1].mean(), "name": "nested"}


class TupleBlock(nn.Module):
    """Takes and gives a tuple, with a mapping as keyword argument."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.block = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)

    def forward(
        self, state: tuple[Tensor, Tensor], *, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Transform the first, collect in the second."""
        x, collected = state
        y = self.block(x) * options["scale"] + options["shift"]
        return y, collected + y.square()


class MaskedBlock(nn.Module):
    """Optional keyword arguments, tensors and not."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.block = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)

    def forward(
        self, hidden: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Change only what the mask lets through."""
        y = self.block(hidden) / temperature
        return y if mask is None else torch.where(mask, y, hidden)


class KeywordModel(nn.Module):
    """Calls its blocks by keyword only."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MaskedBlock(dropout) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Give the mask to every second block."""
        for number, block in enumerate(self.blocks):
            x = block(hidden=x, mask=mask if number % 2 else None, temperature=1.5)
        return x.square().mean()


class BatchNormBlock(nn.Module):
    """Running statistics and their counter change in forward."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)
        self.norm = nn.BatchNorm1d(_WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the batch."""
        return x + self.dropout(F.relu(self.norm(self.linear(x))))


class EMABlock(nn.Module):
    """A moving average in a buffer that the output depends on, and a counter in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)
        self.register_buffer("average", torch.zeros(_WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Center by the average, then move it: a second run in one step would center otherwise."""
        y = torch.tanh(self.linear(x) - self.average)
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.steps += 1
        return x + y * y


class SpectralNormBlock(nn.Module):
    """Each forward runs one power iteration on buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.spectral_norm(nn.Linear(_WIDTH, 4 * _WIDTH))
        self.down = nn.utils.parametrizations.spectral_norm(nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Add a Lipschitz-bounded change."""
        return x + self.down(F.gelu(self.up(x)))


class HandCheckpointed(nn.Module):
    """Checkpoints its inner block itself."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.block = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)
        self.after = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Recompute the first half, keep the second."""
        return self.after(checkpoint(self.block, x, use_reentrant=False))


class _SquareReLU(torch.autograd.Function):
    """relu(x)^2 with a hand-written backward that saves a tensor and an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """Save the positive part."""
        positive = x.clamp(min=0)
        ctx.save_for_backward(positive)
        ctx.scale = scale
        return positive * positive * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Differentiate the square."""
        (positive,) = ctx.saved_tensors
        return 2 * ctx.scale * positive * gradient, None


class CustomFunctionBlock(nn.Module):
    """Uses an autograd Function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function."""
        return x + _SquareReLU.apply(self.linear(x), 0.5)


class ForeignRandomBlock(nn.Module):
    """Draws from NumPy's, Python's and torch's generators in forward."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.block = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Scale by what three generators say."""
        scale = random.random() + float(np.random.random())  # noqa: NPY002  as users draw
        return self.block(x) * scale + 0.01 * torch.randn_like(x)


class UnusedParts(nn.Module):
    """A parameter that never meets the loss, and an output that is thrown away."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MLPBlock(_WIDTH, 4 * _WIDTH, dropout) for _ in range(3))
        self.unused = nn.Linear(_WIDTH, _WIDTH)
        self.ignored = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Ignore one block's output."""
        for block in self.blocks:
            x = block(x)
        self.ignored(x)
        return x.square().mean()


class SharedSkip(nn.Module):
    """One early tensor feeds every later block, so that no region owns it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = MLPBlock(_WIDTH, 4 * _WIDTH, dropout)
        self.blocks = nn.ModuleList(nn.Bilinear(_WIDTH, _WIDTH, _WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Combine with the early tensor in each block."""
        early = y = self.first(x)
        for block in self.blocks:
            y = torch.tanh(block(y, early)) + early
        return y.square().mean()


def _labelled() -> tuple[Tensor, Tensor]:
    return torch.randn(_ROWS, _WIDTH), torch.randint(0, 4, (_ROWS,))


def _chain(block: Callable[[], nn.Module], count: int = 4) -> Case:
    return Case(Chain(*(block() for _ in range(count))), _labelled(), classification_loss)


def _siamese(dropout: float) -> Case:
    pair = (torch.randn(_ROWS, _WIDTH), torch.randn(_ROWS, _WIDTH))
    return Case(Siamese(dropout), pair, lambda model, batch: 1 - model(*batch).mean())


def _tied(dropout: float) -> Case:
    ids = torch.randint(0, 50, (2, 17))
    batch = (ids[:, :-1], ids[:, 1:])
    return Case(TiedLanguageModel(50, dropout), batch, classification_loss)


def _frozen(dropout: float) -> Case:
    case = _chain(lambda: MLPBlock(_WIDTH, 4 * _WIDTH, dropout), 5)
    model: Any = case.model
    for block in (*model.blocks[:2], model.blocks[3].up):
        block.requires_grad_(requires_grad=False)
    return case


def _teacher(dropout: float) -> Case:
    model = Teacher(dropout)
    model.teacher.requires_grad_(requires_grad=False)
    return Case(model, torch.randn(_ROWS, _WIDTH), None)


def _nested(dropout: float) -> Case:
    batch = {
        "pair": (torch.randn(_ROWS, _WIDTH), torch.zeros(_ROWS, _WIDTH)),
        "extra": {"shifts": [torch.randn(_WIDTH), None], "target": torch.randn(_ROWS, _WIDTH)},
        "scale": 0.5,
    }
    return Case(NestedInputs(dropout), batch, None)


def _keywords(dropout: float) -> Case:
    batch = {"x": torch.randn(_ROWS, _WIDTH), "mask": torch.rand(_ROWS, 1) > 0.5}
    return Case(KeywordModel(dropout), batch, None)


def _dropout(dropout: float) -> Case:
    """Dropout is the point of this one: on even where the others have none."""
    return _chain(lambda: PreNormTokens(dropout or 0.2))


class PreNormTokens(nn.Module):
    """A transformer block over rows taken as one sequence."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.block = PreNormBlock(_WIDTH, 2, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add and drop the batch dimension."""
        return self.block(x[None])[0]


ODD: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="recurrent_depth",
            make=lambda dropout: Case(
                RecurrentDepth(4, dropout), _labelled(), classification_loss
            ),
        ),
        Entry(name="siamese", make=_siamese),
        Entry(name="tied_weights", make=_tied),
        Entry(name="views_in_place", make=lambda _dropout: _chain(ViewBlock)),
        Entry(name="in_place_on_input", make=lambda _dropout: _in_place_on_input()),
        Entry(name="frozen", make=_frozen),
        Entry(name="partial_no_grad", make=_teacher),
        Entry(name="nested_batch", make=_nested),
        Entry(name="keyword_arguments", make=_keywords),
        Entry(
            name="batch_norm", make=lambda dropout: _chain(lambda: BatchNormBlock(dropout))
        ),
        Entry(name="ema_buffer", make=lambda _dropout: _chain(EMABlock)),
        Entry(name="spectral_norm", make=lambda _dropout: _chain(SpectralNormBlock)),
        Entry(name="dropout", make=_dropout),
        Entry(
            name="checkpointed_by_hand",
            make=lambda dropout: _chain(lambda: HandCheckpointed(dropout), 3),
        ),
        Entry(name="custom_function", make=lambda _dropout: _chain(CustomFunctionBlock)),
        Entry(
            name="foreign_random", make=lambda dropout: _chain(lambda: ForeignRandomBlock(dropout))
        ),
        Entry(
            name="unused_parts",
            make=lambda dropout: Case(UnusedParts(dropout), torch.randn(_ROWS, _WIDTH), None),
        ),
        Entry(
            name="shared_skip",
            make=lambda dropout: Case(SharedSkip(dropout), torch.randn(_ROWS, _WIDTH), None),
        ),
        Entry(
            name="bare_regression",
            make=lambda dropout: Case(
                nn.Sequential(*(MLPBlock(_WIDTH, _WIDTH, dropout) for _ in range(3))),
                (torch.randn(_ROWS, _WIDTH), torch.randn(_ROWS, _WIDTH)),
                regression_loss,
            ),
        ),
        Entry(
            name="one_tensor",
            make=lambda dropout: Case(
                nn.Sequential(*(MLPBlock(_WIDTH, _WIDTH, dropout) for _ in range(3))),
                torch.randn(_ROWS, _WIDTH),
                mean_loss,
            ),
        ),
    )
}  # fmt: skip


def _in_place_on_input() -> Case:
    """A linear layer first: the batch itself must not be written over."""
    model = Chain(nn.Linear(_WIDTH, _WIDTH), *(InPlaceOnInputBlock() for _ in range(3)))
    return Case(model, _labelled(), classification_loss)


ALL: dict[str, Entry] = {**TINY, **ODD}
