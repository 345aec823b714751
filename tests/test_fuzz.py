"""Nothing that can be written into a file or on the command line ends in a traceback.

A few hundred cases by default; REMAT_FUZZ_CASES=10000 runs ten thousand of each.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import string

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import remat
from remat.cli.errors import BAD_INPUT, CHECK_FAILED, INFEASIBLE, PASSED
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.units import parse_budget
from remat.workloads import load_workload
from tests.models import Block, square_mean

CASES = int(os.environ.get("REMAT_FUZZ_CASES", "100"))

fuzz = hypothesis.settings(
    max_examples=CASES,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)

ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["1", "NaN", "Infinity", "optimal", "blocks.0", -1, 0, 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=5,
)  # fmt: skip


def places(value, path=()):
    """Every place in parsed JSON, deepest last."""
    yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


@pytest.fixture(scope="module")
def planned():
    """A model, its plan as parsed JSON, and every place in that."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(16, norm=nn.BatchNorm1d(16)) for _ in range(3)))
    plan = plan_policy(model, torch.randn(8, 16), AllBlocks(), loss=square_mean)
    data = plan.model_dump(mode="json")
    return model, data, list(places(data))[1:]


def check_plan_text(text, model, path):
    """The text is a plan that can be shown, and applied or refused; or it is no plan."""
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        plan = remat.Plan.load(path)
    except remat.PlanFileError:
        return
    assert str(plan)
    assert (
        remat.Plan.from_data(plan.model_dump(mode="json"), source="again") == plan or "NaN" in text
    )
    with contextlib.suppress(remat.PlanMismatchError, remat.ApplyError):
        remat.apply(model, plan).remove()
    assert all("forward" not in module.__dict__ for module in model.modules())


@fuzz
@hypothesis.given(data=st.data())
def test_changed_plan_files_are_read_or_refused(planned, tmp_path, data):
    """A value anywhere in a plan replaced, left out or added to: loaded or refused, never worse."""
    model, good, known = planned
    changed = copy.deepcopy(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(known))
        inner = changed
        try:
            for key in place[:-1]:
                inner = inner[key]
            if data.draw(st.booleans()):
                inner[place[-1]] = data.draw(ANY_JSON)
            else:
                del inner[place[-1]]
        except (KeyError, IndexError, TypeError):  # an earlier change took that place away
            continue
    check_plan_text(json.dumps(changed), model, tmp_path / "plan.json")


@fuzz
@hypothesis.given(data=st.data())
def test_damaged_plan_files_are_refused(planned, tmp_path, data):
    """A plan that is cut off, or has letters exchanged, is refused with one error."""
    model, good, _ = planned
    text = json.dumps(good)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 50)))
    text = text[:start] + data.draw(st.text(max_size=5)) + text[stop:]
    check_plan_text(text, model, tmp_path / "plan.json")


@pytest.mark.parametrize(
    "place", ["budget_bytes", "recompute_fraction", "schema_version", "predicted_peak_bytes"]
)
def test_numbers_written_as_text_are_refused(planned, tmp_path, place):
    """A number is a number: "80" is refused, and the field is named."""
    _, good, _ = planned
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(good | {place: str(good[place])}))
    with pytest.raises(remat.PlanFileError, match=place):
        remat.Plan.load(path)


@fuzz
@hypothesis.given(
    budget=st.text()
    | st.integers()
    | st.floats()
    | st.none()
    | st.builds(
        "{}{}{}".format,
        st.floats() | st.integers() | st.text(string.digits + ".", max_size=500),
        st.sampled_from(["", " ", "\t", "e", "-"]),
        st.sampled_from(["", "%", "GiB", "gb", "MiB", "TiB", "b", "GiBs"]),
    )
)
def test_budgets_are_read_or_refused(budget):
    """Any text or number is a positive number of bytes, or a BudgetFormatError."""
    with contextlib.suppress(remat.BudgetFormatError):
        size = parse_budget(budget, keep_all_peak_bytes=2**40)
        assert isinstance(size, int)
        assert 0 < size <= 2**100
    with contextlib.suppress(remat.BudgetFormatError):
        parse_budget(budget)


NAMES = st.text(string.ascii_lowercase + "./:_-0 \0é", max_size=20)
WORKLOADS = NAMES | st.builds("{}.py{}".format, NAMES, st.sampled_from(["", ":workload", ":x y"]))


@fuzz
@hypothesis.given(name=WORKLOADS)
def test_workload_names_are_refused(restored_imports, tmp_path, monkeypatch, name):
    """No name that leads nowhere ends in anything but a WorkloadError."""
    monkeypatch.chdir(tmp_path)
    hypothesis.assume(not name.replace(".", "").isidentifier())  # Python's own modules are there
    with pytest.raises(remat.WorkloadError):
        load_workload(f"no_such_place/{name}" if "/" not in name else name)


OPTIONS = (
    "--budget", "-b", "--plan", "--fix", "--output", "-o", "--json", "--device", "--frontier",
    "--hf-config", "--batch", "--out", "--help", "--debug", "--version", "--store", "--", "-",
)  # fmt: skip
VALUES = st.sampled_from(
    ["60%", "8GiB", "0", "-1", "1e9", "mine.py", "mine.py:workload", "nowhere.py", "plan.json",
     ".", "", "H100-80GB", "4x16", "axb", "plan", "😀", "None"]
) | st.text(max_size=6).filter(lambda text: "\0" not in text)  # fmt: skip
WORDS = st.sampled_from(OPTIONS) | VALUES


@fuzz
@hypothesis.given(
    command=st.sampled_from(["plan", "verify", "check", "report", "runs", "schema", ""]),
    words=st.lists(WORDS, max_size=5),
)
def test_command_lines_end_with_an_exit_code(run_cli, tmp_path, monkeypatch, command, words):
    """Any words behind a command: an exit code of ours and no traceback, with or without JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMAT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "mine.py").write_text("workload = 3\n")
    words = [word for word in words if word != "--debug"]
    done = run_cli(*([command] if command else []), *words)
    assert done.code in (PASSED, CHECK_FAILED, BAD_INPUT, INFEASIBLE), (words, done)
    assert "Traceback" not in done.err
    assert "fault of remat" not in done.err
    if done.code == BAD_INPUT and "--json" in words[: words.index("--") if "--" in words else None]:
        assert json.loads(done.out)["exit_code"] == BAD_INPUT


def test_frontier_of_no_points_is_refused():
    """A front needs at least one point, and says so before any search."""
    model = nn.Sequential(Block(16), Block(16))
    for points in (0, -1, 1.5, True):
        with pytest.raises(remat.WorkloadError, match="points must be an integer >= 1"):
            remat.frontier(model, torch.randn(8, 16), points=points, loss=square_mean)


def test_verify_in_another_mode_is_refused():
    """A plan for training does not verify in eval, where other ops run: it says which to call."""
    model, batch = nn.Sequential(Block(16), Block(16)), torch.randn(8, 16)
    plan = remat.plan(model, batch, "1000%", loss=square_mean)
    with pytest.raises(remat.PlanMismatchError, match=r"call model\.train\(\)"):
        remat.verify(model.eval(), batch, plan, loss=square_mean)
