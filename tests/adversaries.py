"""Models that do to their masks, positions and draws what a plan might not expect."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, ROWS = 32, 512


class Odd(nn.Module):
    """Two layers, `first` and `second`, and whatever a function makes of them."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.function(self, x)


class OddPool(nn.Module):
    """Convolutions around what a function makes of their images."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.last(self.function(self, x))


def noise_is_read_elsewhere(m, x):
    """Draws are scaled in place, cloned, viewed and read long after."""
    y = m.first(x)
    noise = torch.empty_like(y).bernoulli_(0.7).div_(0.7)
    other = noise.clone().mul_(2)
    return m.second(torch.tanh(y * noise)) * other + noise.view(WIDTH, ROWS).t() * y


def part_of_the_noise_is_written_to(m, x):
    """What was drawn is no longer only draws."""
    y = m.first(x)
    noise = torch.empty_like(y).bernoulli_(0.5).div_(0.5)
    noise[0] = 7.0
    return m.second(torch.tanh(y * noise))


def masks_are_viewed(m, x):
    """A mask, its transpose, a part of it and its inverse each decide something."""
    y = m.first(x)
    mask = y > 0.1
    half = ROWS // 2
    z = torch.where(mask, y.exp(), -y) + torch.where(mask.t().t(), y, y * 2)
    z = torch.cat([torch.where(mask[:half], z[:half], z[:half] * 3), z[half:]])
    return m.second(torch.where(mask.logical_not(), z, z.sin()))


def masks_are_written_to(m, x):
    """A mask is narrowed and turned round in place after a copy of it was used."""
    y = m.first(x)
    mask = y > 0.1
    z = torch.where(mask.clone(), y.exp(), -y)
    mask &= y < 1.0
    mask.logical_not_()
    return m.second(torch.where(mask, z, z.sin()))


def masks_fill_no_bytes(m, x):
    """The number of booleans is no multiple of eight, or lies apart in memory."""
    y = m.first(x)
    part = y[:311, :31].contiguous()
    flat = y.reshape(-1)[:5001]
    z = torch.where(part > 0, part.exp(), -part).mean()
    z = z + torch.where(flat > 0.2, flat, 0.3 * flat.exp()).mean()
    gaps = y[:, ::2]
    return m.second(y) + z + torch.where(gaps > 0, gaps, gaps.exp()).mean()


def masks_are_read_by_the_program(m, x):
    """The forward counts what is in a mask that it also saves."""
    y = m.first(x)
    mask = y > 0.1
    return m.second(torch.where(mask, y.exp(), -y) * (mask.sum() / mask.numel()))


def dropout_of_every_layout(m, x):
    """Transposed, expanded, with gaps, and of features."""
    y = m.first(x)
    z = F.dropout(y.t(), 0.3).t() + F.dropout(y[:, :1].expand(ROWS, WIDTH), 0.4)
    z = z + F.dropout(y[::2, ::2], 0.2).repeat(2, 2)
    z = F.feature_alpha_dropout(z.reshape(ROWS, WIDTH // 4, 4), 0.3).reshape(ROWS, WIDTH)
    return m.second(F.alpha_dropout(z, 0.5))


def dropout_in_place(m, x):
    """In place on what no other op needs."""
    y = m.first(x)
    F.dropout(y, 0.3, training=True, inplace=True)
    return F.dropout(F.silu(m.second(y)), 0.1, training=True, inplace=True)


def dropout_without_gradients(m, x):
    """Draws between those that are packed are not part of the graph."""
    with torch.no_grad():
        gate = F.dropout(m.first(x), 0.5)
    return F.dropout(torch.tanh(m.second(x) * gate), 0.3)


def rates_at_the_edge(m, x):
    """Nothing, everything and almost everything is dropped."""
    y = F.dropout(F.dropout(m.first(x), 0.0), 0.999999)
    return m.second(torch.tanh(x) + y) + F.dropout(y, 1.0)


def rates_of_each_element(m, x):
    """Probabilities that are tensors."""
    y = m.first(x)
    rates = torch.sigmoid(y.detach())
    noise = torch.empty_like(y).bernoulli_(rates).mul_(2).div_(3)
    return m.second(torch.tanh(y * noise) * torch.bernoulli(rates))


def several_types(m, x):
    """Masks and draws of other types than what they are multiplied with."""
    y = m.first(x)
    y = y * torch.randint(0, 2, y.shape) * (torch.rand_like(y) < 0.7)
    return m.second(
        torch.tanh(y * torch.empty_like(y, dtype=torch.float64).bernoulli_(0.5)).float()
    )


def positions_leave(m, x):
    """What pooling remembers is returned, copied, and used to put values back."""
    pooled, places = F.max_pool2d(m.first(x), 2, return_indices=True)
    inner = m.second(pooled)
    return F.max_unpool2d(inner, places, 2) + F.max_unpool2d(inner.tanh(), places.clone(), 2)


def positions_of_every_kind(m, x):
    """Adaptive and fractional pooling, and one over overlapping windows."""
    y = m.first(x)
    y = F.max_pool2d(y, 3, stride=1, padding=1) * y
    return m.second(F.adaptive_max_pool2d(y, 15) * F.fractional_max_pool2d(y, 2, output_size=15))


def attention_with_a_mask(m, x):
    """A boolean mask, and dropout inside of attention."""
    q, k, v = m.first(x), m.second(x), x.tanh()
    q, k, v = (t.view(4, ROWS // 16, 4, WIDTH).transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(ROWS // 16, ROWS // 16, dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.2)
    return out.transpose(1, 2).reshape(ROWS, WIDTH)


def noise_that_is_filled_late(m, x):
    """RReLU saves its noise before it is there."""
    return F.dropout(F.rrelu(m.first(x).float(), training=True) + m.second(x), 0.4)


def generator_is_reseeded(m, x):
    """The state of the generator is another one after the call, though nothing is drawn."""
    torch.manual_seed(11)
    return m.second(torch.tanh(m.first(x)))


def noise_from_another_thread(m, x):
    """Drawn where no mode of the thread that trains sees it."""
    drawn: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: drawn.append(torch.rand(ROWS, 1)))
    thread.start()
    thread.join()
    return m.second(torch.tanh(m.first(x) * drawn[0]))


# -- what no plan may be made of ------------------------------------------------------------------


def layers_on_threads(m, x):
    """Both layers at once."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda layer: torch.tanh(layer(x)), (m.first, m.second))
    return one + other


def halves_on_threads(m, x):
    """The same layers on both halves of the batch at once, as data-parallel code does."""
    with ThreadPoolExecutor(2) as pool:
        halves = pool.map(lambda half: m.second(F.dropout(m.first(half), 0.1)), x.chunk(2))
        return torch.cat(list(halves))


def ops_on_a_thread(m, x):
    """A dropout, by no module."""
    y = m.first(x)
    with ThreadPoolExecutor(1) as pool:
        return m.second(pool.submit(lambda: F.dropout(torch.tanh(y), 0.5)).result())


def ops_on_a_thread_after_a_branch(m, x):
    """The same, traced with real tensors as the program reads a value."""
    return ops_on_a_thread(m, x if x.sum() < 1e9 else 2 * x)


THREADED = (
    layers_on_threads, halves_on_threads, ops_on_a_thread, ops_on_a_thread_after_a_branch,
)  # fmt: skip


def _rows():
    return torch.randn(ROWS, WIDTH)


def _images():
    return torch.randn(2, 3, 32, 32)


def _tied():
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.ReLU())
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.ReLU())
    other[0].weight = block[0].weight
    return nn.Sequential(block, nn.Tanh(), block, other, nn.Dropout(0.1))


class Recurrent(nn.Module):
    """Two layers whose kernel keeps a reserve of its own, with dropout between them."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.3)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.lstm(x)[0])


def _half_in_eval():
    blocks = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.BatchNorm1d(WIDTH), nn.ReLU())
        for _ in range(3)
    ]
    blocks[1].eval()
    return nn.Sequential(*blocks)


class Alike(nn.Module):
    """One of many blocks that are alike but for what `change` makes different."""

    def __init__(self, change=None, *, p=0.1, dtype=torch.float32):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.p, self.is_hard, self.dtype = p, False, dtype
        self.to(dtype)
        if change is not None:
            change(self)

    def forward(self, x):
        y = self.up(x.to(self.dtype))
        y = F.dropout(F.relu(y) if self.is_hard else F.gelu(y), self.p)
        return x + self.down(y).to(x.dtype)


def alike_but_for_one(name):
    """Six blocks, the third unlike the others in what the name says."""
    blocks = [Alike() for _ in range(6)]
    odd = {
        "a flag": lambda: Alike(lambda block: setattr(block, "is_hard", True)),
        "a shared sub-module": lambda: Alike(lambda block: setattr(block, "up", blocks[4].up)),
        "a frozen parameter": lambda: Alike(lambda block: block.down.weight.requires_grad_(False)),
        "a rate of dropout": lambda: Alike(p=0.7),
        "a dtype": lambda: Alike(dtype=torch.float64),
        "an empty bias": lambda: Alike(lambda block: setattr(block.up, "bias", None)),
        "a hook": lambda: Alike(
            lambda block: block.up.register_forward_hook(lambda _m, _x, y: y * 2)
        ),
    }
    blocks[2] = odd[name]()
    return nn.Sequential(*blocks)


UNLIKE = (
    "a flag", "a shared sub-module", "a frozen parameter", "a rate of dropout", "a dtype",
    "an empty bias", "a hook",
)  # fmt: skip


# Name -> a function that makes model and batch.
ADVERSARIES = {
    **{
        function.__name__: lambda f=function: (nn.Sequential(Odd(f), Odd(f)), _rows())
        for function in (
            noise_is_read_elsewhere, part_of_the_noise_is_written_to, masks_are_viewed,
            masks_are_written_to, masks_fill_no_bytes, masks_are_read_by_the_program,
            dropout_of_every_layout, dropout_in_place, dropout_without_gradients,
            rates_at_the_edge, rates_of_each_element, several_types, attention_with_a_mask,
            generator_is_reseeded, noise_from_another_thread,
        )
    },
    **{
        function.__name__: lambda f=function: (OddPool(f), _images())
        for function in (positions_leave, positions_of_every_kind)
    },
    "channels_last": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.Conv2d(8, 8, 3), nn.Dropout(0.2),
            nn.MaxPool2d(2), nn.FeatureAlphaDropout(0.2),
        ).to(memory_format=torch.channels_last),
        _images().to(memory_format=torch.channels_last),
    ),
    "double_precision": lambda: (
        nn.Sequential(Odd(noise_is_read_elsewhere), Odd(masks_are_viewed)).double(),
        _rows().double(),
    ),
    "half_precision": lambda: (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.GELU(), nn.Dropout(0.3)).half(),
        _rows().half(),
    ),
    "noise_that_is_filled_late": lambda: (
        nn.Sequential(Odd(noise_that_is_filled_late), Odd(dropout_in_place)), _rows(),
    ),
    "tied": lambda: (_tied(), _rows()),
    "recurrent": lambda: (nn.Sequential(Recurrent()), torch.randn(4, 24, WIDTH)),
    "half_in_eval": lambda: (_half_in_eval(), _rows()),
}  # fmt: skip
