"""A plan in words: the figures are right, alike decisions are told once, nothing is cut off."""

import subprocess
import sys

import pytest

from remat.cli.sketch import Point, draw_front
from remat.planner.describe import describe_plan, group_regions
from remat.planner.records import (
    Fingerprint,
    Hazard,
    Outcome,
    Plan,
    Region,
    TensorSignature,
)

MIB = 2**20


def region(module, freed=23 * MIB, seconds=0.0019, **more):
    more.setdefault("reason", "recomputed: frees 23.0 MiB at the peak, costs 1.9 ms")
    return Region(module=module, freed_bytes=freed, recompute_seconds=seconds, **more)


def make_plan(*regions, **changes):
    made_for = Fingerprint(
        model_class="elsewhere.GPT2LMHeadModel",
        parameters=(),
        buffers=(),
        batch=(TensorSignature(name="batch.input_ids", shape=(4, 256), dtype="torch.int64"),),
        device_type="cpu",
        training=True,
        loss="model output",
        optimizer="remat.trace.step.adamw",
        torch_version="2.13.0",
        remat_version="0.1.0",
    )
    settings = {
        "fingerprint": made_for,
        "budget_bytes": 1670 * MIB,
        "predicted_peak_bytes": 1665 * MIB,
        "keep_all_peak_bytes": 2154 * MIB,
        "forward_seconds": 0.3,
        "step_seconds": 0.95,
        "recompute_seconds": 0.0412,
        "recompute_fraction": 0.164,
        "lower_bound_fraction": 0.051,
        "gap": 0.113,
        "outcome": Outcome.FEASIBLE,
        "regions": regions,
        "breakdown": {"parameters": 326 * MIB, "activations": 1339 * MIB, "batch": 0},
    }
    return Plan(**(settings | changes))


def labels(*regions):
    return [(group.label, group.count) for group in group_regions(make_plan(*regions))]


def test_describe_plan_says_every_figure():
    """Budget, peaks, recomputation, bound, gap, outcome and breakdown are all there."""
    text = str(make_plan(region("h.0.mlp")))
    for part in (
        "GPT2LMHeadModel on cpu in training mode",
        "batch input_ids 4x256 int64",
        "optimizer adamw",
        "1.63 GiB",
        "1751121920 bytes",
        "99.7% of the budget",
        "489.0 MiB more than planned",
        "16.4%",
        "41.2 ms",
        "5.1%",
        "gap 11.3%",
        "feasible",
        Outcome.FEASIBLE.sentence[:30],
        "1.31 GiB   80%  ██",
        "h.0.mlp",
        "    frees 23.0 MiB at the peak, costs 1.9 ms",
    ):
        assert part in text, part
    assert "batch  " not in text, "an empty kind takes no line"


def test_describe_plan_without_regions_says_that_nothing_is_recomputed():
    """A budget above the keep-everything peak recomputes nothing, and the text says so."""
    assert "Recomputed: nothing; every activation is kept" in describe_plan(make_plan())


def test_describe_plan_lists_hazards_and_notes():
    """What to know about a plan is part of its text."""
    plan = make_plan(
        hazards=(Hazard(code="workspace", where="conv1", message="cannot be seen"),),
        notes=("planned without a real step",),
    )
    assert "- workspace at conv1: cannot be seen" in str(plan)
    assert "- planned without a real step" in str(plan)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_describe_plan_fits_the_width(width):
    """No line is wider than asked, with long names too."""
    plan = make_plan(
        *(region(f"model.decoder.layers.{i}.feed_forward.activation") for i in (0, 2, 4, 6, 8)),
        region("a" * 150, seconds=1.0),
    )
    assert max(len(line) for line in describe_plan(plan, width).splitlines()) <= width


def test_describe_plan_needs_no_torch():
    """`print(plan)` works where torch is not installed."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from remat.planner.records import Plan\n"
        f"print(Plan.model_validate_json({make_plan(region('h.0')).model_dump_json()!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Recomputed: 1 region\n" in done.stdout


def test_group_regions_numbered_blocks_become_one_line():
    """Alike decisions on consecutive blocks are one group with their sum."""
    (group,) = group_regions(make_plan(*(region(f"h.{i}") for i in range(8))))
    assert group.label == "h.0 … h.7"
    assert group.count == 8
    assert group.freed_bytes == 8 * 23 * MIB
    assert group.recompute_seconds == pytest.approx(8 * 0.0019)
    assert group.reason == "each frees 23.0 MiB at the peak, costs 1.9 ms"


def test_group_regions_interleaved_sub_modules_are_grouped_by_name():
    """`h.0.attn, h.0.mlp, h.1.attn, h.1.mlp` are two decisions, not four."""
    alternating = [region(f"h.{i}.{part}") for i in range(3) for part in ("attn", "mlp")]
    assert labels(*alternating) == [("h.0.attn … h.2.attn", 3), ("h.0.mlp … h.2.mlp", 3)]


def test_group_regions_gaps_are_told():
    """Blocks that are left out are not hidden in a range."""
    assert labels(*(region(f"h.{i}") for i in (0, 1, 5))) == [("h.0 … h.1, h.5", 3)]
    every_other = [region(f"h.{i}") for i in (0, 2, 4, 6, 7)]
    assert labels(*every_other) == [("h.{0,2,4,6-7}", 5)]


def test_group_regions_unlike_ones_stay_apart():
    """Other bytes, other seconds, another call, or random state make another decision."""
    assert len(labels(region("h.0"), region("h.1", freed=MIB))) == 2
    assert len(labels(region("h.0"), region("h.1", seconds=0.1))) == 2
    assert len(labels(region("h.0"), region("h.1", draws_random_numbers=True))) == 2
    assert labels(region("cell", num_calls=2), region("cell", call=1, num_calls=2)) == [
        ("cell (call 1 of 2)", 1),
        ("cell (call 2 of 2)", 1),
    ]


def test_group_regions_measured_seconds_may_differ_a_little():
    """Seconds that were measured differ in the last digits; the group says `about`."""
    (group,) = group_regions(
        make_plan(region("h.0"), region("h.1", seconds=0.00193, reason="costs 1.93 ms"))
    )
    assert group.reason.startswith("each, about: frees")


def test_group_regions_count_every_region_once():
    """Whatever is grouped, no decision is lost or counted twice."""
    regions = [region(f"a.{i % 7}.b.{i}", freed=i % 3) for i in range(50)]
    groups = group_regions(make_plan(*regions))
    assert sum(group.count for group in groups) == 50
    assert sum(group.freed_bytes for group in groups) == sum(one.freed_bytes for one in regions)


def test_group_regions_the_model_itself_has_a_name():
    """The root module, whose path is empty, is called the whole model."""
    assert labels(region("")) == [("the whole model", 1)]


def test_draw_front_places_points_by_bytes_and_fraction():
    """The least peak is left and up, keeping everything right and down, and the plan is marked."""
    points = [Point(peak_bytes=size * MIB, fraction=share) for size, share in ((1, 0.4), (3, 0.0))]
    lines = draw_front(points, Point(peak_bytes=2 * MIB, fraction=0.2), 80)
    assert lines[0].startswith(" 40.0% ┤○")
    assert lines[-3].startswith("    0% ┤")
    assert lines[-3].endswith("○")
    assert sum(line.count("●") for line in lines) == 1
    assert lines[-1].split() == ["1.0", "MiB", "3.0", "MiB"]


@pytest.mark.parametrize("points", [[(5, 0.0)], [(5, 0.3)], [(5, 0.3), (5, 0.3)]])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_draw_front_of_few_points_is_drawn(points, width):
    """One point, or several in one place, neither divide by zero nor leave the screen."""
    drawn = draw_front([Point(peak_bytes=x, fraction=y) for x, y in points], None, width)
    assert any("○" in line for line in drawn)
    assert max(len(line) for line in drawn) <= max(width, 30)
