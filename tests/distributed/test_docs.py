"""The page about several processes runs as it stands, each block in a process of its own."""

from __future__ import annotations

import re

import pytest
import torch

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "distributed.md"
BEFORE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

make_model, make_batch = Model, lambda: torch.randn(8, 64)
model, batch = make_model(), make_batch()
loss_fn = lambda model, batch: model(batch).square().mean()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_every_block_of_the_page_runs(run_process, tmp_path):
    """In a group of one process, and in the one that sends nothing."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for number, block in enumerate(blocks):
        script = tmp_path / f"block{number}.py"
        script.write_text(f"{BEFORE}{block}print(plan.summary())")
        done = run_process(
            script, RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0",
            OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert done.code == 0, done.err
        assert "recomputed" in done.out
