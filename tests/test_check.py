"""Check finds what is planted in a model's own checkpointing, and nothing in a clean one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
import torch.utils.checkpoint as library
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.planner.records import Severity
from tests.models import square_mean

WIDTH = 32
STEP = {"loss": square_mean}


class Part(nn.Module):
    """x + linear(middle(linear(x))): `middle` is where faults are planted."""

    def __init__(self, middle=None):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.middle = middle or nn.GELU()

    def forward(self, x):
        return x + self.down(torch.tanh(self.middle(self.up(x))))


class Checkpointed(nn.Module):
    """A stem, blocks that are checkpointed but for the last, and a head."""

    def __init__(self, make=Part, *, blocks=3, last=False, stem=True, **settings):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH) if stem else nn.Identity()
        self.blocks = nn.ModuleList(make() for _ in range(blocks))
        self.tail, self.last = Part(), last
        self.settings = {"use_reentrant": False, **settings}

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, **self.settings)
        return checkpoint(self.tail, x, **self.settings) if self.last else self.tail(x)


@pytest.fixture
def batch():
    return torch.randn(256, WIDTH)


def found_in(model, batch, **step):
    """The codes of everything worse than a note, and the report."""
    report = remat.check(model, batch, **(step or STEP))
    return {h.code for h in report if h.severity is not Severity.NOTE}, report


# -- clean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_clean_checkpointing_is_clean(batch, reentrant):
    """Blocks with dropout, checkpointed as they should be, are clean and save memory."""
    model = Checkpointed(lambda: Part(nn.Dropout(0.5)), use_reentrant=reentrant)
    codes, report = found_in(model, batch)
    assert codes == set()
    assert report.is_clean
    assert report.num_regions == 3
    assert report.was_compared
    assert report.identical
    assert report.peak_bytes < report.plain_peak_bytes


def test_model_without_checkpointing_is_clean(batch):
    """A model that checkpoints nothing has nothing to be compared, and nothing wrong."""
    codes, report = found_in(nn.Sequential(Part(), Part(nn.BatchNorm1d(2 * WIDTH))), batch)
    assert codes == set()
    assert list(report) == []
    assert report.num_regions == 0


def test_peaks_are_those_of_the_simulation_of_each_model(batch):
    """The two peaks are those of the model as it stands and of a twin that never checkpoints."""
    model = Checkpointed()
    plain = nn.Sequential(model.stem, *model.blocks, model.tail)
    report = remat.check(model, batch, **STEP)
    assert report.peak_bytes == remat.simulate(model, batch, **STEP).peak_bytes
    assert report.plain_peak_bytes == remat.simulate(plain, batch, **STEP).peak_bytes


def test_check_leaves_torch_and_the_model_as_they_were(batch):
    """Torch's entry points, parameters, buffers, gradients and random state are put back."""
    model = Checkpointed(lambda: Part(nn.BatchNorm1d(2 * WIDTH)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    entry_points = (library.CheckpointFunction, library._checkpoint_without_reentrant_generator)
    remat.check(model, batch, **STEP)
    now = (library.CheckpointFunction, library._checkpoint_without_reentrant_generator)
    assert entry_points == now
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_model_without_values_is_checked_from_the_trace(batch):
    """On the meta device the hazards are found; nothing is compared, and it says so."""
    with torch.device("meta"):
        model = Checkpointed(lambda: Part(nn.Dropout(0.5)), preserve_rng_state=False)
    codes, report = found_in(model, batch.to("meta"))
    assert codes == {"random-state"}
    assert not report.was_compared
    assert any("no values" in note for note in report.notes)


def test_applied_plan_is_refused(batch):
    """A model under a plan of ours is no model to check: verify is for that."""
    model = nn.Sequential(Part(), Part())
    with (
        remat.auto_checkpoint(model, batch, "1000%", **STEP),
        pytest.raises(remat.ApplyError, match="remove"),
    ):
        remat.check(model, batch, **STEP)


# -- planted: wrong results -----------------------------------------------------------------------


class DrawsElsewhere(nn.Module):
    def forward(self, x):
        return x * torch.tensor(random.random() + float(np.random.rand()))  # noqa: NPY002


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return x * torch.rand(x.shape[1:], generator=self.generator)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.steps += 1
        return torch.tanh(x) * x


class Spectral(Part):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.up)


class RandomReLU(Part):
    """RReLU last: recomputation stops before its noise is filled in."""

    def forward(self, x):
        return x + torch.rrelu(self.down(self.up(x)), training=True)


class ChangesAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


class WritesToWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.scale.mul_(0.5)
        return torch.tanh(x) * self.scale


WRONG = {
    "random-state": ({"preserve_rng_state": False}, lambda: Part(nn.Dropout(0.5)), "OLMo-core#828"),
    "python-random": ({}, lambda: Part(DrawsElsewhere()), "torch.utils.checkpoint"),
    "generator": ({}, lambda: Part(OwnGenerator()), "torch.utils.checkpoint"),
    "buffers-twice": ({}, lambda: Part(nn.BatchNorm1d(2 * WIDTH)), "pytorch#96136"),
    "buffers-twice, a counter": ({}, lambda: Part(Counts()), "pytorch#96136"),
    "power-iteration": ({}, Spectral, "pytorch#96136"),
    "rrelu": ({}, RandomReLU, "pytorch#193671"),
    "state-changed": ({}, lambda: Part(ChangesAttribute()), "transformers#46572"),
    "outside-changed": ({}, lambda: Part(WritesToWeight()), "torch.utils.checkpoint"),
    "reentrant-without-gradient": ({"use_reentrant": True, "stem": False}, Part, "peft#137"),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_fault_is_found(name, batch):
    """Each fault is named with its place, what to do and its thread, and the bits bear it out."""
    settings, make, thread = WRONG[name]
    code = name.partition(",")[0]
    model = Checkpointed(make, **settings)
    _, report = found_in(model, batch)
    hazard = next(h for h in report if h.code == code)
    assert hazard.severity is Severity.ERROR
    assert hazard.where.startswith("blocks.0")
    assert hazard.message
    assert hazard.fix
    assert thread in hazard.thread
    assert not report.is_clean
    assert report.was_compared
    assert not report.identical
    assert "different-result" in {h.code for h in report}


def test_gradient_that_only_the_bits_show_is_found(batch):
    """What no trace can show, code that runs otherwise the second time, the comparison finds."""

    class Secretly(nn.Module):
        def forward(self, x):
            is_backward = torch._C._current_graph_task_id() >= 0
            return x * (1.01 if is_backward else 1.0)

    codes, report = found_in(Checkpointed(lambda: Part(Secretly()), blocks=1), batch)
    assert "different-result" in codes
    named = {d.name for d in report.differences}
    assert "gradient of blocks.0.down.weight" in named


def test_step_that_fails_with_checkpointing_is_found(batch):
    """A region that writes to its input fails only when it is run again: found and explained."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x.add_(torch.tanh(self.linear(2 * x)))

    codes, _ = found_in(Checkpointed(Adds), batch)
    assert "input-changed" in codes


def test_nested_inputs_of_reentrant_checkpointing_are_found(batch):
    """A tensor in a dictionary is invisible to reentrant checkpointing."""

    class Passes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Linear(WIDTH, WIDTH), Part()

        def forward(self, x):
            side = {"side": self.stem(x)}
            run = lambda y, given: self.part(y) + given["side"]  # noqa: E731
            return checkpoint(run, self.stem(x), side, use_reentrant=True)

    codes, _ = found_in(Passes(), batch)
    assert "reentrant-nested-input" in codes


def test_tensor_changed_before_backward_is_found(batch):
    """A region that reads a buffer which is written to later is run again with other values."""

    class Later(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.part = nn.Linear(WIDTH, WIDTH), Part()
            self.register_buffer("scale", torch.ones(WIDTH))

        def forward(self, x):
            y = checkpoint(lambda z: self.part(z * self.scale), self.stem(x), use_reentrant=False)
            self.scale.mul_(0.5)
            return y * y

    codes, report = found_in(Later(), batch)
    assert "changed-before-backward" in codes
    assert not report.identical


def test_memory_budget_with_dropout_is_found(batch):
    """Torch's own memory budget redraws dropout in backward (pytorch#190758)."""
    with functorch_config.patch(activation_memory_budget=0.5):
        codes, report = found_in(nn.Sequential(Part(nn.Dropout(0.5))), batch)
        assert codes == {"memory-budget-random"}
        assert report.hazards[0].thread == "pytorch#190758"
        assert found_in(nn.Sequential(Part()), batch)[0] == set()


# -- planted: for nothing -------------------------------------------------------------------------


def test_last_block_checkpointed_is_found(batch):
    """The last block is run again at once, when memory is fullest: the peaks prove it."""
    codes, report = found_in(Checkpointed(last=True), batch)
    assert codes == {"last-region"}
    assert [h.where for h in report if h.code == "last-region"] == ["tail"]
    assert report.identical


def test_region_that_saves_nothing_is_found(batch):
    """A linear layer needs only its input, which is kept anyway."""
    codes, report = found_in(Checkpointed(lambda: nn.Linear(WIDTH, WIDTH)), batch)
    assert "saves-nothing" in codes
    assert report.identical


def test_doubled_and_nested_checkpointing_are_found(batch):
    """The same call checkpointed twice, and one that lies in another."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            run = lambda y: checkpoint(self.part, y, use_reentrant=False)  # noqa: E731
            return checkpoint(run, x, use_reentrant=False)

    class Inside(Part):
        def forward(self, x):
            return super().forward(checkpoint(nn.Sequential(nn.Tanh(), nn.Tanh()), x,
                                              use_reentrant=False))  # fmt: skip

    doubled, report = found_in(nn.Sequential(nn.Linear(WIDTH, WIDTH), Twice(), Twice()), batch)
    assert "doubled" in doubled
    assert next(h for h in report if h.code == "doubled").thread == "transformers#34928"
    assert "nested" in found_in(Checkpointed(Inside), batch)[0]


def test_hook_inside_a_region_is_found(batch):
    """A user's forward hook fires again when the region is run again; outside it does not."""
    model = Checkpointed()
    model.blocks[1].down.register_forward_hook(lambda *_: None)
    model.tail.register_forward_hook(lambda *_: None)
    codes, report = found_in(model, batch)
    assert codes == set()  # the last call of a region is not run again: this hook fires once
    assert list(report) == []
    model.blocks[1].up.register_forward_hook(lambda *_: None)
    codes, report = found_in(model, batch)
    assert codes == {"hooks-twice"}
    assert [h.where for h in report] == ["blocks.1.up"]


class Flagged(nn.Module):
    """Checkpoints as a library does: a flag, and only in training."""

    def __init__(self, *, on=True):
        super().__init__()
        self.stem, self.part, self.gradient_checkpointing = nn.Linear(WIDTH, WIDTH), Part(), on

    def forward(self, x):
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.part, self.stem(x), use_reentrant=False)
        return self.part(self.stem(x))


def test_switches_without_effect_are_found(batch):
    """On in eval, on in a wrapper only, off in some of the blocks: each is named."""
    assert found_in(nn.Sequential(Flagged(), Part()), batch)[0] == set()
    codes, report = found_in(nn.Sequential(Flagged(), Part()).eval(), batch)
    assert codes == {"inert-in-eval"}
    assert report.hazards[0].thread == "diffusers#9850"

    wrapper = nn.Sequential(Part(), Part())
    wrapper.gradient_checkpointing = True
    codes, report = found_in(wrapper, batch)
    assert codes == {"inert"}
    assert report.hazards[0].where == "the model"
    assert report.hazards[0].thread == "sentence-transformers#2717"

    codes, report = found_in(nn.Sequential(Flagged(), Flagged(on=False), Part()), batch)
    assert codes == {"not-reached"}
    assert report.hazards[0].where == "1"
