"""RematCallback in Transformers' Trainer: the same training within a budget."""

from __future__ import annotations

import copy
import importlib
import logging
import sys

import pytest
import torch

import remat
from tests.integrations.parts import MeasuredAdamW, texts, tiny_gpt2
from tests.loops import forwards_replaced, measured_step, same_state

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

from remat.integrations.transformers import (  # noqa: E402  they need them
    RematCallback,
)
from remat.integrations.transformers import _check_strategy as check_strategy  # noqa: E402

pytestmark = pytest.mark.slow


class MeasuredTrainer(transformers.Trainer):
    """Records the peak of each forward and backward; its optimizer records those of its steps."""

    def training_step(self, model, inputs, *args, **kwargs):
        results, run, optimizer = [], super().training_step, self.optimizer.optimizer

        def step():
            results.append(run(model, inputs, *args, **kwargs))

        optimizer.peaks.append(measured_step(model, inputs, optimizer, step))
        return results[0]


def trainer_of(model, folder, data, callbacks=(), kind=MeasuredTrainer, **options):
    """Build a trainer that logs each step's loss."""
    options = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "dataloader_pin_memory": False, "learning_rate": 1e-2, **options,
    }  # fmt: skip
    optimizer = MeasuredAdamW(model.parameters(), lr=1e-2)
    optimizer.model = model
    return kind(
        model, transformers.TrainingArguments(str(folder), **options), train_dataset=data,
        callbacks=list(callbacks), optimizers=(optimizer, None),
        data_collator=padded,
    )  # fmt: skip


def padded(examples):
    """Pad token sequences to the longest of the batch."""
    longest = max(len(example["input_ids"]) for example in examples)

    def pad(name, value):
        rows = [
            torch.nn.functional.pad(e[name], (0, longest - len(e[name])), value=value)
            for e in examples
        ]
        return torch.stack(rows)

    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


def losses_of(trainer):
    """The loss of each step, as logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained_both_ways(tmp_path, data, budget, *, kind=MeasuredTrainer, **options):
    """Train with and without the callback; return both trainers and the callback."""
    plain = trainer_of(tiny_gpt2(), tmp_path / "plain", data, kind=kind, **options)
    plain.train()
    callback = RematCallback(budget)
    planned = trainer_of(tiny_gpt2(), tmp_path / "planned", data, [callback], kind, **options)
    planned.train()
    assert losses_of(planned) == losses_of(plain)
    assert same_state(planned.model.state_dict(), plain.model.state_dict())
    assert forwards_replaced(planned.model) == forwards_replaced(plain.model)
    assert "training_step" not in vars(planned)
    return plain, planned, callback


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Trained both ways on texts of many lengths."""
    lengths = (64, 20, 33, 64, 30, 31, 18, 25, 62, 52)
    return trained_both_ways(
        tmp_path_factory.mktemp("ragged"), texts(lengths), "2300KiB", save_strategy="epoch"
    )


def test_trainer_trains_the_same_within_the_budget(ragged):
    """Losses and weights are equal bit for bit; every step's peak is within the budget."""
    plain, planned, callback = ragged
    budget = callback.history[0].plan.budget_bytes
    assert max(plain.optimizer.optimizer.peaks) > budget
    assert max(planned.optimizer.optimizer.peaks) <= budget
    assert len(callback.history) > 1
    assert any(made.plan.regions for made in callback.history)


def test_trainer_logs_what_was_planned(ragged):
    """Each plan's figures are among the trainer's own metrics."""
    _, planned, callback = ragged
    logged = [e for e in planned.state.log_history if "remat/predicted_peak_bytes" in e]
    assert [e["remat/predicted_peak_bytes"] for e in logged] == [
        made.plan.predicted_peak_bytes for made in callback.history
    ]
    assert {"remat/regions", "remat/recompute_fraction"} <= logged[0].keys()


def test_checkpoint_saved_under_a_plan_is_that_of_the_model(ragged):
    """Keys are those without the callback, and from_pretrained gives the trained weights."""
    plain, planned, _ = ragged
    folder = f"{planned.args.output_dir}/checkpoint-{planned.state.global_step}"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert same_state(loaded.state_dict(), plain.model.state_dict())


def test_trainer_with_accumulation_and_autocast_trains_the_same(tmp_path):
    """Two micro-steps under bfloat16: gradients that wait are in the budget, bits are equal."""
    _, planned, callback = trained_both_ways(
        tmp_path, texts([48] * 16), "80%", gradient_accumulation_steps=2, bf16=True
    )
    (made,) = callback.history
    peaks = planned.optimizer.optimizer.peaks
    assert max(peaks) <= made.plan.budget_bytes
    assert max(peaks) == pytest.approx(made.plan.predicted_peak_bytes, rel=0.01)


class OwnLoss(MeasuredTrainer):
    """A loss of the user's own, outside of the model, from the model's logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_loss_of_a_trainer_that_overrides_it_is_planned(tmp_path, caplog):
    """The trainer's compute_loss is the step; library checkpointing is off, with a message."""
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_warning()  # other tests ask for errors alone
    with caplog.at_level(logging.WARNING):
        _, planned, callback = trained_both_ways(
            tmp_path, texts([48] * 8), "80%", kind=OwnLoss, activation_checkpointing=True
        )
    assert planned.model.is_activation_checkpointing
    assert "gradient checkpointing of the library is switched off in 3 modules" in caplog.text
    assert "recomputed: peak" in caplog.text
    (made,) = callback.history
    assert made.plan.fingerprint.loss.endswith("OwnLoss.compute_loss")
    assert max(planned.optimizer.optimizer.peaks) <= made.plan.budget_bytes


class Stops(transformers.TrainerCallback):
    """Raises after a number of steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.after:
            raise KeyboardInterrupt


def test_training_resumes_in_the_middle_of_an_epoch_with_the_same_losses(tmp_path):
    """Broken off and resumed under plans: losses and weights of an unbroken run; all restored."""
    data = texts([32] * 16)
    plain = trainer_of(tiny_gpt2(), tmp_path / "plain", data)
    plain.train()
    saved = {"save_strategy": "steps", "save_steps": 2}
    broken = trainer_of(
        tiny_gpt2(), tmp_path / "broken", data, [RematCallback("80%"), Stops(3)], **saved
    )
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert forwards_replaced(broken.model) == []
    assert "training_step" not in vars(broken)
    resumed = trainer_of(
        tiny_gpt2(seed=9), tmp_path / "broken", data, [RematCallback("80%")], **saved
    )
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(plain)
    assert same_state(resumed.model.state_dict(), plain.model.state_dict())


def test_budget_that_no_plan_keeps_stops_training_before_its_first_step(tmp_path):
    """The error is ours, and the trainer is as it was; a wrong budget is said at once."""
    with pytest.raises(remat.BudgetFormatError):
        RematCallback("8 gigs")
    model = tiny_gpt2()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model, tmp_path, texts([32] * 8), [RematCallback("600KiB", chunks=False)])
    with pytest.raises(remat.BudgetError, match=r"The batch is 4x32"):
        trainer.train()
    assert same_state(model.state_dict(), before)
    assert forwards_replaced(model) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: setattr(t.args, "_n_gpu", 2), "DataParallel, whose replicas.*torchrun"),
        (lambda t: setattr(t, "is_deepspeed_enabled", True), "DeepSpeed, .*use FSDP2"),
    ],
    ids=["DataParallel", "DeepSpeed"],
)
def test_strategies_that_cannot_be_planned_are_refused(change, told, tmp_path):
    """A trainer that says it has two GPUs in one process, or DeepSpeed's engine: ours to refuse."""
    callback = RematCallback("80%")
    trainer = trainer_of(tiny_gpt2(), tmp_path, texts([32] * 8))
    trainer.add_callback(callback)
    change(trainer)
    with pytest.raises(remat.ApplyError, match=told):
        check_strategy(trainer)


def test_callback_outside_of_a_trainer_says_how_to_use_it():
    """An event from something else than a Trainer is refused with the line to write."""
    with pytest.raises(remat.ApplyError, match=r"Trainer\(\.\.\., callbacks="):
        RematCallback("1GiB").on_train_begin()


@pytest.mark.parametrize("library", ["transformers", "accelerate"])
def test_library_that_is_missing_is_named_with_the_command_to_install_it(library, monkeypatch):
    """Importing an integration without its library says which extra has it."""
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"remat.integrations.{library}", raising=False)
    with pytest.raises(remat.MissingPackageError, match=r"pip install 'remat\[integrations\]'"):
        importlib.import_module(f"remat.integrations.{library}")
