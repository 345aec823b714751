"""A plan on a model: nothing of the model changes, everything happens once, and it comes off."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.regions.apply import is_applied, remove
from tests.models import Block, Recurrent, Tower, square_mean, tightest


@pytest.fixture
def blocks():
    """Four blocks with dropout and batch norm, and a batch."""
    return nn.Sequential(*(Block(16, norm=nn.BatchNorm1d(16)) for _ in range(4)))


@pytest.fixture
def batch():
    return torch.randn(32, 16)


@pytest.fixture
def plan(blocks, batch):
    return plan_policy(blocks, batch, AllBlocks(), loss=square_mean)


def test_apply_leaves_names_classes_and_state(blocks, plan):
    """Parameter names, module classes and state_dict keys are the same with the plan on."""
    names = [n for n, _ in blocks.named_parameters()]
    classes = [type(m) for m in blocks.modules()]
    keys = list(blocks.state_dict())
    with remat.apply(blocks, plan):
        assert is_applied(blocks)
        assert [n for n, _ in blocks.named_parameters()] == names
        assert [type(m) for m in blocks.modules()] == classes
        assert list(blocks.state_dict()) == keys


def test_remove_restores_the_model_exactly_and_twice(blocks, plan):
    """After remove() every module has the attributes it had, and removing again is harmless."""
    before = [dict(m.__dict__) for m in blocks.modules()]
    handle = remat.apply(blocks, plan)
    handle.remove()
    handle.remove()
    for module, attributes in zip(blocks.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[k] is v for k, v in attributes.items())


def test_remove_puts_back_a_forward_that_the_instance_had(batch):
    """A forward that a user or library set on the instance is wrapped, and put back."""
    model = nn.Sequential(Block(16), Block(16))
    original = model[0].forward
    calls = []

    def patched(x):
        calls.append(1)
        return original(x)

    model[0].forward = patched
    made = plan_policy(model, batch, AllBlocks(), loss=square_mean)
    calls.clear()
    with remat.apply(model, made):
        square_mean(model, batch).backward()
    assert len(calls) == 2  # forward, and its recomputation
    assert model[0].forward is patched


def test_second_apply_is_refused(blocks, plan):
    """Applying a plan to a planned model says to remove the first."""
    with remat.apply(blocks, plan), pytest.raises(remat.ApplyError, match=r"handle\.remove\(\)"):
        remat.apply(blocks, plan)


def test_recomputation_runs_the_ops_that_the_plan_says(blocks, batch, plan):
    """Each planned block's linear layers run twice, and once without gradients."""
    runs = []
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            forward = module.forward
            module.forward = lambda x, f=forward: (runs.append(1), f(x))[1]
    with remat.apply(blocks, plan):
        square_mean(blocks, batch).backward()
        assert len(runs) == 2 * 8
        runs.clear()
        with torch.no_grad():
            blocks(batch)
        assert len(runs) == 8


def test_copy_runs_its_own_weights_under_the_plan(blocks, batch, plan):
    """A deep copy under a plan trains itself, not the original, and can be freed of the plan."""
    handle = remat.apply(blocks, plan)
    twin = copy.deepcopy(blocks)
    square_mean(twin, batch).backward()
    assert all(p.grad is None for p in blocks.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    remove(twin)
    assert not is_applied(twin)
    assert is_applied(blocks)
    handle.remove()


def test_model_under_a_plan_can_be_pickled_and_saved(blocks, batch, plan):
    """Pickle and torch.save round-trip a planned model; it computes the same."""
    with remat.apply(blocks, plan):
        blocks.eval()
        expected = blocks(batch)
        assert torch.equal(pickle.loads(pickle.dumps(blocks))(batch), expected)
        stream = io.BytesIO()
        torch.save(blocks.state_dict(), stream)
        stream.seek(0)
        blocks.load_state_dict(torch.load(stream))
        assert torch.equal(blocks(batch), expected)


def test_user_hooks_inside_a_region_see_one_call(batch):
    """A hook that only looks is not called by the recomputation; one that changes values is."""
    model = nn.Sequential(Block(16), Block(16))
    made = plan_policy(model, batch, AllBlocks(), loss=square_mean)
    seen = []
    model[0].body[0].register_forward_hook(lambda *_: seen.append(1))
    model[1].body[0].register_forward_hook(lambda _m, _i, out: out * 2)
    torch.manual_seed(0)
    square_mean(model, batch).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    seen.clear()
    torch.manual_seed(0)
    with remat.apply(model, made):
        square_mean(model, batch).backward()
    assert len(seen) == 1
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_buffers_are_updated_exactly_once(blocks, batch, plan):
    """Batch norm counts one batch per step under the plan."""
    with remat.apply(blocks, plan):
        square_mean(blocks, batch).backward()
    assert [int(b.norm.num_batches_tracked) for b in blocks] == [1] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: nn.Sequential(*(Block(16) for _ in range(5))), "parameter"),
        (lambda: nn.Sequential(*(Block(8) for _ in range(4))), r"0\.norm\.weight \[16\]"),
        (lambda: Block(16), "made for"),
        (lambda: nn.Sequential(*(Block(16) for _ in range(4))).double(), "float64"),
    ],
)
def test_plan_for_another_model_is_refused(batch, change, message):
    """A plan for another model names the first difference."""
    model = nn.Sequential(*(Block(16) for _ in range(4)))
    made = plan_policy(model, batch, AllBlocks(), loss=square_mean)
    with pytest.raises(remat.PlanMismatchError, match=message):
        remat.apply(change(), made)


def test_plan_of_another_version_is_refused(blocks, plan):
    """A plan made with another torch says so."""
    old = plan.fingerprint.model_copy(update={"torch_version": "1.13.0"})
    with pytest.raises(remat.PlanMismatchError, match=r"torch 1\.13\.0"):
        remat.apply(blocks, plan.model_copy(update={"fingerprint": old}))


def test_chosen_calls_of_a_shared_module_are_told_apart(batch):
    """Of a block called five times, only the planned calls are recomputed, step after step."""
    model = Recurrent(16, depth=5)
    made = plan_policy(model, batch, AllBlocks(), loss=square_mean)
    assert len(made.regions) == 5
    partial = made.model_copy(update={"regions": (made.regions[0], made.regions[3])})
    runs = []
    inner = model.block.body[0]
    forward = inner.forward
    inner.forward = lambda x: (runs.append(torch.is_grad_enabled()), forward(x))[1]
    with remat.apply(model, partial):
        for _ in range(3):
            runs.clear()
            square_mean(model, batch).backward()
            assert len(runs) == 5 + 2
            with torch.no_grad():
                model(batch)


@pytest.mark.parametrize("build", [lambda: Recurrent(16, depth=4), lambda: Tower(16)])
def test_shared_modules_verify_at_the_tightest_plan(build, batch):
    """Recurrent depth and siamese towers give the same bits under their tightest plan."""
    model = build()
    made = tightest(model, batch, loss=square_mean)
    assert made.regions
    proof = remat.verify(model, batch, made, loss=square_mean)
    assert proof.identical
    assert proof.passed


def test_auto_checkpoint_plans_and_applies_in_one_line(batch):
    """The one-line form leaves a planned model whose measured peak is within the budget."""
    model = nn.Sequential(*(Block(64) for _ in range(6)))
    big = torch.randn(512, 64)

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).square().mean()

    whole = WithLoss()
    handle = remat.auto_checkpoint(whole, big, memory_budget="70%")
    assert is_applied(whole)
    assert remat.measure(whole, big, steps=1).peak_bytes <= handle.plan.budget_bytes
    handle.remove()
    assert not is_applied(whole)


def test_a_graph_that_is_kept_differentiates_twice_from_the_same_buffers():
    """Spectral norm steps its vectors in forward: each backward recomputes from where it began."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
            self.down = nn.Linear(16, 16)

        def forward(self, x):
            return x + torch.tanh(self.down(torch.relu(self.up(x))))

    def twice(model):
        loss, found = square_mean(model, batch), []
        for _ in range(2):
            model.zero_grad()
            loss.backward(retain_graph=True)
            found += [p.grad.clone() for p in model.parameters()]
        return found

    model, batch = nn.Sequential(Normed(), Normed()), torch.randn(64, 16)
    plan = plan_policy(model, batch, AllBlocks(), loss=square_mean, optimizer=None)
    planned = copy.deepcopy(model)
    with remat.apply(planned, plan):
        found = twice(planned)
    assert all(map(torch.equal, found, twice(model)))


@pytest.mark.parametrize("by_name", [False, True])
def test_one_tensor_given_twice_is_one_object_when_run_again(by_name):
    """Self-attention takes another way where query and key are one tensor: so does its region."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True, dropout=0.1)

        def forward(self, x):
            rest = {"key": x, "value": x} if by_name else {}
            return x + self.attention(x, *(() if by_name else (x, x)), **rest)[0]

    model, batch = nn.Sequential(Attends(), Attends()), torch.randn(4, 24, 32)
    plan = tightest(model, batch, loss=square_mean)
    assert plan.regions
    proof = remat.verify(model, batch, plan, loss=square_mean)
    assert proof.identical, proof
    region = plan.regions[0].model_copy(
        update={"module": "0.attention", "saved_ops": (), "followers": ()}
    )
    alone = plan.model_copy(update={"regions": (region,)})
    assert remat.verify(model, batch, alone, loss=square_mean).identical
