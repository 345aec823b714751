"""The forms that serve a model side by side on each slice of the evaluation data."""

from __future__ import annotations

from remat.report.tables import Table, metric, table
from remat.runs.evidence import Serving
from remat.runs.reading import metric_name


def quality_by_slice(serving: Serving) -> tuple[Table, ...]:
    """Set the forms side by side on each slice that all of them have."""
    forms = [form for form in serving.forms if form.is_available]
    figures = {
        form.name: {one.name: one for one in form.slices if one.quality is not None}
        for form in forms
        if form.slices
    }
    if not figures:
        return ()
    first = next(iter(figures.values()))
    shared = [name for name in first if all(name in slices for slices in figures.values())]
    return table(
        "Quality of each form by slice",
        ("Slice", "Examples", "Metric", *figures),
        (
            (
                name,
                f"{first[name].num_examples:,}",
                metric_name(first[name].metric),
                *(
                    metric(slices[name].metric, found.value)
                    for slices in figures.values()
                    if (found := slices[name].quality) is not None
                ),
            )
            for name in shared
        ),
        words=(0, 2),
    )
