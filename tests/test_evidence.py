"""Evidence of an evaluation from end to end: seeds, targets, slices; and bad input as one line."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import remat
from remat.evaluation.equivalence import equivalences
from remat.evaluation.reaching import Aim, Clock
from remat.evaluation.training import train
from remat.runs import load_run
from remat.runs.evidence import Repeat, SliceOrigin
from remat.runs.reading import best_quality, is_reached
from remat.runs.records import EpochQuality, VariantKind, VariantStatus, Verdict
from sample_runs import sample_variant


def build():
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, 32), *blocks, nn.Linear(32, 3))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def predict(model, batch):
    return model(batch[0]).softmax(dim=-1), batch[1]


def make_data(count, seed):
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=-1))


def features(batch):
    return {"side": ["left" if x < 0 else "right" for x in batch[0][:, 7]], "size": batch[0][:, 6]}


def make_workload(**changes):
    settings = {
        "name": "tiny",
        "model": build,
        "train_data": make_data(256, 1),
        "eval_data": make_data(120, 2),
        "batch_size": 128,
        "loss": loss,
        "predict": predict,
        "epochs": 3,
        "slices": {"left": lambda batch: batch[0][:, 7] < 0},
        "features": features,
    }
    return remat.Workload(**(settings | changes))


def evaluate(workload, out, **changes):
    settings = {
        "budgets": ["80%"],
        "policies": [],
        "peers": [],
        "front_points": 0,
        "timing_rounds": 1,
        "warmup_rounds": 0,
        "page": False,
        "serving": None,
        "expenses": None,
    }
    return remat.evaluate(workload, out=out, **(settings | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    found = evaluate(make_workload(), folder, seeds=3, targets={"accuracy": 0.4, "loss": 9.0})
    assert load_run(folder) == found
    return found


def test_every_variant_is_trained_from_every_seed_and_compared(run):
    """Three seeds are three pairs, each equal bit for bit on this machine."""
    reference, planned = run.variants
    assert [one.seed for one in planned.repeats] == [1, 2]
    assert all(one.losses_identical and one.weights_identical for one in planned.repeats)
    assert all(one.losses_identical is None for one in reference.repeats)
    assert len({reference.weights_sha256, *(one.weights_sha256 for one in reference.repeats)}) == 3
    (found,) = run.equivalences
    assert (found.variant, found.metric) == ("plan 80%", "accuracy")
    assert (found.num_pairs, found.num_identical) == (3, 3)
    assert found.is_equivalent
    assert found.difference.value == found.difference.low == found.difference.high == 0
    assert run.passed


def test_repeat_of_a_seed_is_the_run_of_that_seed(run, tmp_path):
    """Seed 1 as a repeat gives what an evaluation with seed 1 gives."""
    alone = evaluate(make_workload(), tmp_path / "a", seed=1)
    repeated = run.variants[0].repeats[0]
    assert alone.variants[0].weights_sha256 == repeated.weights_sha256
    assert alone.variants[0].quality[-1].metrics.items() <= repeated.metrics.items()
    assert alone.equivalences[0].difference is None  # one seed: no interval
    assert alone.equivalences[0].is_equivalent  # identical bits need no statistics


def test_times_in_training_grow_and_the_targets_is_among_them(run):
    """Each epoch ends later than the one before; the target is reached by the end of its epoch."""
    assert run.targets == {"accuracy": 0.4, "loss": 9.0}
    for variant in run.variants:
        seconds = [one.train_seconds for one in variant.quality]
        assert seconds == sorted(seconds)
        assert seconds[-1] <= variant.train_seconds
        reached = [one for one in variant.quality if one.metrics["accuracy"] >= 0.4]
        assert 0 < variant.seconds_to_target <= reached[0].train_seconds
        assert 0 < variant.steps_to_target <= 2 * (reached[0].epoch + 1)
        of_seeds = [one.steps_to_target for one in variant.repeats]
        assert of_seeds == [one.steps_to_target for one in run.variants[0].repeats]


def test_target_is_found_at_its_step_and_no_look_changes_training(tmp_path):
    """Trainings that end after each step say at which one 0.5 is reached; it ends no epoch."""
    workload = make_workload(batch_size=32)
    ends = [
        train(workload, None, seed=0, epochs=2, max_steps=steps).quality[-1].metrics["accuracy"]
        for steps in range(1, 17)
    ]
    first = next(steps for steps, found in enumerate(ends, 1) if found >= 0.5)
    settings = {"epochs": 2, "seeds": 2, "budgets": ["98%"]}
    aimed = {"targets": {"accuracy": 0.5}, "check_every": 1}
    run = evaluate(workload, tmp_path / "a", **settings, **aimed)
    plain = evaluate(workload, tmp_path / "b", **settings)
    assert 8 < first < 16
    assert [one.steps_to_target for one in run.variants] == [first, first]
    for looked, not_looked in zip(run.variants, plain.variants, strict=True):
        assert looked.losses == not_looked.losses
        assert looked.weights_sha256 == not_looked.weights_sha256
        assert looked.repeats[0].weights_sha256 == not_looked.repeats[0].weights_sha256
        assert not_looked.steps_to_target is None
    aim = Aim(targets={"accuracy": 0.5}, every=5)
    assert train(workload, None, seed=0, epochs=2, aim=aim).reached.steps == next(
        steps for steps in (5, 8, 10, 15, 16) if ends[steps - 1] >= 0.5
    )


def test_clock_counts_training_and_no_look():
    """By a clock that only the test advances: 3 s of steps around a look of 100 s."""
    now = iter([0.0, 1.0, 101.0, 103.0])
    clock = Clock(lambda: next(now))
    with clock.running(), clock.resting():
        pass
    assert clock.seconds == 3.0


def test_evidence_is_the_same_where_predictions_are(run):
    """Planned and unplanned predict the same bits, so every figure is the same."""
    reference, planned = run.variants
    assert planned.calibration == reference.calibration
    assert planned.slices == reference.slices
    assert reference.calibration.num_fitted == 60
    last = reference.quality[-1].metrics
    named = reference.slices[0]
    assert (named.name, named.origin) == ("left", SliceOrigin.NAMED)
    overall = named.quality.value * named.num_examples + named.rest * (120 - named.num_examples)
    assert overall / 120 == pytest.approx(last["accuracy"])


def test_groups_of_the_evaluation_data_are_compared_with_training(run):
    """Every feature has a row for every group, with shares that sum to one."""
    for feature in ("side", "size"):
        rows = [row for row in run.representation if row.feature == feature]
        assert sum(row.evaluated_share for row in rows) == pytest.approx(1)
        assert sum(row.reference_share for row in rows) == pytest.approx(1)


def noisy_workload():
    """Training that is not reproducible: its own noise differs from run to run."""
    drawn = np.random.default_rng()

    def noisy(model, batch):
        scale = 1 + 1e-3 * drawn.standard_normal() * model.training
        return loss(model, batch) * scale

    return make_workload(loss=noisy, features=None, slices={})


def test_training_that_is_not_reproducible_is_judged_over_seeds(tmp_path):
    """One seed gives no verdict, three seeds an equivalence with its interval."""
    one = evaluate(noisy_workload(), tmp_path / "one")
    planned = one.variants[1]
    assert planned.verification.within_noise
    assert planned.weights_identical is False
    assert planned.verdict is Verdict.NONE
    assert "one seed is too few" in planned.message
    assert not one.passed
    three = evaluate(noisy_workload(), tmp_path / "three", seeds=3, margin=0.5)
    (found,) = three.equivalences
    assert (found.num_pairs, found.num_identical, found.margin) == (3, 0, 0.5)
    assert found.is_equivalent
    assert found.difference.low <= found.difference.value <= found.difference.high
    assert three.variants[1].verdict is Verdict.PASSED


def seen(accuracies, **changes):
    quality = EpochQuality(epoch=0, num_examples=9, metrics={"accuracy": accuracies[0]})
    repeats = tuple(
        Repeat(seed=i + 1, train_seconds=1.0, metrics={"accuracy": value})
        for i, value in enumerate(accuracies[1:])
    )
    return sample_variant(quality=(quality,), repeats=repeats, **changes)


def test_pairs_are_of_one_seed_and_the_margin_states_its_reason():
    """The difference is that of the pairs, and what the margin stands for is written out."""
    reference = seen([0.9, 0.8, 0.85], label="no plan", kind=VariantKind.REFERENCE)
    other = seen([0.9, 0.81, 0.85], weights_identical=False)
    (found,) = equivalences([reference, other])
    assert found.difference.value == pytest.approx(0.01 / 3)
    assert found.margin == 0.01
    assert "one percentage point" in found.margin_reason
    assert "seeds alone spread it by 5 points" in found.margin_reason
    assert not found.is_equivalent
    (found,) = equivalences([reference, other], margin=0.05)
    assert found.is_equivalent
    assert found.margin_reason.startswith("as asked for")


def test_metric_that_is_not_a_number_is_not_equivalent():
    """A seed that diverged is no evidence of sameness."""
    reference = seen([0.9, 0.8, 0.85], label="no plan", kind=VariantKind.REFERENCE)
    (found,) = equivalences([reference, seen([0.9, 0.8, math.nan], weights_identical=False)])
    assert found.num_pairs == 3
    assert not found.is_equivalent


def test_best_epoch_and_target_follow_the_sense_of_the_metric():
    """Less perplexity is better, more accuracy is; what is not a number reaches nothing."""
    epochs = tuple(
        EpochQuality(epoch=i, num_examples=1, metrics={"perplexity": p}, train_seconds=float(i))
        for i, p in enumerate([9.0, 4.0, 5.0])
    )
    assert best_quality(sample_variant(quality=epochs)).epoch == 1
    assert [is_reached(one, {"perplexity": 5.0}) for one in epochs] == [False, True, True]
    assert not is_reached(epochs[1], {"perplexity": 5.0, "accuracy": 0.1})
    diverged = EpochQuality(epoch=0, num_examples=1, metrics={"perplexity": math.nan})
    assert not is_reached(diverged, {"perplexity": 5.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"predict": lambda m, b: (m(b[0]), b[1])},
            r"must return probabilities.*softmax\(dim=-1\)",
        ),
        ({"predict": lambda m, b: (torch.ones(len(b[0]), 1), b[1])}, "one class, in which every"),
        (
            {"predict": lambda m, b: (m(b[0]).softmax(-1) * math.nan, b[1])},
            "NaN or infinite probabilities for the first evaluation batch",
        ),
        ({"predict": lambda m, b: (m(b[0]).softmax(-1), b[1] + 1)}, "labels from 1 to 3"),
        ({"slices": {"odd": lambda b: b[0] < 0}}, r"slice 'odd' must give one value.*got shape"),
        ({"slices": {"odd": lambda b: b[0][:, 0]}}, "slice 'odd' must give true or false"),
        ({"slices": {"odd": lambda b: 1 / 0}}, r"slice 'odd' raised ZeroDivisionError.*line"),
        ({"features": lambda b: [1, 2]}, "must return a mapping of name to column"),
        ({"features": lambda b: {"x": b[0]}}, r"feature 'x' must give one value for each of the"),
        ({"population": {"age": {"old": 1.0}}}, "population names the feature 'age'"),
        ({"targets": {"f2": 0.5}}, r"target f2=0\.5.*accuracy.*loss"),
        ({"targets": {"loss": math.nan}}, "target loss=nan: expected a number"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, changes, message):
    """One clear error, before a plan is made and before anything is written."""
    stages = []
    with pytest.raises(remat.WorkloadError, match=message):
        evaluate(make_workload(**changes), tmp_path / "a",
                 progress=lambda stage, done, total: stages.append(stage))  # fmt: skip
    assert stages == ["trace one step"]
    assert list(tmp_path.iterdir()) == []


def gaps_of(run, section):
    return [(gap.variant, gap.reason) for gap in run.gaps if gap.section == section]


def test_predictions_that_became_nan_are_a_gap(tmp_path):
    """A model that diverged has no accuracy, and the run says how many predictions are NaN."""

    def diverging(model, batch):
        scores, labels = predict(model, batch)
        is_trained = any(p.grad is not None for p in model.parameters())
        return (torch.full_like(scores, math.nan) if is_trained else scores), labels

    run = evaluate(make_workload(predict=diverging), tmp_path / "a")
    assert run.variants[0].status is VariantStatus.FINISHED
    assert set(run.variants[0].quality[-1].metrics) == {"loss"}
    assert run.variants[0].calibration is None
    assert run.variants[0].slices == ()
    for section in ("quality", "calibration", "slices"):
        found = dict(gaps_of(run, section))
        assert set(found) == {"no plan", "plan 80%"}
        assert "120 of 120 predictions after training are NaN" in found["no plan"]


def test_empty_slice_one_class_and_few_examples_are_gaps(tmp_path):
    """Each is named with its reason, and everything else is evaluated."""
    inputs = make_data(20, 3).tensors[0]
    run = evaluate(
        make_workload(
            eval_data=TensorDataset(inputs, torch.zeros(20, dtype=torch.long)),
            slices={"none": lambda batch: batch[0][:, 0] > 99},
        ),
        tmp_path / "a",
    )
    assert ("no plan", "the slice 'none' holds no example of the evaluation data") in gaps_of(
        run, "slices"
    )
    assert (None, "20 evaluation examples are too few to find slices in") in gaps_of(run, "slices")
    assert "only class 0 occurs" in dict(gaps_of(run, "quality"))["no plan"]
    assert "20 examples are too few for two halves" in dict(gaps_of(run, "calibration"))["no plan"]
    assert run.variants[0].calibration.before.num_examples == 20
    assert run.variants[0].slices[0].quality is None


def test_workload_without_predictions_or_features_says_what_is_missing(tmp_path):
    """Nothing is left out in silence."""
    run = evaluate(make_workload(predict=None, features=None, slices={}), tmp_path / "a", seeds=2)
    assert "no predict or no eval_data" in dict(gaps_of(run, "calibration"))["no plan"]
    assert "names no features" in dict(gaps_of(run, "representation"))[None]
    assert run.equivalences[0].metric == "loss"
    bare = evaluate(
        make_workload(predict=None, features=None, slices={}, eval_data=None), tmp_path / "b"
    )
    assert bare.equivalences[0].metric == "train_loss"
    assert bare.passed


def test_command_line_takes_seeds_margin_and_target(run_cli, write_workload, tmp_path):
    """The options reach the run; a target that cannot be read is one line."""
    folder = tmp_path / "out"
    done = run_cli(
        "evaluate", write_workload(), "--budget", "80%", "--max-steps", 2, "--seeds", 2,
        "--no-serving", "--margin", 0.25, "--target", "loss=100", "--check-every", 1,
        "--out", folder, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    run = load_run(folder)
    assert run.targets == {"loss": 100.0}
    assert all(one.margin == 0.25 and one.num_pairs == 2 for one in run.equivalences)
    trained = [variant for variant in run.variants if variant.losses]
    assert all(variant.steps_to_target == 1 for variant in trained)
    wrong = run_cli("evaluate", write_workload(), "--target", "loss", "--out", tmp_path / "b")
    assert wrong.code == 2
    assert "'loss': expected METRIC=X, such as accuracy=0.9" in wrong.err


def test_regression_has_coverage_in_place_of_calibration(tmp_path):
    """Values and targets give intervals, slices by error, and no calibration."""
    data = make_data(120, 4)
    run = evaluate(
        make_workload(
            train_data=TensorDataset(data.tensors[0], data.tensors[0].sum(dim=1)),
            eval_data=TensorDataset(data.tensors[0], data.tensors[0].sum(dim=1)),
            loss=lambda m, b: F.mse_loss(m(b[0])[:, 0], b[1]),
            predict=lambda m, b: (m(b[0])[:, 0], b[1]),
        ),
        tmp_path / "a",
    )
    found = run.variants[0]
    assert [one.nominal for one in found.coverage] == [0.8, 0.9, 0.95]
    assert found.calibration is None
    assert found.slices[0].metric == "rmse"
    assert not gaps_of(run, "coverage")
