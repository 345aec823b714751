"""RematCallback in Lightning's Trainer: the same training within a budget."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import remat
from tests.integrations.parts import Classifier, MeasuredAdamW, rows
from tests.loops import forwards_replaced, same_state

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the library and its dependencies say when imported
    lightning = pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")

from remat.integrations.lightning import RematCallback

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


class Module(lightning.LightningModule):
    """A classifier whose optimizer records the peak of each step, forward and backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()
        self.losses: list[float] = []

    def on_train_batch_start(self, batch, batch_idx):
        self.optimizer.batch = batch

    def training_step(self, batch, batch_idx):
        loss = self.net(*batch)["loss"]
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        self.optimizer = MeasuredAdamW(self.parameters(), lr=1e-2)
        self.optimizer.model = self
        return self.optimizer


def fitted(folder, *, callbacks=(), count=250, module=None, resume=None, loader=None, **options):
    """Train for two epochs, the last batch of each being smaller, and return the trainer."""
    torch.manual_seed(21)
    module = module or Module()
    loader = loader or torch.utils.data.DataLoader(rows(count), batch_size=100, shuffle=True)
    options = {
        "max_epochs": 2, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1, **options,
    }  # fmt: skip
    logger = lightning.loggers.CSVLogger(folder)
    trainer = lightning.Trainer(
        callbacks=list(callbacks), default_root_dir=folder, logger=logger, **options
    )
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def trained_both_ways(tmp_path, budget, **options):
    """Train with and without the callback; return the planned trainer and the callback."""
    plain = fitted(tmp_path / "plain", **options)
    callback = RematCallback(budget)
    planned = fitted(tmp_path / "planned", callbacks=[callback], **options)
    assert planned.model.losses == plain.model.losses
    assert same_state(planned.model.state_dict(), plain.model.state_dict())
    assert forwards_replaced(planned.model) == []
    budget_bytes = callback.history[0].plan.budget_bytes
    assert max(plain.model.optimizer.peaks) > budget_bytes
    assert max(planned.model.optimizer.peaks) <= budget_bytes
    assert any(made.plan.regions for made in callback.history)
    return planned, callback


def test_lightning_trains_the_same_within_the_budget(tmp_path):
    """Losses and weights are equal bit for bit, peaks are kept, and the plan is logged."""
    planned, callback = trained_both_ways(tmp_path, "80%")
    assert len(callback.history) == 2, "one plan for each size of batch"
    planned.logger.save()
    metrics = (tmp_path / "planned/lightning_logs/version_0/metrics.csv").read_text()
    assert "remat/predicted_peak_bytes" in metrics
    assert metrics.count("train_loss") == 1, "what was logged while tracing is not kept"
    peak, plan = max(planned.model.optimizer.peaks), callback.history[0].plan
    assert peak == pytest.approx(plan.predicted_peak_bytes, rel=0.01)


def test_lightning_with_accumulation_and_autocast_trains_the_same(tmp_path):
    """Gradients that wait between micro-steps, in bfloat16, are in the budget."""
    trained_both_ways(tmp_path, "90%", accumulate_grad_batches=2, precision="bf16-mixed")


class Stops(lightning.Callback):
    """Raises after a number of batches, and saves a checkpoint before."""

    def __init__(self, after: int, path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)
            raise ZeroDivisionError


def test_lightning_restores_the_model_after_an_exception_and_loads_its_checkpoint(tmp_path):
    """What is saved under a plan has the model's keys, and training goes on from it."""
    module, path = Module(), tmp_path / "at_epoch.ckpt"
    names = list(module.state_dict())
    with pytest.raises(ZeroDivisionError):
        fitted(tmp_path, callbacks=[RematCallback("80%"), Stops(2, path)], module=module, count=200)
    assert forwards_replaced(module) == []
    assert list(torch.load(path, weights_only=True)["state_dict"]) == names
    other = Module()
    resumed = fitted(
        tmp_path, callbacks=[RematCallback("80%")], module=other, resume=path, count=200
    )
    assert resumed.global_step == 4
    assert forwards_replaced(other) == []


class Resumable:
    """Batches in an order of their own for each epoch, from any place in it on."""

    def __init__(self) -> None:
        self.epoch = self.place = 0

    def __len__(self) -> int:
        return 4

    def __iter__(self):
        if self.place == len(self):
            self.epoch, self.place = self.epoch + 1, 0
        order = torch.randperm(400, generator=torch.Generator().manual_seed(self.epoch))
        for number in range(self.place, len(self)):
            self.place = number + 1
            yield rows(400)[order[number * 100 : self.place * 100]]

    def state_dict(self):
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


class Seeded(Module):
    """Draws from a random state of its own in each step, as Lightning saves none."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        torch.manual_seed(1000 + self.trainer.global_step)


def test_lightning_resumes_in_the_middle_of_an_epoch_with_the_same_losses(tmp_path):
    """Broken off after three of four batches and resumed, under plans: bits of an unbroken run."""

    def run(*callbacks, module=None, **options):
        torch.manual_seed(21)
        module = module or Seeded()
        fitted(tmp_path, callbacks=callbacks, module=module, loader=Resumable(), **options)
        return module

    plain = run()
    path = tmp_path / "within.ckpt"
    with pytest.raises(ZeroDivisionError):
        run(RematCallback("80%"), Stops(3, path))
    callback = RematCallback("80%")
    resumed = run(callback, resume=path)
    assert callback.history[0].plan.regions
    assert resumed.losses == plain.losses[3:]
    assert len(resumed.losses) == 5
    assert same_state(resumed.state_dict(), plain.state_dict())


class Manual(Module):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class DeepSpeedStrategy(lightning.strategies.SingleDeviceStrategy):
    """Named as Lightning's own, whose package is not installed here."""


def test_lightning_loops_that_cannot_be_planned_are_refused(tmp_path):
    """Manual optimization, DeepSpeed and a budget that cannot be met: named, with what to do."""
    strategy = DeepSpeedStrategy(device="cpu")
    with pytest.raises(remat.ApplyError, match=r"DeepSpeedStrategy, .*fully_shard under Model"):
        fitted(tmp_path, callbacks=[RematCallback("80%")], strategy=strategy)
    with pytest.raises(remat.ApplyError, match=r"manual optimization.*remat\.adapt"):
        fitted(tmp_path, callbacks=[RematCallback("80%")], module=Manual())
    module = Module()
    with pytest.raises(remat.BudgetError, match="The batch is 100x32"):
        fitted(tmp_path, callbacks=[RematCallback("60KiB", chunks=False)], module=module)
    assert forwards_replaced(module) == []
    assert isinstance(module.net.head, nn.Linear)
