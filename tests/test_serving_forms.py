"""Forms to serve: sizes, memory and quality, and exported answers against those of torch."""

import numpy as np
import pytest
import torch
from torch import nn

import remat
from remat.evaluation.checks import make_subject
from remat.evaluation.serving.export import ONNX, ONNX_DYNAMIC, ONNX_STATIC
from remat.evaluation.serving.forms import (
    ATTACHED,
    DETACHED,
    TORCH_INT8,
    TRAINED,
    make_form,
    torch_int8_form,
    trained_form,
)
from remat.evaluation.serving.measure import STEPS, serve_model
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.serving.quality import FormQuality, Yardstick, largest_slice_loss
from remat.evaluation.serving.request import Request, largest_difference
from remat.evaluation.serving.resident import resident_growth
from remat.runs.evidence import Interval, SliceQuality
from tests.test_evaluation import build, make_workload

SHORT = ServingOptions(seconds=0.5, update_seconds=0.3, batch_sizes=(1, 3))


def wide():
    """Linear layers of a size at which nothing else counts."""
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 3))


@pytest.fixture(scope="module")
def subject():
    return make_subject(make_workload(), seed=5)


@pytest.fixture(scope="module")
def plan(subject):
    made = subject.fit.plan("70%")
    assert made.regions
    return made


def test_int8_is_a_quarter_of_linear_weights(subject):
    """Dynamic int8 of linear layers: near four times smaller, and nearly the same answers."""
    model = wide().eval()
    form = torch_int8_form(model, wide)
    plain = trained_form(model, wide)
    assert plain.size_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert 3.7 < plain.size_bytes / form.size_bytes <= 4.0
    request = Request(args=(torch.randn(16, 8),), kwargs={}, num_examples=16)
    answers = [request.send(one.module) for one in (plain, form)]
    assert 0 < largest_difference(*answers) < 0.05 * float(answers[0].abs().max())


def test_form_that_cannot_be_made_says_why():
    """No layer to quantize, and an exporter that raises: a reason, never a crash."""
    missing = make_form(TORCH_INT8, lambda: torch_int8_form(nn.Conv1d(2, 2, 1), build))
    assert missing.reason == "no linear or recurrent layer to quantize."
    assert make_form("x", lambda: 1 / 0).reason == "ZeroDivisionError: division by zero"


def test_slice_on_which_a_form_lost_most_is_named():
    """Accuracy falls and error rises: the larger loss in the metric's own unit."""

    def quality(**values):
        return FormQuality(
            slices=tuple(
                SliceQuality(
                    name=name, origin="named", metric="accuracy", num_examples=9, rest=None,
                    quality=Interval(value=v, low=v, high=v, method="none"), is_worse=False,
                )
                for name, v in values.items()
            )
        )  # fmt: skip

    said = largest_slice_loss(quality(a=0.8, b=0.5), quality(a=0.9, b=0.9))
    assert said == "Largest loss on a slice: accuracy on 'b' from 0.9 to 0.5."
    assert largest_slice_loss(quality(a=0.9), quality(a=0.9, b=0.3)) == ""


def test_quality_on_a_part_of_the_examples_says_so(subject, plan, tmp_path):
    """Whole batches up to the most that is allowed, the same ones for every form."""
    data = make_workload().eval_data
    workload = make_workload(eval_data=data, batch_size=30)
    part = make_subject(workload, seed=5)
    options = ServingOptions(seconds=0.05, update_seconds=0.01, batch_sizes=(1,), exports=False,
                             max_examples=31)  # fmt: skip
    serving, _ = serve_model(part, build, "no plan", None, options, tmp_path)
    (form,) = serving.forms
    assert form.message == "Quality on the first 60 of 100 validation examples."
    labels = [int((data.tensors[1][:60] == k).sum()) for k in range(3)]
    assert [one.num_examples for one in form.slices] == labels


def test_form_whose_predictions_are_nan_has_no_quality_and_is_no_choice(subject):
    """A model that answers NaN: a reason, never metrics of it."""

    class Broken(nn.Module):
        def forward(self, x):
            return build()(x) * float("nan")

    yardstick = Yardstick.of(subject.workload, subject.model, 100)
    with pytest.raises(remat.WorkloadError, match="100 of its predictions are NaN"):
        yardstick.measure(Broken())


def test_serving_without_exports_describes_every_torch_form(subject, plan, tmp_path):
    """Sizes, memory, ops and quality of each; the plan costs no op and no byte of memory."""
    steps = []
    options = ServingOptions(seconds=0.5, update_seconds=0.3, batch_sizes=(1, 3), exports=False)
    serving, gaps = serve_model(subject, build, "plan 70%", plan, options, tmp_path, steps.append)
    assert tuple(steps) == STEPS
    assert gaps == ()
    by_name = {one.name: one for one in serving.forms}
    assert list(by_name) == [TRAINED, ATTACHED, DETACHED]
    assert len({(f.num_ops, f.peak_bytes, f.size_bytes) for f in serving.forms}) == 1
    assert len({str(f.metrics) for f in serving.forms}) == 1
    assert all(f.largest_difference == 0 for f in serving.forms)
    assert by_name[ATTACHED].relative_latency.low <= by_name[ATTACHED].relative_latency.high
    assert {(r.form, r.batch_size) for r in serving.latencies} == {
        (name, size) for name in by_name for size in (1, 3)
    }
    assert serving.recommended_form == TRAINED
    assert [u.variant for u in serving.updates] == ["no plan", "plan 70%"]


def test_inference_peak_is_weights_inputs_and_what_is_alive(tmp_path):
    """Closed form for two linear layers: weights, input, and the largest pair of activations."""
    workload = make_workload(model=lambda: nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 16)),
                             predict=None, eval_data=None,
                             loss=lambda model, batch: model(batch[0]).square().mean())  # fmt: skip
    subject = make_subject(workload, seed=0)
    options = ServingOptions(seconds=0.2, update_seconds=0.01, batch_sizes=(1,), exports=False)
    serving, _ = serve_model(subject, workload.model, "no plan", None, options, tmp_path)
    weights = 4 * (8 * 64 + 64 + 64 * 16 + 16)
    assert serving.forms[0].size_bytes == weights
    assert serving.forms[0].peak_bytes == weights + 4 * 128 * (8 + 64 + 16)
    assert serving.forms[0].metrics == {}


@pytest.mark.slow
def test_exported_forms_answer_as_torch_does(subject, plan, tmp_path):
    """ONNX within rounding, int8 near and far smaller, at batch sizes that were not exported."""
    pytest.importorskip("onnx", reason="needs the extra export")
    workload = make_workload(model=wide)
    served = make_subject(workload, seed=5)
    serving, gaps = serve_model(served, wide, "no plan", None, SHORT, tmp_path)
    assert gaps == ()
    by_name = {one.name: one for one in serving.forms}
    assert list(by_name) == [TRAINED, TORCH_INT8, ONNX, ONNX_DYNAMIC, ONNX_STATIC]
    assert all(one.is_available for one in serving.forms), serving.forms
    assert by_name[ONNX].largest_difference < 1e-5
    assert [one.name for one in serving.forms if one.resident_bytes] == [
        ONNX, ONNX_DYNAMIC, ONNX_STATIC,
    ]  # fmt: skip
    for name in (ONNX_DYNAMIC, ONNX_STATIC):
        assert 0 < by_name[name].largest_difference < 0.2
        assert by_name[ONNX].size_bytes / by_name[name].size_bytes > 3
    assert by_name[ONNX].metrics == pytest.approx(by_name[TRAINED].metrics, abs=1e-5)
    assert {(r.form, r.batch_size) for r in serving.latencies} == {
        (name, size) for name in by_name for size in (1, 3)
    }


@pytest.mark.slow
def test_exported_form_of_a_language_model_answers_with_its_logits(tmp_path):
    """Mappings in, a record with a cache out; the loss asks for labels, the prediction does not."""
    pytest.importorskip("onnx", reason="needs the extra export")
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        return GPT2LMHeadModel(GPT2Config(
            n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=16, bos_token_id=0,
            eos_token_id=0,
        ))  # fmt: skip

    def predict(network, batch):
        return network(input_ids=batch["input_ids"]).logits.softmax(-1)[:, :-1], (
            batch["input_ids"][:, 1:]
        )

    tokens = torch.randint(32, (8, 12))
    data = [{"input_ids": one, "labels": one} for one in tokens]
    workload = remat.Workload(name="lm", model=model, train_data=data, eval_data=data,
                              batch_size=4, predict=predict)  # fmt: skip
    subject = make_subject(workload, seed=0)
    serving, gaps = serve_model(subject, lambda: subject.model, "no plan", None, SHORT, tmp_path)
    by_name = {one.name: one for one in serving.forms}
    assert by_name[ONNX].is_available, by_name[ONNX].message
    assert by_name[ONNX].largest_difference < 1e-4
    trained = by_name[TRAINED].metrics
    assert "loss" not in by_name[ONNX].metrics
    assert by_name[ONNX].metrics["nll"] == pytest.approx(trained["nll"], abs=1e-4)
    assert gaps == ()


@pytest.mark.slow
def test_resident_memory_of_a_file_is_at_least_its_weights(tmp_path):
    """A process that opens 32 MiB of weights and answers grows by them, and not by four times."""
    onnx = pytest.importorskip("onnx", reason="needs the extra export")
    side = 2896  # square, float32: 32 MiB
    weights = np.ones((side, side), dtype=np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, side])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, side])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "one.onnx"
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    feed = {"x": np.ones((1, side), dtype=np.float32)}
    grown = resident_growth(path, feed, num_threads=1)
    assert weights.nbytes <= grown < 4 * weights.nbytes
    path.write_bytes(b"no model")
    with pytest.raises(remat.WorkloadError, match=r"its own process ended with: .*(ONNX|Protobuf)"):
        resident_growth(path, feed, num_threads=1)
