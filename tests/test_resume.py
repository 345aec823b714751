"""Kill -9 in every phase of an evaluation: what is finished stays, and resuming ends the same."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import textwrap

import pytest
import torch

import remat
from remat.evaluation.resuming import as_begun
from remat.evaluation.yardstick import YARDSTICK
from remat.runs import load_run
from remat.runs.records import RunStatus, VariantStatus
from remat.runs.store import held
from remat.workloads import load_workload

DROPOUT_WORKLOAD = """
    import torch
    import remat

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(16, 64)
            self.down = torch.nn.Linear(64, 16)

        def forward(self, x):
            hidden = torch.nn.functional.gelu(self.up(x))
            return x + self.down(torch.nn.functional.dropout(hidden, 0.2, self.training))

    def build():
        return torch.nn.Sequential(*[Block() for _ in range(3)], torch.nn.Linear(16, 4))

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def predict(model, batch):
        return model(batch[0]).softmax(dim=-1), batch[1]

    inputs = torch.randn(192, 16, generator=torch.Generator().manual_seed(3))
    data = torch.utils.data.TensorDataset(inputs, inputs[:, :4].argmax(dim=-1))
    workload = remat.Workload(
        name="dropout", model=build, train_data=data, eval_data=data, batch_size=64, loss=loss,
        predict=predict, epochs=2, seed=7,
    )
"""
SETTINGS = {
    "budgets": ["85%", "70%"],
    "peers": [],
    "front_points": 2,
    "timing_rounds": 2,
    "warmup_rounds": 0,
    "keep_trained_weights": True,
    "serving": None,
    "expenses": None,
    "seeds": 2,
}
BEGUN = {name: value for name, value in SETTINGS.items() if name != "peers"}
# Stage at which the process kills itself, and how much of it is done then.
PHASES = (
    ("plan, verify, measure", 2),
    ("time steps in turn", 1),
    ("plan the Pareto front", 0),
    ("train: plan 85%", 3),
    ("train: plan 70%, seed 8", 2),
    ("draw evidence", 0),
    ("draw the page", 0),
)


def run_until(path, place, stage, done_by_then):
    """Evaluate in this process until a moment of a stage, and then die by SIGKILL."""

    def progress(current, done, total):
        if current == stage and done == done_by_then:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    remat.evaluate(load_workload(str(path)), **SETTINGS, **place, progress=progress)


@pytest.fixture(scope="module")
def processes():
    """Start processes by forking one that has torch loaded: each is real, and dies for real."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remat.evaluation.evaluate", "torch"])
    return context


@pytest.mark.slow
def test_run_killed_in_every_phase_ends_as_an_unbroken_one(
    tmp_path, write_workload, processes, restored_imports
):
    """Seven kills by SIGKILL, each followed by a resume, lose nothing and change no bit."""
    path, out = write_workload(DROPOUT_WORKLOAD), tmp_path / "killed"
    place = {"out": out}
    seen = []
    for stage, done in PHASES:
        child = processes.Process(target=run_until, args=(path, place, stage, done))
        child.start()
        child.join(240)
        assert child.exitcode == -signal.SIGKILL, f"not killed in {stage}"
        seen.append(load_run(out))
        place = {"resume": out}
    states = [[variant.status.value for variant in run.variants] for run in seen]
    assert states == [
        ["measured", "measured", "pending", "pending"],
        ["measured"] * 4,
        ["measured"] * 4,
        ["finished", "finished", "measured", "measured"],
        *[["finished"] * 4] * 3,
    ]
    assert [len(run.finished_stages) for run in seen] == [0, 0, 1, 2, 2, 2, 5]
    assert [len(variant.repeats) for variant in seen[4].variants] == [1, 1, 1, 0]
    for earlier, later in itertools.pairwise(seen):
        kept = {v.label: v.train_seconds for v in later.variants}
        finished = [v for v in earlier.variants if v.status is VariantStatus.FINISHED]
        # the clock never shows the same twice: these are the trainings that were finished then
        assert all(kept[v.label] == v.train_seconds for v in finished)
    workload = load_workload(str(path))
    ended = remat.evaluate(workload, **SETTINGS, resume=out)
    unbroken = remat.evaluate(workload, **SETTINGS, out=tmp_path / "unbroken")
    assert ended.status is RunStatus.COMPLETE
    assert ended == load_run(out)
    assert (out / "report.html").exists()
    assert {path.name for path in out.iterdir()} == {
        "run.json", "metrics.csv", "report.html", "objects",
    }  # fmt: skip
    assert [gap.section for gap in ended.gaps] == [gap.section for gap in unbroken.gaps]
    assert ended.passed
    assert unbroken.passed
    for broken, whole in zip(ended.variants, unbroken.variants, strict=True):
        assert broken.losses == whole.losses
        assert broken.weights_sha256 == whole.weights_sha256
        assert [one.metrics for one in broken.quality] == [one.metrics for one in whole.quality]
        assert broken.calibration == whole.calibration
        assert broken.calibration is not None, "predictions of killed processes were kept"
        assert broken.repeats[0].weights_sha256 == whole.repeats[0].weights_sha256
        assert broken.measured_peak_bytes == whole.measured_peak_bytes
        assert broken.plan.regions == whole.plan.regions
    weights = [{(one.name, one.sha256) for one in run.artifacts} for run in (ended, unbroken)]
    assert weights[0] == weights[1]
    assert len({one.sha256 for one in ended.artifacts}) == 1, "equal weights lie once"


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Give a workload file, a run of it that was interrupted before training, and its folder."""
    folder = tmp_path_factory.mktemp("cut")
    path, out = folder / "mine.py", folder / "run"
    path.write_text(textwrap.dedent(DROPOUT_WORKLOAD), encoding="utf-8")
    before = list(sys.path)
    workload = load_workload(str(path))
    sys.path[:] = before

    def progress(stage, done, total):
        if stage.startswith("train"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remat.evaluate(workload, **BEGUN, page=False, out=out, progress=progress)
    return path, workload, out


def test_resuming_with_anything_else_is_one_clear_error(cut, restored_imports):
    """Seed, budgets, steps, data or weights that differ are named with both values."""
    path, _, out = cut
    before = (out / "run.json").read_bytes()

    def refused(text, change=None, **changes):
        other = path.with_name("other.py")
        other.write_text(path.read_text().replace(*(change or ("", ""))))
        with pytest.raises(remat.RunError, match=text):
            remat.evaluate(load_workload(str(other)), **(BEGUN | changes), page=False, resume=out)

    refused("seed was 7, now 8; first weights was", seed=8)
    refused("budgets was 85%, 70%, now 60%", budgets=["60%"])
    refused("max steps was None, now 3", max_steps=3)
    refused("workload was dropout, now other", ('name="dropout"', 'name="other"'))
    refused("first batch was", ("manual_seed(3)", "manual_seed(4)"))
    refused("parameters was", ("(3)]", "(4)]"))
    assert (out / "run.json").read_bytes() == before


def test_resuming_takes_neither_a_second_folder_nor_a_run_being_written(cut):
    """`out` beside `resume` is refused, and so is a run whose lock another one holds."""
    _, workload, out = cut
    with pytest.raises(remat.WorkloadError, match="not both"):
        remat.evaluate(workload, resume=out, out=out)
    with held(out), pytest.raises(remat.RunError, match="another process is writing"):
        remat.evaluate(workload, **BEGUN, page=False, resume=out)


def test_cli_resumes_with_the_settings_of_the_run(cut, run_cli, tmp_path):
    """`--resume` needs no other option, ends the run, and does nothing to one that has ended."""
    path, _, begun_in = cut
    out = tmp_path / "copy"
    shutil.copytree(begun_in, out)
    assert as_begun(load_run(out)) == BEGUN | {
        "seed": 7, "epochs": 2, "max_steps": None, "budgets": ("85%", "70%"),
        "margin": None, "targets": {}, "check_every": None, "device": None,
    }  # fmt: skip
    done = run_cli("evaluate", path, "--resume", out, "--out", tmp_path / "b")
    assert (done.code, "give one" in done.err) == (2, True)
    done = run_cli("evaluate", path, "--resume", out, "--seed", "8")
    assert (done.code, "seed was 7, now 8" in done.err) == (2, True)
    done = run_cli("evaluate", path, "--resume", out)
    assert done.code == 0, done.err
    ended = (out / "run.json").read_bytes()
    assert load_run(out).status is RunStatus.COMPLETE
    assert run_cli("evaluate", path, "--resume", out).code == 0
    assert (out / "run.json").read_bytes() == ended


def test_yardstick_is_timed_with_the_steps(cut):
    """The fixed work has as many times as the steps have, and is none of the variants."""
    run = load_run(cut[2])
    assert len(run.yardstick.seconds) == SETTINGS["timing_rounds"]
    assert YARDSTICK not in [variant.label for variant in run.variants]
