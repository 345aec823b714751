"""Modules in which checkpointing goes wrong, one fault each, for the cases."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

WIDTH, ROWS = 16, 64


class Net(nn.Module):
    """A stem, blocks and a head; the blocks are what is recomputed."""

    def __init__(self, make, blocks=2, *, stem=True):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH) if stem else nn.Identity()
        self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    """x + down(tanh(middle(up(x)))); faults go in the middle."""

    def __init__(self, middle=None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.middle = middle or nn.GELU()

    def forward(self, x):
        return x + self.down(torch.tanh(self.middle(self.up(x))))


class BreaksGraph(nn.Module):
    """torch.compile cannot put what comes before and after into one graph."""

    def forward(self, x):
        x = nn.functional.dropout(x, 0.5, self.training)
        torch._dynamo.graph_break()
        return torch.sin(x)


class TwoLengths(Net):
    """Each block is called with two sizes, in graphs of their own where it is compiled."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = torch.cat([block(x), block(x[: ROWS // 2])])[:ROWS]
        return self.head(x)


class RandomReLU(Block):
    """RReLU last: recomputation stops before its noise is filled in."""

    def forward(self, x):
        return x + torch.rrelu(self.down(self.up(x)), training=True)


class Jitter(nn.Module):
    """Noise on the logits of a router, which no name gives away as dropout."""

    def forward(self, x):
        return x * torch.empty_like(x).uniform_(0.9, 1.1)


class PythonRandom(nn.Module):
    """Tensors from Python's and NumPy's global generators."""

    def forward(self, x):
        drawn = np.random.rand(x.shape[-1]).astype("float32")  # noqa: NPY002  as users draw
        return x * torch.from_numpy(drawn) * random.random()


class OwnGenerator(nn.Module):
    """A generator that the module holds."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return x * torch.rand(x.shape[-1], generator=self.generator)


class NumpyGenerator(nn.Module):
    """A generator of NumPy's that the module holds."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(5)

    def forward(self, x):
        return x * torch.from_numpy(self.generator.random(x.shape[-1]).astype("float32"))


class Average(nn.Module):
    """An exponential average that the forward reads, and a counter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(2 * WIDTH))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = torch.sigmoid(x - self.average)
        with torch.no_grad():
            self.average.mul_(0.9).add_(y.mean(0), alpha=0.1)
            self.steps += 1
        return y


class Spectral(Block):
    """Power iterations of spectral norm."""

    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.up)


class Routed(nn.Module):
    """Two experts; the router's bias follows the load, so that a second run routes otherwise."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("bias", torch.zeros(2))

    def forward(self, x):
        scores = self.router(x)
        chosen = torch.nn.functional.one_hot((scores + self.bias).argmax(-1), 2).to(x.dtype)
        with torch.no_grad():
            self.bias.sub_(chosen.mean(0) - 0.5)
        gate = scores.softmax(-1) * chosen
        outputs = torch.stack([torch.tanh(e(x)) for e in self.experts], -1)
        return x + (outputs * gate.unsqueeze(-2)).sum(-1)


class CloseScores(nn.Module):
    """Two experts with scores that agree but for rounding, which is another one in backward."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        nn.init.zeros_(self.router.weight)
        nn.init.ones_(self.router.bias)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.register_buffer("rounding", torch.tensor([2e-7, 0.0]), persistent=False)

    def forward(self, x):
        scores = self.router(x)
        is_backward = torch._C._current_graph_task_id() != -1
        rounded = scores + (self.rounding.flip(0) if is_backward else self.rounding)
        chosen = torch.nn.functional.one_hot(rounded.argmax(-1), 2).to(x.dtype)
        gate = scores.softmax(-1) * chosen
        outputs = torch.stack([torch.tanh(e(x)) for e in self.experts], -1)
        return x + (outputs * gate.unsqueeze(-2)).sum(-1)


class LowRank(nn.Module):
    """A frozen layer with a trained low-rank part, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(requires_grad=False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.frozen(x) + self.up(self.down(x)))


class ScaledDraws(nn.Module):
    """Noise that is scaled in place after it was drawn, as dropout does it."""

    def forward(self, x):
        return x * torch.empty_like(x).bernoulli_(0.7).div_(0.7)


class Attends(nn.Module):
    """Attention over two sequences, by whichever kernel torch chooses."""

    def __init__(self):
        super().__init__()
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        parts = self.project(x).view(2, ROWS // 2, 3, 2, WIDTH // 2)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).reshape(ROWS, WIDTH))


class ReadsWhatItIsGiven(nn.Module):
    """Blocks that are given the batch, and read it from an attribute of the model as well."""

    class Part(Block):
        """Knows its owner."""

        def __init__(self, owner):
            super().__init__()
            self.owner = [owner]

        def forward(self, x):
            return super().forward(x) * self.owner[0].given

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([self.Part(self), Block()])

    def forward(self, x):
        self.given = x
        for block in self.blocks:
            x = block(x)
        return x


class ReadsAttribute(nn.Module):
    """Blocks that multiply by what the model has left on an attribute of its own."""

    class Part(Block):
        """Knows its owner."""

        def __init__(self, owner):
            super().__init__()
            self.owner = [owner]

        def forward(self, x):
            return super().forward(x) * self.owner[0].context

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.Part(self) for _ in range(2))

    def forward(self, x):
        self.context = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x


class Cached(nn.Module):
    """Appends to a list and reads its length."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(WIDTH, WIDTH), []

    def forward(self, x):
        self.seen.append(None)
        return x + torch.tanh(self.linear(x)) * len(self.seen)


class Shares(nn.Module):
    """Blocks that pass a dictionary on, each adding to it (sharing of keys across layers)."""

    class Part(nn.Module):
        """Reads all that is in the dictionary, and adds to it."""

        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, shared):
            y = torch.tanh(self.block(x)) + sum(shared.values(), torch.zeros(()))
            shared[len(shared)] = y.mean()
            return y * y

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Part() for _ in range(2))

    def forward(self, x):
        shared = {}
        for block in self.blocks:
            x = block(x, shared)
        return x


class TakesDict(nn.Module):
    """Blocks that are given tensors in a dictionary and by keyword."""

    class Part(Block):
        """Reads its side input."""

        def forward(self, x, side, *, scale):
            return super().forward(x * scale) + torch.tanh(side["side"])

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self.Part() for _ in range(2))

    def forward(self, x):
        side = {"side": self.stem(x)}
        scale = self.stem(x).sigmoid()
        for block in self.blocks:
            x = block(x, side, scale=scale)
        return x


class TiedPair(nn.Module):
    """First and last block share their weight."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[1].up.weight = self.blocks[0].up.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class ViewAtTheEnd(Block):
    """Its last op writes to a view of its result."""

    def forward(self, x):
        y = super().forward(x)
        y[:, :2].mul_(2.0)
        return y


class WritesInput(nn.Module):
    """Adds to its input in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x.add_(torch.tanh(self.linear(2 * x)))


class KeepsTensors(nn.Module):
    """A custom function that keeps tensors as attributes, where no hook sees them."""

    class Square(torch.autograd.Function):
        """x squared."""

        @staticmethod
        def forward(ctx, x):
            ctx.kept = x.detach().clone()
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.kept * gradient

    def forward(self, x):
        return self.Square.apply(x)


class ReadsLater(nn.Module):
    """Block 0 reads a buffer that block 1 writes to."""

    class Reads(Block):
        """Adds the scale to its input."""

        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", scale)

        def forward(self, x):
            return super().forward(x + self.scale)

    class Writes(Block):
        """Halves the scale."""

        def __init__(self, scale):
            super().__init__()
            self.register_buffer("scale", scale)

        def forward(self, x):
            self.scale.mul_(0.5)
            return super().forward(x)

    def __init__(self):
        super().__init__()
        scale = torch.ones(WIDTH)
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([self.Reads(scale), self.Writes(scale)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


SETTINGS = {"factor": 1.0}


class ReadsGlobal(nn.Module):
    """Multiplies by a global variable, as a tensor."""

    def forward(self, x):
        return x * torch.full(x.shape[-1:], SETTINGS["factor"])


class LanguageModel(nn.Module):
    """A tiny GPT-2 of Transformers' whose layers are the blocks; gives logits."""

    def __init__(self, dropout=0.1, *, frozen=False):
        super().__init__()
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.GPT2Config(
            n_layer=2, n_embd=WIDTH, n_head=2, vocab_size=61, n_positions=16, bos_token_id=0,
            eos_token_id=0, attn_pdrop=dropout, resid_pdrop=dropout, embd_pdrop=dropout,
            tie_word_embeddings=False,
        )  # fmt: skip
        self.inner = transformers.GPT2LMHeadModel(config)
        if frozen:
            self.inner.get_input_embeddings().requires_grad_(requires_grad=False)
            self.inner.transformer.wpe.requires_grad_(requires_grad=False)

    def forward(self, ids):
        return self.inner(input_ids=ids).logits
