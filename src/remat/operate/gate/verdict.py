"""The verdict: every rule on every variant of a run, against its baseline."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from remat.errors import GateError
from remat.operate.gate.checks import (
    Check,
    Pair,
    check_calibration,
    check_latency,
    check_parity,
    check_peak,
    check_prediction,
    check_quality,
    check_slices,
    check_step_time,
)
from remat.operate.gate.records import Gate, GateCheck, GateReport, Outcome
from remat.operate.gate.rules import load_rules
from remat.runs.records import Run, RunStatus, Variant, VariantStatus
from remat.units import format_bytes

_CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "peak": check_peak,
        "step_time": check_step_time,
        "quality": check_quality,
        "calibration": check_calibration,
        "slice": check_slices,
        "latency": check_latency,
        "prediction_error": check_prediction,
        "gradient_parity": check_parity,
    }
)
_ALIVE = (VariantStatus.MEASURED, VariantStatus.FINISHED)


def gate(run: Run, baseline: Run, rules: Gate | str | os.PathLike[str] | None = None) -> GateReport:
    """Hold a run against its baseline by the rules, and return every check with its reason.

    Arguments
    ---------
    rules: a `Gate`, the path of a `gate.toml`, or `None` for the default rules.

    Raises
    ------
    GateError: if the rules cannot be read, the runs are of different workloads or not complete,
        a variant that the rules name is in neither, or nothing at all could be compared.

    Example
    -------
    `gate(load_run("after"), load_run("before")).passed`
    """
    chosen = rules if isinstance(rules, Gate) else load_rules(rules)
    source = "" if rules is None or isinstance(rules, Gate) else os.fspath(rules)
    _check_runs(run, baseline)
    checks = tuple(_all_checks(run, baseline, chosen))
    if all(check.outcome is Outcome.NOT_COMPARED for check in checks):
        raise GateError(
            f"run {run.id!r} and its baseline {baseline.id!r} have nothing that the rules could "
            "compare: no variant was measured in both."
        )
    return GateReport(
        run=run.id,
        baseline=baseline.id,
        rules=source,
        passed=all(check.outcome is not Outcome.FAILED for check in checks),
        checks=checks,
    )


def _check_runs(run: Run, baseline: Run) -> None:
    if run.name != baseline.name:
        raise GateError(
            f"run {run.id!r} trains {run.name!r}, its baseline {baseline.id!r} trains "
            f"{baseline.name!r}: a gate compares runs of one workload."
        )
    for what, one in (("run", run), ("baseline", baseline)):
        if one.status is not RunStatus.COMPLETE:
            raise GateError(
                f"{what} {one.id!r} was not finished: end it with `remat evaluate ... --resume "
                f"{one.id}` first."
            )


def _all_checks(run: Run, baseline: Run, rules: Gate) -> Iterator[GateCheck]:
    new = {variant.label: variant for variant in run.variants}
    old = {variant.label: variant for variant in baseline.variants}
    unknown = [label for label in rules.variants if label not in new and label not in old]
    if unknown:
        known = ", ".join(dict.fromkeys((*old, *new)))
        raise GateError(
            f"the rules name the variant {unknown[0]!r} at variants, which is in neither run "
            f"(there are: {known})."
        )
    for label in rules.variants or dict.fromkeys((*old, *new)):
        found = _presence(label, new.get(label), old.get(label))
        if found is not None:
            yield found
            continue
        pair = Pair(run=run, baseline=baseline, new=new[label], old=old[label])
        for name, check in _CHECKS.items():
            if getattr(rules, name).enabled:
                yield from check(pair, rules)
    if rules.latency.enabled and run.serving is None:
        yield GateCheck(rule="latency", outcome=Outcome.NOT_COMPARED, message="it was not served")


def _presence(label: str, new: Variant | None, old: Variant | None) -> GateCheck | None:
    """Say what is wrong with a variant as a whole; `None` where its figures can be compared."""

    def make(outcome: Outcome, message: str) -> GateCheck:
        return GateCheck(rule="variant", variant=label, outcome=outcome, message=message)

    if new is None or old is None:
        missing = "the run" if new is None else "the baseline"
        return make(Outcome.NOT_COMPARED, f"{missing} has no such variant")
    if old.status not in _ALIVE:
        return make(Outcome.NOT_COMPARED, f"it was {old.status.value} in the baseline")
    if new.status is VariantStatus.INFEASIBLE:
        least = format_bytes(new.minimum_bytes or 0)
        return make(Outcome.FAILED, f"no plan reaches its budget any more: least peak {least}")
    if new.status not in _ALIVE:
        return make(Outcome.FAILED, new.message or f"it is {new.status.value}")
    return None
