"""Evidence on every trained variant, drawn from its predictions; what cannot be drawn is a gap."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from remat.errors import MissingPackageError, WorkloadError
from remat.evaluation.calibration import calibrate, is_temperature_at_an_end
from remat.evaluation.coverage import LEVELS, cover
from remat.evaluation.finding import LEAST_SUPPORT, find_slices
from remat.evaluation.metadata import Column, Metadata, training_features
from remat.evaluation.predictions import Predictions, Task
from remat.evaluation.representation import representation
from remat.evaluation.slices import FoundSlice, slice_quality
from remat.runs.evidence import (
    CalibrationEvidence,
    Coverage,
    Gap,
    Representation,
    SliceQuality,
)
from remat.runs.records import Variant, VariantStatus
from remat.workload import Workload

# Labels are a feature of their own where they are few: a class may be the slice that is bad.
_MOST_CLASSES = 50
_LABEL = "label"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the predictions of one trained model show."""

    calibration: CalibrationEvidence | None = None
    coverage: tuple[Coverage, ...] = ()
    slices: tuple[SliceQuality, ...] = ()
    gaps: tuple[Gap, ...] = ()


def with_evidence(
    variants: Sequence[Variant],
    predictions: Mapping[str, Predictions],
    metadata: Metadata,
    *,
    seed: int,
) -> tuple[tuple[Variant, ...], tuple[Gap, ...]]:
    """Return the variants with what their predictions show, and the gaps.

    Slices that were found on any variant are measured on all of them, so that they can be read
    side by side. Predictions that are equal bit for bit are evaluated once.
    """
    digests = {label: _digest(one) for label, one in predictions.items()}
    distinct = {digests[label]: one for label, one in predictions.items()}
    found, search_gaps = _found(list(distinct.values()), metadata, seed)
    by_digest = {
        digest: evidence_of(one, metadata, found, seed=seed) for digest, one in distinct.items()
    }
    changed: list[Variant] = []
    gaps = list(search_gaps)
    for variant in variants:
        evidence = by_digest.get(digests.get(variant.label, ""))
        if evidence is None:
            changed.append(variant)
            gaps += _without_predictions(variant)
            continue
        changed.append(
            variant.model_copy(
                update={
                    "calibration": evidence.calibration,
                    "coverage": evidence.coverage,
                    "slices": evidence.slices,
                }
            )
        )
        gaps += [gap.model_copy(update={"variant": variant.label}) for gap in evidence.gaps]
    return tuple(changed), tuple(gaps)


def evidence_of(
    predictions: Predictions,
    metadata: Metadata,
    found: Sequence[FoundSlice] = (),
    *,
    seed: int = 0,
) -> Evidence:
    """Draw calibration or coverage, and slices, from the predictions of one model."""
    reason = _unusable(predictions)
    if reason:
        return Evidence(gaps=tuple(_gap(part, reason) for part in _parts(predictions)))
    gaps: list[Gap] = []
    calibrated: CalibrationEvidence | None = None
    covered: tuple[Coverage, ...] = ()
    if predictions.task is Task.VALUES:
        covered = cover(predictions, seed=seed)
        gaps += _coverage_gaps(covered, predictions)
    else:
        calibrated = calibrate(predictions, seed=seed)
        gaps += _calibration_gaps(calibrated, predictions)
    named, slice_gaps = _named_masks(predictions, metadata)
    slices = slice_quality(predictions, named, found)
    gaps += slice_gaps
    gaps += [
        _gap("slices", f"the slice {one.name!r} holds no example of the evaluation data")
        for one in slices
        if one.num_examples == 0
    ]
    return Evidence(calibration=calibrated, coverage=covered, slices=slices, gaps=tuple(gaps))


def represent(
    workload: Workload, metadata: Metadata, *, seed: int
) -> tuple[tuple[Representation, ...], tuple[Gap, ...]]:
    """Compare the evaluation data with the population or the training data, or say why not."""
    if not metadata.features:
        reason = "the workload names no features of its examples to compare by (features=...)"
        return (), (_gap("representation", reason),)
    gaps: tuple[Gap, ...] = ()
    training: Mapping[str, Column] = {}
    if set(metadata.features) - set(workload.population):
        try:
            training = training_features(workload, seed=seed)
        except WorkloadError as error:
            gaps = (_gap("representation", f"the training data have no features: {error}"),)
    return representation(metadata.features, training, workload.population), gaps


def _parts(predictions: Predictions) -> tuple[str, str, str]:
    is_values = predictions.task is Task.VALUES
    return ("quality", "coverage" if is_values else "calibration", "slices")


def _unusable(predictions: Predictions) -> str:
    """Say why nothing can be drawn from the predictions; empty where it can."""
    if predictions.num_invalid:
        total = predictions.num_invalid + len(predictions.target)
        return (
            f"{predictions.num_invalid:,} of {total:,} predictions after training are NaN, "
            "infinite or no probabilities"
        )
    if len(predictions.target) == 0:
        return "no label of the evaluation data counts"
    return ""


def _calibration_gaps(found: CalibrationEvidence, predictions: Predictions) -> list[Gap]:
    gaps = []
    if found.temperature is None:
        why = (
            "too many probabilities to keep"
            if predictions.probabilities is None
            else f"{predictions.num_examples} examples are too few for two halves"
        )
        gaps.append(_gap("calibration", f"no temperature was fitted: {why}"))
    elif is_temperature_at_an_end(found.temperature):
        gaps.append(
            _gap("calibration", "no temperature is best: the fit ended at the limit of its range")
        )
    classes = np.unique(predictions.target)
    if len(classes) == 1:
        gaps.append(
            _gap(
                "quality",
                f"only class {classes[0]:.0f} occurs in the evaluation data: accuracy and "
                "calibration tell nothing of the others, and there is no AUROC",
            )
        )
    return gaps


def _coverage_gaps(found: Sequence[Coverage], predictions: Predictions) -> list[Gap]:
    missing = sorted(set(LEVELS) - {one.nominal for one in found})
    if not missing:
        return []
    levels = ", ".join(f"{level:.0%}" for level in missing)
    return [
        _gap(
            "coverage", f"{predictions.num_examples} examples are too few for intervals of {levels}"
        )
    ]


def _named_masks(
    predictions: Predictions, metadata: Metadata
) -> tuple[dict[str, np.ndarray], list[Gap]]:
    if not metadata.slices:
        return {}, []
    if metadata.num_examples != predictions.num_examples:
        reason = (
            f"predictions are for {predictions.num_examples:,} examples and slices for "
            f"{metadata.num_examples:,}: the evaluation data differ from pass to pass"
        )
        return {}, [_gap("slices", reason)]
    return dict(metadata.slices), []


def _found(
    predictions: Sequence[Predictions], metadata: Metadata, seed: int
) -> tuple[tuple[FoundSlice, ...], tuple[Gap, ...]]:
    """Search slices on each of the distinct predictions, or say why not."""
    usable = [one for one in predictions if not _unusable(one)]
    if usable and metadata.features and metadata.num_examples < 4 * LEAST_SUPPORT:
        reason = f"{metadata.num_examples} evaluation examples are too few to find slices in"
        return (), (_gap("slices", reason),)
    found: dict[str, FoundSlice] = {}
    try:
        for one in usable:
            features = _features(one, metadata)
            found |= {proposed.name: proposed for proposed in find_slices(one, features, seed=seed)}
    except MissingPackageError as error:  # without features of its own, a workload may do without
        return (), (_gap("slices", str(error)),)
    return tuple(found.values()), ()


def _features(predictions: Predictions, metadata: Metadata) -> dict[str, Column]:
    """Columns to search for slices: those of the workload, and the label of classification."""
    if metadata.features and metadata.num_examples != predictions.num_examples:
        return {}
    columns = dict(metadata.features)
    is_label = predictions.task is Task.CLASSES and predictions.has_one_row_each
    if not is_label or predictions.num_classes > _MOST_CLASSES:
        return columns
    label = predictions.target.astype(np.int64)
    if not any(np.array_equal(column, label) for column in columns.values()):
        columns.setdefault(_LABEL, label)
    return columns


def _without_predictions(variant: Variant) -> list[Gap]:
    if variant.status is not VariantStatus.FINISHED:
        return []
    reason = (
        "the workload has no predict or no eval_data"
        if not variant.quality or set(variant.quality[-1].metrics) == {"loss"}
        else "its predictions are not at hand any more"
    )
    return [_gap(part, reason, variant.label) for part in ("calibration", "slices")]


def _digest(predictions: Predictions) -> str:
    digest = hashlib.sha256(predictions.task.name.encode())
    for column in (predictions.example, predictions.predicted, predictions.target):
        digest.update(np.ascontiguousarray(column).tobytes())
    for column in (predictions.likelihood, predictions.confidence, predictions.square_sum):
        digest.update(np.ascontiguousarray(column).tobytes())
    digest.update(f"{predictions.num_examples}|{predictions.num_invalid}".encode())
    return digest.hexdigest()


def _gap(section: str, reason: str, variant: str | None = None) -> Gap:
    return Gap(section=section, variant=variant, reason=reason)
