"""Models from configurations, each as a function of its sizes: what benchmarks and tests share.

Every function returns a `Case`: a model with random weights, one batch, and the loss (`None`: the
model's own). Transformers' models are built from their configuration classes, without any file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  as everyone writes it
from torch import Tensor, nn


class Case(NamedTuple):
    """What `remat.plan` takes: a model, a batch, and the loss or `None` for the model's own."""

    model: nn.Module
    batch: Any  # a tensor, tuple or mapping
    loss: Callable[[nn.Module, Any], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named case; `make(dropout)` builds it, `note` says what could not be matched or matters."""

    name: str
    make: Callable[[float], Case]
    keep_all_mib: float | None = None  # published keep-everything peak of a real step
    note: str = ""

    def build(self, *, dropout: float = 0.0, device: str = "cpu", seed: int = 0) -> Case:
        """Build in training mode, always with the same values, and leave the random state alone.

        `device="meta"` gives shapes without values, for models beyond the machine's memory.
        """
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            case = self.make(dropout)
        case.model.train()
        return case


# -- Transformers -----------------------------------------------------------------------------


def gpt2(
    *,
    layers: int,
    width: int,
    heads: int,
    vocabulary: int,
    batch: int,
    tokens: int,
    dropout: float = 0.0,
) -> Case:
    """GPT-2 with as many positions as tokens, output tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=tokens,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        **_plain_tokens(),
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # the default, which the library cannot infer and warns about
    return Case(model, _text(vocabulary, batch, tokens), None)


def llama(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    batch: int,
    tokens: int,
    dropout: float = 0.0,
) -> Case:
    """Llama with an output of its own (not tied)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        attention_dropout=dropout,
        use_cache=False,
        tie_word_embeddings=False,
        **_plain_tokens(),
    )
    return Case(LlamaForCausalLM(config), _text(vocabulary, batch, tokens), None)


def moe(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    key_value_heads: int,
    experts: int,
    used: int,
    vocabulary: int,
    batch: int,
    tokens: int,
    dropout: float = 0.0,
) -> Case:
    """Mixtral whose experts run as one batched product.

    `batched_mm` gathers the weights of each token's experts: shapes do not depend on the routing,
    so it can be traced, and the gathered weights make the peak.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        num_local_experts=experts,
        num_experts_per_tok=used,
        attention_dropout=dropout,
        use_cache=False,
        tie_word_embeddings=False,
        experts_implementation="batched_mm",
        **_plain_tokens(),
    )
    return Case(MixtralForCausalLM(config), _text(vocabulary, batch, tokens), None)


def t5(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    vocabulary: int,
    batch: int,
    tokens: int,
    dropout: float = 0.0,
) -> Case:
    """T5 with as many decoder layers, the labels shifted into the decoder; ReLU, tied."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=inner,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
        use_cache=False,
        decoder_start_token_id=0,
    )
    return Case(T5ForConditionalGeneration(config), _text(vocabulary, batch, tokens), None)


def vit(
    *,
    layers: int,
    width: int,
    inner: int,
    heads: int,
    pixels: int,
    patch: int,
    labels: int,
    batch: int,
    dropout: float = 0.0,
) -> Case:
    """Vision transformer with a classification head."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=pixels,
        patch_size=patch,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Case(ViTForImageClassification(config), _images(pixels, labels, batch), None)


def resnet(
    *,
    pixels: int,
    labels: int,
    batch: int,
    embedding: int = 64,
    widths: tuple[int, ...] = (256, 512, 1024, 2048),
    depths: tuple[int, ...] = (3, 4, 6, 3),
) -> Case:
    """ResNet (50 by default); its architecture has no dropout, its BatchNorm has state instead."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=embedding, hidden_sizes=list(widths), depths=list(depths), num_labels=labels
    )
    return Case(ResNetForImageClassification(config), _images(pixels, labels, batch), None)


def convnext(
    *,
    pixels: int,
    labels: int,
    batch: int,
    widths: tuple[int, ...] = (96, 192, 384, 768),
    depths: tuple[int, ...] = (3, 3, 9, 3),
    dropout: float = 0.0,
) -> Case:
    """ConvNeXt (tiny by default); its dropout drops whole paths."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=list(widths),
        depths=list(depths),
        num_stages=len(depths),
        num_labels=labels,
        drop_path_rate=dropout,
    )
    return Case(ConvNextForImageClassification(config), _images(pixels, labels, batch), None)


# -- written out ------------------------------------------------------------------------------


def unet(*, levels: int, width: int, pixels: int, batch: int, dropout: float = 0.0) -> Case:
    """UNet: channels double per level, skips by concatenation, an image to an image."""
    images = torch.randn(batch, 3, pixels, pixels)
    return Case(UNet(levels, width, dropout), (images, torch.randn_like(images)), regression_loss)


def vgg19(*, pixels: int, labels: int, batch: int, dropout: float = 0.0) -> Case:
    """VGG19 (configuration E of Simonyan and Zisserman 2015)."""
    batch_of_images = (torch.randn(batch, 3, pixels, pixels), torch.randint(0, labels, (batch,)))
    return Case(VGG19(pixels, labels, dropout), batch_of_images, classification_loss)


def chain(
    *,
    blocks: int,
    width: int,
    rows: int,
    labels: int = 10,
    dropout: float = 0.0,
    by_tuples: bool = False,
) -> Case:
    """Deep thin chain: x + linear(gelu(linear(norm(x)))), then a norm and a linear head.

    With `by_tuples` a loop calls the blocks, and each returns a tuple.
    """
    kind = TupleBlock if by_tuples else MLPBlock
    body = [kind(width, width, dropout) for _ in range(blocks)]
    model = nn.Sequential(
        *([TupleLoop(body)] if by_tuples else body), nn.LayerNorm(width), nn.Linear(width, labels)
    )
    batch = (torch.randn(rows, width), torch.randint(0, labels, (rows,)))
    return Case(model, batch, classification_loss)


def prenorm_blocks(
    *, blocks: int, width: int, heads: int, batch: int, tokens: int, dropout: float = 0.0
) -> Case:
    """Pre-norm transformer blocks alone, attention written out so that its weights are kept."""
    model = nn.Sequential(*(PreNormBlock(width, heads, dropout) for _ in range(blocks)))
    return Case(model, torch.randn(batch, tokens, width), mean_loss)


def thin_resnet(*, depth: int, batch: int, pixels: int = 32, labels: int = 10) -> Case:
    """ResNet of 6n + 2 layers for small images (He et al. 2016, arXiv:1512.03385, section 4.2)."""
    model = ThinResNet((depth - 2) // 6, labels)
    images, targets = torch.randn(batch, 3, pixels, pixels), torch.randint(0, labels, (batch,))
    return Case(model, (images, targets), classification_loss)


class MLPBlock(nn.Module):
    """x + linear(gelu(linear(norm(x))))."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.dropout = _dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add the MLP of the normalized input."""
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class TupleBlock(MLPBlock):
    """The same, in a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return what the block returns, and nothing beside it."""
        return super().forward(x), None


class TupleLoop(nn.Module):
    """Calls blocks that return tuples, as models of Transformers do."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Pass each block's result on to the next."""
        for block in self.blocks:
            x = block(x)[0]
        return x


class SelfAttention(nn.Module):
    """Softmax attention, written out."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = _dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each token to all."""
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, width of a head)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (self.dropout(weights) @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.out(mixed)


def _dropout(dropout: float) -> nn.Module:
    """Leave dropout out where it is zero: tracing compilers copy what passes through one."""
    return nn.Dropout(dropout) if dropout else nn.Identity()


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with a four times wider middle."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, dropout)
        self.mlp = MLPBlock(width, 4 * width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        return self.mlp(x + self.attention(self.norm(x)))


class UNet(nn.Module):
    """Encoder and decoder of `levels` resolutions."""

    def __init__(self, levels: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(
            _double_convolution(before, after)
            for before, after in zip([3, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, 2, stride=2) for after in reversed(widths[:-1])
        )
        self.up = nn.ModuleList(
            _double_convolution(2 * after, after) for after in reversed(widths[:-1])
        )
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images of the same size."""
        skips: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if skips else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([skips.pop(), grow(x)], dim=1))
        return self.head(x)


def _double_convolution(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )


class ThinResNet(nn.Module):
    """Three stages of n basic blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks: int, labels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        widths = (16, 32, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(before, after, 1 if before == after else 2),
                    *(BasicBlock(after, after, 1) for _ in range(blocks - 1)),
                )
                for before, after in zip((16, *widths), widths, strict=False)
            )
        )
        self.head = nn.Linear(64, labels)

    def forward(self, x: Tensor) -> Tensor:
        """Return a score per label."""
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two convolutions with BatchNorm around a shortcut without parameters."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, self.grows_by = stride, after - before
        self.first = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        )
        self.second = nn.Sequential(
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the transformed input to the input, subsampled and padded where the shape changes."""
        shortcut = x
        if self.grows_by:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.grows_by))
        return F.relu(shortcut + self.second(self.first(x)))


class VGG19(nn.Module):
    """Sixteen convolutions in five stages, three linear layers."""

    def __init__(self, pixels: int, labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = 3
        for after, convolutions in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            stage: list[nn.Module] = []
            for _ in range(convolutions):
                stage += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True)]
                before = after
            stages.append(nn.Sequential(*stage, nn.MaxPool2d(2)))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(
            nn.Linear(512 * (pixels // 32) ** 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, labels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return a score per label."""
        return self.classifier(self.features(x).flatten(1))


# -- losses and batches -----------------------------------------------------------------------


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of (inputs, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def regression_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square error of (inputs, targets)."""
    return F.mse_loss(model(batch[0]), batch[1])


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean of the squared output."""
    return model(batch).square().mean()


def _text(vocabulary: int, batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (batch, tokens))
    return {"input_ids": ids, "labels": ids}


def _images(pixels: int, labels: int, batch: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch, 3, pixels, pixels),
        "labels": torch.randint(0, labels, (batch,)),
    }


def _plain_tokens() -> dict[str, Any]:
    """Special tokens inside any vocabulary; training on given ids uses none of them."""
    return {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
