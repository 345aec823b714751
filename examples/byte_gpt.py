"""A small GPT that reads and predicts bytes, on the reference text that Python itself ships.

    remat evaluate examples/byte_gpt.py --budget 75% --budget 60%
    remat plan examples/byte_gpt.py --budget 60%

The text is what `help("topics")` shows: the language reference as plain text, in the module
`pydoc_data.topics` of every Python. The model reads bytes, so there is no tokenizer to fetch.
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

import remat

# Shapes: B sequences, T bytes, D width, H heads, V byte values.
LENGTH, WIDTH, HEADS, DEPTH, DROPOUT, VALUES = 128, 128, 4, 6, 0.1, 256
TRAIN_BYTES, EVAL_BYTES = 100_000, 16_000


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each on a normalized input and added to it."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.dropout(self.attend(self.norm_1(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.norm_2(x_BTD)))

    def attend(self, x_BTD):
        split = self.queries_keys_values(x_BTD).unflatten(-1, (3, HEADS, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each B, H, T, D / H
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projection(mixed.transpose(1, 2).flatten(-2))


class ByteGPT(nn.Module):
    """Byte and position embeddings, blocks, and a head that shares the byte embedding."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(VALUES, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VALUES, bias=False)
        nn.init.normal_(self.bytes.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.bytes.weight

    def forward(self, text_BT):
        x_BTD = self.bytes(text_BT) + self.positions.weight[: text_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class Windows(Dataset):
    """Windows of a text, one after another, each with the byte that follows every byte of it."""

    def __init__(self, text):
        self.text = torch.tensor(list(text), dtype=torch.long)

    def __len__(self):
        return (len(self.text) - 1) // LENGTH

    def __getitem__(self, index):
        start = index * LENGTH
        window = self.text[start : start + LENGTH + 1]
        return window[:-1], window[1:]


def read_text():
    """Take the training text and, from behind it, the validation text."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    return text[:TRAIN_BYTES], text[TRAIN_BYTES : TRAIN_BYTES + EVAL_BYTES]


def loss(model, batch):
    text_BT, next_BT = batch
    return F.cross_entropy(model(text_BT).flatten(0, 1), next_BT.flatten())


def predict(model, batch):
    text_BT, next_BT = batch
    return model(text_BT).softmax(dim=-1), next_BT  # (B, T, V) and (B, T): perplexity per byte


def features(batch):
    """What a window of text is like: evaluation looks for kinds where the model is worse."""
    text_BT, _ = batch
    return {
        "capitals": share(text_BT, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        "spaces": share(text_BT, b" "),
        "marks": share(text_BT, b"`*:;()[]{}_='\"<>|"),
        "digits": share(text_BT, b"0123456789"),
    }


def share(text_BT, values):
    return torch.isin(text_BT, torch.tensor(list(values))).float().mean(dim=1)


def has_grammar(batch):
    """A window with a rule of Python's grammar in it, such as `pass_stmt ::= "pass"`."""
    text_BT, _ = batch
    first, second, third = (text_BT[:, i : LENGTH - 2 + i] for i in range(3))
    return ((first == ord(":")) & (second == ord(":")) & (third == ord("="))).any(dim=1)


def make_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


train_text, eval_text = read_text()
workload = remat.Workload(
    name="byte-gpt",
    model=ByteGPT,
    train_data=Windows(train_text),
    eval_data=Windows(eval_text),
    batch_size=16,
    loss=loss,
    predict=predict,
    optimizer=make_optimizer,
    epochs=1,
    seed=0,
    slices={"grammar": has_grammar},
    features=features,
)
