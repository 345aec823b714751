"""The parts of an evaluation: turns, times, seeds, batches, quality, equality, contenders."""

import contextlib
import gc
import hashlib
import math
import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn
from torch.utils.data import TensorDataset

import remat
from remat.evaluation.checks import thin_out
from remat.evaluation.contenders import contenders
from remat.evaluation.data import (
    describe_batch,
    num_examples,
    num_training_batches,
    training_batches,
    validation_batches,
)
from remat.evaluation.environment import describe_environment
from remat.evaluation.identity import same_bits, weights_sha256
from remat.evaluation.quality import measure_quality
from remat.evaluation.seeds import seeded
from remat.evaluation.timing import summarize_times, time_in_turn, turns
from remat.planner.policies import AllBlocks, EveryNth, FirstK
from remat.prove.records import MemorySample
from remat.runs.records import VariantKind


@given(st.integers(1, 6), st.integers(0, 8))
def test_every_round_has_every_variant_once(count, rounds):
    """Interleaved: a slow minute of the machine hits every variant alike."""
    labels = [f"v{i}" for i in range(count)]
    order = turns(labels, rounds)
    assert len(order) == count * rounds
    for turn in range(rounds):
        assert sorted(order[turn * count : (turn + 1) * count]) == labels


def test_rounds_are_rotated_so_that_nobody_is_always_first():
    """Over as many rounds as variants, each is first once."""
    order = turns(["a", "b", "c"], 3)
    assert order[::3] == ["a", "b", "c"]


def test_times_are_of_the_step_alone_and_warm_up_is_not_counted():
    """Applying a plan is outside the clock; the first rounds are thrown away."""
    now = [0.0]
    log = []

    def prepare(label, seconds):
        @contextlib.contextmanager
        def prepared():
            now[0] += 100  # putting a plan on takes long, and is not part of a step
            log.append(label)

            def step():
                now[0] += seconds * (50 if log.count(label) <= 2 else 1)

            yield step
            now[0] += 100

        return prepared

    rounds = []
    times = time_in_turn(
        {"a": prepare("a", 1.0), "b": prepare("b", 2.0)},
        rounds=5,
        warmup_rounds=2,
        clock=lambda: now[0],
        on_round=rounds.append,
    )
    assert times["a"].seconds == (1.0,) * 5
    assert times["b"].seconds == (2.0,) * 5
    assert log == turns(["a", "b"], 7)
    assert rounds == [1, 2, 3, 4, 5, 6, 7]


def test_garbage_collector_is_given_back_when_a_step_fails():
    """The collector rests while steps are timed, and works again after an error."""

    @contextlib.contextmanager
    def prepared():
        def step():
            assert not gc.isenabled()
            raise RuntimeError("boom")

        yield step

    with pytest.raises(RuntimeError, match="boom"):
        time_in_turn({"a": prepared}, rounds=1, warmup_rounds=0)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_median_and_spread_are_those_of_numpy(seconds):
    """Median and interquartile range agree with NumPy's."""
    found = summarize_times(seconds, 2)
    assert found.median_seconds == pytest.approx(np.median(seconds), rel=1e-12)
    low, high = np.quantile(seconds, [0.25, 0.75])
    assert found.iqr_seconds == pytest.approx(high - low, abs=1e-12)


def draw():
    return random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002


def test_seeded_block_repeats_and_gives_the_state_back():
    """Three generators start alike in every block; outside, nothing happened, even on errors."""
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()  # noqa: NPY002
    with seeded(7):
        first = draw()
    with pytest.raises(ZeroDivisionError), seeded(7):
        assert 1 / (draw() != first)
    with seeded(8):
        assert draw() != first
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def workload(**changes):
    settings = {
        "name": "parts",
        "model": lambda: nn.Linear(1, 1),
        "train_data": TensorDataset(torch.arange(10.0)),
        "eval_data": TensorDataset(torch.arange(7.0)),
        "batch_size": 4,
    }
    return remat.Workload(**(settings | changes))


def seen(batches):
    return [batch[0].tolist() for batch in batches]


def test_training_batches_depend_on_seed_and_epoch_alone():
    """The same seed and epoch give the same batches, whatever the global random state."""
    first = seen(training_batches(workload(), seed=3, epoch=0))
    torch.manual_seed(99)
    assert seen(training_batches(workload(), seed=3, epoch=0)) == first
    assert seen(training_batches(workload(), seed=3, epoch=1)) != first
    assert seen(training_batches(workload(), seed=4, epoch=0)) != first


def test_training_batches_are_all_of_one_size():
    """The incomplete last batch is left out, unless it is the only one."""
    assert [len(batch) for batch in seen(training_batches(workload(), seed=0, epoch=0))] == [4, 4]
    small = workload(batch_size=32)
    assert [len(batch) for batch in seen(training_batches(small, seed=0, epoch=0))] == [10]
    assert (num_training_batches(workload()), num_training_batches(small)) == (2, 1)


def test_validation_batches_are_complete_and_in_order():
    """Every validation example is seen once, in the order of the data."""
    assert seen(validation_batches(workload())) == [[0, 1, 2, 3], [4, 5, 6]]


def test_function_gives_its_batches_as_they_are():
    """What a function yields is passed on; how many there are only running it can tell."""
    given_batches = [{"x": torch.ones(2)}, {"x": torch.zeros(3)}]
    made = workload(train_data=lambda: iter(given_batches))
    assert list(training_batches(made, seed=0, epoch=0)) == given_batches
    assert num_training_batches(made) is None


@pytest.mark.parametrize("data", [[], lambda: iter(())])
def test_data_without_a_batch_is_refused_by_name(data):
    """An empty dataset is one clear error that names the workload and the field."""
    with pytest.raises(remat.WorkloadError, match="'parts': train_data holds no batch"):
        list(training_batches(workload(train_data=data), seed=0, epoch=0))
    with pytest.raises(remat.WorkloadError, match="'parts': eval_data holds no batch"):
        list(validation_batches(workload(eval_data=data)))


def test_batches_are_described_and_counted_through_any_nesting():
    """Shapes and dtypes of nested batches are written, examples counted by the first tensor."""
    batch = {"a": (torch.ones(2, 3), "text"), "b": [torch.ones(2, dtype=torch.int64)]}
    assert describe_batch(batch) == ("float32[2, 3]", "int64[2]")
    assert num_examples(batch) == 2
    assert num_examples("text") == 1


class Fixed(nn.Module):
    """Gives what it is told, and remembers the mode it was called in."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return x


def quality(batches, predict, loss=lambda model, batch: model(batch[0]).float().mean()):
    model = Fixed()
    model.inner.eval()  # a part that its owner had switched to eval stays so
    found = measure_quality(model, batches, loss=loss, predict=predict, epoch=3)
    assert model.training
    assert not model.inner.training
    assert set(model.modes) == {(False, False)}
    return found


def test_quality_of_classes_agrees_with_scikit_learn():
    """Accuracy and likelihood over uneven batches are those of all examples at once."""
    scores = torch.rand(11, 3).softmax(dim=-1)
    labels = torch.randint(0, 3, (11,))
    batches = [(scores[:8], labels[:8]), (scores[8:], labels[8:])]
    found = quality(batches, lambda model, batch: (model(batch[0]), batch[1]))
    assert found.num_examples == 11
    assert found.epoch == 3
    chosen = scores.argmax(dim=-1)
    accuracy = metrics.accuracy_score(labels, chosen)
    assert found.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    expected = metrics.log_loss(labels, normalized(scores))
    assert found.metrics["nll"] == pytest.approx(expected, abs=1e-9)
    assert found.metrics["loss"] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert 0 <= found.metrics["calibration_error"] <= 1


def test_quality_of_classes_is_that_of_scikit_learn_to_nine_digits():
    """Macro averages, top five and area agree on the same predictions, whatever classes occur."""
    scores = torch.rand(60, 12).softmax(dim=-1)
    labels = torch.randint(0, 7, (60,))  # some classes are predicted and never occur
    found = quality([(scores, labels)], lambda model, batch: (model(batch[0]), batch[1])).metrics
    chosen = scores.argmax(dim=-1)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = metrics.balanced_accuracy_score(labels, chosen)
    expected = {
        "accuracy": metrics.accuracy_score(labels, chosen),
        "balanced_accuracy": balanced,
        "macro_f1": metrics.f1_score(labels, chosen, average="macro"),
        "top_5_accuracy": metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(12)),
        "nll": metrics.log_loss(labels, normalized(scores), labels=range(12)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    scores, labels = torch.rand(50, 2).double().softmax(dim=-1), torch.randint(0, 2, (50,))
    found = quality([(scores, labels)], lambda model, batch: (model(batch[0]), batch[1])).metrics
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, scores[:, 1]), abs=1e-9)


def normalized(scores):
    return scores.double() / scores.double().sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("channels_last", [False, True])
def test_quality_of_segmentation_agrees_with_scikit_learn(channels_last):
    """Classes lie in the second or the last place; all pixels of all images count alike."""
    scores, labels = torch.rand(5, 3, 3, 3).softmax(dim=1), torch.randint(0, 2, (5, 3, 3))
    labels[0, 0, 0] = -100  # does not count
    given_scores = scores.movedim(1, -1) if channels_last else scores
    batches = [(given_scores[:3], labels[:3]), (given_scores[3:], labels[3:])]
    found = quality(batches, lambda model, batch: (model(batch[0]), batch[1])).metrics
    kept = labels.flatten() >= 0
    pair = labels.flatten()[kept], scores.argmax(dim=1).flatten()[kept]
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(*pair), abs=1e-9)
    iou = metrics.jaccard_score(*pair, average="macro")
    assert found["mean_iou"] == pytest.approx(iou, abs=1e-9)
    assert found["dice"] == pytest.approx(metrics.f1_score(*pair, average="macro"), abs=1e-9)


def test_batches_of_two_kinds_are_refused():
    """Ten classes cannot follow three."""
    batches = [(torch.full((2, n), 1 / n), torch.zeros(2, dtype=torch.long)) for n in (3, 10)]
    with pytest.raises(remat.WorkloadError, match="10 classes after classification with 3"):
        quality(batches, lambda model, batch: (model(batch[0]), batch[1]))


def test_quality_of_sequences_has_perplexity():
    """For (B, T, C) the perplexity is the exponential of the mean negative log-likelihood."""
    scores = torch.rand(4, 5, 6).softmax(dim=-1)
    labels = torch.randint(0, 6, (4, 5))
    found = quality([(scores, labels)], lambda model, batch: (model(batch[0]), batch[1])).metrics
    flat = normalized(scores).flatten(0, 1)
    expected = math.exp(metrics.log_loss(labels.flatten(), flat, labels=range(6)))
    assert found["perplexity"] == pytest.approx(expected, abs=1e-9)


def test_class_that_was_ruled_out_gives_a_finite_likelihood():
    """A probability of zero for the true class is bad, not infinite."""
    scores, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([1])
    found = quality([(scores, labels)], lambda model, batch: (model(batch[0]), batch[1]))
    assert 80 < found.metrics["nll"] < 100


def test_quality_of_values_agrees_with_scikit_learn():
    """Absolute error, squared error and R² agree to 1e-9, batch by batch or at once."""
    values, targets = torch.rand(9, 2), torch.rand(9, 2)
    found = quality([(values, targets)], lambda model, batch: (model(batch[0]), batch[1])).metrics
    flat = targets.flatten().double(), values.flatten().double()
    expected = {
        "mae": metrics.mean_absolute_error(*flat),
        "rmse": metrics.root_mean_squared_error(*flat),
        "r2": metrics.r2_score(*flat),
    }
    batches = [(values[:4], targets[:4]), (values[4:], targets[4:])]
    halves = quality(batches, lambda model, batch: (model(batch[0]), batch[1])).metrics
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
        assert halves[name] == pytest.approx(value, abs=1e-9), name


def test_quality_without_predict_is_the_loss():
    """No metric is made up where the workload predicts nothing."""
    assert set(quality([(torch.ones(2, 2), torch.ones(2))], None).metrics) == {"loss"}


@pytest.mark.parametrize(
    ("predicted", "message"),
    [
        (torch.ones(2), "got Tensor"),
        ((torch.ones(2, 3), torch.ones(4)), r"got \[2, 3\] and \[4\]"),
        ((torch.ones(2), torch.ones(2), torch.ones(2)), "got tuple"),
    ],
)
def test_prediction_of_another_form_is_refused(predicted, message):
    """What predict must return is said with what it returned."""
    with pytest.raises(remat.WorkloadError, match=message):
        quality([(torch.ones(2, 2), torch.ones(2))], lambda model, batch: predicted)


def test_missing_metrics_package_is_named(monkeypatch):
    """Without torchmetrics the error has the install command."""
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(remat.MissingPackageError, match=r"pip install 'remat\[eval\]'"):
        quality(
            [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))],
            lambda model, batch: (model(batch[0]), batch[1]),
        )


def test_digest_sees_every_bit_name_shape_and_dtype():
    """Any change of a weight or buffer, however small, gives another digest."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    digests = {weights_sha256(model)}
    assert weights_sha256(model) in digests
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nextafter(model[0].weight[0, 0], torch.tensor(9.0))
        digests.add(weights_sha256(model))
        model[1].num_batches_tracked += 1
        digests.add(weights_sha256(model))
    digests.add(weights_sha256(model.bfloat16()))
    digests.add(weights_sha256(nn.Sequential(nn.Linear(3, 2))))
    assert len(digests) == 5
    assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)


def test_digest_tells_zero_from_minus_zero():
    """Bit for bit means bit for bit: -0.0 is another number."""
    one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(one.weight)
    nn.init.constant_(other.weight, -0.0)
    assert weights_sha256(one) != weights_sha256(other)


def test_curves_are_compared_by_their_bits():
    """NaN equals the same NaN, zero differs from minus zero, and lengths count."""
    assert same_bits([1.0, math.nan], [1.0, math.nan])
    assert not same_bits([0.0], [-0.0])
    assert not same_bits([1.0], [1.0, 2.0])
    assert not same_bits([1.0], [math.nextafter(1.0, 2.0)])


def test_contenders_are_listed_once_in_the_order_of_the_report():
    """No plan first, then policies, budgets, and peers, which are not trained."""
    found = contenders(["80%", 1024**2, "80%"], [AllBlocks()], [EveryNth(n=2), AllBlocks()])
    assert [one.label for one in found] == [
        "no plan",
        "all blocks",
        "plan 80%",
        "plan 1.0 MiB",
        EveryNth(n=2).label,
    ]
    assert [one.is_trained for one in found] == [True, True, True, True, False]
    assert [one.asked_budget for one in found][2:4] == ["80%", "1.0 MiB"]
    assert found[0].kind is VariantKind.REFERENCE


@pytest.mark.parametrize("budgets", [["8 gigs"], [0], ["60%", "-1GiB"], "60%", 1024])
def test_budgets_that_cannot_be_read_are_refused_before_anything_runs(budgets):
    """A wrong budget, or one that is no list, is an error of its own kind."""
    with pytest.raises(remat.BudgetFormatError):
        contenders(budgets, [], [])


def test_nothing_to_compare_is_refused():
    """An evaluation needs a budget or a policy."""
    with pytest.raises(remat.WorkloadError, match="at least one budget or policy"):
        contenders([], [], [FirstK(k=1)])


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 99)), min_size=1, max_size=60),
    st.integers(1, 20),
)
def test_thinned_timeline_keeps_peak_phases_and_order(moments, limit):
    """Of a timeline few samples remain, the peak and the order of the phases among them."""
    samples = [MemorySample(phase=phase, bytes_by_kind={"x": size}) for phase, size in moments]
    kept = thin_out(samples, limit)
    assert max(s.bytes_by_kind["x"] for s in kept) == max(size for _, size in moments)

    def changes(phases):
        return [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]

    phases = changes([phase for phase, _ in moments])
    assert changes([sample.phase for sample in kept]) == phases
    assert len(kept) <= limit + len(phases)
    places = iter(samples)
    assert all(any(sample is other for other in places) for sample in kept)


def test_environment_has_what_is_needed_to_do_it_again():
    """Machine, versions and command are recorded, the command without the program's folder."""
    found = describe_environment(torch.device("cpu"))
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.versions["remat"] == remat.__version__
    assert found.num_threads == torch.get_num_threads()
    assert found.device == "cpu"
    assert "/" not in found.command.split()[0]
    assert describe_environment(torch.device("cpu"), "remat demo").command == "remat demo"


def test_environment_without_git_says_nothing_of_commits(tmp_path, monkeypatch):
    """Outside a repository, or without git, commit and state are left open."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe_environment(torch.device("cpu"))
    assert (found.git_commit, found.git_dirty) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment(torch.device("cpu")).git_commit is None
