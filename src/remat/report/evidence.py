"""The evidence beside memory and time, section by section, as tables of texts."""

from __future__ import annotations

from collections.abc import Sequence

from remat.report.expense_tables import expense_section
from remat.report.quality_tables import quality_section
from remat.report.serving_tables import serving_section
from remat.report.tables import (
    NOTHING,
    Section,
    fixed,
    metric,
    metric_interval,
    number,
    p_value,
    percent,
    said_once,
    seconds,
    shown_metrics,
    table,
    yes,
)
from remat.runs.evidence import Calibration, SliceQuality
from remat.runs.reading import best_planned, metric_name, reference_of
from remat.runs.records import Run, Variant

# Slices that a page shows; the rest is in run.json.
MOST_SLICES = 12


def evidence_sections(run: Run) -> tuple[Section, ...]:
    """Give the sections that the run has figures for, or a gap to tell of, in reading order."""
    made = [
        quality_section(run), _equivalence(run), _calibration(run), _coverage(run), _slices(run),
        _representation(run), serving_section(run), expense_section(run),
    ]  # fmt: skip
    placed: set[int] = set()
    sections = []
    for section in made:
        gaps = []
        for place, gap in enumerate(run.gaps):
            if _belongs(gap.section, section.key):
                placed.add(place)
                gaps.append(f"{gap.variant}: {gap.reason}" if gap.variant else gap.reason)
        if section.tables or gaps:
            sections.append(_with_gaps(section, gaps))
    rest = [gap for place, gap in enumerate(run.gaps) if place not in placed]
    if rest:
        told = [
            f"{gap.section}{f' ({gap.variant})' if gap.variant else ''}: {gap.reason}"
            for gap in rest
        ]
        empty = Section(
            key="gaps", title="Not evaluated", lead="What has no figure on this page, and why."
        )
        sections.append(_with_gaps(empty, told))
    return tuple(sections)


_ALIASES = {
    "quality": ("quality",),
    "equivalence": ("equivalence", "repeats", "seeds", "parity"),
    "calibration": ("calibration", "temperature"),
    "coverage": ("coverage",),
    "slices": ("slices", "slice"),
    "representation": ("representation", "representativeness"),
    "serving": ("serving", "latency", "export", "quantization"),
    "expense": ("expense", "expenses", "cost", "energy"),
}


def _belongs(named: str, key: str) -> bool:
    words = named.lower().replace("-", " ").replace("_", " ").split()
    return bool(words) and words[0] in _ALIASES[key]


def _with_gaps(section: Section, gaps: Sequence[str]) -> Section:
    return Section(
        key=section.key,
        title=section.title,
        lead=section.lead,
        how=section.how,
        tables=section.tables,
        remarks=section.remarks,
        working=section.working,
        gaps=tuple(gaps),
    )


def _equivalence(run: Run) -> Section:
    tests = table(
        "Equivalence over the seeds",
        ("Variant", "Metric", "Pairs", "Equal in every bit", "Difference", "Margin", "p",
         "Equivalent"),
        (
            (
                e.variant,
                metric_name(e.metric),
                str(e.num_pairs),
                f"{e.num_identical} of {e.num_pairs}",
                NOTHING
                if e.difference is None
                else f"{number(e.difference.value, 3)} "
                f"[{number(e.difference.low, 3)}, {number(e.difference.high, 3)}]",
                f"± {number(e.margin, 3)}",
                p_value(e.p_value),
                yes(e.is_equivalent),
            )
            for e in run.equivalences
        ),
        words=(0, 1, 7),
    )  # fmt: skip
    names = shown_metrics(name for v in run.variants for r in v.repeats for name in r.metrics)
    repeats = table(
        "Every further training",
        ("Variant", "Seed", *(metric_name(name) for name in names), "Losses equal",
         "Weights equal", "Time"),
        (
            (
                v.label,
                str(r.seed),
                *(metric(name, r.metrics.get(name)) for name in names),
                yes(r.losses_identical),
                yes(r.weights_identical),
                seconds(r.train_seconds),
            )
            for v in run.variants
            for r in v.repeats
        ),
    )  # fmt: skip
    reasons = dict.fromkeys(e.margin_reason for e in run.equivalences if e.margin_reason)
    level = next((e.difference.level for e in run.equivalences if e.difference), None)
    interval = "" if level is None else f" Intervals hold {level:.0%} confidence."
    return Section(
        key="equivalence",
        title="Equal over several seeds",
        lead=(
            "The same training from further seeds, with and without a plan in pairs. The question "
            "is not whether a difference was seen, but whether one larger than the margin can be "
            "ruled out."
        ),
        how=(
            "Two one-sided t-tests on the paired differences; equivalent where the larger p is "
            f"below 0.05, or where every pair is equal in every bit.{interval} Margin: "
            f"{'; '.join(reasons) or 'not stated'}."
        )
        if run.equivalences
        else "",
        tables=(*tests, *repeats),
    )


def _calibration(run: Run) -> Section:
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for v in run.variants:
        if v.calibration is None:
            continue
        found = v.calibration
        blocks[v.label] = [("as trained", *_calibration_cells(found.before), NOTHING)]
        if found.after is not None:
            scale = number(found.temperature, 3)
            cells = _calibration_cells(found.after)
            blocks[v.label].append(("temperature fitted", *cells, scale))
    rows = [(label, *cells) for label, block in said_once(blocks).items() for cells in block]
    fitted = max((v.calibration.num_fitted for v in run.variants if v.calibration), default=0)
    held = f" The temperature was fitted on {fitted:,} examples, none of those shown."
    return Section(
        key="calibration",
        title="Is its confidence earned?",
        lead=(
            "Of all predictions made with 80% confidence, 80% should be right. Points below the "
            "diagonal are overconfident."
        ),
        how=(
            "Bins of equal width over the confidence of the predicted class; the expected error is "
            "the mean gap weighted by examples, the maximum that of the worst bin."
            f"{held if fitted else ''}"
        ),
        tables=table(
            "Calibration",
            ("Variant", "Probabilities", "Examples", "Expected error", "Maximum error", "Brier",
             "Negative log-likelihood", "Temperature"),
            rows,
            words=(0, 1),
        ),
    )  # fmt: skip


def _calibration_cells(found: Calibration) -> tuple[str, ...]:
    return (
        f"{found.num_examples:,}",
        percent(found.expected_error, 2),
        percent(found.maximum_error, 2),
        fixed(found.brier),
        fixed(found.nll),
    )


def _coverage(run: Run) -> Section:
    return Section(
        key="coverage",
        title="Do its intervals hold the truth?",
        lead="How often an interval around a predicted value holds what was then observed.",
        how="Counted on held-out data; brackets are the confidence interval of the share.",
        tables=table(
            "Coverage",
            ("Variant", "Asked for", "Held", "Mean width"),
            (
                (
                    v.label,
                    percent(c.nominal, 0),
                    metric_interval("accuracy", c.covered),
                    number(c.mean_width),
                )
                for v in run.variants
                for c in v.coverage
            ),
        ),
    )


def sliced_plan(run: Run) -> Variant | None:
    """Return the variant whose slices stand beside those without a plan: the smallest plan's."""
    best, reference = best_planned(run.variants), reference_of(run.variants)
    if best is not None and best.slices:
        return best
    return next((v for v in run.variants if v.slices and v is not reference), None)


def slice_rows(run: Run) -> list[tuple[SliceQuality | None, SliceQuality | None]]:
    """Pair each slice without a plan and under the smallest plan, the worst first."""
    reference, best = reference_of(run.variants), sliced_plan(run)
    without = {(s.name, s.metric): s for s in reference.slices} if reference else {}
    planned = {(s.name, s.metric): s for s in best.slices} if best else {}
    pairs = [(without.get(key), planned.get(key)) for key in {**planned, **without}]
    return sorted(pairs, key=_badness)


def _badness(pair: tuple[SliceQuality | None, SliceQuality | None]) -> tuple[bool, float, str]:
    shown = pair[1] or pair[0]
    assert shown is not None
    return (not shown.is_worse, shown.adjusted_p_value or 1.0, shown.name)


def _slices(run: Run) -> Section:
    pairs = slice_rows(run)
    metrics = {one.metric for pair in pairs for one in pair if one}
    shown = [
        (
            slice_.name,
            slice_.origin.value,
            "" if len(metrics) == 1 else metric_name(slice_.metric),
            f"{slice_.num_examples:,}",
            metric_interval(slice_.metric, without.quality if without else None),
            metric_interval(slice_.metric, planned.quality if planned else None),
            metric(slice_.metric, slice_.rest),
            p_value(slice_.adjusted_p_value),
            "worse" if slice_.is_worse else ("empty" if slice_.quality is None else "no worse"),
        )
        for without, planned in pairs[:MOST_SLICES]
        if (slice_ := planned or without) is not None
    ]
    left = len(pairs) - len(shown)
    methods = dict.fromkeys(
        one.quality.method for pair in pairs for one in pair if one and one.quality
    )
    named = f" ({', '.join(methods)})" if methods else ""
    best = sliced_plan(run)
    by = f" by {metric_name(next(iter(metrics)))}" if len(metrics) == 1 else ""
    return Section(
        key="slices",
        title="Weak spots",
        lead=(
            "Parts of the evaluation data on their own: those that were named, and those found by "
            "searching for where the model is worse. A plan that moves none of them is safe for "
            "them, too."
        ),
        how=(
            "Brackets are confidence intervals"
            f"{named}; p is corrected for the number of slices (Holm), and a slice is "
            "called worse below 0.05."
        ),
        tables=table(
            f"Slices{by}, the weakest first",
            ("Slice", "Origin", "Metric", "Examples", "Without a plan",
             f"Under {best.label}" if best else "Under a plan", "All others", "p", "Verdict"),
            shown,
            words=(0, 1, 2, 8),
        ),
        remarks=(f"{left} more slices are in run.json.",) if left else (),
    )  # fmt: skip


def _representation(run: Run) -> Section:
    return Section(
        key="representation",
        title="Does the evaluation data stand for the rest?",
        lead="The share of each group in the data for evaluation against that in the reference.",
        how="p is corrected for the number of groups (Holm); a group without examples is missing.",
        tables=table(
            "Groups",
            ("Feature", "Group", "In the reference", "In evaluation", "Examples", "p", "Verdict"),
            (
                (
                    r.feature,
                    r.group,
                    percent(r.reference_share),
                    percent(r.evaluated_share),
                    f"{r.num_evaluated:,}",
                    p_value(r.adjusted_p_value),
                    "missing" if r.is_missing else ("off" if r.is_off else "as expected"),
                )
                for r in run.representation
            ),
            words=(0, 1, 6),
        ),
    )
