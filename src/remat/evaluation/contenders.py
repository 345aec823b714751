"""Which variants an evaluation runs: none, fixed policies, and a plan for each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remat.errors import BudgetFormatError, WorkloadError
from remat.planner.policies import AbstractPolicy, KeepAll
from remat.runs.records import VariantKind
from remat.units import format_bytes, parse_budget

REFERENCE_LABEL = "no plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One variant before it has run: a policy or a budget; trained, or only measured and timed."""

    label: str
    kind: VariantKind
    policy: AbstractPolicy | None = None
    budget: int | str | None = None
    is_trained: bool = True

    @property
    def asked_budget(self) -> str | None:
        """The budget as text, as it was asked for."""
        if self.budget is None:
            return None
        return format_bytes(self.budget) if isinstance(self.budget, int) else self.budget.strip()


def contenders(
    budgets: Sequence[int | str],
    policies: Sequence[AbstractPolicy],
    peers: Sequence[AbstractPolicy],
) -> tuple[Contender, ...]:
    """List the variants in the order of the report: no plan, fixed policies, budgets, peers.

    What is named twice runs once; peers are measured and timed, but not trained.

    Raises
    ------
    BudgetFormatError: for a budget that cannot be read, before anything is run.
    WorkloadError: if there is neither a budget nor a policy.
    """
    if isinstance(budgets, (str, int)):
        raise BudgetFormatError(f'budgets must be a list, such as ["60%"], got {budgets!r}.')
    for budget in budgets:
        parse_budget(budget, keep_all_peak_bytes=2**40)  # only its form is checked here
    if not (budgets or policies):
        raise WorkloadError("evaluate needs at least one budget or policy to compare.")
    listed = [
        Contender(label=REFERENCE_LABEL, kind=VariantKind.REFERENCE, policy=KeepAll()),
        *(Contender(label=p.label, kind=VariantKind.POLICY, policy=p) for p in policies),
        *(_for_budget(budget) for budget in budgets),
        *(
            Contender(label=p.label, kind=VariantKind.POLICY, policy=p, is_trained=False)
            for p in peers
        ),
    ]
    by_label: dict[str, Contender] = {}
    for contender in listed:
        by_label.setdefault(contender.label, contender)
    return tuple(by_label.values())


def _for_budget(budget: int | str) -> Contender:
    named = Contender(label="", kind=VariantKind.PLANNED, budget=budget).asked_budget
    return Contender(label=f"plan {named}", kind=VariantKind.PLANNED, budget=budget)
