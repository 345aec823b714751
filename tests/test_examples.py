"""The examples: real data from installed packages, and the demo that a stranger runs first."""

import math
from pathlib import Path

import pytest
import torch

import remat
from remat.evaluation.data import training_batches, validation_batches
from remat.evaluation.demo import example_path, run_demo
from remat.runs import load_run
from remat.runs.records import VariantKind, VariantStatus, Verdict
from remat.trace.step import compute_loss, make_optimizer
from remat.workloads import load_workload

ROOT = Path(__file__).parent.parent
# Those with a workload; what runs by itself is tested in tests/distributed.
EXAMPLES = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("train_")
)


@pytest.fixture(scope="module")
def workloads():
    return {name: load_workload(str(ROOT / "examples" / name)) for name in EXAMPLES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns_something_in_few_steps(workloads, name):
    """A few steps on its own data lower the loss: model, data and loss belong together."""
    workload = workloads[name]
    model = workload.model()
    optimizer = make_optimizer(workload.optimizer, model)
    batch = next(training_batches(workload, seed=0, epoch=0))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        value = compute_loss(model, batch, workload.loss)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert all(math.isfinite(value) for value in losses)
    assert min(losses[3:]) < losses[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_predicts_probabilities_for_its_validation_data(workloads, name):
    """Predictions are probabilities over classes, one row for each label."""
    workload = workloads[name]
    model = workload.model().eval()
    with torch.no_grad():
        scores, labels = workload.predict(model, next(validation_batches(workload)))
    assert scores.shape[:-1] == labels.shape
    assert torch.allclose(scores.sum(dim=-1), torch.ones(labels.shape), atol=1e-5)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_keeps_training_and_validation_apart(workloads, name):
    """No validation example is among those of training."""
    workload = workloads[name]

    def inputs(data):
        return {data[i][0].numpy().tobytes() for i in range(len(data))}

    assert not inputs(workload.train_data) & inputs(workload.eval_data)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_says_how_to_run_it(name):
    """The first lines of each example have the command that uses it."""
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert f"remat evaluate examples/{name} --budget" in text.split('"""')[1]


def test_example_that_is_not_there_is_an_error():
    """The demo's file is found in a checkout; a missing one is named."""
    assert example_path("digits_vit.py").read_text(encoding="utf-8").startswith('"""')
    with pytest.raises(remat.WorkloadError, match=r"'nothing\.py' is not part"):
        example_path("nothing.py")


NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
        raise AssertionError(f"{event} {arguments}")
sys.addaudithook(refuse)
from remat.workloads import load_workload
workload = load_workload(sys.argv[1])
workload.model()
assert workload.train_data[0] is not None
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_needs_no_network(run_process, name):
    """Importing an example, building its model and reading its data asks the network nothing."""
    done = run_process("-c", NO_NETWORK, ROOT / "examples" / name)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_demo_trains_the_same_under_half_the_memory(tmp_path):
    """The demo ends with a page, three ways to train, one result, and peaks within budgets."""
    run, page = run_demo(out=tmp_path / "demo")
    assert run.passed, run.summary
    assert load_run(page.parent) == run
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    trained = [variant for variant in run.variants if variant.status is VariantStatus.FINISHED]
    assert len(trained) >= 3
    assert len({variant.weights_sha256 for variant in trained}) == 1
    assert trained[0].quality[-1].metrics["accuracy"] > 0.85
    planned = [variant for variant in trained if variant.kind is VariantKind.PLANNED]
    assert all(variant.verdict is Verdict.PASSED for variant in planned)
    assert min(v.measured_peak_bytes for v in planned) < 0.45 * trained[0].measured_peak_bytes
