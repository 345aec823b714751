"""Rows of the conformance table that only CUDA shows: the same bits, or no more than noise apart.

Not run on a GPU yet: written for `python -m pytest tests/gpu` wherever one is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import remat
from remat.prove.measure import restored
from tests.conformance import verdicts
from tests.conformance.cases import CASES, Case, square_mean
from tests.conformance.parts import ROWS, WIDTH, Block, Net

pytestmark = pytest.mark.gpu

WORKER = Path(__file__).parent / "sync_batch_norm.py"


def proofs(model, batch):
    """Verify every kind of plan that the CPU's table has."""
    for plan in verdicts.plans_of(model, batch):
        yield remat.verify(model, batch, plan, loss=square_mean, optimizer=None)


class DrawsOnBoth(nn.Module):
    """Noise from the CPU's generator and from the device's."""

    def forward(self, x):
        noise = torch.rand(x.shape[-1]).to(x.device)
        return nn.functional.dropout(x, 0.5, self.training) * noise


class MovesInside(nn.Module):
    """Computes, and draws, on the last device, and comes back."""

    def __init__(self):
        super().__init__()
        self.there = torch.device("cuda", torch.cuda.device_count() - 1)
        self.linear = nn.Linear(2 * WIDTH, 2 * WIDTH, device=self.there)

    def forward(self, x):
        y = nn.functional.dropout(self.linear(x.to(self.there)), 0.5, self.training)
        return y.to(x.device)


@pytest.mark.parametrize("make", [DrawsOnBoth, MovesInside])
def test_row_7_randomness_on_a_second_device(make):
    """The states of all generators that a region draws from are kept."""
    torch.manual_seed(0)
    model, batch = Net(lambda: Block(make())).cuda(), torch.randn(ROWS, WIDTH, device="cuda")
    for module in model.modules():
        if isinstance(module, MovesInside):
            module.linear.to(module.there)
    assert all(proof.identical for proof in proofs(model, batch))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_row_10_statistics_that_processes_share(run_pair, tmp_path):
    """SyncBN under NCCL: statistics are updated once, gradients are those without a plan."""
    path = tmp_path / "found.json"
    run_pair(WORKER, path)
    assert json.loads(path.read_text()) == verdicts.IDENTICAL


class Dispatches(nn.Module):
    """Rows are sent to experts and added up again by atomic additions, in any order."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        gates, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = (chosen == number).nonzero(as_tuple=True)
            weighted = torch.tanh(expert(x[rows])) * gates[rows, slot].unsqueeze(-1)
            out = out.index_add(0, rows, weighted)
        return x + out


def test_row_14_dispatch_whose_sums_do_not_repeat():
    """Sums by atomic additions: equal, or apart by no more than two runs without a plan."""
    torch.manual_seed(0)
    model, batch = Net(Dispatches).cuda(), torch.randn(ROWS, WIDTH, device="cuda")
    assert all(proof.passed for proof in proofs(model, batch))


class AddsAtomically(torch.autograd.Function):
    """Gathers rows; its backward adds rows that were taken often, in whatever order."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x[rows]

    @staticmethod
    def backward(ctx, gradient):
        (rows,) = ctx.saved_tensors
        summed = gradient.new_zeros(ctx.shape)
        return summed.index_put_((rows,), gradient, accumulate=True), None


class Gathers(nn.Module):
    """Every row is read many times."""

    def forward(self, x):
        rows = torch.arange(64 * len(x), device=x.device) % 7
        return x + AddsAtomically.apply(x, rows).view(64, *x.shape).mean(0)


def test_row_15_kernels_that_do_not_repeat():
    """A custom function whose backward is not reproducible: within the model's own noise."""
    torch.manual_seed(0)
    model, batch = Net(lambda: Block(Gathers())).cuda(), torch.randn(ROWS, WIDTH, device="cuda")
    assert all(proof.passed for proof in proofs(model, batch))


@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_row_43_padding_by_inductor():
    """Products of odd sizes in half precision, which inductor pads: as compiled without a plan."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(1027, 1027), nn.GELU(), nn.Dropout(0.1)) for _ in range(3)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    batch = torch.randn(1021, 1027, device="cuda", dtype=torch.bfloat16)
    case = Case(row=43, title="", thread="", build=lambda: model)

    def compiled():
        torch._dynamo.reset()
        return verdicts.run(case, model, batch, torch.compile(model))

    with torch._inductor.config.patch(shape_padding=True, fallback_random=True):
        theirs, again = compiled(), compiled()
        with remat.apply(model, verdicts.plans_of(model, batch)[1]):
            ours = compiled()
    noise = verdicts.differing(theirs, again)
    for name in verdicts.differing(theirs, ours):
        a, b = theirs[name].float(), ours[name].float()
        assert name in noise or (a - b).abs().max() <= 2**-6 * a.abs().max(), name


def test_row_54_a_fused_op_of_a_third_party():
    """An op made with Triton and registered with torch: run again, or kept, with the same bits."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    import triton.language as tl

    @triton.jit
    def kernel(x, y, count, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count)
        tl.store(y + at, value * tl.sigmoid(value), mask=at < count)

    @torch.library.custom_op("remat_tests::fused_silu", mutates_args=())
    def fused(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
        return y

    fused.register_fake(torch.empty_like)

    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))

    fused.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0])
    )

    class Fused(nn.Module):
        def forward(self, x):
            return fused(x.contiguous())

    torch.manual_seed(0)
    model, batch = Net(lambda: Block(Fused())).cuda(), torch.randn(ROWS, WIDTH, device="cuda")
    assert all(proof.identical for proof in proofs(model, batch))


def test_row_58_a_context_that_chooses_attentions_kernel():
    """The forward alone runs under another kernel: recomputed under the same one."""
    case = next(case for case in CASES if case.row == 58)
    torch.manual_seed(0)
    model, batch = case.build().cuda(), case.batch().cuda()
    theirs = verdicts.run(case, model, batch)
    for plan in verdicts.plans_of(model, batch):
        with remat.apply(model, plan), restored(model, batch):
            assert verdicts.differing(theirs, verdicts.run(case, model, batch)) == []
