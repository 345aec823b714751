"""The trace against real steps: the same ops, FLOPs, saved bytes and branches, and nothing left."""

from __future__ import annotations

import dataclasses
import logging
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import remat
from remat.trace.capture import capture
from remat.trace.records import BACKWARD, BASE_KINDS, FORWARD, OPTIMIZER
from remat.trace.standin import random_states
from remat.trace.step import compute_loss
from tests.models import Block, Recurrent, Tower, square_mean, tightest
from tests.zoo import ALL, TINY

CRUMBS = 4096
# What fakes dispatch differently, none of which makes memory: saving a tensor, reading a value, and
# making a view anew after a write through it.
_BESIDE = {
    "aten.detach.default", "aten._local_scalar_dense.default", "aten.select.int",
    "aten.as_strided.default",
}  # fmt: skip


class Names(TorchDispatchMode):
    """Write down the name of every op."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def taken(self):
        taken = [n for n in self.names if n not in _BESIDE]
        self.names.clear()
        return taken


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"checkpointed_by_hand"}))
def test_ops_are_those_of_a_real_step(name):
    """Forward, backward and the warm optimizer step dispatch the same ops, in the same order."""
    case = ALL[name].build(dropout=0.1)
    trace = capture(case.model, case.batch, loss=case.loss)
    optimizer = torch.optim.AdamW(p for p in case.model.parameters() if p.requires_grad)
    real = {}
    with Names() as mode:
        value = compute_loss(case.model, case.batch, case.loss)
        real[FORWARD] = mode.taken()
        value.backward()
        real[BACKWARD] = mode.taken()
        optimizer.step()
        mode.taken()
        optimizer.step()
        real[OPTIMIZER] = mode.taken()
    for phase, names in real.items():
        traced = [op.name for op in trace.ops if op.phase == phase and op.name not in _BESIDE]
        assert traced == names, phase


def shared_block():
    return Recurrent(16, depth=4), torch.randn(32, 16), square_mean


def siamese():
    return Tower(16), torch.randn(32, 16), square_mean


def convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3),
    )  # fmt: skip
    return model, torch.randn(2, 3, 12, 12), square_mean


def frozen_front():
    model = nn.Sequential(*(Block(16) for _ in range(4)))
    model[:2].requires_grad_(False)
    return model, torch.randn(32, 16), square_mean


SMALL = [shared_block, siamese, convolutions, frozen_front]
ENTRIES = [
    "gpt2", "llama", "t5", "resnet", "unet", "moe", "tied_weights", "views_in_place",
    "partial_no_grad", "nested_batch", "keyword_arguments", "custom_function", "spectral_norm",
]  # fmt: skip


def built(case):
    if callable(case):
        return case()
    return ALL[case].build(dropout=0.1)


@pytest.mark.parametrize("case", [*SMALL, *ENTRIES])
def test_flops_are_those_that_torch_counts(case):
    """FLOPs of the traced forward and backward equal FlopCounterMode's on a real step."""
    model, batch, loss = built(case)
    trace = capture(model, batch, loss=loss, optimizer=None)
    with FlopCounterMode(display=False) as forward:
        value = compute_loss(model, batch, loss)
    with FlopCounterMode(display=False) as backward:
        value.backward()
    for phase, counter in ((FORWARD, forward), (BACKWARD, backward)):
        assert sum(op.flops for op in trace.ops if op.phase == phase) == counter.get_total_flops()
    assert forward.get_total_flops() > 0


@pytest.mark.parametrize("case", [*SMALL, *ENTRIES])
def test_saved_bytes_are_those_that_autograd_keeps(case):
    """Number and bytes of tensors saved for backward equal those of a real forward."""
    model, batch, loss = built(case)
    trace = capture(model, batch, loss=loss, optimizer=None)
    base = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    batch_ids = {t.untyped_storage()._cdata for t in flat(batch)}
    saved, count = {}, 0

    def pack(tensor):
        nonlocal count
        count += 1
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute_loss(model, batch, loss)
    real = sum(s.nbytes() for key, s in saved.items() if key not in base | batch_ids)
    traced = {h.storage for h in trace.handles if trace.storages[h.storage].kind not in BASE_KINDS}
    assert len(trace.handles) == count
    assert sum(trace.storages[s].size_bytes for s in traced) == real > 0


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [t for item in value for t in flat(item)]


@pytest.mark.parametrize("build", SMALL)
def test_peak_is_the_measured_one(build):
    """The simulated peak is the allocator's."""
    model, batch, loss = build()
    simulated = remat.simulate(model, batch, loss=loss).peak_bytes
    measured = remat.measure(model, batch, loss=loss, steps=1).peak_bytes
    assert abs(simulated - measured) <= max(CRUMBS, 0.001 * measured)


def test_module_calls_are_told_apart():
    """A block called four times has four calls, in order, inside the root's."""
    model, batch, loss = shared_block()
    trace = capture(model, batch, loss=loss)
    assert [c.index for c in trace.calls if c.module == "block"] == [0, 1, 2, 3]
    assert trace.num_calls("block") == 4
    assert trace.calls[0].module == ""
    starts = [c.start for c in trace.calls]
    assert starts == sorted(starts)


# -- batches and outputs --------------------------------------------------------------------------


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass
class Out:
    hidden: torch.Tensor
    loss: torch.Tensor


class ReturnsDataclass(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x, y=None, *, scale=1.0):
        hidden = self.block(x) * scale
        return Out(hidden, (hidden - (0 if y is None else y)).square().mean())


class BlockOfPairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, point):
        return Point(self.block(point.x), point.y + 1)


class PairModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(BlockOfPairs() for _ in range(3))

    def forward(self, point):
        for block in self.blocks:
            point = block(point)
        return {"loss": point.x.square().mean() + point.y.mean(), "points": [point]}


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (ReturnsDataclass, lambda: torch.randn(64, 16)),
        (ReturnsDataclass, lambda: (torch.randn(64, 16), torch.randn(64, 16))),
        (ReturnsDataclass, lambda: [torch.randn(64, 16)]),
        (ReturnsDataclass, lambda: {"x": torch.randn(64, 16), "scale": 2.0}),
        (PairModel, lambda: {"point": Point(torch.randn(64, 16), torch.randn(64, 16))}),
    ],
)
def test_batches_and_outputs_of_many_kinds(model, batch):
    """Tensors, tuples, lists, mappings, namedtuples and dataclasses: planned exactly, same bits."""
    made, given = model(), batch()
    plan = tightest(made, given)
    assert plan.regions
    proof = remat.verify(made, given, plan)
    assert proof.identical
    assert proof.passed
    assert abs(plan.predicted_peak_bytes - proof.measured_peak_bytes) <= CRUMBS


def test_batch_encoding_of_transformers():
    """A dict-like batch of another class is passed as keywords, as the mapping that it is."""
    from transformers import BatchEncoding

    case = TINY["gpt2"].build(dropout=0.1)
    batch = BatchEncoding(dict(case.batch))
    plan = remat.plan(case.model, batch, "90%")
    assert plan.regions
    assert plan.regions == remat.plan(case.model, dict(case.batch), "90%").regions
    assert remat.verify(case.model, batch, plan).passed


def test_tensor_given_twice_is_counted_once():
    """Inputs and labels that are one tensor are one storage, with real tensors as with fakes."""

    class Model(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.block, self.branch = Block(16), branch

        def forward(self, x, y):
            if self.branch and x.mean() < -100:
                return x.mean()
            return (self.block(x) - y).square().mean()

    x = torch.randn(512, 16)
    for branch in (False, True):
        breakdown = remat.simulate(Model(branch), (x, x)).breakdown
        assert breakdown["batch"] == x.nbytes


# -- branches -------------------------------------------------------------------------------------


class IfMask(nn.Module):
    """Takes its branch by what a mask or lengths say."""

    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x, mask, lengths):
        x = self.block(x)[:, : int(lengths.max().item())]
        if mask.all():
            return x.square().mean()
        kept = mask[:, : x.shape[1]].nonzero().shape[0]
        return (torch.tanh(x) * torch.sigmoid(x)).square().sum() / kept


def masked(ones, longest):
    mask = torch.ones(8, 16, dtype=torch.bool)
    mask[0, 5:] = ones
    return torch.randn(8, 16, 16), mask, torch.tensor([3, longest, 2])


@pytest.mark.parametrize("ones", [True, False])
@pytest.mark.parametrize("longest", [4, 16])
def test_branches_on_integers_follow_their_values(ones, longest, caplog):
    """mask.all() and lengths.max() steer the trace as they steer the step, without real tensors."""
    model, batch = IfMask(), masked(ones, longest)
    with caplog.at_level(logging.WARNING, logger="remat"):
        plan = remat.plan(model, batch, "1000%")
    assert not caplog.records
    measured = remat.measure(model, batch, steps=1).peak_bytes
    assert abs(plan.predicted_peak_bytes - measured) <= CRUMBS
    names = [op.name for op in capture(model, batch).ops]
    assert ("aten.sigmoid.default" in names) == (not ones)


@pytest.mark.parametrize("kind", ["none", "ones", "zeros"])
def test_transformers_mask_costs_what_it_costs_in_a_real_step(kind):
    """An attention mask of ones builds no scores' mask in the trace either; one with zeros does."""
    case = TINY["llama"].build()
    ids = case.batch["input_ids"]
    batch = dict(case.batch)
    if kind != "none":
        batch["attention_mask"] = torch.ones_like(ids)
    if kind == "zeros":
        batch["attention_mask"][0, :5] = 0
    peak = remat.simulate(case.model, batch).peak_bytes
    measured = remat.measure(case.model, batch, steps=1).peak_bytes
    assert abs(peak - measured) <= CRUMBS
    masks = [
        mask.shape
        for signature in capture(case.model, batch).signatures
        if signature.name.startswith("aten._scaled_dot_product")
        and (mask := dict(signature.keywords).get("attn_mask")) is not None
    ]
    rows, tokens = ids.shape
    assert bool(masks) == (kind == "zeros")
    assert all(shape == (rows, 1, tokens, tokens) for shape in masks)


class Overwritten(nn.Module):
    """An integer tensor whose known value is overwritten by one that is not known."""

    def __init__(self, write):
        super().__init__()
        self.block, self.write = Block(16), write

    def forward(self, x):
        flags = torch.zeros(2, dtype=torch.long)
        self.write(flags, x)
        y = self.block(x)
        return (torch.tanh(y) * torch.sigmoid(y) if flags.max() > 0 else y).square().mean()


def write_into_view(flags, x):
    flags[0] = (x > -100).sum()


def write_random(flags, x):
    flags.random_(1, 5)


def write_by_out(flags, x):
    torch.sum((x > -100).long(), dim=(0, 1), out=flags[:1].squeeze(0))


@pytest.mark.parametrize("write", [write_into_view, write_random, write_by_out])
def test_overwritten_values_are_not_followed(write):
    """A value that was overwritten, through a view or at random, is not taken for the old one."""
    model, batch = Overwritten(write), torch.randn(64, 16)
    plan = tightest(model, batch)
    proof = remat.verify(model, batch, plan)
    assert proof.passed
    measured = remat.measure(model, batch, steps=1).peak_bytes
    assert abs(plan.keep_all_peak_bytes - measured) <= CRUMBS


def test_mask_used_in_place_is_still_known():
    """A mask that an in-place op only reads keeps its value."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(16)

        def forward(self, x, mask):
            y = self.block(x) * 1
            y.masked_fill_(mask, 0.0)
            return (torch.tanh(y) if mask.any() else y).square().mean()

    assert capture(Model(), (torch.randn(8, 16), torch.rand(8, 16) > 0.5)).notes == []


def test_following_values_never_writes_to_a_tensor_outside_the_model():
    """A counter that a closure holds is not advanced by the trace."""
    count = torch.zeros((), dtype=torch.long)
    model = nn.Sequential(Block(16))

    def loss(m, x):
        count.add_(1)
        return m(x).mean()

    capture(model, torch.randn(8, 16), loss=loss)
    assert int(count) == 0


class IfMean(nn.Module):
    """Takes its branch by a computed floating point value."""

    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x):
        y = self.block(x)
        return y * 2 if y.mean() > -100 else torch.tanh(y)


class Selects(nn.Module):
    """Selects rows by computed values."""

    def __init__(self):
        super().__init__()
        self.block = Block(16)

    def forward(self, x):
        y = self.block(x)
        y = y[y.detach().sum(1) > -1e6]
        return y + torch.nonzero(y.detach() > -1e6)[:1, :1]


@pytest.mark.parametrize("block", [IfMean, Selects])
def test_branches_on_floats_are_traced_with_real_tensors(block, caplog):
    """One warning, a note, an exact prediction, the same bits, and the model untouched."""
    model, batch = nn.Sequential(*(block() for _ in range(3))), torch.randn(64, 16)
    before = [p.detach().clone() for p in model.parameters()]
    random_before = random_states()["torch"]
    with caplog.at_level(logging.WARNING, logger="remat"):
        plan = remat.plan(model, batch, "75%", loss=square_mean)
    assert len(caplog.records) == 1
    assert "real tensors" in caplog.records[0].getMessage()
    assert any("real tensors" in note for note in plan.notes)
    assert torch.equal(random_states()["torch"], random_before)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert plan.regions
    proof = remat.verify(model, batch, plan, loss=square_mean)
    assert proof.passed
    assert abs(plan.predicted_peak_bytes - proof.measured_peak_bytes) <= CRUMBS


@pytest.mark.parametrize("block", [IfMean, Selects])
def test_branches_on_floats_of_a_meta_model_are_refused(block):
    """Without values there is no branch to take: the error says to pass real tensors."""
    with torch.device("meta"):
        model, batch = nn.Sequential(block()), torch.randn(64, 16)
    with pytest.raises(remat.CaptureError, match="pass real tensors"):
        remat.plan(model, batch, "75%", loss=square_mean)


# -- autocast and gradients at hand ---------------------------------------------------------------


def inside(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch).float().square().mean()


@pytest.mark.parametrize("outside", [False, True])
def test_autocast_is_planned_and_verified(outside):
    """Autocast in the loss or around all: the same bits, and the predicted peak."""
    model, batch = nn.Sequential(*(Block(128) for _ in range(4))), torch.randn(512, 128)
    loss = square_mean if outside else inside
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        plan = remat.plan(model, batch, "90%", loss=loss)
        proof = remat.verify(model, batch, plan, loss=loss)
        measured = remat.measure(model, batch, loss=loss, steps=2).peak_bytes
    assert plan.regions
    assert proof.identical
    assert proof.passed
    assert abs(plan.keep_all_peak_bytes - measured) <= CRUMBS
    assert abs(proof.peak_error) <= 0.001
    assert plan.fingerprint.autocast_dtype == ("bfloat16" if outside else None)


def test_gradients_at_hand_are_untouched_and_change_no_plan():
    """Accumulated gradients stay the tensors they are, and the plan is that without them."""
    model, batch = nn.Sequential(*(Block(16) for _ in range(3))), torch.randn(64, 16)
    clean = tightest(model, batch, loss=square_mean)
    square_mean(model, batch).backward()
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients]
    plan = tightest(model, batch, loss=square_mean)
    assert plan.predicted_peak_bytes == clean.predicted_peak_bytes
    assert [r.module for r in plan.regions] == [r.module for r in clean.regions]
    assert remat.verify(model, batch, plan, loss=square_mean).passed
    remat.measure(model, batch, loss=square_mean, steps=1)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, v) for g, v in zip(gradients, values, strict=True))


@pytest.mark.parametrize("verb", ["plan", "measure", "verify"])
def test_attributes_and_caches_are_put_back(verb):
    """Lists, nested dicts, counters, tensors and generators of modules are as they were."""

    class Keeps(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.block = Block(16)
            self.shared, self.nested, self.count = shared, {"deep": []}, 0
            self.total = torch.zeros(3)
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x):
            y = self.block(x)
            self.shared.append(y.detach())
            self.nested["deep"].append(y.detach())
            self.total += y.detach().mean()
            self.count += 1
            return y + torch.rand((), generator=self.generator)

    shared = []
    model, batch = nn.Sequential(*(Keeps(shared) for _ in range(3))), torch.randn(8, 16)
    plan = remat.plan(model, batch, "1000%", loss=square_mean)
    state = model[0].generator.get_state()
    if verb == "measure":
        remat.measure(model, batch, loss=square_mean, steps=2)
    if verb == "verify":
        assert remat.verify(model, batch, plan, loss=square_mean).identical
    for block in model:
        assert block.shared is shared
        assert (shared, block.nested, block.count) == ([], {"deep": []}, 0)
        assert torch.equal(block.total, torch.zeros(3))
    assert torch.equal(model[0].generator.get_state(), state)
