"""A small vision transformer on handwritten digits, with dropout: what `remat demo` trains.

    remat evaluate examples/digits_vit.py --budget 80% --budget 60%
    remat plan examples/digits_vit.py --budget 60%

The images are scikit-learn's `load_digits`: 1,797 real scans of 8 x 8 pixels, which lie inside the
installed package. Dropout makes every step draw random numbers, so a recomputation that did not
restore the random state would show in the loss curve at once.

The file stands alone; a wheel of remat carries it as `remat/examples/digits_vit.py`.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import remat

# Shapes: B images, T tokens (patches of 2 x 2 pixels), D width, H heads.
SIDE, PATCH, WIDTH, HEADS, DEPTH, DROPOUT, CLASSES = 8, 2, 64, 4, 6, 0.1, 10


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on a normalized input and added to it."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.projection = nn.Linear(WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH),
            nn.Dropout(DROPOUT),
        )

    def forward(self, x_BTD):
        x_BTD = x_BTD + self.attend(self.norm_1(x_BTD))
        return x_BTD + self.mlp(self.norm_2(x_BTD))

    def attend(self, x_BTD):
        split = self.queries_keys_values(x_BTD).unflatten(-1, (3, HEADS, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)  # each B, H, T, D / H
        dropout = DROPOUT if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.projection(mixed.transpose(1, 2).flatten(-2))


class VisionTransformer(nn.Module):
    """Patches, blocks, and a classifier that sees every token in its place.

    With the mean over the tokens instead, it would take many more than a demo's steps to learn.
    """

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=PATCH, stride=PATCH)
        self.positions = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear((SIDE // PATCH) ** 2 * WIDTH, CLASSES)

    def forward(self, images):
        x_BTD = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD).flatten(1))


def read_digits():
    """Split the images into training and validation data, four to one, in a fixed random order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return TensorDataset(images[train], labels[train]), TensorDataset(
        images[held_out], labels[held_out]
    )


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def predict(model, batch):
    images, labels = batch
    return model(images).softmax(dim=-1), labels


def features(batch):
    """What may make a digit hard: evaluation looks for combinations where the model is worse."""
    images, labels = batch
    ink = images.mean(dim=(1, 2, 3))
    return {
        "digit": labels,
        "brightness": ink,
        "stroke width": (images > 0.5).float().mean(dim=(1, 2, 3)) / ink,  # of the ink, how much
        "upper half": images[:, :, : images.shape[2] // 2].sum(dim=(1, 2, 3))
        / images.sum(dim=(1, 2, 3)),
    }


def is_faint(batch):
    return batch[0].mean(dim=(1, 2, 3)) < 0.28


def make_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


train_data, eval_data = read_digits()
workload = remat.Workload(
    name="digits-vit",
    model=VisionTransformer,
    train_data=train_data,
    eval_data=eval_data,
    batch_size=64,
    loss=loss,
    predict=predict,
    optimizer=make_optimizer,
    epochs=2,
    seed=0,
    slices={"faint": is_faint},
    features=features,
)
