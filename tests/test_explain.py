"""What the third depth says and draws, and the small pictures of the comparison."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import remat
from remat.report.comparison import compare, notes, render_comparison
from remat.report.explain import tales
from remat.report.html import render_html
from remat.report.spark import HEIGHT, WIDTH, front_points, loss_path
from remat.runs.records import RunStatus, VariantKind
from remat.units import MIB, format_bytes
from sample_evidence import BLOCKS, rich_run, rich_variant, sample_story
from sample_runs import sample_run, sample_variant


@pytest.fixture(scope="module")
def told():
    return {tale.label: tale for tale in tales(rich_run())}


def test_every_moment_has_its_words_letters_and_levels(told):
    """Words, states and fills are of one length, and each state is of one of the blocks."""
    for tale in told.values():
        assert len(tale.texts) == len(tale.states) == len(tale.fills) == tale.num_moments
        assert {len(state) for state in tale.states} == {len(BLOCKS)}
        assert {len(fill) for fill in tale.fills} == {len(BLOCKS)}
        assert all(0 <= size <= 100 for fill in tale.fills for size in fill)


def test_states_of_a_dropped_block_tell_its_whole_life(told):
    """It waits, runs, lies dropped, runs again, goes backward, and is done; a kept one is kept."""
    dropped = "".join(state[1] for state in told["plan 60%"].states)
    assert dropped == "wfddddabxx"
    kept = "".join(state[1] for state in told["no plan"].states)
    assert kept == "wfkkkkbxx"


def test_words_name_block_bytes_and_peak(told):
    """Each moment is told with its bytes, which are those of the record."""
    texts = told["plan 60%"].texts
    assert texts[1] == (
        "Forward through blocks.0. It drops 38.0 MiB of what it made and keeps 2.0 MiB. "
        "Memory: 79.0 MiB."
    )
    assert any("so blocks.0 runs forward again and holds 40.0 MiB." in text for text in texts)
    assert texts[-1].startswith("Update: the optimizer changes the weights")
    story = sample_story()
    for text, moment in zip(texts, story.moments, strict=True):
        assert format_bytes(sum(moment.bytes_by_kind.values())) in text
    assert len([text for text in texts if "the peak of the step" in text]) == 1


def test_smallest_plan_with_a_story_is_shown_first(told):
    """One story is the default: the smallest plan's, or where it has none, the last one told."""
    assert [tale.label for tale in told.values() if tale.is_default] == ["plan 60%"]
    assert tales(sample_run()) == ()


def test_curve_stands_on_one_scale_for_all_plans(told):
    """The peak without a plan is drawn at the same height in every story."""
    highest = {
        line.share for tale in told.values() for line in tale.lines if "197.0 MiB" in line.text
    }
    assert len(highest) == 1
    for tale in told.values():
        assert all(0 < line.share < 1 for line in tale.lines)


def test_area_encloses_what_the_block_holds(told):
    """The path of a row, read back as numbers, is the bytes of the record."""
    story, tale = sample_story(), told["plan 60%"]
    steps = re.findall(r"H(\d+)V([\d.]+)", tale.rows[1].area)
    level, levels = 100.0, []
    changes = {int(at): float(height) for at, height in steps}
    for at in range(tale.num_moments):
        level = changes.get(at, level)
        levels.append(1 - level / 100)
    assert levels == [
        pytest.approx(moment.held_bytes[1] / (40 * MIB), abs=0.001) for moment in story.moments
    ]


def test_page_without_a_story_says_that_it_was_not_recorded():
    """A run of an older version has its page, with a gap in the place of the animation."""
    text = render_html(sample_run(sample_variant("no plan", VariantKind.REFERENCE)))
    assert "Not recorded" in text
    assert "explain-data" not in text.split("<script>")[0]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300))
def test_loss_path_stays_inside_its_box_whatever_the_losses(losses):
    """Numbers that are none are left out; what is drawn is finite and inside."""
    path = loss_path(losses)
    for x, y in re.findall(r"([-\w.]+) ([-\w.]+)(?:L|$)", path.removeprefix("M")):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT
        assert math.isfinite(float(x))
    assert len(path) < 1000


def test_front_is_in_shares_of_no_plan():
    """No plan stands at one and one; half of its memory stands in the middle between."""
    run = sample_run(
        sample_variant("no plan", VariantKind.REFERENCE, peak_mib=200, ms=100),
        sample_variant(peak_mib=100, ms=150),
    )
    (x_1, y_1, role), (x_2, y_2, _) = front_points(run)
    assert role == "reference"
    assert (x_2 - 4) / (x_1 - 4) == pytest.approx(0.5, abs=0.01)
    assert y_2 < y_1


def test_comparison_says_how_each_run_ended():
    """Passed, failed, unfinished and without any plan are told apart, each with its sentences."""
    reference = sample_variant("no plan", VariantKind.REFERENCE, peak_mib=200, ms=100)
    runs = [
        sample_run(reference, sample_variant()),
        sample_run(reference, sample_variant(weights_identical=False)),
        sample_run(reference, sample_variant(), status=RunStatus.UNFINISHED),
        sample_run(reference),
    ]
    assert [one.verdict for one in compare(runs)] == ["passed", "FAILED", "unfinished", "no plan"]
    assert all(len(one.sentences) == 5 for one in compare(runs))
    assert render_comparison(runs).count('class="told') == 0
    assert render_comparison(runs).count("card told") == 4


def test_comparison_warns_of_different_machines_and_versions():
    """Seconds of two machines are no comparison, and the page says so."""
    run = sample_run()
    other = run.environment.model_copy(
        update={"processor": "Other CPU", "versions": {"torch": "2.12.0"}}
    )
    found = " ".join(notes([run, run.model_copy(update={"environment": other})]))
    assert "2 machines" in found
    assert "2.12.0, 2.13.0" in found
    assert notes([run, run]) == []


def test_comparison_is_refused_beyond_what_a_page_holds():
    """The error names the limit and what was given."""
    with pytest.raises(remat.RunError, match="at most 50 runs, got 51"):
        render_comparison([sample_run()] * 51)


def test_block_that_keeps_part_is_told_apart():
    """A block that holds half of what it made is neither kept nor dropped."""
    story = sample_story((1,))
    moments = [
        moment.model_copy(
            update={"held_bytes": tuple(20 * MIB if s == 2 * MIB else s for s in moment.held_bytes)}
        )
        for moment in story.moments
    ]
    half = story.model_copy(update={"moments": tuple(moments)})
    run = sample_run(
        rich_variant("no plan", VariantKind.REFERENCE),
        rich_variant("plan 60%", VariantKind.PLANNED, story=half),
    )
    tale = next(one for one in tales(run) if one.label == "plan 60%")
    assert "p" in "".join(state[1] for state in tale.states)
