"""Check on a library's own checkpointing, the plan that replaces it, and the command."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import remat
from remat.prove.records import CheckReport
from tests.models import square_mean
from tests.test_check import STEP, Checkpointed, OwnGenerator, Part, found_in


@pytest.fixture
def batch():
    return torch.randn(256, 32)


# -- Transformers ---------------------------------------------------------------------------------


def gpt2(**changes):
    transformers = pytest.importorskip(
        "transformers", reason="needs the extra 'text'", exc_type=ImportError
    )
    transformers.logging.set_verbosity_error()
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=512, n_positions=32, bos_token_id=0,
        eos_token_id=0, loss_type="ForCausalLM", **changes,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(0, 512, (4, 32))
    return model, {"input_ids": ids, "labels": ids}


def enable(model, **settings):
    switch = getattr(model, "activation_checkpointing_enable", None)
    if switch is not None:
        switch(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@pytest.mark.slow
def test_transformers_own_checkpointing_is_clean():
    """Switched on as documented, with dropout and a large head, it is right and saves memory."""
    model, batch = gpt2(use_cache=False)
    enable(model, use_reentrant=False)
    report = remat.check(model, batch)
    assert list(report) == []
    assert report.num_regions == 3
    assert report.identical
    assert report.peak_bytes < report.plain_peak_bytes


@pytest.mark.slow
def test_transformers_pitfalls_are_found():
    """Frozen embeddings with reentrant checkpointing, eval mode, and the cache's switch."""
    model, batch = gpt2()
    for block in model.transformer.h:  # as Transformers before it let inputs require gradients
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    codes, report = found_in(model, batch, optimizer=None)
    assert "reentrant-without-gradient" in codes
    assert any(d.name == "gradient of transformer.h.0.ln_1.weight" for d in report.differences)
    assert "use-cache" in {h.code for h in report}

    model, batch = gpt2(use_cache=False)
    enable(model, use_reentrant=False)
    codes, _ = found_in(model.eval(), batch, optimizer=None)
    assert codes == {"inert-in-eval"}


# -- the fix --------------------------------------------------------------------------------------


def test_fix_replaces_the_models_checkpointing(batch):
    """The plan reaches the model's own peak and gives the bits of the plain model."""
    model = Checkpointed(lambda: Part(nn.Dropout(0.5)), last=True)
    before = remat.check(model, batch, **STEP)
    assert not before.is_clean
    plan = remat.replace_checkpointing(model, batch, **STEP)
    assert plan.replaces_checkpointing
    assert plan.predicted_peak_bytes <= before.peak_bytes
    assert abs(plan.keep_all_peak_bytes - before.plain_peak_bytes) < 100  # kernels' workspace
    assert sum(not r.packed_ops or bool(r.dropped_ops) for r in plan.regions) <= 3
    with remat.apply(model, plan):
        planned = remat.simulate(model, batch, **STEP)
        torch.manual_seed(0)
        square_mean(model, batch).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        after_planned = torch.get_rng_state()
    assert planned.peak_bytes == plan.predicted_peak_bytes
    plain = nn.Sequential(model.stem, *model.blocks, model.tail)
    model.zero_grad()
    torch.manual_seed(0)
    square_mean(plain, batch).backward()
    assert torch.equal(torch.get_rng_state(), after_planned)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.equal(ours, parameter.grad)
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_fix_of_a_model_that_recomputes_wrongly_takes_what_is_needed(batch):
    """Right costs memory that wrong does not: the default budget is then the least in reach."""
    model = Checkpointed(lambda: Part(OwnGenerator()))
    own = remat.simulate(model, batch, **STEP).peak_bytes
    plan = remat.replace_checkpointing(model, batch, **STEP)
    assert plan.predicted_peak_bytes > own
    with pytest.raises(remat.BudgetError):
        remat.replace_checkpointing(model, batch, own, **STEP)


def test_checkpointing_of_other_models_stays_on(batch):
    """While a plan replaces one model's checkpointing, another model's still works."""
    model, other = Checkpointed(), Checkpointed()
    peak = remat.simulate(other, batch, **STEP).peak_bytes
    with remat.apply(model, remat.replace_checkpointing(model, batch, **STEP)):
        assert remat.simulate(other, batch, **STEP).peak_bytes == peak


@pytest.mark.slow
def test_check_command_tells_fixes_and_exits_with_1(run_cli, write_workload, tmp_path):
    """Exit code 1, each hazard told; `--fix` writes a plan that replaces; `--json` is data."""
    path = write_workload(
        """
        import torch
        import remat
        from torch.utils.checkpoint import checkpoint

        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = torch.nn.Linear(32, 128), torch.nn.Linear(128, 32)

            def forward(self, x):
                return x + self.down(torch.dropout(self.up(x).tanh(), 0.5, True))

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.stem = torch.nn.Linear(32, 32)
                self.blocks = torch.nn.ModuleList(Block() for _ in range(4))

            def forward(self, x):
                x = self.stem(x)
                for block in self.blocks:
                    x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                return x

        workload = remat.Workload(
            name="forgetful", model=Net, train_data=[torch.zeros(32)] * 256, batch_size=256,
            loss=lambda model, batch: model(batch).square().mean(),
        )
        """
    )
    done = run_cli("check", path, "--fix", tmp_path / "plan.json")
    assert done.code == 1
    assert "error random-state at blocks.0, blocks.1, blocks.2, blocks.3" in done.out
    assert "OLMo-core#828" in done.out
    assert "preserve_rng_state" in done.out
    plan = remat.Plan.load(tmp_path / "plan.json")
    assert plan.replaces_checkpointing
    done = run_cli("verify", path, "--plan", tmp_path / "plan.json")
    assert done.code == 0, done
    assert "without its own checkpointing" in done.out
    done = run_cli("check", path, "--json")
    assert done.code == 1
    assert not CheckReport.from_data(json.loads(done.out), source="stdout").is_clean


def test_check_command_on_a_clean_workload_exits_with_0(run_cli, write_workload):
    """A workload that checkpoints nothing is clean."""
    done = run_cli("check", write_workload())
    assert done.code == 0
    assert "clean" in done.out


@pytest.mark.parametrize(
    "arguments",
    [["--budget", "1GiB"], ["--fix", "."], ["--fix", "plan.json", "--budget", "8 gigs"]],
)
def test_check_command_refuses_bad_input(run_cli, write_workload, arguments):
    """A budget without a plan, a folder for a file and an unreadable budget are usage errors."""
    done = run_cli("check", write_workload(), *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
