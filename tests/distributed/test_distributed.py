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
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
@pytest.mark.parametrize(
    ("kind", "order"), [("ddp", "before"), ("fsdp", "before"), ("fsdp", "after")]
)
def test_gradients_are_those_of_one_process(run_process, tmp_path, kind, order):
    """A plan put on before or after wrapping: the mean of both gradients, less memory."""
    done = run_process(
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", WORKER, kind, order,
        tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.code == 0, done.err
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
