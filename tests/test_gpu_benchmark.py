"""The benchmark for GPUs, as far as it runs without one: rows, time, verdicts, and going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_rows, shapes
from benchmarks.gpu_rows import RIVALS, Bench, Subject
from benchmarks.shapes import Entry
from remat.cost.devices import find_device
from remat.cost.model import CostModel
from zoo import TINY

ROOT = Path(__file__).parent.parent
GPT2 = {"gpt2": TINY["gpt2"]}
CPU = torch.device("cpu")


@pytest.fixture(name="bench")
def small_bench() -> Bench:
    """A tiny model on the CPU, priced by the device table."""
    return Bench(device=CPU, cost=CostModel(device=find_device("cpu")), entries=GPT2)


def row(outcome: str, *passed: bool | None, may_fail: bool = False) -> dict[str, object]:
    checks = [{"what": "allocated", "passed": verdict} for verdict in passed]
    return {"outcome": outcome, "checks": checks, "may_fail": may_fail, "reason": "why"}


@pytest.mark.parametrize(
    ("rows", "passed"),
    [
        ([row("measured", True, None)], True),
        ([row("measured", True, False)], False),
        ([row("error")], False),
        ([row("error", may_fail=True)], True),
        ([row("not reached")], False),
        ([row("not reached", may_fail=True)], True),
        ([row("skipped", may_fail=True)], False),
    ],
)
def test_verdict_is_passed_only_where_all_was_measured(rows, passed) -> None:
    """What failed or is missing fails the whole; what others cannot do does not."""
    found = gpu.verdicts({str(number): one for number, one in enumerate(rows)})
    assert found["passed"] is passed
    assert sum(found["outcomes"].values()) == len(rows)


def test_row_ends_when_its_time_is_up() -> None:
    """A row that would go on is ended and said to be skipped; one without time is not begun."""
    begin = time.monotonic()
    found = gpu.measured_within(lambda: time.sleep(60), begin + 0.3)  # type: ignore[func-returns-value]
    assert found["outcome"] == "skipped"  # a job that comes to its end returns something else
    assert "not done in the" in found["reason"]
    late = gpu.measured_within(lambda: {"outcome": "measured"}, begin)
    assert late["outcome"] == "skipped"
    assert "before it began" in late["reason"]


def test_row_whose_budget_is_out_of_reach_is_shown(bench) -> None:
    """A plan that cannot be had is a row with the reason, and so is any other error."""
    theirs = {"measured": {"allocated": 1}, "tokens_per_second": 1.0}
    enough = {"deadline": time.monotonic() + 500, "most_seconds": 500}
    found = gpu.measured_within(lambda: bench.ours("gpt2", "all blocks", theirs), **enough)
    assert found["outcome"] == "not reached"
    assert "least peak" in found["reason"]
    found = gpu.measured_within(lambda: bench.unplanned("no such", autocast=False), **enough)
    assert found == {"outcome": "error", "reason": "KeyError: 'no such'"}


@pytest.mark.parametrize("autocast", [False, True])
def test_predictions_for_a_gpu_are_made_without_one_and_judged(autocast) -> None:
    """Reserved memory and a plan between the least peak and keeping all; too far off fails."""
    cost = CostModel(device=find_device("H100-80GB"))
    bench = Bench(device=torch.device("cuda"), cost=cost, entries=GPT2)
    fit = bench.away("gpt2", autocast=autocast)
    plan = gpu_rows.halfway(fit)
    assert plan.predicted_reserved_bytes is not None
    assert plan.predicted_reserved_bytes + plan.outside_bytes <= plan.budget_bytes
    assert plan.budget_bytes <= fit.keep_all_peak_bytes
    measured = {
        "allocated": plan.predicted_peak_bytes / 1.03,
        "reserved": plan.predicted_reserved_bytes / 1.03,
        "seconds": (plan.step_seconds + plan.recompute_seconds) / 1.2,
    }
    checks = bench.judged(plan, measured)["checks"]
    assert {c["what"]: c["passed"] for c in checks} == {
        "allocated": False, "reserved": True, "seconds": False,
    }  # fmt: skip


@pytest.mark.parametrize("rival", sorted(set(RIVALS) - gpu_rows.COMPILED))
def test_what_others_do_trains_alike_and_leaves_the_model_as_it_was(rival) -> None:
    """The same loss and gradients bit for bit, and no trace of it afterwards."""
    gradients = []
    for context in (RIVALS["keep everything"], RIVALS[rival]):
        subject = Subject(TINY["gpt2"], CPU, autocast=False)
        with context(subject):
            subject.loss(subject.model, subject.batch).backward()
        gradients.append([p.grad for p in subject.model.parameters()])
        assert not any("forward" in vars(module) for module in subject.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_others_do_takes_the_memory_that_it_should() -> None:
    """Blocks keep less than everything, and saving every second product lies between."""
    cost = CostModel(device=find_device("cpu"))
    bench = Bench(device=CPU, cost=cost, entries={"llama": TINY["llama"]})
    peaks = {
        rival: bench.rival("llama", rival)["measured"]["allocated"]
        for rival in ("keep everything", "all blocks", "save every second matmul")
    }
    assert peaks["all blocks"] < peaks["save every second matmul"] < peaks["keep everything"]


def test_rows_of_a_dry_run_pass_and_are_kept_by_the_next(tmp_path, capsys) -> None:
    """Predictions, plan, budget and gradients of one model; a second run measures nothing again."""
    path = tmp_path / "gpu.json"
    only = ["--dry-run", "--out", str(path), "--only", "gpt2 fp32|gpt2 bf16, all blocks(: ours)?$"]
    assert gpu.main(only) == 0, capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found["rows"]) == [
        "gpt2 fp32, unplanned",
        "gpt2 bf16, all blocks",
        "gpt2 bf16, all blocks: ours",
        "gpt2 fp32, planned",
        "gpt2 fp32, predicted on the device",
    ]
    assert found["verdicts"]["checks"]["allocated"] == {"passed": 3, "failed": 0, "not judged": 0}
    assert found["verdicts"]["checks"]["gradients"]["passed"] == 1
    assert found["verdicts"]["checks"]["budget"]["passed"] == 1
    assert gpu.main([*only[:-1], "gpt2 fp32, unplanned"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == found["rows"]


def test_time_that_is_up_is_said_and_fails(tmp_path, capsys) -> None:
    """Every row is listed as skipped with the reason, and nothing else runs."""
    path = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--seconds", "0", "--out", str(path)]) == 1
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {one["outcome"] for one in rows.values()} == {"skipped"}
    assert "llama bf16, predicted on the device: skipped" in capsys.readouterr().out


def test_results_of_another_device_are_refused(tmp_path, capsys) -> None:
    """Rows of two devices never stand in one file."""
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"hardware": "another", "rows": {}}), encoding="utf-8")
    assert gpu.main(["--dry-run", "--seconds", "0", "--out", str(path)]) == 2
    assert "is of another hardware" in capsys.readouterr().out


@pytest.mark.slow
def test_command_measures_prices_first(tmp_path) -> None:
    """As a process of its own, run as a file."""
    path = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--only", "calibration"]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "--out", str(path)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=550, check=False,
    )  # fmt: skip
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert {name: one["outcome"] for name, one in rows.items()} == {"calibration": "measured"}
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
def test_compiled_rival_is_measured() -> None:
    """By inductor, which builds each kernel for seconds: a model of one block."""
    entry = Entry(name="chain", make=lambda _: shapes.chain(blocks=1, width=16, rows=256))
    bench = Bench(device=CPU, cost=CostModel(device=find_device("cpu")), entries={"chain": entry})
    (rival,) = gpu_rows.COMPILED
    found = bench.rival("chain", rival)
    assert found["outcome"] == "measured"
    assert found["tokens_per_second"] > 0
