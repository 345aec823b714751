"""Programs with rewrites, traced and kept where they free memory, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from remat.planner.records import Rewrite, RewriteKind
from remat.program import Program, Step
from remat.rewriting.calls import sliced_blocks
from remat.rewriting.heads import sliced_heads
from remat.rewriting.tokens import sliced_tokens
from remat.units import format_bytes, format_seconds

_MOST_NAMED = 3  # modules or parameters in a note

Make = Callable[[tuple[Rewrite, ...]], Program]


def with_sliced_heads(plain: Program, step: Step, make: Make) -> tuple[Program, ...]:
    """Trace the step with its loss heads in slices; empty where that frees nothing."""
    rewrites = sliced_heads(plain, step.model)
    program = make(rewrites) if rewrites else None
    if program is None or program.keep_all_peak_bytes >= plain.keep_all_peak_bytes:
        return ()
    program.rewrites = _with_reasons(plain, program)
    return (program,)


def with_sliced_tokens(
    plain: Program, heads: Sequence[Program], step: Step, make: Make
) -> tuple[Program, ...]:
    """Trace the step with token-wise modules in slices of the tokens, and what `heads` rewrite.

    Empty where there are none, or where that frees nothing.
    """
    before = tuple(r for head in heads for r in head.rewrites)
    rewrites = sliced_tokens(plain, step.model, before)
    program = make((*before, *rewrites)) if rewrites else None
    lowest = min(p.keep_all_peak_bytes for p in (plain, *heads))
    if program is None or program.keep_all_peak_bytes >= lowest:
        return ()
    program.rewrites = _with_reasons(plain, program)
    return (program,)


def with_sliced_blocks(
    plain: Program,
    heads: Sequence[Program],
    others: Sequence[Program],
    step: Step,
    make: Make,
) -> tuple[Program, ...]:
    """Trace the step with every block in slices of the batch, and what `heads` rewrite.

    Empty where blocks cannot be sliced, or where these or `others` reach as low a peak without.
    """
    rewrites = sliced_blocks(plain, step)
    if not rewrites:
        return ()
    program = make((*(r for head in heads for r in head.rewrites), *rewrites))
    lowest = min(p.needed(p.least_peak()[1]) for p in (plain, *heads, *others))
    if program.needed(program.least_peak()[1]) >= lowest:
        return ()
    program.rewrites = _with_reasons(plain, program)
    return (program,)


def rewrite_notes(rewrites: Sequence[Rewrite]) -> list[str]:
    """Say for which parameters bit identity is given up, and by how much."""
    if not rewrites:
        return []
    heads = [r.module for r in rewrites if r.kind is RewriteKind.LOSS_HEAD]
    blocks = [r.module for r in rewrites if r.kind is RewriteKind.SLICED_CALL]
    tokens = [r.module for r in rewrites if r.kind is RewriteKind.SLICED_TOKENS]
    affected = list(dict.fromkeys(name for r in rewrites for name in r.affects))
    what = [f"{name} and its loss" for name in heads]
    what += [f"{_listed(blocks)} (by the batch)"] if blocks else []
    what += [f"{_listed(tokens)} (by the tokens)"] if tokens else []
    note = (
        f"Bit identity is given up: {' and '.join(what)} run in slices, so that the loss and the "
        f"gradients of {len(affected)} parameters ({_listed(affected)}) are summed in another "
        "order; expected to differ by at most "
        f"{max(r.tolerance for r in rewrites):.1e} of their largest value."
    )
    return [note]


def _listed(names: Sequence[str]) -> str:
    others = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {others} more" if others > 0 else "")


def _with_reasons(plain: Program, program: Program) -> tuple[Rewrite, ...]:
    """Write down what the rewrites, together, free and cost; told at the first."""
    freed = plain.keep_all_peak_bytes - program.keep_all_peak_bytes
    added = program.cost.step_seconds - plain.cost.step_seconds
    first, *rest = program.rewrites
    change = "costs" if added > 0 else "saves"
    reason = (
        f"{_what(first)}{' and the others' if rest else ''}: the peak of the step without other "
        f"recomputation is {format_bytes(freed)} lower, {change} {format_seconds(abs(added))}"
    )
    update = {"freed_bytes": freed, "added_seconds": added, "reason": reason}
    told: Iterable[Rewrite] = (r.model_copy(update={"reason": _what(r)}) for r in rest)
    return (first.model_copy(update=update), *told)


def _what(rewrite: Rewrite) -> str:
    if rewrite.kind is RewriteKind.LOSS_HEAD:
        return f"head and loss in {rewrite.num_slices} slices"
    along = "batch" if rewrite.kind is RewriteKind.SLICED_CALL else "tokens"
    return f"recomputed in {rewrite.num_slices} slices of the {along}"
