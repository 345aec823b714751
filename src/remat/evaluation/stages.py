"""The stages of an evaluation: each takes the book and skips what it holds already."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from remat.errors import RematError
from remat.evaluation.book import Book
from remat.evaluation.checks import (
    Subject,
    check_variant,
    failed,
    planned_front,
)
from remat.evaluation.contenders import Contender
from remat.evaluation.data import (
    model_device,
    num_training_batches,
)
from remat.evaluation.equivalence import equivalences
from remat.evaluation.evidence import represent, with_evidence
from remat.evaluation.identity import same_bits
from remat.evaluation.keeping import (
    keep_predictions,
    kept_predictions,
    objects_for,
    put_weights,
)
from remat.evaluation.metadata import Metadata
from remat.evaluation.predictions import Predictions
from remat.evaluation.reaching import Aim, make_aim
from remat.evaluation.repeats import compared, repeat
from remat.evaluation.resuming import is_repeated
from remat.evaluation.seeds import seeded
from remat.evaluation.service import keep_served
from remat.evaluation.timing import Prepare, time_in_turn
from remat.evaluation.training import optimizer_of, train, train_step, under_plan
from remat.evaluation.yardstick import YARDSTICK, yardstick
from remat.planner.records import Plan
from remat.runs.evidence import Gap
from remat.runs.reading import reference_of
from remat.runs.records import (
    Artifact,
    Variant,
    VariantKind,
    VariantStatus,
)
from remat.trace.step import make_optimizer
from remat.workloads import call_model


def check_all(book: Book, subject: Subject, listed: Sequence[Contender]) -> None:
    """Plan, verify and measure every variant."""
    for done, contender in enumerate(listed):
        book.progress("plan, verify, measure", done, len(listed))
        if book.variant(contender.label).status is not VariantStatus.PENDING:
            continue  # finished before the run was interrupted
        book.note_variant(check_variant(subject, contender))
    book.progress("plan, verify, measure", len(listed), len(listed))


def time_all(book: Book, subject: Subject, rounds: int, warmup_rounds: int) -> None:
    """Time the variants on one model and one optimizer, so that all fit where one fits."""
    ready = [variant for variant in book.run.variants if variant.status is VariantStatus.MEASURED]
    if not ready:
        return
    with seeded(subject.seed):
        model = call_model(subject.workload)
        optimizer = make_optimizer(optimizer_of(subject.workload), model)
        assert optimizer is not None
        device = model_device(model)

        def step() -> None:
            train_step(model, subject.batch, subject.workload, optimizer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the loss is there before the optimizer is done

        def prepare(variant: Variant) -> Prepare:
            @contextlib.contextmanager
            def prepared() -> Iterator[Callable[[], None]]:
                with under_plan(model, _applied_plan(variant)):
                    yield step

            return prepared

        total = rounds + warmup_rounds
        book.progress("time steps in turn", 0, total)
        times = time_in_turn(
            {variant.label: prepare(variant) for variant in ready}
            | {YARDSTICK: lambda: yardstick(device)},
            rounds=rounds,
            warmup_rounds=warmup_rounds,
            on_round=lambda done: book.progress("time steps in turn", done, total),
        )
    timed = (
        variant.model_copy(update={"step_times": times.get(variant.label)})
        for variant in book.run.variants
    )
    book.note(variants=tuple(timed), yardstick=times[YARDSTICK])


def plan_front(book: Book, subject: Subject, num_points: int) -> None:
    """Plan the Pareto front, which is not run."""
    if num_points:
        book.progress("plan the Pareto front", 0, None)
        book.note(front=planned_front(subject, num_points, book.run.variants))


def train_all(
    book: Book, subject: Subject, listed: Sequence[Contender], max_steps: int | None
) -> dict[str, Predictions]:
    """Train every variant that is to be trained, and return what each predicts at the end."""
    total = _num_steps(book, subject, max_steps)
    predictions = kept_predictions(book.folder, book.run.variants)
    for contender in listed:
        variant = book.variant(contender.label)
        if contender.is_trained and variant.status is VariantStatus.MEASURED:
            trained, predicted = _trained(book, subject, variant, total, max_steps)
            if predicted is not None:
                keep_predictions(book.folder, trained, predicted)
            book.note_variant(_compared(trained, reference_of(book.run.variants)))
            if predicted is not None:
                predictions[variant.label] = predicted
    return predictions


def _num_steps(book: Book, subject: Subject, max_steps: int | None) -> int | None:
    """Count the steps of one training; `None` where only running it can tell."""
    per_epoch = num_training_batches(subject.workload)
    total = None if per_epoch is None else per_epoch * book.run.epochs
    if max_steps is not None:
        total = min(total or max_steps, max_steps)
    return total


def _aim(book: Book, subject: Subject) -> Aim | None:
    every = None if book.run.settings is None else book.run.settings.check_every
    return make_aim(book.run.targets, every, num_training_batches(subject.workload))


def repeat_all(
    book: Book,
    subject: Subject,
    listed: Sequence[Contender],
    max_steps: int | None,
    seeds: int,
) -> None:
    """Train every finished variant from the further seeds; one that fails is a gap."""
    total = _num_steps(book, subject, max_steps)
    for seed in range(book.run.seed + 1, book.run.seed + seeds):
        for contender in listed:
            variant = book.variant(contender.label)
            if variant.status is not VariantStatus.FINISHED or is_repeated(book.run, variant, seed):
                continue
            try:
                repeated = repeat(
                    subject.workload,
                    _applied_plan(variant),
                    seed=seed,
                    epochs=book.run.epochs,
                    max_steps=max_steps,
                    aim=_aim(book, subject),
                    on_step=book.counting(f"train: {variant.label}, seed {seed}", total),
                )
            except (RematError, torch.OutOfMemoryError) as error:
                reason = f"seed {seed}: {failed(variant, error).message}"
                gap = Gap(section="repeats", variant=variant.label, reason=reason)
                book.note(gaps=(*book.run.gaps, gap))
                continue
            reference = reference_of(book.run.variants)
            if reference is not None and reference.label != variant.label:
                repeated = compared(repeated, reference.repeats)
            repeats = (*variant.repeats, repeated)
            book.note_variant(variant.model_copy(update={"repeats": repeats}))


def draw_evidence(
    book: Book,
    subject: Subject,
    metadata: Metadata,
    predictions: Mapping[str, Predictions],
    margin: float | None,
) -> None:
    """Draw calibration, slices, representation and equivalence from what training left."""
    book.progress("draw evidence", 0, None)
    variants, gaps = with_evidence(book.run.variants, predictions, metadata, seed=book.run.seed)
    groups, group_gaps = represent(subject.workload, metadata, seed=book.run.seed)
    book.note(
        variants=variants,
        representation=groups,
        equivalences=equivalences(variants, margin),
        gaps=tuple(dict.fromkeys((*book.run.gaps, *gaps, *group_gaps))),
    )


def _trained(
    book: Book, subject: Subject, variant: Variant, total: int | None, max_steps: int | None
) -> tuple[Variant, Predictions | None]:
    kept: list[Artifact] = []

    def on_trained(model: nn.Module) -> None:
        keep_served(book, variant.label, model)
        if book.run.settings is not None and book.run.settings.keeps_weights:
            kept.append(put_weights(model, objects_for(book.folder), variant.label))

    try:
        training = train(
            subject.workload,
            _applied_plan(variant),
            seed=book.run.seed,
            epochs=book.run.epochs,
            max_steps=max_steps,
            aim=_aim(book, subject),
            on_step=book.counting(f"train: {variant.label}", total),
            on_trained=on_trained,
        )
    except (RematError, torch.OutOfMemoryError) as error:
        if variant.kind is VariantKind.REFERENCE and isinstance(error, RematError):
            raise
        return failed(variant, error), None
    if training.batch_signatures != {book.run.batch_signature}:
        book.note(notes=tuple(dict.fromkeys((*book.run.notes, _MANY_SHAPES))))
    # not written before the variant is: see NOTE [ Collection ]
    book.run = book.run.model_copy(update={"artifacts": (*book.run.artifacts, *kept)})
    trained = variant.model_copy(
        update={
            "status": VariantStatus.FINISHED,
            "losses": training.losses,
            "quality": training.quality,
            "train_seconds": training.seconds,
            "seconds_to_target": None if training.reached is None else training.reached.seconds,
            "steps_to_target": None if training.reached is None else training.reached.steps,
            "weights_sha256": training.weights_sha256,
        }
    )
    return trained, training.predictions


_MANY_SHAPES = (
    "Training saw batches of several shapes; plans, peaks and step times are for the first batch."
)


def _compared(variant: Variant, reference: Variant | None) -> Variant:
    """Say whether the training gave what that without a plan gave, bit for bit."""
    if (
        reference is None
        or variant.label == reference.label
        or variant.status is not VariantStatus.FINISHED
        or reference.status is not VariantStatus.FINISHED
    ):
        return variant
    return variant.model_copy(
        update={
            "losses_identical": same_bits(variant.losses, reference.losses),
            "weights_identical": variant.weights_sha256 == reference.weights_sha256,
        }
    )


def _applied_plan(variant: Variant) -> Plan | None:
    """The plan to train under; the reference is the model as its author wrote it."""
    return None if variant.kind is VariantKind.REFERENCE else variant.plan
