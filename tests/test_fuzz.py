"""Nothing that can be written into a file or on the command line ends in a traceback.

A hundred cases of each by default; `make fuzz` (REMAT_FUZZ_CASES=10000) runs ten thousand.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import string
import textwrap

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import remat
from remat.cli.errors import BAD_INPUT, CHECK_FAILED, INFEASIBLE, PASSED
from remat.planner.records import Rewrite, RewriteKind
from remat.units import parse_budget
from remat.workloads import load_workload
from tests.conftest import TINY_WORKLOAD
from tests.forced import forced, plan_of, slow_fit
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
    """A model, a plan of it with every kind of decision as parsed JSON, and every place in that."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(64, norm=nn.BatchNorm1d(64)) for _ in range(6)))
    fit = slow_fit(model, torch.randn(512, 64), host_budget="64MiB")
    options, regions = fit.plain.options, []
    for number, chosen in enumerate(forced(fit).values()):  # a kind for each block, in turn
        inside = [p for p in chosen if options[p].module.split(".")[0] == str(number % 5)]
        regions += [r for p in inside for r in fit.plain.regions([p])]
    kinds = ("packed_ops", "dropped_ops", "offload", "mutated_buffers")
    assert all(any(getattr(region, kind) for region in regions) for kind in kinds)
    sliced = Rewrite(kind=RewriteKind.SLICED_CALL, module="5", num_slices=2, arguments=(0,))
    plan = plan_of(fit, ()).model_copy(update={"regions": tuple(regions), "rewrites": (sliced,)})
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
    changes = st.tuples(st.sampled_from(known), st.booleans(), ANY_JSON)
    for place, is_replaced, value in data.draw(st.lists(changes, min_size=1, max_size=3)):
        inner = changed
        try:
            for key in place[:-1]:
                inner = inner[key]
            if is_replaced:
                inner[place[-1]] = value
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


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_plan_with_seconds_that_are_no_number_is_shown(planned, tmp_path, number):
    """A duration that is no number, which a file may hold, is shown as unknown."""
    model, good, _ = planned
    changed = copy.deepcopy(good) | {"recompute_seconds": number, "plan_seconds": number}
    changed["regions"][0]["recompute_seconds"] = number
    path = tmp_path / "plan.json"
    check_plan_text(json.dumps(changed), model, path)
    assert "unknown" in str(remat.Plan.load(path))


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
    "--host-budget", "--devices", "--shards", "--depth", "--page", "--prices", "--seeds",
    "--target", "--latency-target", "--resume", "--markdown", "--jobs", "--on", "--baseline",
    "--rules", "--report",
)  # fmt: skip
VALUES = st.sampled_from(
    ["60%", "8GiB", "0", "-1", "1e9", "mine.py", "mine.py:workload", "nowhere.py", "plan.json",
     ".", "", "H100-80GB", "4x16", "axb", "plan", "😀", "None"]
) | st.text(max_size=6).filter(lambda text: "\0" not in text)  # fmt: skip
WORDS = st.sampled_from(OPTIONS) | VALUES


# All but the two that measure or train with no argument at all: `calibrate` and `demo`.
COMMANDS = (
    "plan", "verify", "check", "report", "runs", "schema", "", "fit", "evaluate", "sweep",
    "compare", "gate", "gate promote", "gate baselines", "runs show", "runs tag", "runs note",
    "runs search", "runs export", "runs gc",
)  # fmt: skip


@fuzz
@hypothesis.given(
    command=st.sampled_from(COMMANDS),
    words=st.lists(WORDS, max_size=5),
)
def test_command_lines_end_with_an_exit_code(run_cli, tmp_path, monkeypatch, command, words):
    """Any words behind a command: an exit code of ours and no traceback, with or without JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REMAT_RUNS", str(tmp_path / "runs"))
    (tmp_path / "mine.py").write_text("workload = 3\n")
    words = [word for word in words if word != "--debug"]
    done = run_cli(*command.split(), *words)
    assert done.code in (PASSED, CHECK_FAILED, BAD_INPUT, INFEASIBLE), (words, done)
    assert "Traceback" not in done.err
    assert "fault of remat" not in done.err
    if done.code == BAD_INPUT and "--json" in words[: words.index("--") if "--" in words else None]:
        assert json.loads(done.out)["exit_code"] == BAD_INPUT


CALLED = st.sampled_from(
    ["build", "loss", "lambda *_: None", "lambda *_: 1 / 0", "lambda *_: [{}, 'x']", "print",
     "lambda *_: torch.ones(3)", "lambda *_: torch.tensor(float('nan'), requires_grad=True)",
     "lambda m, b: m(b[0])", "lambda: iter(())", "lambda: None", "torch.optim.SGD", "torch.Tensor"]
)  # fmt: skip
DATA = st.sampled_from(
    ["examples", "[]", "[1, 2, 3]", "[None] * 4", "'abc'", "{}", "range(5)", "[(1,)]", "3", "torch",
     "torch.ones(8, 32)", "[torch.ones(2), torch.ones(3)] * 4", "[('a', {})] * 4"]
)  # fmt: skip
WRITTEN = ANY_JSON.map(repr)
TRAINED = {
    "name": WRITTEN, "model": CALLED, "train_data": DATA | CALLED, "batch_size": WRITTEN,
    "loss": CALLED, "optimizer": CALLED, "epochs": WRITTEN, "seed": WRITTEN, "other": WRITTEN,
}  # fmt: skip
EVALUATED = {
    "eval_data": DATA | CALLED, "predict": CALLED, "slices": WRITTEN | st.just("{'a': print}"),
    "features": CALLED, "population": WRITTEN, "targets": WRITTEN,
}  # fmt: skip


def one_of(fields):
    """One of the fields with a value for it."""
    return st.sampled_from(sorted(fields)).flatmap(lambda f: st.tuples(st.just(f), fields[f]))


def check_workload(run_cli, write_workload, command, changed):
    """A workload with anything in one field: done, or one error that is not called our fault."""
    field, value = changed
    text = textwrap.dedent(TINY_WORKLOAD) + (
        "nan, inf = float('nan'), float('inf')\n"
        "fields = dict(vars(workload))\n"
        f"fields[{field!r}] = {value}\n"
        "workload = remat.Workload(**fields)\n"
    )
    done = run_cli(command[0], write_workload(text), *command[1:])
    assert done.code in (PASSED, CHECK_FAILED, BAD_INPUT, INFEASIBLE), (changed, done)
    assert "Traceback" not in done.err
    assert "fault of remat" not in done.err


@hypothesis.settings(fuzz, max_examples=max(20, CASES // 5))
@hypothesis.given(
    changed=one_of(TRAINED), command=st.sampled_from([("plan", "--budget", "60%"), ("check",)])
)
def test_workloads_with_a_wrong_field_are_refused(run_cli, write_workload, changed, command):
    """Anything in any field of a workload that is planned or checked."""
    check_workload(run_cli, write_workload, command, changed)


@pytest.mark.slow
@hypothesis.settings(fuzz, max_examples=max(6, CASES // 25))
@hypothesis.given(changed=one_of(EVALUATED))
def test_workloads_with_a_wrong_field_are_not_evaluated(
    run_cli, write_workload, tmp_path, monkeypatch, changed
):
    """Anything in any field that only an evaluation reads."""
    monkeypatch.setenv("REMAT_RUNS", str(tmp_path / "runs"))
    command = ("evaluate", "--max-steps", "1", "--budget", "90%")
    check_workload(run_cli, write_workload, command, changed)


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
