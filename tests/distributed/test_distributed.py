"""DDP and FSDP2 under a plan, two processes on gloo: the gradients of one process, memory saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remat.cost.allocations import most_allocated
from tests.distributed.worker import model_and_batches, step_of

WORKER = Path(__file__).parent / "worker.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "order"), [("ddp", "before"), ("fsdp", "before"), ("fsdp", "after")]
)
def test_gradients_are_those_of_one_process(run_pair, tmp_path, kind, order):
    """A plan put on before or after wrapping: the mean of both gradients, less memory."""
    run_pair(WORKER, kind, order, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    model, batches = model_and_batches()
    for rank, batch in enumerate(batches):
        step_of(model, batch, rank)
    for name, parameter in model.named_parameters():
        ours = torch.tensor(found["gradients"][name])
        expected = parameter.grad / len(batches)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    model.zero_grad(set_to_none=True)
    plain = most_allocated(lambda: step_of(model, batches[0], 0))
    assert found["peak"] < 0.6 * plain
