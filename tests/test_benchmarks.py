"""The benchmarks' own machinery: stages run, peers are judged as they are, figures reproduced."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import remat
from benchmarks import checkmate, scaling, steptime
from benchmarks.compiled import as_data, compiled, memory_budget
from benchmarks.core import CoreRunner
from benchmarks.peer_step import Reference, examine
from benchmarks.peers_report import equal_peak, findings, score
from benchmarks.runner import Data, path_of, read
from benchmarks.zoo import ZOO
from remat.fit import Fit

ROOT = Path(__file__).parent.parent


def row(asked: int, measured: int, fraction: float, *, wrong: bool = False) -> Data:
    return {
        "setting": str(asked),
        "asked_bytes": asked,
        "measured_bytes": measured,
        "predicted_bytes": measured,
        "fraction": fraction,
        "verdict": {"identical": not wrong, "wrong_in_silence": wrong},
    }


def test_scores_count_what_the_rows_show() -> None:
    """A peer over its budget, with peaks that fall as budgets grow, wrong and cheaper, is told."""
    megabyte = 10**6
    ours = [row(9 * megabyte, 9 * megabyte, 0.5), row(20 * megabyte, 20 * megabyte, 0.1)]
    peer = [
        row(10 * megabyte, 25 * megabyte, 0.2, wrong=True),
        row(20 * megabyte, 10 * megabyte, 0.4),
        row(30 * megabyte, 8 * megabyte, 0.9),
    ]
    found = {one["peer"]: one for one in score({"ours": ours, "sac": peer})}
    assert (found["ours"]["within"], found["ours"]["tightness"]) == (2, 1.0)
    assert found["sac"]["within"] == 2
    assert found["sac"]["not_monotone"] == 2
    assert found["sac"]["wrong_in_silence"] == 1
    assert found["sac"]["lowest_peak_bytes"] == 8 * megabyte
    assert found["sac"]["dearer_than_ours"] == 1
    assert found["sac"]["cheaper_than_ours"] == 1
    assert found["sac"]["unreached_by_ours"] == 1
    assert equal_peak(peer[1], ours)["gap"] == pytest.approx(-0.1)
    model = {"name": "a model", "scores": list(found.values()), "peers": {"sac": peer}}
    assert any("AHEAD" in sentence for sentence in findings([model]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wrong_gradients_of_a_memory_budget_with_dropout_are_seen() -> None:
    """Under a low activation_memory_budget the loss is right and gradients are not; at 1.0 both."""
    reference = Reference(ZOO["chain6"].build(dropout=0.1))
    verdicts = {}
    for fraction in (1.0, 0.05):
        with memory_budget("aot_eager", fraction, "dp") as twice:
            found = examine(reference, functools.partial(compiled, backend="aot_eager"))
        reference.restore()
        verdicts[fraction] = found["verdict"]
        if fraction < 1.0:
            assert as_data(twice, 1.0)["num_recomputed_random_ops"] > 0
    assert verdicts[1.0]["identical"]
    assert verdicts[0.05]["loss_identical"]
    assert verdicts[0.05]["wrong_in_silence"]
    assert verdicts[0.05]["largest_gradient_error"] > 0.01


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_memory_budget_reproduces_the_reference_peak() -> None:
    """Six blocks, forward and backward alone, under aot_eager at 0.5: 86.6 MiB."""
    reference = Reference(ZOO["six_blocks"].build())
    with memory_budget("aot_eager", 0.5, "dp"):
        prepare = functools.partial(compiled, backend="aot_eager")
        found = examine(reference, prepare, optimizer=None)
    above = (found["measured_bytes"] - found["base_bytes"]) / 2**20
    assert above == pytest.approx(86.6, abs=0.1)


@pytest.mark.slow
def test_stages_run_and_agree_with_each_other(tmp_path: Path) -> None:
    """A chain is planned by rotor, run in fresh processes, and kept bit for bit."""
    script = (
        "import sys; from benchmarks.peer_stages import main\n"
        "for stage in ('facts', 'rotor-plan', 'rotor'):\n"
        f"    sys.argv = ['x', stage, 'chain6', '--work', {str(tmp_path)!r}, '--points', '2']\n"
        "    main()"
    )
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, timeout=300
    )
    rows = read(path_of(tmp_path, "chain6", "rotor"))["rows"]
    assert len(rows) == 2
    assert all(one["verdict"]["identical"] for one in rows), json.dumps(rows, indent=1)
    assert rows[0]["fraction"] > rows[1]["fraction"] > 0
    assert rows[0]["measured_bytes"] < rows[1]["measured_bytes"]


def test_checkmates_static_model_gives_the_published_batches() -> None:
    """One accounting gives exactly the 167 of storing all, the other exactly the optimum of 289."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in checkmate.flat_vgg19(batch=1).model.parameters())
    assert parameters == 143_667_240  # VGG19 as published
    twice, once = (checkmate.by_their_model(a, parameters) for a in checkmate.ACCOUNTINGS)
    assert twice["no schedule above"] == checkmate.PUBLISHED["optimum"]
    assert once["store all"] == checkmate.PUBLISHED["store all"]


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "fits"), [(289, True), (320, True), (600, False)])
def test_vgg19_reaches_checkmates_optimum(batch: int, fits: bool) -> None:
    """The published optimum's batch, and larger ones, fit 16 GB for much less than a forward."""
    accounting = checkmate.ACCOUNTINGS[0]
    with torch.device("meta"):
        case = checkmate.staged_vgg19(batch=batch)
    fit = Fit(case.model, case.batch, loss=case.loss, optimizer=None, cost=checkmate.STATIC)
    budget = checkmate.our_budget(accounting, case, 143_667_240)
    if fits:
        assert fit.plan(budget).recompute_fraction < 0.2
    else:
        with pytest.raises(remat.BudgetError):
            fit.plan(budget)


def test_exponents_are_those_of_powers() -> None:
    """A square root has exponent one half, whatever its factor."""
    depths = [25, 50, 100, 800]
    assert scaling.fitted_exponent(depths, [3 * n**0.5 for n in depths]) == pytest.approx(0.5)
    assert scaling.fitted_exponent(depths, [7 * n for n in depths]) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "depth"), [("chain", 4), ("tuples", 4), ("llama", 2), ("resnet1202", 20)]
)
def test_scaling_plans_each_kind_of_model(kind: str, depth: int) -> None:
    """A point notes what planning took, and a least plan below keeping everything."""
    row = scaling.point(kind, depth)
    assert row["least_peak_bytes"] <= row["keep_all_bytes"]
    assert row["least_activation_bytes"] > 0
    assert row["once_activation_bytes"] >= row["least_activation_bytes"]
    assert min(row["seconds"].values()) >= 0
    assert row["python_bytes"] > 0
    assert scaling.exponents([row]) == []


@pytest.mark.slow
def test_steps_are_compared_at_equal_peak() -> None:
    """Ours takes no more memory than all blocks, recomputes no more, and is timed as often."""
    row = steptime.compared(ZOO["chain6"], seconds=0.0)
    blocks, ours = row["plans"]["all"], row["plans"]["ours"]
    assert ours["predicted_peak_bytes"] <= blocks["predicted_peak_bytes"]
    assert ours["predicted_step_seconds"] <= blocks["predicted_step_seconds"]
    assert row["rounds"] == steptime.FEWEST_ROUNDS
    assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


@pytest.mark.slow
def test_core_stages_write_what_the_results_are_made_of(tmp_path: Path) -> None:
    """Bounds, a plan with its measured peak, and an unplanned step, each from its own process."""
    runner = CoreRunner(tmp_path, threads=1)
    assert runner.run("bounds", "chain6", points=2)
    assert runner.run("plan", "chain6", index=1)
    assert runner.run("unplanned", "chain6")
    bounds = read(path_of(tmp_path, "chain6", "bounds"))
    plan = read(path_of(tmp_path, "chain6", "plan", 1))
    assert plan["asked_bytes"] == bounds["budgets"][1]
    assert plan["measured_bytes"] <= plan["asked_bytes"]
    assert plan["measured_bytes"] == pytest.approx(plan["predicted_bytes"], abs=1024)
    measured = read(path_of(tmp_path, "chain6", "unplanned"))["peak_bytes"]
    assert measured == pytest.approx(bounds["keep_all_bytes"], abs=1024)
    stages = {task.args[0] for task in runner.tasks("chain6", points=2, sweep=3)}
    assert stages == {"verify", "sweep", "targets", "policies", "plan", "unplanned"}
