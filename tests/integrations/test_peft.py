"""LoRA by peft: adapters on a frozen model, planned and trained the same within the budget."""

from __future__ import annotations

import pytest
import torch

import remat
from tests.integrations.parts import MeasuredAdamW, texts, tiny_gpt2
from tests.loops import same_state, train

peft = pytest.importorskip("peft", reason="peft is not installed")

pytestmark = [
    pytest.mark.slow,
    # peft asks Transformers by a name that it is about to drop.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def with_lora():
    """The tiny GPT-2, frozen, embeddings included, with adapters that drop out."""
    model = tiny_gpt2()
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(model, config).train()


def own_loss(model, batch):
    """Loss: the model's."""
    return model(**batch).loss


def adapters(model):
    return MeasuredAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_lora_trains_the_same_within_the_budget_and_is_saved(tmp_path):
    """Adapters are equal bit for bit, no peak is above the budget, and what is saved loads."""
    batches = []
    for length in (48, 40, 48):
        ids = torch.stack([text["input_ids"] for text in texts([length] * 4)])
        batches.append({"input_ids": ids, "labels": ids})
    plain, model = with_lora(), with_lora()
    expected, _ = train(plain, batches, own_loss, adapters(plain))
    optimizer = adapters(model)
    with remat.adapt(model, "70%", loss=own_loss, optimizer=optimizer) as handle:
        losses, peaks = train(model, batches, own_loss, optimizer, prepare=handle.prepare)
        assert max(peaks) <= handle.plan.budget_bytes
        assert handle.plan.regions
        model.save_pretrained(tmp_path)
    assert losses == expected
    assert same_state(model.state_dict(), plain.state_dict())
    moved = [name for name, value in model.named_parameters() if value.grad is not None]
    assert all("lora_" in name for name in moved)
    loaded = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    assert same_state(loaded.state_dict(), model.state_dict())


def test_lora_in_the_trainer_needs_nothing_more(tmp_path):
    """The callback plans a PeftModel as it is: the same losses, and adapters that load."""
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is missing")
    from tests.integrations.test_transformers import RematCallback, losses_of, trainer_of

    data = texts([40] * 8)
    plain = trainer_of(with_lora(), tmp_path / "plain", data)
    plain.train()
    callback = RematCallback("80%")
    planned = trainer_of(with_lora(), tmp_path / "planned", data, [callback])
    planned.train()
    assert losses_of(planned) == losses_of(plain)
    assert same_state(planned.model.state_dict(), plain.model.state_dict())
    assert max(planned.optimizer.optimizer.peaks) <= callback.history[0].plan.budget_bytes
