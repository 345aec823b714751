"""The report of a run: one page that opens anywhere and loads nothing, at three depths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from remat.files import write_atomically
from remat.planner.describe import group_regions
from remat.report import charts, palette, view
from remat.report.drawing import require_pictures
from remat.report.evidence import evidence_sections, slice_rows, sliced_plan
from remat.report.explain import tales
from remat.report.losses import loss_picture
from remat.report.pages import content_policy, page_environment, page_script
from remat.report.pareto import pareto_picture
from remat.report.sentences import five_sentences
from remat.report.tables import percent, seconds
from remat.report.timeline import timeline_picture
from remat.runs.reading import format_value, metric_name
from remat.runs.records import Run, Variant
from remat.units import format_bytes

# Pictures are drawn twice, for wide and for narrow screens: shrinking one would shrink its text.
_WIDE, _NARROW = 900, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture at its widths, with what it shows in words."""

    alt: str
    wide: str
    narrow: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The memory of one variant over its step."""

    label: str
    role: str
    caption: str
    picture: Picture


def write_report(run: Run, path: str | os.PathLike[str]) -> Path:
    """Write the run's page to `path`; an interrupted write leaves the old page or none.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    return write_atomically(path, render_html(run))


def render_html(run: Run) -> str:
    """Make the run's page: summary, evidence and explanation; nothing loaded from anywhere.

    Its one script is its own and named by its hash in the page's policy, so that a browser runs
    nothing else; without scripts all is there but the animation.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    from markupsafe import Markup

    require_pictures()
    environment = page_environment()
    told = tales(run)
    script = page_script()
    timelines = _timelines(run)
    kinds = {kind for v in run.variants for s in v.timeline for kind in s.bytes_by_kind}
    return environment.get_template("run.html.j2").render(
        run=run,
        sentences=five_sentences(run),
        tiles=view.tiles(run),
        sections=[(section, *_pictured(run, section.key)) for section in evidence_sections(run)],
        tales=told,
        tale_data=[tale.for_script() for tale in told],
        script=Markup(script),  # noqa: S704  our own file
        policy=content_policy(script),
        rows=view.rows(run),
        how=view.how_measured(run),
        pareto=_pareto(run),
        losses=_losses(run),
        timelines=timelines,
        kinds=[kind for kind in palette.KINDS if kind in kinds],
        plans=[
            (variant, group_regions(variant.plan))
            for variant in run.variants
            if variant.plan is not None and (variant.plan.regions or variant.plan.rewrites)
        ],
        light=palette.css_variables(palette.LIGHT),
        dark=palette.css_variables(palette.DARK),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One entry of a picture's legend."""

    label: str
    role: str
    shape: str


def _pictured(run: Run, key: str) -> tuple[Picture | None, list[Key]]:
    """Draw the picture of a section, if it has one, and say what its marks mean."""
    draw = {
        "equivalence": _equivalence,
        "calibration": _reliability,
        "slices": _slices,
        "serving": _latency,
    }.get(key)
    return (None, []) if draw is None else draw(run)


def _equivalence(run: Run) -> tuple[Picture | None, list[Key]]:
    if not run.equivalences:
        return None, []
    told = "; ".join(
        f"{e.variant}, {metric_name(e.metric)}: {'' if e.is_equivalent else 'not '}equivalent"
        for e in run.equivalences
    )
    picture = Picture(
        alt=f"Differences from no plan with their intervals, against the margin. {told}.",
        wide=charts.equivalence_picture(run, width=_WIDE),
        narrow=charts.equivalence_picture(run, width=_NARROW),
    )
    return picture, [
        Key(label="inside the margin", role="plan-1", shape="plan"),
        Key(label="not shown to be inside", role="policy-1", shape="policy"),
    ]


def _reliability(run: Run) -> tuple[Picture | None, list[Key]]:
    found = charts.shown_calibration(run)
    if found is None:
        return None, []
    label, calibration = found
    keys = [Key(label=f"{label}, as trained", role="reference", shape="reference")]
    told = f"expected error {percent(calibration.before.expected_error, 2)} as trained"
    if calibration.after is not None:
        keys.append(Key(label="after one temperature", role="plan-1", shape="plan"))
        told += f", {percent(calibration.after.expected_error, 2)} after one temperature"
    picture = Picture(
        alt=f"Share of right predictions against confidence under {label}: {told}.",
        wide=charts.reliability_picture(calibration, width=420, height=320),
        narrow=charts.reliability_picture(calibration, width=_NARROW, height=230),
    )
    return picture, keys


def _slices(run: Run) -> tuple[Picture | None, list[Key]]:
    pairs = [p for p in slice_rows(run) if any(one and one.quality for one in p)]
    if not pairs:
        return None, []
    shown = [planned or without for without, planned in pairs]
    told = "; ".join(
        f"{one.name}: {format_value(one.metric, one.quality.value)}"
        for one in shown
        if one is not None and one.quality is not None
    )
    best = sliced_plan(run)
    keys = [Key(label="without a plan", role="reference", shape="reference")]
    keys.append(Key(label=best.label if best else "under a plan", role="plan-1", shape="plan"))
    picture = Picture(
        alt=f"Quality of each slice with its confidence interval. {told}.",
        wide=charts.slices_picture(run, width=_WIDE),
        narrow=charts.slices_picture(run, width=_NARROW),
    )
    return picture, keys


def _latency(run: Run) -> tuple[Picture | None, list[Key]]:
    if run.serving is None or not run.serving.latencies:
        return None, []
    told = "; ".join(
        f"{one.form} at batch {one.batch_size}: {seconds(one.p95_seconds)}"
        for one in run.serving.latencies
    )
    picture = Picture(
        alt=f"95th percentile of latency against batch size. {told}.",
        wide=charts.latency_picture(run, width=_WIDE, height=300),
        narrow=charts.latency_picture(run, width=_NARROW, height=260),
    )
    looks = charts.form_looks(run)
    return picture, [Key(label=f, role=role, shape=shape) for f, (role, shape) in looks.items()]


def _pareto(run: Run) -> Picture | None:
    shown = [v for v in run.variants if v.measured_peak_bytes and v.step_times is not None]
    if not shown:
        return None
    told = "; ".join(
        f"{v.label}: {format_bytes(v.measured_peak_bytes or 0)}, {view.step_time(v)}" for v in shown
    )
    return Picture(
        alt=f"Peak memory against time per step. {told}.",
        wide=pareto_picture(run, width=_WIDE, height=340),
        narrow=pareto_picture(run, width=_NARROW, height=300),
    )


def _losses(run: Run) -> Picture | None:
    shown = [variant for variant in run.variants if variant.losses]
    if not shown:
        return None
    told = "; ".join(f"{v.label}: from {v.losses[0]:.4g} to {v.losses[-1]:.4g}" for v in shown)
    return Picture(
        alt=f"Training loss by step. {told}.",
        wide=loss_picture(run, width=_WIDE, height=280),
        narrow=loss_picture(run, width=_NARROW, height=240),
    )


def _timelines(run: Run) -> list[Timeline]:
    shown = [variant for variant in run.variants if variant.timeline]
    roles = palette.variant_roles(run.variants)
    top = max((_top_bytes(variant) for variant in shown), default=1)
    return [
        Timeline(
            label=variant.label,
            role=roles[variant.label],
            caption=_timeline_caption(variant),
            picture=Picture(
                alt=f"Memory over one step under {variant.label}. {_timeline_caption(variant)}",
                wide=timeline_picture(variant, top_bytes=top, width=250, height=170),
            ),
        )
        for variant in shown
    ]


def _top_bytes(variant: Variant) -> int:
    highest = max(sum(sample.bytes_by_kind.values()) for sample in variant.timeline)
    return max(highest, variant.budget_bytes or 0)


def _timeline_caption(variant: Variant) -> str:
    peak = max(variant.timeline, key=lambda sample: sum(sample.bytes_by_kind.values()))
    total = sum(peak.bytes_by_kind.values())
    kind, size = max(peak.bytes_by_kind.items(), key=lambda item: item[1])
    return (
        f"Peak {format_bytes(total)} in {peak.phase}; the largest part is {kind}, "
        f"{format_bytes(size)}."
    )
