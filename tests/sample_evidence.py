"""A made-up run with every kind of evidence, its figures chosen by hand."""

from __future__ import annotations

from remat.prove.records import Act, StepStory, StoryMoment
from remat.runs.evidence import (
    Calibration,
    CalibrationEvidence,
    Coverage,
    Equivalence,
    Expense,
    Gap,
    Interval,
    Latency,
    ReliabilityBin,
    Repeat,
    Representation,
    ServedForm,
    Serving,
    SliceOrigin,
    SliceQuality,
    UpdateStep,
)
from remat.runs.records import Run, Variant, VariantKind
from remat.units import MIB
from sample_runs import sample_run, sample_variant

BLOCKS = ("stem", "blocks.0", "blocks.1", "loss")


def sample_story(dropped: tuple[int, ...] = (1,), *, base_mib: int = 37) -> StepStory:
    """Tell a step of four blocks that hold 40 MiB each; those in `dropped` run forward again."""
    held = [0] * len(BLOCKS)
    moments: list[StoryMoment] = []

    def note(act: Act, block: int, extra_mib: int = 0) -> None:
        kinds = {"parameters": 12, "optimizer": 24, "batch": 1, "temporaries": extra_mib}
        kinds["activations"] = sum(held) + base_mib - 37
        moments.append(
            StoryMoment(
                act=act,
                block=block,
                bytes_by_kind={kind: size * MIB for kind, size in kinds.items()},
                held_bytes=tuple(size * MIB for size in held),
            )
        )

    for block in range(len(BLOCKS)):
        held[block] = 2 if block in dropped else 40
        note(Act.FORWARD, block)
    for block in reversed(range(len(BLOCKS))):
        if block in dropped:
            held[block] = 40
            note(Act.AGAIN, block)
        held[block] = 0
        note(Act.BACKWARD, block, extra_mib=8)
    note(Act.UPDATE, 0)
    return StepStory(blocks=BLOCKS, moments=tuple(moments))


def interval(value: float, half: float, method: str = "Wilson") -> Interval:
    """Make a symmetric interval."""
    return Interval(value=value, low=value - half, high=value + half, method=method)


def sample_calibration(shift: float = 0.08) -> CalibrationEvidence:
    """Make one that is overconfident by `shift` in every bin, and hardly so once corrected."""
    return CalibrationEvidence(
        before=_calibration(shift), after=_calibration(shift / 10), temperature=1.42,
        num_fitted=180,
    )  # fmt: skip


def _calibration(shift: float) -> Calibration:
    bins = []
    for place in range(10):
        middle = place / 10 + 0.05
        count = 0 if place < 2 else 4 * place
        bins.append(
            ReliabilityBin(
                low=place / 10,
                high=(place + 1) / 10,
                num_examples=count,
                confidence=middle if count else None,
                accuracy=max(0.0, middle - shift) if count else None,
            )
        )
    return Calibration(
        num_examples=180, expected_error=shift, maximum_error=shift * 1.5, brier=0.11, nll=0.31,
        bins=tuple(bins),
    )  # fmt: skip


def sample_slices(*, worse: float = 0.71) -> tuple[SliceQuality, ...]:
    """Make a named slice, one found to be worse, and an empty one."""
    return (
        SliceQuality(
            name="bright", origin=SliceOrigin.NAMED, metric="accuracy", num_examples=180,
            quality=interval(0.93, 0.03), rest=0.92, p_value=0.4, adjusted_p_value=0.8,
            is_worse=False,
        ),
        SliceQuality(
            name="ink < 0.2 and width > 5", origin=SliceOrigin.FOUND, metric="accuracy",
            num_examples=41, quality=interval(worse, 0.09), rest=0.94, p_value=0.0004,
            adjusted_p_value=0.0012, is_worse=True,
        ),
        SliceQuality(
            name="night", origin=SliceOrigin.NAMED, metric="accuracy", num_examples=0,
            quality=None, rest=0.93, is_worse=False,
        ),
    )  # fmt: skip


def rich_variant(label: str, kind: VariantKind, **changes: object) -> Variant:
    """Make a variant with repeats, calibration, slices and a story."""
    dropped = () if kind is VariantKind.REFERENCE else (1,)
    fields: dict[str, object] = {
        "story": sample_story(dropped),
        "repeats": tuple(
            Repeat(
                seed=seed,
                train_seconds=12.5,
                losses_identical=None if kind is VariantKind.REFERENCE else True,
                weights_identical=None if kind is VariantKind.REFERENCE else True,
                metrics={"accuracy": 0.93 + seed / 1000, "loss": 0.21},
            )
            for seed in (1, 2)
        ),
        "calibration": sample_calibration(),
        "slices": sample_slices(),
    }
    return sample_variant(label, kind, **fields | changes)


def sample_equivalence(variant: str = "plan 60%", **changes: object) -> Equivalence:
    """Make a test that shows equivalence on three pairs, none of which is equal in every bit."""
    fields: dict[str, object] = {
        "variant": variant, "metric": "accuracy", "num_pairs": 3, "num_identical": 0,
        "difference": interval(0.001, 0.004, "Student t"), "margin": 0.01,
        "margin_reason": "one point of accuracy", "p_value": 0.012, "is_equivalent": True,
    }  # fmt: skip
    return Equivalence.model_validate(fields | changes)


def sample_serving() -> Serving:
    """Make a service with three forms, one of which is not available."""
    forms = ("as trained", "int8")
    return Serving(
        variant="plan 60%",
        forms=(
            ServedForm(
                name="as trained", size_bytes=6 * MIB, first_request_seconds=0.03,
                peak_bytes=30 * MIB, metrics={"accuracy": 0.933},
            ),
            ServedForm(
                name="int8", size_bytes=2 * MIB, first_request_seconds=0.02, peak_bytes=20 * MIB,
                metrics={"accuracy": 0.931}, message="dynamic, linear layers",
            ),
            ServedForm(name="ONNX Runtime", is_available=False, message="onnxruntime is missing"),
        ),
        latencies=tuple(
            Latency(
                form=form, batch_size=size, num_requests=200,
                p50_seconds=cost * (1 + size / 4), p95_seconds=cost * (1.2 + size / 3.5),
                p99_seconds=cost * (1.4 + size / 3), examples_per_second=size / cost / 2,
            )
            for form, cost in zip(forms, (0.004, 0.0025), strict=True)
            for size in (1, 8, 32)
        ),
        target_p95_seconds=0.05,
        recommended_batch_size=32,
        recommended_form="int8",
        recommendation="Serve int8 in batches of 32: 25.9 ms at p95, within 50 ms.",
        updates=(
            UpdateStep(
                variant="plan 60%", step_seconds=0.134, requests_p50_seconds=0.006,
                requests_p99_seconds=0.14, steps_per_minute=90.0,
            ),
        ),
    )  # fmt: skip


def sample_expense(variant: str, device: str, *, fits: bool = True, **changes: object) -> Expense:
    """Make the price of ten hours on a device at two dollars."""
    fields: dict[str, object] = {
        "variant": variant, "device": device, "offer": "cloud", "fits": fits,
        "is_measured": False, "step_seconds": 0.12, "epoch_seconds": 3600.0,
        "run_seconds": 36000.0, "usd_per_hour": 2.0, "epoch_usd": 2.0, "run_usd": 20.0,
        "price_source": "sample list", "price_date": "2026-11-01", "kilowatt_hours": 3.5,
        "kilograms_co2": 1.4, "arithmetic": f"{variant} on {device}: 10 h x $2.00/h = $20.00",
    }  # fmt: skip
    return Expense.model_validate(fields | changes)


def rich_run(**changes: object) -> Run:
    """Make a run with all the evidence there is, and two gaps."""
    fields: dict[str, object] = {
        "equivalences": (sample_equivalence(), sample_equivalence(metric="loss", margin=0.02)),
        "representation": (
            Representation(
                feature="digit", group="7", reference_share=0.1, evaluated_share=0.04,
                num_evaluated=14, adjusted_p_value=0.01, is_off=True,
            ),
            Representation(
                feature="scanner", group="B", reference_share=0.2, evaluated_share=0.0,
                num_evaluated=0, is_missing=True,
            ),
        ),
        "serving": sample_serving(),
        "expenses": (
            sample_expense("no plan", "A100-80GB"),
            sample_expense("no plan", "L4", fits=False),
            sample_expense("plan 60%", "L4", run_usd=12.0, run_seconds=43200.0,
                           arithmetic="plan 60% on L4: 12 h x $1.00/h = $12.00"),
        ),
        "gaps": (
            Gap(section="serving", variant="plan 60%", reason="static int8 needs a data loader"),
            Gap(section="fairness", reason="no group was named"),
        ),
    }  # fmt: skip
    variants = (
        rich_variant("no plan", VariantKind.REFERENCE, peak_mib=197, ms=120),
        rich_variant("all blocks", VariantKind.POLICY, peak_mib=92, ms=157),
        rich_variant("plan 60%", VariantKind.PLANNED),
        sample_variant("plan 50%", peak_mib=99, ms=141, budget_bytes=100 * MIB,
                       coverage=(Coverage(nominal=0.9, covered=interval(0.88, 0.02),
                                          mean_width=1.3),)),
    )  # fmt: skip
    return sample_run(*variants, **fields | changes)
