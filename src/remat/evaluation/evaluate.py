"""Evaluate: train a workload under several plans with the same seeds, and record what it took."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from remat.calibrating.learning import learn
from remat.errors import WorkloadError
from remat.evaluation.arguments import check_counts, check_margin, checked_seed
from remat.evaluation.book import Book, ProgressFunction
from remat.evaluation.checks import (
    Subject,
    make_subject,
)
from remat.evaluation.contenders import Contender, contenders
from remat.evaluation.data import (
    describe_batch,
    model_device,
)
from remat.evaluation.environment import describe_environment
from remat.evaluation.keeping import drop_predictions, is_in_store, keep_files, objects_for
from remat.evaluation.placing import placed
from remat.evaluation.preflight import check_evaluation, require_packages
from remat.evaluation.pricing import ExpenseOptions
from remat.evaluation.resuming import make_origin, make_settings, resumed
from remat.evaluation.service import serve_and_price
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.stages import (
    check_all,
    draw_evidence,
    plan_front,
    repeat_all,
    time_all,
    train_all,
)
from remat.planner.policies import AbstractPolicy, AllBlocks, EveryNth
from remat.report.drawing import require_pictures
from remat.report.html import write_report
from remat.runs.records import (
    Run,
    RunStatus,
    Settings,
    Variant,
)
from remat.runs.store import (
    REPORT_FILE,
    claim_run_dir,
    find_run,
    held,
    load_run,
    new_run_dir,
)
from remat.workload import Workload

_SERVING, _EXPENSES = ServingOptions(), ExpenseOptions()


def evaluate(
    workload: Workload,
    *,
    budgets: Sequence[int | str] = ("80%", "60%"),
    policies: Sequence[AbstractPolicy] = (AllBlocks(),),
    peers: Sequence[AbstractPolicy] = (EveryNth(n=2),),
    front_points: int = 8,
    out: str | os.PathLike[str] | None = None,
    device: str | None = None,
    seed: int | None = None,
    seeds: int = 1,
    margin: float | None = None,
    targets: Mapping[str, float] | None = None,
    check_every: int | None = None,
    epochs: int | None = None,
    max_steps: int | None = None,
    timing_rounds: int = 7,
    warmup_rounds: int = 2,
    serving: ServingOptions | None = _SERVING,
    expenses: ExpenseOptions | None = _EXPENSES,
    page: bool = True,
    resume: str | os.PathLike[str] | None = None,
    keep_trained_weights: bool = False,
    command: str | None = None,
    progress: ProgressFunction | None = None,
) -> Run:
    """Train the workload without a plan, under fixed policies and under a plan for each budget.

    All variants start from the same weights, see the same batches and draw the same random numbers.
    First every variant is planned, verified and measured, then all are timed in turn, then each is
    trained, from each seed; last, evidence is drawn from what the trained models predict:
    calibration, slices, equivalence. What of it cannot be drawn is a gap of the run. `run.json` is
    written again after each of these, so that what was finished survives when the process is
    killed; `report.html` and `metrics.csv` lie beside it.

    Arguments
    ---------
    budgets: as for `remat.plan`; one that cannot be reached is recorded with the least peak.
    policies: fixed policies to train for comparison.
    peers: fixed policies to measure and time only.
    front_points: points of the planned Pareto front in the picture; 0 leaves it out.
    out: folder of this run; default a new one in the run store.
    device: where to train, as torch names it (`cpu`, `cuda`, `cuda:1`): the model is built as
        before, and moved; default where the workload builds it.
    seed, epochs, targets: default those of the workload.
    seeds: how many trainings of each variant, from `seed` on; from two on, variants that differ
        from the one without a plan are tested for equivalence.
    margin: difference of the metric up to which variants count as equivalent; default one point of
        a share such as accuracy, 1% of anything else.
    check_every: steps between two looks at whether the targets are reached, until they are; default
        a tenth of an epoch, or an epoch whose length is not known. The clock rests meanwhile.
    max_steps: end each training after so many steps.
    timing_rounds, warmup_rounds: steps of each variant that are timed, and that run before.
    serving: how the trained model is served and timed at the end; `None` leaves it out.
    expenses: on which devices and by which prices the run is costed, a few common ones unless
        given; `None` leaves it out.
    page: write `report.html`.
    resume: folder or id of a run that was interrupted, to go on with what it did not finish. Same
        workload, settings, versions and machine; its losses are then those of an unbroken run.
    keep_trained_weights: keep the final weights of every trained variant, in safetensors.
    command: what to record as the command; default that of the process.
    progress: called with stage, done and total.

    Raises
    ------
    WorkloadError: if the workload cannot be trained, or not be evaluated, as it is.
    DeviceError: before anything runs, if a price table is broken, or a device is not known or not
        here.
    RunError: if `out` already holds a run, another process writes it, or the run to resume was
        begun with other settings.
    MissingPackageError: before anything runs, if a package for metrics or pictures is missing.
    """
    check_counts(
        front_points=(front_points, 0),
        seeds=(seeds, 1),
        epochs=(epochs, 1),
        max_steps=(max_steps, 1),
        check_every=(check_every, 1),
        timing_rounds=(timing_rounds, 1),
        warmup_rounds=(warmup_rounds, 0),
    )
    check_margin(margin)
    workload = placed(workload, device)
    seed = checked_seed(workload.seed if seed is None else seed, seeds)
    pricing = None if expenses is None else expenses.load()
    listed = contenders(budgets, policies, peers)
    if page:
        require_pictures()
    require_packages(workload, seeds)
    targets = workload.targets if targets is None else targets
    progress = progress or (lambda _stage, _done, _total: None)
    settings = make_settings(
        listed,
        policies,
        peers,
        front_points=front_points,
        max_steps=max_steps,
        timing_rounds=timing_rounds,
        warmup_rounds=warmup_rounds,
        keeps_weights=keep_trained_weights,
        seeds=seeds,
        margin=margin,
        check_every=check_every,
        serving=serving,
        expenses=expenses,
        device=device,
    )
    folder = _folder(workload, out, resume)
    with held(folder), _dropped_if_empty(folder):
        progress("trace one step", 0, None)
        subject = make_subject(workload, seed=seed)
        metadata = check_evaluation(subject, targets)
        begun = _begun(subject, folder, listed, epochs, command, targets, settings)
        run = begun if resume is None else resumed(load_run(folder), begun)
        book = Book(folder, run, progress)
        book.serves = serving is not None
        check_all(book, subject, listed)
        book.once("time", lambda: time_all(book, subject, timing_rounds, warmup_rounds))
        book.once("front", lambda: plan_front(book, subject, front_points))
        predictions = train_all(book, subject, listed, max_steps)
        repeat_all(book, subject, listed, max_steps, seeds)
        book.once("evidence", lambda: draw_evidence(book, subject, metadata, predictions, margin))
        drop_predictions(folder)
        serve_and_price(book, subject, serving, pricing)
        if book.run.status is not RunStatus.COMPLETE:
            book.note(status=RunStatus.COMPLETE)
        if page and not (folder / REPORT_FILE).exists():
            progress("draw the page", 0, None)
            write_report(book.run, folder / REPORT_FILE)
        book.once("keep", lambda: _keep(book))
    return book.run


def _keep(book: Book) -> None:
    """Learn from the finished run, and keep its files by content where it lies in the store."""
    learn(book.run)
    if is_in_store(book.folder):
        book.note(artifacts=keep_files(book.run, book.folder, objects_for(book.folder)))


def _folder(
    workload: Workload,
    out: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
) -> Path:
    """Folder of a new run, or of the one to go on with."""
    if resume is None:
        return new_run_dir(workload.name) if out is None else claim_run_dir(out)
    if out is not None:
        raise WorkloadError("give out= for a new run, or resume= to go on with one; not both.")
    return find_run(resume)


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
    targets: Mapping[str, float],
    settings: Settings,
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
        targets={name: float(value) for name, value in targets.items()},
        passed=False,
        summary="",
        settings=settings,
        origin=make_origin(subject.model, subject.batch),
    )
