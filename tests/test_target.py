"""Steps traced for a device that is not here: its kernels, and what its allocator reserves."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import remat
from remat.cost.allocator_rules import AllocatorOptions
from remat.fit import Fit
from remat.prove.accounting import target_of
from remat.prove.reserved import replay_step
from remat.trace.capture import capture
from remat.trace.target import Attention, Target, choose_attention, default_to_foreach, ops_of

MIB = 1024**2
A100 = Target(device_type="cuda", compute_capability=(8, 0))
H100 = Target(device_type="cuda", compute_capability=(9, 0))
L4 = Target(device_type="cuda", compute_capability=(8, 9))
V100 = Target(device_type="cuda", compute_capability=(7, 0))
MI300X = Target(device_type="cuda", is_rocm=True)
MPS = Target(device_type="mps")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

MASK = torch.zeros(17, 17, dtype=BF16)
LEARNT_MASK = torch.zeros(17, 17, dtype=BF16, requires_grad=True)

# Each row follows from one rule of PyTorch's sdp_utils.cpp; see NOTE [ Which attention ].
CHOICES = [
    # target, dtype, head size, what else, kernel
    (A100, BF16, 64, {}, Attention.FLASH),
    (A100, FP16, 256, {}, Attention.FLASH),
    (A100, BF16, 64, {"dropout_p": 0.1}, Attention.FLASH),
    (A100, BF16, 64, {"is_causal": True}, Attention.FLASH),
    (A100, BF16, 64, {"is_causal": True, "keys": 9}, Attention.EFFICIENT),  # not square
    (A100, BF16, 64, {"mask": MASK}, Attention.EFFICIENT),  # flash takes no mask
    (A100, BF16, 264, {}, Attention.EFFICIENT),  # flash takes heads up to 256
    (A100, BF16, 36, {"mask": MASK}, Attention.MATH),  # 36 is no multiple of 8
    (A100, BF16, 36, {}, Attention.FLASH),  # padded
    (A100, FP32, 64, {}, Attention.EFFICIENT),  # flash is for half precision
    (A100, FP32, 66, {}, Attention.MATH),  # 66 is no multiple of 4
    (A100, FP64, 64, {}, Attention.MATH),
    (H100, BF16, 64, {}, Attention.CUDNN),
    (H100, BF16, 64, {"mask": MASK}, Attention.CUDNN),
    (H100, BF16, 64, {"dropout_p": 0.1}, Attention.FLASH),  # 0.1 is no multiple of 1/16
    (H100, BF16, 64, {"dropout_p": 0.125}, Attention.CUDNN),
    (H100, BF16, 192, {}, Attention.FLASH),
    (H100, BF16, 192, {"values": 128}, Attention.CUDNN),  # the one pair above 128
    (A100, BF16, 192, {"values": 128}, Attention.EFFICIENT),  # flash takes equal sizes
    (H100, BF16, 64, {"keys": 1}, Attention.FLASH),  # cuDNN takes more than one key
    (H100, BF16, 64, {"mask": LEARNT_MASK}, Attention.EFFICIENT),  # cuDNN: no gradient
    (A100, BF16, 64, {"mask": MASK[:, :1].expand(17, 17)}, Attention.MATH),  # gaps in the mask
    (A100, BF16, 64, {"key_heads": 2}, Attention.MATH),  # as many heads, unless grouped
    (A100, BF16, 64, {"key_heads": 2, "is_grouped": True}, Attention.FLASH),
    (A100, FP32, 64, {"key_heads": 2, "is_grouped": True}, Attention.EFFICIENT),
    (A100, BF16, 64, {"key_heads": 3, "is_grouped": True}, Attention.MATH),  # 3 does not divide 4
    (A100, BF16, 64, {"batch": 1}, Attention.MATH),  # batches are not broadcast
    (A100, BF16, 64, {"keys": 0}, Attention.MATH),
    (L4, BF16, 192, {}, Attention.FLASH),
    (L4, BF16, 200, {}, Attention.EFFICIENT),  # no backward between 193 and 224 on small chips
    (L4, BF16, 256, {}, Attention.FLASH),
    (L4, BF16, 256, {"dropout_p": 0.1}, Attention.EFFICIENT),
    (V100, FP16, 64, {}, Attention.EFFICIENT),  # flash needs 8.0
    (V100, BF16, 64, {}, Attention.MATH),
    (V100, FP32, 66, {}, Attention.EFFICIENT),  # no alignment asked for
    (MI300X, BF16, 64, {}, Attention.FLASH),
    (MI300X, BF16, 512, {}, Attention.FLASH),  # ROCm's kernel takes twice the size
    (MI300X, FP32, 64, {"key_heads": 2, "is_grouped": True}, Attention.MATH),
    (MPS, FP16, 64, {}, Attention.MATH),
]  # fmt: skip


def heads(dtype, size, length=17, number=4, batch=2):
    shape = (batch, number, length, size)
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


@pytest.mark.parametrize(("target", "dtype", "size", "more", "kernel"), CHOICES)
def test_attention_kernel_is_the_one_that_pytorch_selects(target, dtype, size, more, kernel):
    """The first kernel in PyTorch's order whose conditions hold is chosen."""
    facts = dict(more)
    shape = (facts.pop("keys", 17), facts.pop("key_heads", 4), facts.pop("batch", 2))
    key, value = (heads(dtype, s, *shape) for s in (size, facts.pop("values", size)))
    assert choose_attention(target, heads(dtype, size), key, value, **facts) is kernel


def test_attention_of_three_dimensions_or_with_gaps_is_written_out():
    """Fused kernels take four dimensions, the last one without gaps."""
    three = heads(BF16, 64)[0]
    assert choose_attention(A100, three, three, three) is Attention.MATH
    gaps = heads(BF16, 128)[..., ::2]
    assert choose_attention(A100, gaps, gaps, gaps) is Attention.MATH


@pytest.mark.parametrize(
    ("left", "chosen"),
    [
        ([SDPBackend.MATH], Attention.MATH),
        ([SDPBackend.EFFICIENT_ATTENTION], Attention.EFFICIENT),
        ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], Attention.FLASH),
    ],
)
def test_attention_kernels_that_are_turned_off_are_not_chosen(left, chosen):
    """What a user allows by `sdpa_kernel` is what the device would be given."""
    query = heads(BF16, 64)
    assert choose_attention(H100, query, query, query) is Attention.CUDNN
    with sdpa_kernel(left):
        assert choose_attention(H100, query, query, query) is chosen


def test_deterministic_algorithms_leave_cudnn_out():
    """`check_cudnn_deterministic`: cuDNN's attention is not deterministic."""
    query = heads(BF16, 64)
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_attention(H100, query, query, query) is Attention.FLASH
    finally:
        torch.use_deterministic_algorithms(False)


class Mixer(nn.Module):
    """Attention, dropout, a normalization and a linear layer."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.qkv = nn.Linear(64, 192, dtype=dtype)
        self.out = nn.Linear(64, 64, dtype=dtype)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + functional.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)), 0.1)


def names(trace):
    return Counter(op.name.split(".")[1] for op in trace.ops)


@pytest.mark.parametrize(
    ("target", "dtype", "kernel"),
    [
        (A100, BF16, "_scaled_dot_product_flash_attention"),
        (H100, BF16, "_scaled_dot_product_cudnn_attention"),
        (A100, FP32, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_step_runs_the_targets_ops_forward_and_backward(target, dtype, kernel):
    """The trace holds the device's fused ops and their backward, and none of the CPU's parts."""
    trace = capture(
        Mixer(dtype), torch.randn(2, 32, 64, dtype=dtype), loss=square_mean, target=target
    )
    found = names(trace)
    for name in (kernel, "native_dropout"):
        assert found[name] == 1
        assert found[f"{name}_backward"] == 1
    assert not {"bernoulli_", "_softmax"} & set(found)
    assert found["_foreach_sqrt"] == 1
    assert trace.device_type == "cuda"


def square_mean(model, batch):
    return model(batch).float().square().mean()


def test_fused_attention_saves_no_scores():
    """What backward keeps grows with the length for flash, with its square when written out."""
    kept = {}
    for target in (A100, V100):  # V100 writes bfloat16 attention out
        for length in (128, 512):
            batch = torch.randn(2, length, 64, dtype=torch.bfloat16)
            trace = capture(Mixer(), batch, loss=square_mean, target=target)
            storages = {h.storage for h in trace.handles}
            kept[target, length] = sum(trace.storages[s].size_bytes for s in storages)
    assert kept[A100, 512] < 4 * kept[A100, 128]
    assert kept[V100, 512] > 8 * kept[V100, 128]


def test_module_that_calls_attention_inside_is_mapped_too():
    """Torch's own multi-head attention reaches the same kernels, however it calls them."""
    layer = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True, dtype=torch.bfloat16)
    trace = capture(
        layer,
        torch.randn(2, 16, 64, dtype=torch.bfloat16),
        loss=lambda m, x: m(x, x, x, need_weights=False)[0].float().sum(),
        target=A100,
    )
    assert names(trace)["_scaled_dot_product_flash_attention_backward"] == 1


def test_grouped_heads_and_masks_run_on_the_efficient_kernel():
    """Fewer key heads are repeated, and boolean masks become numbers."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            mask = torch.ones(17, 17, dtype=torch.bool)
            q, k = x @ self.weight, x[:, :2] @ self.weight
            return functional.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    trace = capture(Grouped(), torch.randn(2, 4, 17, 16), loss=square_mean, target=A100)
    assert names(trace)["_scaled_dot_product_efficient_attention_backward"] == 1


def test_kernels_are_the_cpus_again_behind_the_trace():
    """Nothing of the target stays in torch, also where the step fails."""
    x = torch.ones(1000)
    with pytest.raises(ValueError, match="stop"), ops_of(A100):
        raise ValueError("stop")
    assert set(functional.dropout(x, 0.5).tolist()) == {0.0, 2.0}
    q = torch.randn(1, 2, 8, 16)
    found = functional.scaled_dot_product_attention(q, q, q)
    assert torch.allclose(found, torch.softmax(q @ q.mT / 4, -1) @ q, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "arguments", "expected"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.SGD, {"momentum": 0.9}, True),
        (torch.optim.AdamW, {"foreach": False}, False),
        (torch.optim.AdamW, {"fused": False}, None),
        (torch.optim.AdamW, {"fused": True}, None),
        (torch.optim.AdamW, {"differentiable": True}, None),
        (torch.optim.AdamW, {"lr": torch.tensor(0.1)}, None),
        (torch.optim.AdamW, {"lr": torch.tensor(0.1), "capturable": True}, True),
        (torch.optim.LBFGS, {}, "absent"),
    ],
)
def test_optimizers_take_all_tensors_at_once_on_cuda(optimizer, arguments, expected):
    """What an optimizer leaves open becomes what it chooses on CUDA; what is said stays."""
    made = optimizer([nn.Parameter(torch.zeros(3))], **arguments)
    default_to_foreach(made, "cuda")
    assert made.param_groups[0].get("foreach", "absent") is expected
    default_to_foreach(made, "mps")
    assert made.param_groups[0].get("foreach", "absent") is expected


def blocks(number=4):
    return nn.Sequential(*[Mixer() for _ in range(number)])


def test_plan_for_cuda_keeps_reserved_memory_within_the_budget():
    """Reserved bytes, context and margin stay within the budget, and are what the plan says."""
    batch = torch.empty(512, 512, 64, dtype=torch.bfloat16, device="meta")
    fit = Fit(blocks(), batch, loss=square_mean, device="A100-80GB")
    keep = fit.keep_all_peak_bytes
    plan = fit.plan("90%")
    assert plan.predicted_reserved_bytes is not None
    assert plan.outside_bytes == remat.load_devices()["A100-80GB"].context_bytes
    held = plan.predicted_reserved_bytes + plan.outside_bytes + plan.margin_bytes
    assert held <= plan.budget_bytes == int(0.9 * keep)
    assert plan.regions
    assert plan.predicted_peak_bytes <= plan.predicted_reserved_bytes
    assert sum(plan.breakdown.values()) == plan.predicted_peak_bytes
    assert plan.breakdown["allocator"] >= 2 * 8_519_680  # cuBLAS's two workspaces
    assert plan.device == "A100-80GB"
    assert "on A100-80GB" in str(plan)
    with pytest.raises(remat.BudgetError, match=r"context 543\.6 MiB") as caught:
        fit.plan("600MiB")
    assert {"context", "unused segments", "allocator"} <= set(caught.value.blame)
    assert remat.Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    ("alloc_conf", "options"),
    [
        ("expandable_segments:True", AllocatorOptions(expandable_segments=True)),
        ("max_split_size_mb:21", AllocatorOptions(max_split_size_bytes=21 * MIB)),
        (
            "garbage_collection_threshold:0.5, per_process_memory_fraction:0.25",
            AllocatorOptions(garbage_collection_threshold=0.5, limit_bytes=85_024_047_104 // 4),
        ),
    ],
)
def test_allocators_settings_decide_what_is_reserved(alloc_conf, options):
    """Under settings of PYTORCH_ALLOC_CONF a plan reserves what a replay under them does."""
    batch = torch.empty(64, 512, 64, dtype=torch.bfloat16, device="meta")
    row = dataclasses.replace(
        remat.load_devices()["A100-80GB"], usable_bytes=85_024_047_104, alloc_conf=alloc_conf
    )
    plan = remat.plan(blocks(2), batch, "4GiB", loss=square_mean, device=row)
    target = target_of(row, "cpu")
    trace = capture(blocks(2), batch, loss=square_mean, target=target, drop_saved=False)
    peaks = replay_step(trace, options, library_bytes=row.workspace_bytes)
    assert plan.predicted_reserved_bytes == peaks.reserved_bytes
    assert plan.predicted_peak_bytes == peaks.allocated_bytes
    assert any(alloc_conf in note for note in plan.notes)


def test_a_share_of_memory_is_all_that_fits():
    """What a process may reserve bounds the device, and what would need more says how much."""
    a100 = remat.load_devices()["A100-80GB"]
    tight = dataclasses.replace(a100, alloc_conf="per_process_memory_fraction:0.001")
    assert tight.available_bytes == int(0.001 * a100.available_bytes) + a100.context_bytes
    batch = torch.empty(512, 512, 64, dtype=torch.bfloat16, device="meta")
    step = {"loss": square_mean, "chunks": False}
    needs = [Fit(blocks(2), batch, device=row, **step).keep_all_peak_bytes for row in (a100, tight)]
    assert needs[0] == needs[1] > tight.available_bytes


def test_plan_for_cuda_is_refused_on_the_cpu():
    """A plan holds for its type of device: elsewhere other kernels run."""
    model, batch = blocks(2), torch.randn(4, 64, 64, dtype=torch.bfloat16)
    plan = remat.plan(model, batch, "8GiB", loss=square_mean, device="L4")
    assert plan.fingerprint.device_type == "cuda"
    with pytest.raises(remat.PlanMismatchError, match="made for a model on 'cuda'"):
        remat.apply(model, plan)


def test_plan_for_apple_counts_what_is_requested():
    """No caching allocator of CUDA's kind is assumed on other devices."""
    batch = torch.randn(4, 64, 64, dtype=torch.bfloat16)
    plan = remat.plan(blocks(2), batch, "8GiB", loss=square_mean, device="mps")
    assert plan.predicted_reserved_bytes is None
    assert plan.fingerprint.device_type == "mps"


def test_file_of_a_plan_made_before_devices_is_read():
    """Files without the fields for devices are plans as before."""
    batch = torch.randn(4, 64, 64, dtype=torch.bfloat16)
    plan = remat.plan(blocks(2), batch, "8GiB", loss=square_mean)
    data = plan.model_dump(mode="json")
    for field in ("device", "predicted_reserved_bytes", "outside_bytes"):
        del data[field]
    old = remat.Plan.from_data(data, "old file")
    assert (old.device, old.predicted_reserved_bytes, old.outside_bytes) == ("", None, 0)


def test_cli_plans_for_a_device_and_writes_its_timeline(run_cli, write_workload, tmp_path):
    """Without a budget the device's memory is one; the timeline is a snapshot of segments."""
    path = tmp_path / "step.json"
    line = ("plan", write_workload(), "--device", "l4", "--frontier", 0, "--memory-timeline", path)
    done = run_cli(*line)
    assert done.code == 0, done.err
    assert re.search(r"budget +21\.\d+ GiB +\d+ bytes on L4", done.out)
    assert '"segments"' in path.read_text()
    page = tmp_path / "step.html"
    done = run_cli(*line[:-1], page)
    assert done.code == 0, done.err
    text = page.read_text()
    assert text.count("<svg") == 4  # two pictures, each for desktop and phone
    assert "Blocks by kind over time" in text
    assert "<script" not in text
    done = run_cli("plan", write_workload(), "--device", "l4", "--memory-timeline", "step.txt")
    assert done.code == 2
    assert "ends in .html, .json or .pickle" in done.err


def test_cli_plans_for_a_device_of_ones_own_and_its_allocator(run_cli, write_workload, tmp_path):
    """Figures of a file and settings of the allocator stand in the plan."""
    table = tmp_path / "devices.toml"
    table.write_text("schema_version = 1\n[device.L4]\nusable_bytes = 9_000_000_000\n")
    own = ("--device", "L4", "--device-file", table)
    settings = ("--alloc-conf", "expandable_segments:True")
    done = run_cli("plan", write_workload(), *own, *settings, "--json")
    plan = remat.Plan.from_data(json.loads(done.out), "-")
    assert plan.budget_bytes == 9_000_000_000
    assert any("PYTORCH_ALLOC_CONF=expandable_segments:True" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "H100-80"), "Did you mean 'H100-80GB'?"),
        (("--device", "L4", "--device-file", "nowhere.toml"), "cannot be read"),
        (("--device", "L4", "--alloc-conf", "max_split_size_mb:x"), "a whole number of MiB"),
        (("--device", "mps", "--alloc-conf", "expandable_segments:True"), "no caching allocator"),
        (("--budget", "1GiB", "--alloc-conf", "expandable_segments:True"), "need --device"),
    ],
)
def test_cli_plan_refuses_bad_devices(run_cli, write_workload, words, message):
    """Each is one line that names it, and exit code 2."""
    done = run_cli("plan", write_workload(), *words)
    assert done.code == 2
    assert message in done.err.replace("\n", " ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_of_cuda_casts_as_on_cuda(dtype):
    """Under the device's autocast products are half, norms and softmaxes in float32."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = (
                nn.Linear(64, 64),
                nn.LayerNorm(64),
                nn.Linear(64, 64),
            )
            self.mixer = Mixer(torch.float32)

        def forward(self, x):
            with torch.autocast(device_type="cuda", dtype=dtype):
                seen.append(self.first(x).dtype)
                seen.append(self.norm(self.first(x)).dtype)
                seen.append(torch.softmax(self.last(x), -1).dtype)
                return self.mixer(x) + self.last(self.norm(self.first(x)))

    seen = []
    trace = capture(Small(), torch.randn(2, 16, 64), loss=square_mean, target=A100)
    assert seen == [dtype, torch.float32, torch.float32]
    assert names(trace)["_scaled_dot_product_flash_attention_backward"] == 1
    assert not torch.is_autocast_enabled("cpu")
    assert torch.autocast("cpu").device == "cpu"
