"""Probes: small training steps whose ops, timed one by one, stand for those of real models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from remat.trace.step import Loss

_HEAD_WIDTH = 32
_NUM_WORDS = 1000
_NUM_CLASSES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One training step: a model and a batch, built when asked for, and its loss."""

    name: str
    build: Callable[[], tuple[nn.Module, Tensor]]
    loss: Loss | None = None


class Tokens(nn.Module):
    """A transformer block between an embedding and a loss over words, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD_WIDTH
        self.embedding = nn.Embedding(_NUM_WORDS, width)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )
        self.gate = nn.Linear(width, width)
        self.head = nn.Linear(width, _NUM_WORDS, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """Return the loss of words (B, T)."""
        x = self.embedding(words)
        split = self.queries_keys_values(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).flatten(-2))
        x = x + self.mlp(self.norm_2(x))
        x = x * functional.silu(self.gate(x))
        scores = self.head(x)
        return functional.cross_entropy(scores.flatten(0, 1), words.flatten())


class Images(nn.Module):
    """Convolutions wide, narrow and by channel, with batch norm and pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(4, channels),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * channels, _NUM_CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of images (B, 3, height, width)."""
        scores: Tensor = self.layers(images)
        return functional.cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.long))


_SIZES_OF_TOKENS = ((32, 1, 8), (64, 4, 64), (256, 4, 128), (512, 8, 256))
_SIZES_OF_IMAGES = ((8, 1, 8), (16, 4, 16), (32, 8, 32), (64, 8, 64))


def half_of(device: torch.device) -> torch.dtype:
    """Return the type of 16 bits that models are trained in there: bfloat16 where it is native.

    A CPU without instructions for it still trains in it, by emulation, which is slow: then too its
    speed is what a plan has to know.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def probes(device: torch.device, dtype: torch.dtype) -> Iterator[Probe]:
    """Yield the steps whose ops are timed, of both kinds in turn, from small to large."""
    for tokens, images in zip(_SIZES_OF_TOKENS, _SIZES_OF_IMAGES, strict=True):
        yield _tokens(*tokens, device, dtype)
        yield _images(*images, device, dtype)


def held_out(device: torch.device) -> Iterator[Probe]:
    """Yield steps of other sizes: what the calibration says of them is checked on a real one.

    The last are in 16 bits, and small, as that may be slow: all of it, and by autocast.
    """
    yield _tokens(128, 4, 96, device)
    yield _tokens(384, 4, 128, device)
    yield _images(24, 8, 28, device)
    yield _images(48, 4, 56, device)
    half = half_of(device)
    yield _tokens(96, 2, 48, device, half)
    yield _mixed(_tokens(96, 2, 48, device), half)
    yield _mixed(_images(12, 4, 20, device), half)


def _mixed(probe: Probe, half: torch.dtype) -> Probe:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, half):
            value: Tensor = model(batch)
        return value

    return Probe(
        name=f"{probe.name}, autocast to {_named(half)}", build=probe.build, loss=loss
    )  # fmt: skip


def _tokens(
    width: int,
    examples: int,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Probe:
    return Probe(
        name=f"transformer block, {width} wide, {examples} x {tokens} tokens{_in(dtype)}",
        build=lambda: (
            Tokens(width).to(device, dtype),
            torch.randint(_NUM_WORDS, (examples, tokens), device=device),
        ),
    )


def _images(
    channels: int,
    examples: int,
    side: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Probe:
    return Probe(
        name=f"convolutions, {channels} channels, {examples} x {side} x {side} pixels{_in(dtype)}",
        build=lambda: (
            Images(channels).to(device, dtype),
            torch.randn(examples, 3, side, side, device=device).to(dtype),
        ),
    )


def _in(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f", {_named(dtype)}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
