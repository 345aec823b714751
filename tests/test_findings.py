"""What the evidence of a run is said to mean, in the summary and in the terminal."""

import io

from rich.console import Console

from remat.report.terminal import run_view
from remat.runs.evidence import (
    Calibration,
    CalibrationEvidence,
    Coverage,
    Equivalence,
    Gap,
    Interval,
    Representation,
    SliceOrigin,
    SliceQuality,
)
from remat.runs.findings import evidence_lines
from remat.runs.records import EpochQuality, VariantKind
from sample_runs import sample_run, sample_variant


def interval(value):
    return Interval(value=value, low=value - 0.1, high=value + 0.1, method="made up")


def slice_of(name, value, *, is_worse=True, metric="accuracy"):
    return SliceQuality(
        name=name,
        origin=SliceOrigin.FOUND,
        metric=metric,
        num_examples=40,
        quality=interval(value),
        rest=0.9,
        p_value=0.001,
        adjusted_p_value=0.002,
        is_worse=is_worse,
    )


def run_of(reference=(), planned=(), **changes):
    return sample_run(
        sample_variant("no plan", VariantKind.REFERENCE, slices=tuple(reference)),
        sample_variant("plan 60%", slices=tuple(planned)),
        **changes,
    )


def equivalence(num_pairs, num_identical):
    return Equivalence(
        variant="plan 60%",
        metric="accuracy",
        num_pairs=num_pairs,
        num_identical=num_identical,
        difference=interval(0.002) if num_pairs > 1 else None,
        margin=0.01,
        margin_reason="one point",
        p_value=0.01,
        is_equivalent=True,
    )


def test_summary_says_how_many_seeds_were_identical():
    """All identical is one sentence, else each variant is named with its difference."""
    assert "seeds" not in run_of(equivalences=(equivalence(1, 1),)).summary
    assert "The same holds from each of 3 seeds." in (
        run_of(equivalences=(equivalence(3, 3),)).summary
    )
    told = run_of(equivalences=(equivalence(3, 1),)).summary
    assert "plan 60%: 1 of 3 seeds identical, accuracy differs by +0.2 points" in told


def test_summary_names_the_weakest_slice_side_by_side():
    """Only slices that are shown to be worse are told, with the figure without a plan."""
    bad, worse = slice_of("x = 1", 0.7), slice_of("x = 2", 0.5)
    same = run_of([bad, worse], [bad, worse]).summary
    assert (
        "weakest where x = 2: accuracy 50.0% on 40 examples, 90.0% on the others, with and "
        "without a plan." in same
    )
    other = run_of([slice_of("x = 2", 0.6)], [worse]).summary
    assert "90.0% on the others (60.0% without a plan)." in other
    assert "weakest" not in run_of([slice_of("x = 1", 0.7, is_worse=False)]).summary


def test_weakest_slice_by_an_error_is_the_one_with_most():
    """For perplexity, more is worse."""
    found = [
        slice_of("x = 1", 7.0, metric="perplexity"),
        slice_of("x = 2", 5.0, metric="perplexity"),
    ]
    assert "weakest where x = 1: perplexity 7" in run_of(found, found).summary


def test_terminal_has_a_line_for_each_kind_of_evidence():
    """Calibration, coverage, slices, groups, epochs, targets and gaps, and nothing else."""
    assert evidence_lines(run_of()) == []
    measured = Calibration(
        num_examples=180, expected_error=0.119, maximum_error=0.5, brier=0.1, nll=0.3, bins=()
    )
    epochs = tuple(
        EpochQuality(epoch=i, num_examples=9, metrics={"accuracy": a})
        for i, a in enumerate((0.9, 0.8))
    )
    reference = sample_variant(
        "no plan",
        VariantKind.REFERENCE,
        quality=epochs,
        seconds_to_target=2.0,
        calibration=CalibrationEvidence(
            before=measured,
            after=measured.model_copy(update={"expected_error": 0.027}),
            temperature=0.47,
        ),
        coverage=(Coverage(nominal=0.9, covered=interval(0.88), mean_width=1.0),),
        slices=(slice_of("x = 1", 0.7),),
    )
    group = Representation(
        feature="region", group="north", reference_share=0.1, evaluated_share=0.0,
        num_evaluated=0, is_missing=True,
    )  # fmt: skip
    run = sample_run(
        reference,
        sample_variant(),
        targets={"accuracy": 0.85},
        representation=(group,),
        gaps=(
            Gap(section="slices", variant="a", reason="it is empty"),
            Gap(section="slices", variant="b", reason="it is empty"),
            Gap(section="quality", reason="it is empty"),
        ),
    )
    lines = dict(evidence_lines(run))
    assert lines == {
        "calibration": "confidence off by 11.9% on average, 2.7% with temperature 0.47 "
        "(180 predictions)",
        "coverage": "90% intervals hold 88.0%",
        "slices": "0 named and 1 found, 1 shown to be worse than the rest; "
        "weakest where x = 1: 70.0%",
        "groups": "1 compared with their reference, 0 off, 1 missing: region = north",
        "best epoch": "1 of 2, with accuracy 90.0%",
        "target": "accuracy >= 0.85: no plan 2.00 s",
        "not evaluated": "slices, quality: it is empty",
    }
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run_view(run))
    text = console.export_text()
    assert all(heading in text for heading in lines)
