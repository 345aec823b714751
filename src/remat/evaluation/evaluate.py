"""Evaluate: train a workload under several plans with the same seeds, and record what it took."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from remat.errors import RematError, WorkloadError
from remat.evaluation.checks import (
    Subject,
    check_variant,
    failed,
    make_subject,
    planned_front,
)
from remat.evaluation.contenders import Contender, contenders
from remat.evaluation.data import (
    describe_batch,
    model_device,
    num_training_batches,
)
from remat.evaluation.environment import describe_environment
from remat.evaluation.identity import same_bits
from remat.evaluation.quality import require_metrics
from remat.evaluation.seeds import seeded
from remat.evaluation.timing import Prepare, time_in_turn
from remat.evaluation.training import optimizer_of, train, train_step, under_plan
from remat.files import write_atomically
from remat.planner.policies import AbstractPolicy, AllBlocks, EveryNth
from remat.planner.records import Plan
from remat.report.drawing import require_pictures
from remat.report.html import write_report
from remat.runs.judge import judged
from remat.runs.reading import reference_of
from remat.runs.records import Run, RunStatus, Variant, VariantKind, VariantStatus
from remat.runs.series import metrics_csv
from remat.runs.store import METRICS_FILE, REPORT_FILE, RUN_FILE, claim_run_dir, new_run_dir
from remat.trace.step import make_optimizer
from remat.workload import Workload
from remat.workloads import call_model

# Called with the stage, how much of it is done, and how much it has in all (None: not known).
ProgressFunction = Callable[[str, int, int | None], None]


def evaluate(
    workload: Workload,
    *,
    budgets: Sequence[int | str] = ("80%", "60%"),
    policies: Sequence[AbstractPolicy] = (AllBlocks(),),
    peers: Sequence[AbstractPolicy] = (EveryNth(n=2),),
    front_points: int = 8,
    out: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    timing_rounds: int = 7,
    warmup_rounds: int = 2,
    page: bool = True,
    command: str | None = None,
    progress: ProgressFunction | None = None,
) -> Run:
    """Train the workload without a plan, under fixed policies and under a plan for each budget.

    All variants start from the same weights, see the same batches and draw the same random numbers.
    First every variant is planned, verified and measured, then all are timed in turn, then each is
    trained. `run.json` is written again after each of these, so that what was finished survives
    when the process is killed; `report.html` and `metrics.csv` lie beside it.

    Arguments
    ---------
    budgets: as for `remat.plan`; one that cannot be reached is recorded with the least peak.
    policies: fixed policies to train for comparison.
    peers: fixed policies to measure and time only.
    front_points: points of the planned Pareto front in the picture; 0 leaves it out.
    out: folder of this run; default a new one in the run store.
    seed, epochs: default those of the workload.
    max_steps: end each training after so many steps.
    timing_rounds, warmup_rounds: steps of each variant that are timed, and that run before.
    page: write `report.html`.
    command: what to record as the command; default that of the process.
    progress: called with stage, done and total.

    Raises
    ------
    WorkloadError: if the workload cannot be trained as it is.
    RunError: if `out` already holds a run.
    MissingPackageError: before anything runs, if a package for metrics or pictures is missing.
    """
    _check_counts(front_points, epochs, max_steps, timing_rounds, warmup_rounds)
    seed = _checked_seed(workload.seed if seed is None else seed)
    listed = contenders(budgets, policies, peers)
    if page:
        require_pictures()
    if workload.predict is not None and workload.eval_data is not None:
        require_metrics()
    progress = progress or (lambda _stage, _done, _total: None)
    folder = new_run_dir(workload.name) if out is None else claim_run_dir(out)
    with _dropped_if_empty(folder):
        progress("trace one step", 0, None)
        subject = make_subject(workload, seed=seed)
        book = _Book(folder, _begun(subject, folder, listed, epochs, command), progress)
        _check_all(book, subject, listed)
        _time_all(book, subject, rounds=timing_rounds, warmup_rounds=warmup_rounds)
        _plan_front(book, subject, front_points)
        _train_all(book, subject, listed, max_steps)
        book.note(status=RunStatus.COMPLETE)
        if page:
            progress("draw the page", 0, None)
            write_report(book.run, folder / REPORT_FILE)
    return book.run


@contextlib.contextmanager
def _dropped_if_empty(folder: Path) -> Iterator[None]:
    """Leave no empty folder behind where the workload turned out not to run at all."""
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _begun(
    subject: Subject,
    folder: Path,
    listed: Sequence[Contender],
    epochs: int | None,
    command: str | None,
) -> Run:
    workload = subject.workload
    return Run(
        id=folder.resolve().name,
        name=workload.name,
        created=dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        status=RunStatus.UNFINISHED,
        seed=subject.seed,
        epochs=workload.epochs if epochs is None else epochs,
        batch_size=workload.batch_size,
        batch_signature=describe_batch(subject.batch),
        num_parameters=sum(parameter.numel() for parameter in subject.model.parameters()),
        environment=describe_environment(model_device(subject.model), command),
        variants=tuple(
            Variant(label=one.label, kind=one.kind, asked_budget=one.asked_budget) for one in listed
        ),
        passed=False,
        summary="",
    )


class _Book:
    """The run as far as it has come, on disk after every change."""

    def __init__(self, folder: Path, run: Run, progress: ProgressFunction) -> None:
        self.folder = folder
        self.run = run
        self.progress = progress

    def note(self, **changes: object) -> None:
        """Change fields of the run, draw the verdicts again, and write it."""
        self.run = judged(self.run.model_copy(update=changes))
        self.run.save(self.folder / RUN_FILE)
        write_atomically(self.folder / METRICS_FILE, metrics_csv(self.run))

    def note_variant(self, variant: Variant) -> None:
        """Replace the variant of that label."""
        self.note(
            variants=tuple(
                variant if old.label == variant.label else old for old in self.run.variants
            )
        )

    def variant(self, label: str) -> Variant:
        """Return the variant of that label."""
        return next(variant for variant in self.run.variants if variant.label == label)


def _check_all(book: _Book, subject: Subject, listed: Sequence[Contender]) -> None:
    for done, contender in enumerate(listed):
        book.progress("plan, verify, measure", done, len(listed))
        book.note_variant(check_variant(subject, contender))
    book.progress("plan, verify, measure", len(listed), len(listed))


def _time_all(book: _Book, subject: Subject, *, rounds: int, warmup_rounds: int) -> None:
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
            {variant.label: prepare(variant) for variant in ready},
            rounds=rounds,
            warmup_rounds=warmup_rounds,
            on_round=lambda done: book.progress("time steps in turn", done, total),
        )
    timed = (
        variant.model_copy(update={"step_times": times.get(variant.label)})
        for variant in book.run.variants
    )
    book.note(variants=tuple(timed))


def _plan_front(book: _Book, subject: Subject, num_points: int) -> None:
    if num_points:
        book.progress("plan the Pareto front", 0, None)
        book.note(front=planned_front(subject, num_points, book.run.variants))


def _train_all(
    book: _Book, subject: Subject, listed: Sequence[Contender], max_steps: int | None
) -> None:
    per_epoch = num_training_batches(subject.workload)
    total = None if per_epoch is None else per_epoch * book.run.epochs
    if max_steps is not None:
        total = min(total or max_steps, max_steps)
    for contender in listed:
        variant = book.variant(contender.label)
        if contender.is_trained and variant.status is VariantStatus.MEASURED:
            trained = _trained(book, subject, variant, total, max_steps)
            book.note_variant(_compared(trained, reference_of(book.run.variants)))


def _trained(
    book: _Book, subject: Subject, variant: Variant, total: int | None, max_steps: int | None
) -> Variant:
    stage = f"train: {variant.label}"
    book.progress(stage, 0, total)
    try:
        training = train(
            subject.workload,
            _applied_plan(variant),
            seed=book.run.seed,
            epochs=book.run.epochs,
            max_steps=max_steps,
            on_step=lambda done: book.progress(stage, done, total),
        )
    except (RematError, torch.OutOfMemoryError) as error:
        if variant.kind is VariantKind.REFERENCE and isinstance(error, RematError):
            raise
        return failed(variant, error)
    if training.batch_signatures != {book.run.batch_signature}:
        book.note(notes=tuple(dict.fromkeys((*book.run.notes, _MANY_SHAPES))))
    return variant.model_copy(
        update={
            "status": VariantStatus.FINISHED,
            "losses": training.losses,
            "quality": training.quality,
            "train_seconds": training.seconds,
            "weights_sha256": training.weights_sha256,
        }
    )


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


def _check_counts(
    front_points: int,
    epochs: int | None,
    max_steps: int | None,
    timing_rounds: int,
    warmup_rounds: int,
) -> None:
    for label, value, least in (
        ("front_points", front_points, 0),
        ("epochs", 1 if epochs is None else epochs, 1),
        ("max_steps", 1 if max_steps is None else max_steps, 1),
        ("timing_rounds", timing_rounds, 1),
        ("warmup_rounds", warmup_rounds, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise WorkloadError(f"{label} must be an integer >= {least}, got {value!r}.")


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise WorkloadError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}.")
    return seed
