"""Plans in loops that Accelerate prepares: the same training within a budget."""

from __future__ import annotations

import contextlib

import pytest
import torch

import remat
from tests.integrations.parts import Classifier, rows
from tests.loops import forwards_replaced, measured_step, same_state

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from remat.integrations.accelerate import prepare  # noqa: E402  it needs accelerate

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the process: start and leave without any."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def trained(budget=None, *, loss=None, **options):
    """Train for two epochs; return losses, weights, peaks of the second epoch, and the context."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    torch.manual_seed(31)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(250), batch_size=100, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, peaks = [], []
    context = contextlib.nullcontext()
    if budget is not None:
        context = prepare(accelerator, model, optimizer, budget=budget, loss=loss)
    with context:
        for epoch in range(2):
            for x, labels in loader:

                def step(x=x, labels=labels):
                    value = model(x, labels=labels)["loss"]
                    accelerator.backward(value)
                    optimizer.step()
                    losses.append(value.item())

                with accelerator.accumulate(model):
                    if loss is not None and budget is not None:
                        context.prepare((x, labels))
                    if epoch == 0:
                        step()
                    else:
                        peaks.append(measured_step(model, (x, labels), optimizer.optimizer, step))
                    optimizer.zero_grad()
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert forwards_replaced(bare) in ([], [""])
    return losses, bare.state_dict(), peaks, context


@pytest.mark.parametrize(
    ("budget", "options"),
    [
        ("85%", {}),
        ("90%", {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}),
    ],
    ids=["plain", "accumulation and autocast"],
)
def test_accelerate_trains_the_same_within_the_budget(budget, options):
    """An unchanged loop: losses and weights equal bit for bit, no peak above the budget."""
    losses, weights, peaks, _ = trained(**options)
    planned_losses, planned_weights, planned_peaks, context = trained(budget, **options)
    assert planned_losses == losses
    assert same_state(planned_weights, weights)
    budget_bytes = context.history[0].plan.budget_bytes
    assert max(peaks) > budget_bytes >= max(planned_peaks)
    assert len(context.history) == 2


def test_accelerate_with_a_loss_of_ones_own_is_prepared_for_each_batch():
    """With loss=, prepare is called before the forward; the training is the same."""

    def loss(model, batch):
        x, labels = batch
        return model(x, labels=labels)["loss"]

    losses, weights, _, _ = trained()
    planned_losses, planned_weights, _, context = trained("85%", loss=loss)
    assert planned_losses == losses
    assert same_state(planned_weights, weights)
    assert context.history[0].plan.fingerprint.loss.endswith("<locals>.loss")


def test_accelerate_refuses_strategies_that_cannot_be_planned():
    """DeepSpeed and Megatron, which partition in ways of their own, are named."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = Classifier()
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    kind = accelerator.state.distributed_type
    for other in (accelerate.DistributedType.DEEPSPEED, accelerate.DistributedType.MEGATRON_LM):
        accelerator.state.distributed_type = other
        try:
            with pytest.raises(remat.ApplyError, match=rf"{other.value}, whose gathered"):
                prepare(accelerator, *prepared, budget="1GiB")
        finally:
            accelerator.state.distributed_type = kind


def test_accelerate_refuses_a_model_that_was_not_prepared():
    """The order of calls is said, as the accelerator's wrappers belong inside."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(remat.ApplyError, match=r"accelerator\.prepare"):
        prepare(accelerator, model, optimizer, budget="1GiB")
