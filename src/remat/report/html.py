"""The report of a run: one page that opens anywhere, without a network and without scripts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from remat.files import write_atomically
from remat.planner.describe import group_regions
from remat.report import palette, view
from remat.report.drawing import require_pictures
from remat.report.losses import loss_picture
from remat.report.pages import page_environment
from remat.report.pareto import pareto_picture
from remat.report.timeline import timeline_picture
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
    """Make the run's page: pictures inside, no script, nothing loaded from anywhere.

    Raises
    ------
    MissingPackageError: if the packages that draw are not installed.
    """
    from markupsafe import Markup

    require_pictures()
    environment = page_environment()
    environment.filters |= {
        "zip": zip,
        "svg": Markup,
    }  # our own pictures, whose texts vega has escaped
    timelines = _timelines(run)
    kinds = {kind for v in run.variants for s in v.timeline for kind in s.bytes_by_kind}
    return environment.get_template("run.html.j2").render(
        run=run,
        tiles=view.tiles(run),
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
