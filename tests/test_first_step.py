"""The first step of a process takes what later ones take: nothing is made once, and late."""

from __future__ import annotations

from pathlib import Path

import pytest

import remat
from tests.first_step import made
from tests.forced import forced, plan_of, slow_fit
from tests.models import tightest

ROOT = str(Path(__file__).parents[1])


def plans(name):
    """A plan of each kind that a model's step has, with its predicted peak."""
    model, batch, loss = made(name)
    fit = slow_fit(model, batch, loss, host_budget="1GiB")
    kinds = {"nothing": [], **forced(fit)}
    found = {}
    for kind, chosen in kinds.items():
        peak = fit.plain.simulate(chosen).peak_bytes
        found[kind] = plan_of(fit, chosen).model_copy(update={"predicted_peak_bytes": peak})
    return found


def measured(run_process, folder, name, plans):
    """Measure the first step under each plan in a process that has run none before."""
    paths = [folder / f"{number}.json" for number in range(len(plans))]
    for plan, path in zip(plans, paths, strict=True):
        plan.save(path)
    done = run_process("-m", "tests.first_step", name, *paths, PYTHONPATH=ROOT, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    return [int(line) for line in done.out.split()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blocks", "booleans", "positions", "attention", "language"])
def test_first_step_of_a_process_takes_what_the_plan_says(name, run_process, tmp_path):
    """For decisions of every kind: no table, copy or probe of ours is made within the step."""
    found = plans(name)
    expected = {"regions", "dropped", "packed", "offloaded", "mixed"}
    assert expected <= set(found)
    peaks = measured(run_process, tmp_path, name, found.values())
    for (kind, plan), peak in zip(found.items(), peaks, strict=True):
        assert 0 <= plan.predicted_peak_bytes - peak <= 1024, kind


@pytest.mark.slow
def test_first_step_in_slices_takes_what_the_plan_says(run_process, tmp_path):
    """The same where loss head, MLPs and blocks run in slices, as few as are asked for, or all."""
    model, batch, loss = made("wide language")
    step = {"loss": loss, "optimizer": None, "chunks": True}
    least = tightest(model, batch, **step)
    plans = [least, remat.plan(model, batch, "80%", **step)]
    assert all(plan.rewrites for plan in plans)
    peaks = measured(run_process, tmp_path, "wide language", plans)
    for plan, peak in zip(plans, peaks, strict=True):
        assert peak <= plan.predicted_peak_bytes
