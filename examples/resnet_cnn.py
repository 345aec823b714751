"""A small residual network with BatchNorm, on handwritten digits enlarged to 24 x 24.

    remat evaluate examples/resnet_cnn.py --budget 80% --budget 65%
    remat plan examples/resnet_cnn.py --budget 65%

BatchNorm is the trap here: a forward pass that runs twice would update its running statistics
twice. Under a plan they are updated once, so validation, which uses them, comes out the same.

The images are scikit-learn's `load_digits`, which lie inside the installed package.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import remat

CHANNELS, CLASSES, SIDE = (16, 32, 64), 10, 24


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to the input; the first may halve the image."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.convolution_1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(channels)
        self.convolution_2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        y = F.relu(self.norm_1(self.convolution_1(x)))
        return F.relu(self.norm_2(self.convolution_2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of two residual blocks each, and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS[0])
        blocks, before = [], CHANNELS[0]
        for stage, channels in enumerate(CHANNELS):
            blocks.append(Residual(before, channels, stride=1 if stage == 0 else 2))
            blocks.append(Residual(channels, channels, stride=1))
            before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(CHANNELS[-1], CLASSES)

    def forward(self, images):
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


def read_digits():
    """Split the enlarged images into training and validation data, in a fixed random order."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
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
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


train_data, eval_data = read_digits()
workload = remat.Workload(
    name="resnet-cnn",
    model=ResNet,
    train_data=train_data,
    eval_data=eval_data,
    batch_size=64,
    loss=loss,
    predict=predict,
    optimizer=make_optimizer,
    epochs=3,
    seed=0,
    slices={"faint": is_faint},
    features=features,
)
