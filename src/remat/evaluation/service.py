"""The last stage of an evaluation: how the trained model serves, and what training it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from remat.errors import RematError
from remat.evaluation.book import Book
from remat.evaluation.checks import Subject
from remat.evaluation.expense import price_sources
from remat.evaluation.pricing import Pricing, price_run
from remat.evaluation.seeds import seeded
from remat.evaluation.serving.found import SECTION, first_line
from remat.evaluation.serving.measure import STEPS, serve_model
from remat.evaluation.serving.options import ServingOptions
from remat.evaluation.weights import (
    drop_weights,
    load_weights,
    save_weights,
    served_variant,
)
from remat.planner.records import Plan
from remat.runs.evidence import Gap, Serving
from remat.runs.records import Variant, VariantKind, VariantStatus
from remat.workloads import call_model

_STAGE = "serve and price"
# Names of the stages in the run's book.
SERVING, EXPENSE = "serving", "expense"


def keep_served(book: Book, label: str, model: nn.Module) -> None:
    """Keep the weights of a variant's trained model until it is served, if it is the one to be."""
    served = served_variant(book.run.variants)
    if book.serves and served is not None and served.label == label:
        save_weights(model, book.folder)


def serve_and_price(
    book: Book,
    subject: Subject,
    serving: ServingOptions | None,
    pricing: Pricing | None,
) -> None:
    """Fill the run's serving and expenses, where they are wanted and not done yet.

    The run is as good without them: what cannot be measured becomes a gap of the run. The weights
    that were kept to be served are dropped.
    """
    left = [name for name, options in ((SERVING, serving), (EXPENSE, pricing)) if options]
    left = [name for name in left if name not in book.run.finished_stages]
    total = len(STEPS) * (SERVING in left) + (EXPENSE in left)

    def progress(step: str) -> None:
        book.progress(_STAGE, STEPS.index(step), total)

    def serve() -> None:
        if serving is not None:
            found, gaps = _serve(book, subject, serving, progress)
            book.note(serving=found, gaps=_with(book.run.gaps, gaps))

    def price() -> None:
        if pricing is not None:
            book.progress(_STAGE, total - 1, total)
            rows, gaps = price_run(book.run, subject, pricing)
            book.note(
                expenses=rows,
                price_sources=price_sources(rows, pricing.table),
                gaps=_with(book.run.gaps, gaps),
            )

    book.once(SERVING, serve)
    drop_weights(book.folder)
    book.once(EXPENSE, price)
    if left:
        book.progress(_STAGE, total, total)


def _serve(
    book: Book, subject: Subject, options: ServingOptions, progress: Callable[[str], None]
) -> tuple[Serving | None, tuple[Gap, ...]]:
    variant = served_variant(book.run.variants)
    if variant is None or variant.status is not VariantStatus.FINISHED:
        return None, (Gap(section=SECTION, reason="No variant was trained, so none is served."),)
    with tempfile.TemporaryDirectory(prefix="remat-") as folder, seeded(subject.seed):

        def build() -> nn.Module:
            model = call_model(subject.workload)
            load_weights(model, book.folder)
            return model

        try:
            return serve_model(
                subject, build, variant.label, _plan_of(variant), options, Path(folder), progress
            )
        except (RematError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = f"The model could not be served: {first_line(error)}"
            return None, (Gap(section=SECTION, variant=variant.label, reason=reason),)


def _plan_of(variant: Variant) -> Plan | None:
    return None if variant.kind is VariantKind.REFERENCE else variant.plan


def _with(gaps: tuple[Gap, ...], more: tuple[Gap, ...]) -> tuple[Gap, ...]:
    return tuple(dict.fromkeys((*gaps, *more)))
