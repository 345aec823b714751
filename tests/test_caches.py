"""Key-value caches that a model fills while it trains: filled once, and never in silence twice."""

from __future__ import annotations

import pytest
import torch
import transformers

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.models import tightest


def llama():
    config = transformers.LlamaConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        num_layers=2, num_decoder_layers=2, d_model=32, d_kv=8, d_ff=64, num_heads=4,
        vocab_size=97, decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


@pytest.fixture
def batch():
    ids = torch.randint(3, 97, (2, 16))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("build", [llama, t5])
def test_default_configs_are_planned_with_their_cache(build, batch):
    """With use_cache at its default, layers are regions, and verify finds the same bits."""
    model = build().train()
    made = tightest(model, batch)
    assert any("layers" in r.module or "block" in r.module for r in made.regions)
    assert remat.verify(model, batch, made).passed


def test_cache_is_filled_once(batch):
    """The cache that a planned forward returns is as long as the unplanned one's, also after."""
    model = llama().train()
    made = plan_policy(model, batch, AllBlocks())
    assert len(made.regions) == 3
    with remat.apply(model, made):
        output = model(**batch)
        output.loss.backward()
    assert output.past_key_values.get_seq_length() == 16


def test_cache_that_is_not_empty_is_refused(batch):
    """A planned layer that would append to a prefix says so instead of computing something else."""
    model = llama().train()
    made = plan_policy(model, batch, AllBlocks())
    with torch.no_grad():
        prefix = model(input_ids=batch["input_ids"]).past_key_values
    with remat.apply(model, made), pytest.raises(remat.ApplyError, match="use_cache=False"):
        model(**batch, past_key_values=prefix)
