"""Evaluate, end to end on small real training: the same result under every plan, and on disk."""

import os
import signal
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import remat
from remat.planner.policies import AllBlocks, EveryNth
from remat.runs import load_run
from remat.runs.records import RunStatus, VariantKind, VariantStatus, Verdict


class Block(nn.Module):
    """A residual block with BatchNorm and dropout: both go wrong where a block runs twice."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 128)
        self.norm = nn.BatchNorm1d(128)
        self.down = nn.Linear(128, 32)

    def forward(self, x):
        return x + self.down(F.dropout(F.gelu(self.norm(self.up(x))), 0.2, self.training))


def build():
    return nn.Sequential(nn.Linear(8, 32), *[Block() for _ in range(4)], nn.Linear(32, 3))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def predict(model, batch):
    return model(batch[0]).softmax(dim=-1), batch[1]


def make_data(count, seed):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=-1))


def make_workload(**changes):
    settings = {
        "name": "tiny",
        "model": build,
        "train_data": make_data(300, 1),
        "eval_data": make_data(100, 2),
        "batch_size": 128,
        "loss": loss,
        "predict": predict,
        "epochs": 2,
        "seed": 5,
    }
    return remat.Workload(**(settings | changes))


def evaluate(workload, out, **changes):
    settings = {
        "budgets": ["85%", "70%"],
        "peers": [EveryNth(n=2)],
        "front_points": 3,
        "timing_rounds": 2,
        "warmup_rounds": 0,
        "serving": None,
        "expenses": None,
        "page": False,
    }
    return remat.evaluate(workload, out=out, **(settings | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One evaluation, its folder, and the random state before and after it."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run = evaluate(make_workload(), folder, budgets=["85%", "70%", "1%"], page=True)
    return run, folder, torch.equal(before, torch.get_rng_state())


def by_label(run):
    return {variant.label: variant for variant in run.variants}


def test_training_is_identical_bit_for_bit_under_every_plan(finished):
    """With dropout and BatchNorm, losses, quality and final weights equal in every variant."""
    run, _, _ = finished
    trained = [variant for variant in run.variants if variant.status is VariantStatus.FINISHED]
    assert [variant.label for variant in trained] == [
        "no plan", "all blocks", "plan 85%", "plan 70%",
    ]  # fmt: skip
    assert len({variant.losses for variant in trained}) == 1
    assert len({variant.weights_sha256 for variant in trained}) == 1
    assert len({str([one.metrics for one in variant.quality]) for variant in trained}) == 1
    assert all(v.losses_identical and v.weights_identical for v in trained[1:])
    assert any(variant.plan.regions for variant in trained[1:])


def test_training_is_what_a_plain_loop_gives(finished):
    """The losses without a plan are those of ten lines of PyTorch with the same seeds."""
    run, _, _ = finished
    workload = make_workload()
    expected = []
    torch.manual_seed(5)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(2):
        loader = torch.utils.data.DataLoader(
            workload.train_data,
            batch_size=128,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(5 + epoch),
        )
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            optimizer.step()
            expected.append(value.item())
        model.eval()
    assert list(by_label(run)["no plan"].losses) == expected


def test_validation_accuracy_is_that_of_the_trained_model(finished):
    """Accuracy after the last epoch is between chance and one, over all validation examples."""
    run, _, _ = finished
    last = by_label(run)["no plan"].quality[-1]
    assert [point.epoch for point in by_label(run)["plan 70%"].quality] == [0, 1]
    assert last.num_examples == 100
    assert 0 <= last.metrics["accuracy"] <= 1
    assert last.metrics["accuracy"] * 100 == pytest.approx(round(last.metrics["accuracy"] * 100))


def test_measured_peaks_keep_their_budgets(finished):
    """Every planned variant stays within its bytes, on a real step."""
    run, _, _ = finished
    reference = by_label(run)["no plan"]
    for label, share in (("plan 85%", 0.85), ("plan 70%", 0.70)):
        variant = by_label(run)[label]
        assert variant.measured_peak_bytes <= variant.budget_bytes
        assert variant.budget_bytes <= share * reference.plan.keep_all_peak_bytes
        assert variant.verdict is Verdict.PASSED, variant.message
        peak = max(sum(sample.bytes_by_kind.values()) for sample in variant.timeline)
        assert peak == pytest.approx(variant.predicted_peak_bytes, rel=0.02)


def test_budget_out_of_reach_is_recorded_and_the_rest_goes_on(finished):
    """An infeasible budget is a result with the least peak, not the end of the evaluation."""
    run, _, _ = finished
    variant = by_label(run)["plan 1%"]
    assert variant.status is VariantStatus.INFEASIBLE
    assert variant.minimum_bytes > variant.budget_bytes
    assert not variant.losses
    assert "The budget 1% cannot be reached" in run.summary
    assert run.passed


def test_peers_are_timed_but_not_trained(finished):
    """A peer has a peak and step times, and no losses."""
    run, _, _ = finished
    peer = by_label(run)[EveryNth(n=2).label]
    assert peer.status is VariantStatus.MEASURED
    assert peer.kind is VariantKind.POLICY
    assert len(peer.step_times.seconds) == 2
    assert not peer.losses


def test_front_is_ordered_and_costs_less_with_more_memory(finished):
    """More memory never costs more time on the planned front."""
    run, _, _ = finished
    peaks = [point.peak_bytes for point in run.front]
    seconds = [point.step_seconds for point in run.front]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)


def test_run_on_disk_is_the_run_returned(finished):
    """run.json holds everything, the page and the series lie beside it, and nothing else does."""
    run, folder, _ = finished
    assert load_run(folder) == run
    assert run.status is RunStatus.COMPLETE
    assert {path.name for path in folder.iterdir()} == {"run.json", "metrics.csv", "report.html"}
    assert run.summary.split(".")[0] in (folder / "report.html").read_text(encoding="utf-8")


def test_random_state_of_the_caller_is_left_alone(finished):
    """An evaluation draws from its own seeds only."""
    assert finished[2]


def test_existing_run_is_not_written_over(finished):
    """A folder that holds a run is refused before anything is trained."""
    _, folder, _ = finished
    before = (folder / "run.json").read_bytes()
    with pytest.raises(remat.RunError, match="already holds a run"):
        evaluate(make_workload(), folder)
    assert (folder / "run.json").read_bytes() == before


def test_seed_and_length_can_be_set_for_one_run(tmp_path):
    """The arguments win over the workload; training ends after max_steps, within an epoch too."""
    run = evaluate(make_workload(), tmp_path / "a", budgets=["70%"], policies=[], seed=6, epochs=3,
                   max_steps=5, peers=[], front_points=0)  # fmt: skip
    assert (run.seed, run.epochs) == (6, 3)
    assert [len(variant.losses) for variant in run.variants] == [5, 5]
    assert len(run.variants[0].quality) == 3
    assert run.front == ()


def test_batches_from_a_function_and_mappings_are_trained(tmp_path):
    """A function that yields mappings, and a loss from the model's own output, work as well."""

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build()

        def forward(self, inputs, labels):
            return {"loss": F.cross_entropy(self.body(inputs), labels)}

    def batches():
        data = make_data(256, 3)
        for start in (0, 128):
            inputs, labels = data[start : start + 128]
            yield {"inputs": inputs, "labels": labels}

    workload = remat.Workload(
        name="mapping", model=WithLoss, train_data=batches, eval_data=batches, epochs=1
    )
    run = evaluate(workload, tmp_path / "a", budgets=["80%"], policies=[], peers=[], front_points=0)
    assert run.passed, run.summary
    assert [len(variant.losses) for variant in run.variants] == [2, 2]
    assert set(run.variants[0].quality[0].metrics) == {"loss"}


def test_batches_of_several_shapes_are_noted(tmp_path):
    """A plan is for one shape: where training saw others, the run says so."""
    shapes = [(64, 1), (32, 2)]
    workload = make_workload(
        train_data=lambda: [make_data(count, seed)[:] for count, seed in shapes], epochs=1
    )
    run = evaluate(workload, tmp_path / "a", budgets=["90%"], policies=[], peers=[], front_points=0)
    assert "several shapes" in run.notes[0]


def interrupt_at(stage):
    def progress(current, done, total):
        if current == stage:
            raise KeyboardInterrupt

    return progress


def test_interrupted_run_keeps_its_finished_variants(tmp_path):
    """After Ctrl-C run.json holds what was finished, says that it is unfinished, and is whole."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_workload(), tmp_path / "a", progress=interrupt_at("train: plan 85%"))
    run = load_run(tmp_path / "a")
    assert run.status is RunStatus.UNFINISHED
    assert not run.passed
    found = by_label(run)
    assert len(found["no plan"].losses) == len(found["all blocks"].losses) == 4
    assert found["plan 85%"].status is VariantStatus.MEASURED
    assert run.summary.startswith("This run was not finished (2 of 5 variants were)")
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"run.json", "metrics.csv", "predictions"}


def test_interrupt_before_the_first_result_leaves_no_folder(tmp_path):
    """Where nothing was found out, nothing is left behind."""
    with pytest.raises(KeyboardInterrupt):
        evaluate(make_workload(), tmp_path / "a", progress=interrupt_at("trace one step"))
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_evaluation as here

    def progress(stage, done, total):
        if stage == "train: plan 85%" and done == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    here.evaluate(here.make_workload(), {out!r}, progress=progress, peers=[], front_points=0)
"""


@pytest.mark.slow
def test_killed_run_keeps_its_finished_variants(tmp_path, run_process):
    """A process killed in the middle of training loses that training and no other."""
    out = tmp_path / "a"
    code = KILLED.format(tests=os.path.dirname(__file__), out=str(out))  # noqa: PTH120
    assert run_process("-c", textwrap.dedent(code)).code == -signal.SIGKILL
    run = load_run(out)
    assert run.status is RunStatus.UNFINISHED
    found = by_label(run)
    assert len(found["all blocks"].losses) == 4
    assert found["all blocks"].weights_identical
    assert found["plan 85%"].losses == ()
    assert {path.name for path in out.iterdir()} == {"run.json", "metrics.csv", "predictions"}


def test_variant_out_of_memory_is_recorded_and_the_rest_goes_on(tmp_path):
    """What does not fit fails alone; without a reference nothing is called identical."""
    calls = []

    def greedy(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    def scarce_loss(model, batch):
        is_planned = any("forward" in module.__dict__ for module in model.modules())
        if model.training and not is_planned and calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss(model, batch)

    def progress(stage, done, total):
        if stage.startswith("train"):
            calls.append(stage)

    workload = make_workload(loss=scarce_loss, optimizer=greedy, epochs=1)
    run = evaluate(workload, tmp_path / "a", budgets=["70%"], peers=[], front_points=0,
                   progress=progress)  # fmt: skip
    found = by_label(run)
    assert found["no plan"].status is VariantStatus.FAILED
    assert found["no plan"].message.startswith("out of memory")
    assert found["plan 70%"].status is VariantStatus.FINISHED
    assert found["plan 70%"].losses_identical is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": lambda: "model"}, "returned a str, expected a torch.nn.Module"),
        (
            {"model": lambda: 1 / 0},
            r"model\(\) raised ZeroDivisionError.*test_evaluation\.py, line",
        ),
        ({"loss": lambda model, batch: model(batch[0])}, "expected a scalar"),
        ({"train_data": []}, "train_data holds no batch"),
        ({"train_data": TensorDataset}, "train_data: expected a dataset of examples"),
        ({"train_data": 3}, "expected a dataset of examples"),
    ],
)
def test_workload_that_cannot_be_trained_is_refused_and_leaves_no_folder(
    tmp_path, changes, message
):
    """The error is that of the workload, raised before anything is written."""
    with pytest.raises(remat.WorkloadError, match=message):
        evaluate(make_workload(**changes), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0}, {"max_steps": 0}, {"timing_rounds": 0}, {"warmup_rounds": -1},
        {"front_points": True}, {"seed": -1}, {"seed": 2**63}, {"seeds": 0},
    ],
)  # fmt: skip
def test_counts_out_of_range_are_refused_by_name(tmp_path, changes):
    """A count that makes no sense is named, with what is allowed."""
    (name,) = changes
    with pytest.raises(remat.WorkloadError, match=f"{name} must be an integer"):
        evaluate(make_workload(), tmp_path / "a", **changes)


def test_progress_counts_every_stage_to_its_end(tmp_path):
    """Stages come in order, counts only grow, and known totals are reached."""
    seen = {}

    def progress(stage, done, total):
        assert done >= seen.get(stage, (0, None))[0]
        seen[stage] = (done, total)

    evaluate(make_workload(epochs=1), tmp_path / "a", policies=[AllBlocks()], budgets=[], peers=[],
             front_points=0, progress=progress)  # fmt: skip
    assert list(seen) == [
        "trace one step",
        "plan, verify, measure",
        "time steps in turn",
        "train: no plan",
        "train: all blocks",
        "draw evidence",
    ]
    assert all(done == total for done, total in seen.values() if total is not None)
