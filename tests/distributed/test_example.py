"""The example that trains on several processes, as its first lines say to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_fsdp.py"

pytestmark = pytest.mark.slow


def test_example_trains_within_the_budget_of_each_process(run_pair):
    """One torchrun: every rank within its budget, the prediction to the byte, the loss lower."""
    done = run_pair(EXAMPLE, "--steps", "8")
    ranks = re.findall(
        r"rank (\d): budget ([\d,]+) bytes, predicted ([\d,]+), measured ([\d,]+)", done.out
    )
    assert [int(number) for number, *_ in ranks] == [0, 1]
    for _, *figures in ranks:
        budget, predicted, measured = (int(text.replace(",", "")) for text in figures)
        assert 0 <= predicted - measured <= 0.001 * measured
        assert measured <= budget
    first, *_, last = map(float, re.findall(r"\d\.\d{3}", done.out))
    assert last < first


def test_example_says_how_it_is_run(run_process):
    """`--help` needs no process group, and has the command."""
    done = run_process(EXAMPLE, "--help")
    assert done.code == 0
    assert "torchrun --nproc-per-node 2 examples/train_fsdp.py" in done.out
