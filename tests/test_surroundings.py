"""What surrounds training, with a plan on the model: export, quantization, attacks, Opacus."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import remat
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from tests.loops import forwards_replaced
from tests.models import Block, square_mean, tightest

WIDTH = 32


def planned():
    """A model under the tightest plan, its twin without one, and a batch."""
    model = nn.Sequential(
        Block(WIDTH), Block(WIDTH, norm=nn.BatchNorm1d(WIDTH)), Block(WIDTH)
    ).eval()
    batch = torch.randn(64, WIDTH)
    plain = copy.deepcopy(model)
    plan = tightest(model.train(), batch, loss=square_mean)
    assert plan.regions
    remat.apply(model, plan)
    return model.eval(), plain, batch


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export_gives_the_graph_of_the_model_without_a_plan(strict, training):
    """The same ops, the same names of parameters, the same values."""
    model, plain, batch = planned()
    model.train(training), plain.train(training)
    exported, expected = (torch.export.export(m, (batch,), strict=strict) for m in (model, plain))

    def ops(program):
        return [node.target for node in program.graph.nodes if node.op == "call_function"]

    assert ops(exported) == ops(expected)
    assert list(exported.state_dict) == list(expected.state_dict)
    torch.manual_seed(1)
    value = exported.module()(batch)
    torch.manual_seed(1)
    assert torch.equal(value, plain(batch))


@pytest.mark.slow
def test_onnx_file_is_that_of_the_model_without_a_plan(tmp_path):
    """The exported graph has the same nodes, and computes the same."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, plain, batch = planned()
    nodes = []
    for name, subject in (("planned", model), ("plain", plain)):
        path = tmp_path / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            torch.onnx.export(subject, (batch,), path, dynamo=True, verbose=False)
        nodes.append([node.op_type for node in onnx.load(path).graph.node])
    assert nodes[0] == nodes[1]


@pytest.mark.filterwarnings("ignore:.*deprecated")  # torch's quantization as a whole
def test_dynamic_quantization_gives_what_it_gives_without_a_plan():
    """The quantized copy has the same modules and values; the model keeps its plan."""
    model, plain, batch = planned()
    quantized, expected = (
        torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
        for m in (model, plain)
    )
    assert [type(m) for m in quantized.modules()] == [type(m) for m in expected.modules()]
    with torch.no_grad():
        assert torch.equal(quantized(batch), expected(batch))
    assert torch.equal(quantized(batch), expected(batch))
    assert forwards_replaced(model)


def test_attack_through_the_input_is_that_of_the_model_without_a_plan():
    """Several steps of autograd.grad on the input: the same example, no parameter's gradient."""

    def attacked(model, batch):
        found = batch.clone()
        for _ in range(3):
            found.requires_grad_()
            (gradient,) = torch.autograd.grad(square_mean(model, found), found)
            found = (found + 0.1 * gradient.sign()).detach()
        assert all(p.grad is None for p in model.parameters())
        return found

    model, plain, batch = planned()
    assert torch.equal(attacked(model, batch), attacked(plain, batch))


def test_per_sample_gradients_by_expanded_weights():
    """Regions that run modules again refuse them; a plan that runs single ops again keeps them."""
    model, batch = nn.Sequential(*(Block(WIDTH) for _ in range(3))), torch.randn(64, WIDTH)
    plain = copy.deepcopy(model)
    handle = remat.apply(model, plan_policy(model, batch, AllBlocks(), loss=square_mean))
    with pytest.raises(remat.ApplyError, match="GradSampleModule"):
        call_for_per_sample_grads(model)(batch)
    handle.remove()
    plan = tightest(model, batch, loss=square_mean)
    assert any(region.dropped_ops for region in plan.regions)
    kept = tuple(region for region in plan.regions if region.dropped_ops or region.packed_ops)
    remat.apply(model, plan.model_copy(update={"regions": kept}))
    for subject in (model, plain):
        torch.manual_seed(1)
        square_mean(call_for_per_sample_grads(subject), batch).backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad_sample, expected.grad_sample)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("force_functorch", [False, True])
@pytest.mark.parametrize("wraps_first", [False, True])
def test_opacus_gives_the_same_gradients_of_each_example(force_functorch, wraps_first):
    """Hooks see one call under a plan: gradients of each example and their sum are the same."""
    opacus = pytest.importorskip("opacus")
    model = nn.Sequential(*(Block(WIDTH, dropout=0.0) for _ in range(3)))
    plain, batch = copy.deepcopy(model), torch.randn(64, WIDTH)
    plan = tightest(model, batch, loss=square_mean)

    def wrapped(module):
        return opacus.GradSampleModule(module, force_functorch=force_functorch)

    if wraps_first:
        subject = wrapped(model)
        with pytest.raises(remat.WorkloadError, match="wrapped by Opacus"):
            remat.plan(subject, batch, "80%", loss=square_mean)
        remat.apply(subject._module, plan)
    else:
        remat.apply(model, plan)
        subject = wrapped(model)
    expected = wrapped(plain)
    square_mean(subject, batch).backward()
    square_mean(expected, batch).backward()
    for a, b in zip(subject.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a.grad_sample, b.grad_sample)
