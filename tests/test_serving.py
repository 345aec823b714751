"""Serving: counts under a plan, forms against torch, percentiles, ratios, recommendations."""

import math
import threading
import time

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import remat
from remat.evaluation.checks import make_subject
from remat.evaluation.serving.forms import (
    ATTACHED,
    TRAINED,
    Form,
    attached_form,
    detached_form,
    trained_form,
)
from remat.evaluation.serving.found import Found
from remat.evaluation.serving.latency import latency_of, paired_ratio, request_in_turn
from remat.evaluation.serving.options import ServingOptions, parse_latency
from remat.evaluation.serving.recommend import recommend
from remat.evaluation.serving.request import (
    Request,
    count_ops,
    observe_request,
    sharing_copy,
)
from remat.evaluation.serving.sweep import time_forms
from remat.evaluation.serving.updates import measure_updates
from remat.runs.evidence import Latency, ServedForm
from tests.test_evaluation import build, make_workload


@pytest.fixture(scope="module")
def subject():
    return make_subject(make_workload(), seed=5)


@pytest.fixture(scope="module")
def plan(subject):
    made = subject.fit.plan("70%")
    assert made.regions
    return made


@pytest.fixture(scope="module")
def request_of_batch(subject):
    return observe_request(subject.workload, subject.model, subject.batch)


def test_plan_runs_the_same_ops_under_no_grad(subject, plan, request_of_batch):
    """Attached or taken off, a plan adds not one op to a request, and changes not one bit of it."""
    forms = [
        trained_form(sharing_copy(subject.model), build),
        attached_form(subject.model, build, plan),
        detached_form(subject.model, build, plan),
    ]
    counts = [count_ops(lambda form=form: request_of_batch.send(form.module)) for form in forms]
    assert sum(counts[0].values()) > 20
    assert counts[1] == counts[2] == counts[0]
    answers = [request_of_batch.send(form.module) for form in forms]
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_plan_adds_ops_where_gradients_are_recorded(subject, plan):
    """The count would show recomputation: a training step under the plan runs more ops."""
    plain = sharing_copy(subject.model).train()
    planned = sharing_copy(subject.model).train()
    remat.apply(planned, plan)

    def step(model):
        subject.workload.loss(model, subject.batch).backward()

    more = count_ops(lambda: step(planned)).total() - count_ops(lambda: step(plain)).total()
    subject.model.zero_grad(set_to_none=True)
    assert more > 0


def test_sharing_copy_shares_weights_and_no_modules(subject):
    """The copy answers from the same memory, and a plan on it is not on the model."""
    copied = sharing_copy(subject.model)
    pairs = zip(copied.parameters(), subject.model.parameters(), strict=True)
    assert all(mine is other for mine, other in pairs)
    assert not set(map(id, copied.modules())) & set(map(id, subject.model.modules()))


def test_request_is_cut_and_repeated_by_examples(request_of_batch):
    """A request of fewer examples holds the first ones; one of more starts again."""
    (inputs,) = request_of_batch.args
    assert torch.equal(request_of_batch.of(3).args[0], inputs[:3])
    longer = request_of_batch.of(130).args[0]
    assert torch.equal(longer, torch.cat([inputs, inputs[:2]]))


def test_request_that_never_calls_the_model_is_refused(subject):
    """A prediction past the model itself leaves nothing to time."""
    workload = make_workload(predict=lambda model, batch: (model[0](batch[0]), batch[1]))
    with pytest.raises(remat.WorkloadError, match="does not call the model itself"):
        observe_request(workload, subject.model, subject.batch)


def test_percentiles_are_numpys_and_throughput_is_examples_over_time():
    """p50, p95 and p99 against sorted ranks; examples per second against the sum."""
    seconds = [0.001 * (i + 1) for i in np.random.default_rng(0).permutation(101)]
    row = latency_of("x", 4, seconds)
    assert row.p50_seconds == pytest.approx(0.051)
    assert row.p95_seconds == pytest.approx(0.096)
    assert row.p99_seconds == pytest.approx(0.100)
    assert row.p95_seconds == pytest.approx(np.percentile(seconds, 95), rel=1e-12)
    assert row.examples_per_second == pytest.approx(4 * 101 / sum(seconds))


@pytest.mark.parametrize("count", [6, 10, 25, 100])
def test_ratio_interval_is_that_of_the_sign_test(count):
    """The ranks are the widest that SciPy's binomial test does not reject at 5 %."""
    ratios = np.exp(np.random.default_rng(count).normal(size=count))
    found = paired_ratio(ratios, [1.0] * count)
    low_rank = sorted(ratios).index(found.low)
    assert found.value == pytest.approx(np.median(ratios))
    assert scipy.stats.binomtest(low_rank, count).pvalue <= 0.05
    assert scipy.stats.binomtest(low_rank + 1, count).pvalue > 0.05
    assert sorted(ratios)[::-1].index(found.high) == low_rank
    assert found.level == 0.95


def test_ratio_of_few_pairs_is_their_range_at_its_own_level():
    """Five pairs lie on one side of the median in 2 of 32 cases."""
    found = paired_ratio([3.0, 1.0, 2.0, 5.0, 4.0], [1.0] * 5)
    assert (found.low, found.value, found.high) == (1, 3, 5)
    assert found.level == pytest.approx(1 - 2 / 32)


def test_forms_are_timed_in_turn_by_the_clock():
    """A clock that only the calls advance: every round sees each form once, none waits."""
    now, order = [0.0], []

    def call(label, seconds):
        def run():
            order.append(label)
            now[0] += seconds

        return run

    times = request_in_turn(
        {"slow": call("slow", 0.3), "fast": call("fast", 0.1)}, seconds=4.0, clock=lambda: now[0]
    )
    assert times["slow"] == pytest.approx([0.3] * 9)
    assert times["fast"] == pytest.approx([0.1] * 9)
    assert order[:6] == ["slow", "fast", "slow", "fast", "fast", "slow"]


def form(name, loss, **more):
    return ServedForm(name=name, metrics={"loss": loss}, **more)


def row(name, batch_size, p95, throughput):
    return Latency(
        form=name, batch_size=batch_size, num_requests=100, p50_seconds=p95 / 2, p95_seconds=p95,
        p99_seconds=p95, examples_per_second=throughput,
    )  # fmt: skip


def test_recommendation_is_the_most_within_the_target():
    """By brute force over rows: throughput within p95, of forms that are as good."""
    forms = [form(TRAINED, 0.5), form("good", 0.505), form("bad", 0.6), form(ATTACHED, 0.5)]
    rows = [
        row(TRAINED, 1, 0.002, 500), row(TRAINED, 16, 0.010, 1600), row("good", 16, 0.006, 2600),
        row("good", 64, 0.021, 3000), row("bad", 16, 0.001, 9000), row(ATTACHED, 16, 0.01, 9000),
    ]  # fmt: skip
    best, why = recommend(forms, rows, 0.020)
    assert (best.form, best.batch_size) == ("good", 16)
    assert "95 of 100 answers within 20.0 ms" in why
    best, why = recommend(forms, rows, None)
    assert (best.form, best.batch_size) == ("good", 64)
    best, why = recommend(forms, rows, 0.0001)
    assert best is None
    assert why.startswith("No form gives 95 of 100 answers within 100 µs; the fastest was")
    assert recommend(forms, [], 0.02)[0] is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("20ms", 0.02), (" 1.5 s", 1.5), ("300us", 3e-4), (".5s", 0.5)]
)
def test_latency_is_read_with_its_unit(text, seconds):
    """A number and a unit, in seconds."""
    assert parse_latency(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["20", "ms", "0ms", "-3ms", "fast", ""])
def test_latency_without_number_or_unit_is_refused(text):
    """What is no time says how one is written."""
    with pytest.raises(remat.WorkloadError, match="such as 20ms"):
        parse_latency(text)


@pytest.mark.parametrize(
    "changes", [{"seconds": 0}, {"target_p95_seconds": math.nan}, {"batch_sizes": (0,)}]
)
def test_serving_options_out_of_range_are_refused_by_name(changes):
    """A figure that makes no sense is named."""
    (name,) = changes
    with pytest.raises(remat.WorkloadError, match=name):
        ServingOptions(**changes)


@pytest.mark.parametrize(
    ("metrics", "is_chosen"),
    [
        ({"loss": 0.509, "accuracy": 0.1}, True),
        ({"loss": 0.6, "accuracy": 0.9}, False),
        ({"nll": 0.5, "accuracy": 0.1}, True),
        ({"accuracy": 0.89}, True),
        ({"accuracy": 0.80}, False),
        ({"loss": math.nan}, False),
        ({}, False),
    ],
)
def test_form_is_as_good_by_the_first_metric_that_both_have(metrics, is_chosen):
    """Loss first, then likelihood, then what there is; within 2 %, and never without a figure."""
    trained = ServedForm(name=TRAINED, metrics={"loss": 0.5, "accuracy": 0.9, "nll": 0.5})
    rows = [row(TRAINED, 1, 0.01, 100), row("other", 1, 0.01, 200)]
    best, _ = recommend([trained, ServedForm(name="other", metrics=metrics)], rows, None)
    assert (best.form == "other") == is_chosen


class Slow(nn.Module):
    """Takes 20 ms for each example."""

    def forward(self, x):
        time.sleep(0.02 * len(x))
        return x


class OnlyTwo(nn.Module):
    """Answers batches of two and no other, as an export with a fixed batch does."""

    def forward(self, x):
        if len(x) != 2:
            raise RuntimeError("got invalid dimensions for input\nindex 0 got 1 expected 2")
        return x


def test_batch_sizes_that_take_too_long_or_are_refused_are_gaps():
    """Four seconds are not spent on a request; a form may lack one size."""
    forms = [
        Form(name=name, module=module, start=type(module), size_bytes=0)
        for name, module in ((TRAINED, Slow()), ("fixed", OnlyTwo()))
    ]
    found = Found(forms=[ServedForm(name=form.name) for form in forms])
    request = Request(args=(torch.ones(4, 1),), kwargs={}, num_examples=4)
    options = ServingOptions(seconds=1.0, batch_sizes=(200, 2, 1))
    time_forms(forms, request, options, found)
    assert [(row.form, row.batch_size) for row in found.latencies] == [
        (TRAINED, 1), (TRAINED, 2), ("fixed", 2),
    ]  # fmt: skip
    refused, slow = (gap.reason for gap in found.gaps)
    assert refused == (
        "'fixed' does not answer batches of 1: RuntimeError: got invalid dimensions for input"
    )
    assert slow.startswith("batches of 200 were not timed: one request of each form would take")


class Counted(nn.Module):
    """Counts its answers; `wait` returns after two more, of which one began since."""

    def __init__(self):
        super().__init__()
        self.answers = 0

    def forward(self, x):
        self.answers += 1
        return x

    def wait(self):
        before = self.answers
        while self.answers < before + 2:
            time.sleep(0.001)


def test_updates_take_turns_beside_requests():
    """Steps of each variant alternate, weights are published after each, and the thread ends."""
    model, order, published = Counted(), [], []

    def step(label):
        def run():
            order.append(label)
            model.wait()

        return run

    request = Request(args=(torch.ones(1, 2),), kwargs={}, num_examples=1)
    threads = threading.active_count()
    found = measure_updates(
        {"a": step("a"), "b": step("b")}, model, request, lambda: published.append(1),
        seconds=0.05,
    )  # fmt: skip
    assert order == ["a", "b"] * (len(order) // 2)
    assert len(published) == len(order)
    assert [u.variant for u in found] == ["a", "b"]
    for update in found:
        assert update.num_steps == len(order) // 2 - 1 >= 1
        assert update.num_requests >= update.num_steps
        assert 0 < update.step_seconds <= update.lag_seconds
        assert update.requests_p50_seconds <= update.requests_p99_seconds
    assert threading.active_count() == threads


def test_request_that_fails_beside_updates_is_raised():
    """What a request raises ends the measurement, and no thread stays."""
    failing = threading.Event()

    class Fails(nn.Module):
        def forward(self, x):
            failing.set()
            raise RuntimeError("no answer")

    request = Request(args=(torch.ones(1, 2),), kwargs={}, num_examples=1)
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="no answer"):
        measure_updates({"a": lambda: failing.wait(60)}, Fails(), request, list, seconds=0.05)
    assert threading.active_count() == threads
