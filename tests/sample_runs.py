"""Made-up runs with known figures, for tests of what reads a run."""

from __future__ import annotations

import math

from remat.planner.records import Fingerprint, Outcome, Plan, Region
from remat.prove.records import MemorySample, Verification
from remat.runs.judge import judged
from remat.runs.records import (
    Environment,
    EpochQuality,
    FrontPoint,
    Run,
    RunStatus,
    StepTimes,
    Variant,
    VariantKind,
    VariantStatus,
)
from remat.units import MIB

_FIXED = {"parameters": 12, "optimizer": 24, "batch": 1}


def sample_plan(peak_mib: int = 118, num_regions: int = 5) -> Plan:
    """Make a plan for no model in particular."""
    return Plan(
        fingerprint=Fingerprint(
            model_class="sample.Model",
            parameters=(),
            buffers=(),
            batch=(),
            device_type="cpu",
            training=True,
            loss="loss",
            optimizer="AdamW",
            torch_version="2.13.0",
            remat_version="0.1.0",
        ),
        budget_bytes=120 * MIB,
        predicted_peak_bytes=peak_mib * MIB,
        keep_all_peak_bytes=197 * MIB,
        forward_seconds=0.04,
        step_seconds=0.12,
        recompute_seconds=0.01,
        recompute_fraction=0.25,
        lower_bound_fraction=0.1,
        gap=0.15,
        device="cpu",
        cost_source="roofline of device 'cpu', not calibrated",
        outcome=Outcome.OPTIMAL,
        regions=tuple(
            Region(
                module=f"blocks.{i}.mlp",
                freed_bytes=16 * MIB,
                recompute_seconds=0.002,
                draws_random_numbers=True,
                reason="recomputed: frees 16.0 MiB at the peak, costs 2.0 ms",
            )
            for i in range(num_regions)
        ),
        breakdown={"parameters": 12 * MIB, "activations": 80 * MIB},
    )


def sample_variant(
    label: str = "plan 60%",
    kind: VariantKind = VariantKind.PLANNED,
    *,
    peak_mib: float = 118,
    ms: float = 134,
    **changes: object,
) -> Variant:
    """Make a variant that passed; `changes` replace its fields."""
    is_planned = kind is VariantKind.PLANNED
    is_reference = kind is VariantKind.REFERENCE
    peak = int(peak_mib * MIB)
    steps = (0.98, 1.03, 1.0, 0.99, 1.01)
    fields: dict[str, object] = {
        "status": VariantStatus.FINISHED,
        "asked_budget": label.removeprefix("plan ") if is_planned else None,
        "budget_bytes": 120 * MIB if is_planned else None,
        "plan": sample_plan(int(peak_mib)),
        "predicted_peak_bytes": int(peak_mib * 1.0004 * MIB),
        "measured_peak_bytes": peak,
        "verification": None if is_reference else _verification(peak),
        "step_times": StepTimes(
            seconds=tuple(ms / 1e3 * factor for factor in steps),
            median_seconds=ms / 1e3,
            iqr_seconds=ms / 1e3 * 0.02,
            warmup_rounds=2,
        ),
        "timeline": _timeline(peak_mib),
        "losses": tuple(2.3 * math.exp(-step / 20) + 0.2 for step in range(60)),
        "quality": (
            EpochQuality(epoch=0, num_examples=360, metrics={"loss": 0.8, "accuracy": 0.871}),
        ),
        "train_seconds": 12.0,
        "weights_sha256": "ab" * 32,
        "losses_identical": None if is_reference else True,
        "weights_identical": None if is_reference else True,
    }
    return Variant.model_validate({"label": label, "kind": kind} | fields | changes)


def sample_run(*variants: Variant, **changes: object) -> Run:
    """Make a complete run of these variants, by default one of each kind and an infeasible one."""
    fields: dict[str, object] = {
        "id": "20261105-143210-digits-vit-3fa2c1",
        "name": "digits-vit",
        "created": "2026-11-05T14:32:10+00:00",
        "status": RunStatus.COMPLETE,
        "seed": 0,
        "epochs": 1,
        "batch_size": 256,
        "batch_signature": ("float32[256, 1, 8, 8]", "int64[256]"),
        "num_parameters": 1_600_000,
        "environment": Environment(
            command="remat demo",
            machine="Linux x86_64",
            processor="Sample CPU",
            num_threads=2,
            memory_bytes=8 * 1024 * MIB,
            device="cpu",
            python="3.11.7",
            versions={"remat": "0.1.0", "torch": "2.13.0"},
            git_commit="0" * 40,
            git_dirty=False,
        ),
        "variants": variants
        or (
            sample_variant("no plan", VariantKind.REFERENCE, peak_mib=197, ms=120),
            sample_variant("all blocks", VariantKind.POLICY, peak_mib=92, ms=157),
            sample_variant("plan 80%", peak_mib=157, ms=123, budget_bytes=158 * MIB),
            sample_variant("plan 60%"),
            sample_variant("every 2nd block", VariantKind.POLICY, peak_mib=150, ms=138, losses=()),
            Variant(
                label="plan 10%",
                kind=VariantKind.PLANNED,
                status=VariantStatus.INFEASIBLE,
                asked_budget="10%",
                budget_bytes=20 * MIB,
                minimum_bytes=71 * MIB,
            ),
        ),
        "front": tuple(
            FrontPoint(
                peak_bytes=mib * MIB,
                step_seconds=0.120 + 0.035 * ((197 - mib) / 125) ** 1.5,
                recompute_fraction=0.1,
            )
            for mib in (72, 88, 105, 125, 145, 165, 197)
        ),
        "passed": False,
        "summary": "",
    }
    return judged(Run.model_validate(fields | changes))


def _verification(peak: int) -> Verification:
    return Verification(
        identical=True,
        within_noise=True,
        passed=True,
        differences=(),
        num_compared=100,
        measured_peak_bytes=peak,
        predicted_peak_bytes=peak,
        budget_bytes=peak,
        peak_error=0.0,
        within_budget=True,
    )


def _timeline(peak_mib: float) -> tuple[MemorySample, ...]:
    top = peak_mib - sum(_FIXED.values()) - 12
    moments = [("forward", i / 40, 0.0) for i in range(1, 41)]
    moments += [("backward", 1 - i / 60, i / 60) for i in range(1, 61)]
    moments += [("optimizer", 0.0, 1.0) for _ in range(12)]
    return tuple(
        MemorySample(
            phase=phase,
            bytes_by_kind={kind: size * MIB for kind, size in _FIXED.items()}
            | {
                "activations": int(top * kept * MIB),
                "gradients": int(12 * back * MIB),
                "temporaries": (3 + 5 * (i % 3)) * MIB,
            },
        )
        for i, (phase, kept, back) in enumerate(moments)
    )
