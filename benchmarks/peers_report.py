"""The peers benchmark's results for people: scores, a Markdown page, and one picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.core_report import table
from benchmarks.runner import Data, where

# Any: results are JSON.

_MIB = 1024**2
_SLACK = 1e-6  # of a forward pass: prices of the same ops, summed in another order

# Predictions add half a KiB for crumbs below the dispatcher: peaks this close are equal.
SAME_PEAK_BYTES = 4096

NAMES = {
    "ours": "remat",
    "fixed": "rules of thumb",
    "amb-aot_eager-dp": "memory budget, aot_eager, dp",
    "amb-aot_eager-ilp": "memory budget, aot_eager, ilp",
    "amb-inductor-dp": "memory budget, inductor, dp",
    "amb-inductor-ilp": "memory budget, inductor, ilp",
    "sac": "sac_milp",
    "rotor": "rotor",
}
# Peak in MiB of the six blocks, forward and backward alone, under aot_eager; run by others before.
PUBLISHED_REFERENCE = {
    "1": 149.8, "0.5": 86.6, "0.2": 55.6, "0.1": 41.6, "0.05": 35.6, "0": 149.8,
}  # fmt: skip
_SHAPES = ("circle", "square", "triangle-up", "triangle-down", "cross", "diamond")
_WRONG = "memory budget, wrong gradients"
_COLOURS = {
    "remat": "#0072b2",
    "rules of thumb": "#1b1b1b",
    "memory budget": "#d55e00",
    _WRONG: "#e69f00",
    "sac_milp": "#cc79a7",
    "rotor": "#009e73",
}


# -- scores -----------------------------------------------------------------------------------


def score(peers: dict[str, list[Data]]) -> list[Data]:
    """Score every peer on one model.

    `tightness` is the median of peak over asked where the peak is within; `dearer_than_ours` and
    `cheaper_than_ours` count the peer's points at which our plan for that very peak recomputes
    less, and more.
    """
    return [{"peer": peer} | _score(rows, peers.get("ours", [])) for peer, rows in peers.items()]


def _score(rows: list[Data], ours: list[Data]) -> Data:
    measured = [row for row in rows if row.get("measured_bytes")]
    asked = [row for row in measured if row.get("asked_bytes")]
    within = [row for row in asked if row["measured_bytes"] <= row["asked_bytes"]]
    proofs = [row["verdict"] for row in measured]
    compared = [equal_peak(row, ours) for row in measured if row.get("fraction") is not None]
    gaps = [c["gap"] for c in compared if c["gap"] is not None]
    shares = sorted(row["measured_bytes"] / row["asked_bytes"] for row in within)
    right = [row for row in measured if not row["verdict"]["wrong_in_silence"]]
    return {
        "rows": len(rows),
        "failed": sum("error" in row for row in rows),
        "within": len(within),
        "asked": len(asked),
        "tightness": shares[len(shares) // 2] if shares else None,
        "not_monotone": _not_monotone(asked),
        "wrong_in_silence": sum(p["wrong_in_silence"] for p in proofs),
        "identical": sum(p["identical"] for p in proofs),
        "measured": len(measured),
        "lowest_peak_bytes": min((row["measured_bytes"] for row in right), default=None),
        "dearer_than_ours": sum(gap > _SLACK for gap in gaps),
        "cheaper_than_ours": sum(gap < -_SLACK for gap in gaps),
        "unreached_by_ours": sum(c["gap"] is None for c in compared),
        "compared": len(compared),
    }


def _not_monotone(rows: list[Data]) -> int:
    """Count budgets whose measured peak is above that of a larger budget."""
    ordered = sorted(rows, key=lambda row: row["asked_bytes"])
    return sum(
        any(row["measured_bytes"] > later["measured_bytes"] * 1.001 for later in ordered[i + 1 :])
        for i, row in enumerate(ordered)
    )


def equal_peak(row: Data, ours: list[Data]) -> Data:
    """Compare a peer's row with our cheapest plan whose peak is no higher."""
    fits = [
        o for o in ours
        if o.get("fraction") is not None
        and (o.get("measured_bytes") or o["predicted_bytes"])
        <= row["measured_bytes"] + SAME_PEAK_BYTES
    ]  # fmt: skip
    best = min((o["fraction"] for o in fits), default=None)
    return {"ours": best, "gap": None if best is None else row["fraction"] - best}


# -- page -------------------------------------------------------------------------------------

_LEGEND = (
    "Peaks are those of one whole warm training step (AdamW, foreach=False) by the allocator's "
    "record, in MiB, each in a fresh process. Recomputed: price of what runs twice over that of "
    "the forward pass in eager mode, by the roofline of the device `cpu`; for compiled peers the "
    "nodes that the partitioner put in both graphs, unfused. Ours at that peak: the least that our "
    "plans recompute at a peak no higher, made with and without a price on bookkeeping. "
    "Asked, for `activation_memory_budget`: the fraction "
    "applied to what its own 1.0 takes above parameters, state and batch. Asked, for `sac_milp`: "
    "its budget and the optimizer's state, which it does not count. Wrong in silence: the loss is "
    "right, and a gradient differs by more than 0.1 % of its largest entry. Dropout is 0.1 where "
    "the model has any, but for `six_blocks` and the chains."
)


def markdown(results: Data) -> str:
    """Write the results as a page."""
    lines = ["# Against every peer", "", where(results), "", _LEGEND]
    for model in results["models"]:
        lines += ["", f"## {model['name']}", "", _facts(model), ""]
        lines += _scores(model)
        lines += ["", *_rows(model)]
        if model["times"]:
            lines += ["", *_times(model)]
    if results["reference"]:
        lines += _reference(results["reference"])
    lines += ["", "## As found", ""]
    lines += [f"- {sentence}" for sentence in results["findings"]]
    if results["failures"]:
        lines += ["", "## Failures", ""]
        lines += [f"- {f['model']}, {f['stage']}: {f['problem']}" for f in results["failures"]]
    return "\n".join(lines) + "\n"


def _facts(model: Data) -> str:
    facts = model["facts"]
    if not facts:
        return "Not run."
    return (
        f"{facts['num_ops']} ops, {facts['num_blocks']} blocks; keep everything "
        f"{_mib(facts['keep_all_bytes'])} MiB, of which {_mib(facts['base_bytes'])} MiB are "
        "parameters, buffers, state and batch."
    )


def _scores(model: Data) -> list[str]:
    headings = (
        "peer", "peak within asked", "tightness", "not monotone", "wrong in silence", "identical",
        "lowest peak", "dearer than ours at equal peak", "cheaper than ours",
        "peak not reached by ours", "failed",
    )  # fmt: skip
    return table(
        headings,
        (
            (
                NAMES[row["peer"]],
                f"{row['within']}/{row['asked']}" if row["asked"] else "",
                "" if row["tightness"] is None else f"{row['tightness']:.3f}",
                row["not_monotone"] if row["asked"] else "",
                row["wrong_in_silence"],
                f"{row['identical']}/{row['measured']}",
                _mib(row["lowest_peak_bytes"]),
                "" if row["peer"] == "ours" else f"{row['dearer_than_ours']}/{row['compared']}",
                "" if row["peer"] == "ours" else row["cheaper_than_ours"],
                "" if row["peer"] == "ours" else row["unreached_by_ours"],
                row["failed"],
            )
            for row in model["scores"]
        ),
    )


def _rows(model: Data) -> list[str]:
    headings = (
        "peer", "setting", "asked", "predicted", "measured", "error", "recomputed",
        "ours at that peak", "FLOPs again", "verdict", "plan time",
    )  # fmt: skip
    body = []
    for peer, rows in model["peers"].items():
        for row in rows:
            if peer == "ours" and not row.get("measured_bytes") and "error" not in row:
                continue  # planned at a peer's peak: it stands in that peer's row
            at = equal_peak(row, model["peers"].get("ours", [])) if _is_comparable(row) else {}
            body.append(
                (
                    NAMES[peer],
                    row["setting"],
                    _mib(row.get("asked_bytes")),
                    _mib(row.get("predicted_bytes")),
                    _mib(row.get("measured_bytes")),
                    _error(row),
                    _fraction(row.get("fraction")),
                    "" if peer == "ours" or not at else _fraction(at["ours"]) or "not reached",
                    _fraction(row.get("flop_fraction")),
                    row.get("error") or _verdict(row.get("verdict")),
                    f"{row['plan_s']:.1f} s" if row.get("plan_s") is not None else "",
                )
            )
    return table(headings, body)


def _is_comparable(row: Data) -> bool:
    return row.get("fraction") is not None and bool(row.get("measured_bytes"))


def _error(row: Data) -> str:
    if not row.get("predicted_bytes") or not row.get("measured_bytes"):
        return ""
    return f"{row['predicted_bytes'] / row['measured_bytes'] - 1:+.2%}"


def _verdict(verdict: Data | None) -> str:
    if verdict is None:
        return ""
    if verdict["identical"]:
        return "identical"
    if verdict["wrong_in_silence"]:
        return f"WRONG gradients, by {verdict['largest_gradient_error']:.1%}, in silence"
    parts = [
        f"gradients within {verdict['largest_gradient_error']:.0e}",
        *(["buffers differ"] if not verdict["buffers_identical"] else []),
        *(["random state differs"] if not verdict["random_state_identical"] else []),
    ]
    return ", ".join(parts)


def _times(model: Data) -> list[str]:
    return table(
        ("step", "median", "interquartile range", "rounds"),
        (
            (
                row["setting"],
                f"{row['median_s'] * 1e3:.0f} ms",
                f"{row['iqr_s'] * 1e3:.0f} ms",
                row["rounds"],
            )
            for row in model["times"]
        ),
    )


def _reference(rows: list[Data]) -> list[str]:
    spoken = (
        "Six pre-norm blocks, forward and backward alone, what is alive before excluded; "
        "`activation_memory_budget` under aot_eager, dp."
    )
    body = [
        (
            row["setting"],
            f"{PUBLISHED_REFERENCE[row['setting']]:.1f}",
            f"{row['above_base_mib']:.1f}" if "above_base_mib" in row else row.get("error", ""),
        )
        for row in rows
    ]
    heading = ["", "## The reference table", "", spoken, ""]
    return [*heading, *table(("budget", "published MiB", "here MiB"), body)]


def findings(models: Iterable[Data]) -> list[str]:
    """Say what stands out: where a peer is ahead, wrong gradients, peaks that are not monotone."""
    found = []
    for model in models:
        for row in model["scores"]:
            name = NAMES[row["peer"]]
            if row["wrong_in_silence"]:
                settings = [
                    r["setting"]
                    for r in model["peers"][row["peer"]]
                    if r.get("verdict", {}).get("wrong_in_silence")
                ]
                found.append(
                    f"{model['name']}: {name} computes wrong gradients in silence at "
                    f"{', '.join(settings)}."
                )
            if row["not_monotone"]:
                found.append(
                    f"{model['name']}: {name} takes more memory at {row['not_monotone']} budgets "
                    "than at a larger one."
                )
            if row["peer"] != "ours" and (row["cheaper_than_ours"] or row["unreached_by_ours"]):
                found.append(
                    f"{model['name']}: {name} is AHEAD of ours: it recomputes less at "
                    f"{row['cheaper_than_ours']}, and reaches a peak that ours does not at "
                    f"{row['unreached_by_ours']} of {row['compared']} points."
                )
    return found


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / _MIB:.1f}"


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# -- picture ----------------------------------------------------------------------------------


def draw(models: list[Data], *, width: int = 300, height: int = 220) -> str:
    """Draw measured peak against what is recomputed, one panel for each model, as SVG."""
    import altair as alt
    import vl_convert

    points: list[dict[str, Any]] = []
    for model in models:
        for peer, rows in model["peers"].items():
            points += [
                {
                    "model": model["name"],
                    "peer": _WRONG if _is_wrong(row) else NAMES[peer].partition(",")[0],
                    "peak": (row.get("measured_bytes") or row["predicted_bytes"]) / _MIB,
                    "share": row["fraction"] * 100,
                }
                for row in rows
                if row.get("fraction") is not None
            ]
    names = list(_COLOURS)
    panels = []
    for model in models:
        mine = [p for p in points if p["model"] == model["name"]]
        if mine:
            panels.append(_panel(alt, model["name"], mine, names, width, height))
    chart = (
        alt.concat(*panels, columns=2)
        # Room beside the legend, whose width is computed in another font than browsers may have.
        .properties(
            background="#ffffff", padding={"left": 12, "top": 12, "right": 40, "bottom": 12}
        )
        .configure_axis(gridColor="#e8e8e8", domainColor="#888888", labelFontSize=11)
        .configure_view(stroke=None)
    )
    return str(vl_convert.vegalite_to_svg(chart.to_json())) + "\n"


def _panel(
    alt: Any, title: str, points: list[dict[str, Any]], names: list[str], width: int, height: int
) -> Any:
    x = alt.X("peak:Q", title="Measured peak, MiB", scale=alt.Scale(zero=False, nice=True))
    y = alt.Y("share:Q", title="Forward pass computed twice, %")
    colour = alt.Color(
        "peer:N", title=None, scale=alt.Scale(domain=names, range=list(_COLOURS.values()))
    )
    scale = alt.Scale(domain=names, range=list(_SHAPES))
    shape = alt.Shape("peer:N", title=None, scale=scale)
    base = alt.Chart(alt.InlineData(values=points))
    marks = base.mark_point(filled=True, size=50, opacity=0.85).encode(
        x=x, y=y, color=colour, shape=shape
    )
    return marks.properties(title=title, width=width, height=height)


def _is_wrong(row: Data) -> bool:
    return bool(row.get("verdict", {}).get("wrong_in_silence"))
