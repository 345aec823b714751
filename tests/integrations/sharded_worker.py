"""One process of DDP and FSDP2 trainings by Lightning, Accelerate and the Trainer, on gloo.

torchrun --nproc-per-node 2 sharded_worker.py FOLDER

Each trains with a plan and without; every step under a plan is measured. Accelerate turns FSDP on
only where there are GPUs: here its state is set as it would be there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pytorch_lightning as lightning
    from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy

sys.path.insert(0, str(Path(__file__).parents[2]))

import remat
from remat.integrations.accelerate import prepare
from remat.integrations.lightning import RematCallback as LightningCallback
from remat.integrations.transformers import RematCallback
from tests.distributed.worker import leave
from tests.integrations.parts import Classifier, MeasuredAdamW, rows, texts, tiny_gpt2
from tests.loops import forwards_replaced, measured_step

BUDGET = "85%"


class Module(lightning.LightningModule):
    """A classifier, sharded where `is_sharded`, whose optimizer measures each step."""

    def __init__(self, *, is_sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(31)
        self.net, self.is_sharded, self.losses = Classifier(), is_sharded, []

    def configure_model(self):
        if self.is_sharded and not isinstance(self.net.head.weight, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def on_train_batch_start(self, batch, batch_idx):
        self.optimizer.batch, self.optimizer.model = batch, self.trainer.strategy.model

    def training_step(self, batch, batch_idx):
        loss = self.net(*batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def configure_optimizers(self):
        self.optimizer = MeasuredAdamW(self.parameters(), lr=1e-2)
        return self.optimizer


def by_lightning(budget, strategy, *, is_sharded=False, **options):
    """Train for three epochs."""
    module = Module(is_sharded=is_sharded)
    loader = torch.utils.data.DataLoader(rows(800), batch_size=100)
    callbacks = [] if budget is None else [LightningCallback(budget)]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(), max_epochs=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return told(module.losses, module, callbacks, module.optimizer.peaks)


def with_views():
    """Gradients are views of DDP's buckets."""
    return DDPStrategy(gradient_as_bucket_view=True)


def by_shards():
    """Every process has its own batches and a shard of the model."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def sharded_accelerator(accelerator, block):
    """Set an accelerator's state as it is with FSDP2 on GPUs."""
    for state in (accelerator.state, accelerate.PartialState()):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[block], state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    return accelerator


def by_accelerate(budget, *, is_sharded):
    """Train for two epochs in a loop of one's own."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    if is_sharded:
        sharded_accelerator(accelerator, "Block")
    torch.manual_seed(31)
    model = Classifier()
    optimizer = MeasuredAdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(rows(800), batch_size=100)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    context = contextlib.nullcontext()
    if budget is not None:
        context = prepare(accelerator, model, optimizer, budget=budget)
    losses, peaks = [], []
    with context:
        for batch in (*loader, *loader):

            def step(batch=batch):
                loss = model(batch[0], labels=batch[1])["loss"]
                accelerator.backward(loss)
                optimizer.step()
                losses.append(loss.item())

            peaks.append(measured_step(model, batch, optimizer.optimizer, step))
            optimizer.zero_grad()
    return told(losses, model, () if budget is None else (context,), peaks)


class MeasuredTrainer(transformers.Trainer):
    """Records the peak of each forward and backward."""

    def training_step(self, model, inputs, *args, **kwargs):
        results, run, optimizer = [], super().training_step, self.optimizer.optimizer

        def step():
            results.append(run(model, inputs, *args, **kwargs))

        optimizer.peaks.append(measured_step(model, inputs, optimizer, step))
        return results[0]

    def create_optimizer(self, model=None):
        self.optimizer = MeasuredAdamW(self.model.parameters(), lr=1e-2)
        return self.optimizer


class ShardedTrainer(MeasuredTrainer):
    """Sharded by FSDP2."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        sharded_accelerator(self.accelerator, "GPT2Block")
        self.is_fsdp_enabled = True


def by_trainer(budget, folder, *, kind, **options):
    """Train for an epoch by the Trainer."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, callbacks = tiny_gpt2(), [] if budget is None else [RematCallback(budget)]
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=3,
        save_strategy="no", **options,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=texts([40] * 48), callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return told(losses, trainer.model, callbacks, trainer.optimizer.optimizer.peaks)


def told(losses, model, callbacks, peaks):
    """What a training came to; `peaks` are bytes of each step."""
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    plans = [made.plan for callback in callbacks for made in callback.history]
    return {
        "losses": losses,
        "weights": [float(p.detach().double().sum()) for p in parameters],
        "is_sharded": any(isinstance(p, DTensor) for p in model.parameters()),
        "kinds": sorted({k for plan in plans for k, size in plan.breakdown.items() if size}),
        "regions": [len(plan.regions) for plan in plans],
        "predicted": [plan.predicted_peak_bytes for plan in plans],
        "budgets": [plan.budget_bytes for plan in plans],
        "peaks": peaks,
        "replaced": forwards_replaced(model),
    }


def refusal(attempt):
    """What is said where steps cannot be planned."""
    try:
        attempt()
    except remat.ApplyError as error:
        return str(error)
    return "nothing"


def refusals(folder):
    """Micro-steps whose gradients wait unreduced, and FSDP1."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = sharded_accelerator(
        accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2), "Block"
    )
    model = Classifier()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def prepared():
        prepare(accelerator, model, optimizer, budget=BUDGET)

    told = {"accelerate accumulating": refusal(prepared)}
    accelerator.state.fsdp_plugin.fsdp_version = 1
    return told | {
        "accelerate fsdp1": refusal(prepared),
        "trainer accumulating": refusal(
            lambda: by_trainer(BUDGET, folder, kind=ShardedTrainer, gradient_accumulation_steps=2)
        ),
    }


RUNS = {
    "lightning ddp": lambda b, _: by_lightning(b, DDPStrategy),
    "lightning ddp views": lambda b, _: by_lightning(b, with_views),
    "lightning ddp views accumulating": lambda b, _: by_lightning(
        b, with_views, accumulate_grad_batches=2
    ),
    "lightning fsdp": lambda b, _: by_lightning(b, by_shards, is_sharded=True),
    "lightning fsdp accumulating": lambda b, _: by_lightning(
        b, by_shards, is_sharded=True, accumulate_grad_batches=2
    ),
    "accelerate ddp": lambda b, _: by_accelerate(b, is_sharded=False),
    "accelerate fsdp": lambda b, _: by_accelerate(b, is_sharded=True),
    "trainer ddp": lambda b, folder: by_trainer(b, folder, kind=MeasuredTrainer),
    "trainer fsdp": lambda b, folder: by_trainer(b, folder, kind=ShardedTrainer),
}


def main(folder: Path) -> None:
    """Write what this process found."""
    found = {name: [run(BUDGET, folder), run(None, folder)] for name, run in RUNS.items()}
    found["refusals"] = refusals(folder)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
