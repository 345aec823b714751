"""No plan is ever wrong in silence, and docs/conformance.md says what is true of every tool."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import remat
from remat.prove.measure import restored
from remat.regions import runtime
from tests.conformance import parts, verdicts
from tests.conformance.cases import (
    CASES,
    ELSEWHERE,
    LANGUAGE_CASES,
    eval_before_backward,
    square_mean,
)
from tests.conformance.parts import ROWS, WIDTH, Block, Net
from tests.conformance.processes import WRAPPINGS

WORKER = Path(__file__).parent / "processes.py"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
PITFALLS = range(1, 64)


def table(last="activation_memory_budget") -> dict[str, dict[str, str]]:
    """The page's table whose last column is named so, by case and column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head = next(row for row in rows if row[0] == "row" and row[-1] == last)
    width = len(head)
    cells = [row for row in rows if len(row) == width and re.fullmatch(r"[0-9]+", row[0])]
    return {
        f"{row[0]} {row[1]}": {
            name: cell.replace("*", "") for name, cell in zip(head, row, strict=True)
        }
        for row in cells
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdicts_are_those_of_the_page(case):
    """Our verdict and torch's, eager, are as the page says, and ours is never wrong."""
    said = table()[case.name]
    verdict = verdicts.of_remat(case)
    assert verdict == said["remat"]
    assert verdict.split()[0] in (verdicts.IDENTICAL, verdicts.KEPT, verdicts.REFUSED)
    assert verdicts.of_torch(case, reentrant=False) == said["torch"]
    assert verdicts.of_torch(case, reentrant=True) == said["torch, reentrant"]


@pytest.mark.slow
@pytest.mark.parametrize("case", LANGUAGE_CASES, ids=lambda case: case.name)
def test_verdicts_on_transformers_are_those_of_the_page(case):
    """The verdict on Transformers' own switch is as the page says."""
    pytest.importorskip("transformers", reason="needs the extra 'text'", exc_type=ImportError)
    rows = [said for said in table().values() if said["row"] == str(case.row)]
    assert verdicts.of_transformers(case) in {said["Transformers"] for said in rows}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch.compile's own
@pytest.mark.parametrize("title", ["dropout", "moving averages and counters"])
def test_compiled_verdicts_are_those_of_the_page(title):
    """Compiled, dropout and buffers stay right under a plan; the memory budget redraws dropout."""
    case = next(case for case in CASES if case.title == title)
    said = table()[case.name]
    assert verdicts.of_remat_compiled(case) == said["remat, compiled"] == verdicts.IDENTICAL
    if title == "dropout":
        assert verdicts.of_memory_budget(case) == said["activation_memory_budget"] == verdicts.WRONG


@pytest.mark.slow
def test_verdicts_of_two_processes_are_those_of_the_page(run_pair, tmp_path):
    """DDP and FSDP2 on gloo: each tool's verdict is as the page says, and ours is identical."""
    path = tmp_path / "found.json"
    run_pair(WORKER, path)
    found, said = json.loads(path.read_text()), table("torch, reentrant")
    assert set(found) == set(said) == {case.name for case in WRAPPINGS}
    for name, cells in found.items():
        assert cells["remat"] == verdicts.IDENTICAL
        assert cells == {column: said[name][column] for column in cells}


def test_page_has_every_row_and_every_case():
    """Each pitfall is a case or is said to belong elsewhere, and no plan's verdict is an error."""
    said = table()
    assert {case.name for case in CASES} == set(said)
    run = {case.row for case in (*CASES, *WRAPPINGS)}
    assert run | set(ELSEWHERE) == set(PITFALLS)
    assert not run & set(ELSEWHERE)
    page = PAGE.read_text(encoding="utf-8")
    for row, (what, where) in ELSEWHERE.items():
        assert f"| {row} | {what} | {where} |" in page
    for name, cells in said.items():
        for column in ("remat", "remat, compiled"):
            allowed = {"identical", "kept", "refused ApplyError", "rounding", "n/a"}
            assert cells[column] in allowed, (name, column)


def test_verdicts_can_fail(monkeypatch):
    """A plan that forgets the random state is refused, and WRONG where no values are compared."""
    case = next(case for case in CASES if case.title == "dropout")
    honest = verdicts.plans_of

    def forgetful(model, batch):
        forget = {"draws_random_numbers": False}
        return [
            plan.model_copy(
                update={"regions": tuple(r.model_copy(update=forget) for r in plan.regions)}
            )
            for plan in honest(model, batch)
        ]

    monkeypatch.setattr(verdicts, "plans_of", forgetful)
    assert verdicts.of_remat(case) == "refused ApplyError"
    monkeypatch.setattr(runtime, "LOOKS", 0)
    assert verdicts.of_remat(case) == verdicts.WRONG
    one = torch.ones(3)
    other = one.clone()
    other.view(torch.int32)[0] += 1
    assert verdicts.differing({"a": one}, {"a": other}) == ["a"]


# -- what happens between forward and backward ----------------------------------------------------


@pytest.fixture
def planned():
    """A model with dropout, its batch and a plan that recomputes every block."""
    model, batch = Net(lambda: Block(torch.nn.Dropout(0.5))), torch.randn(ROWS, WIDTH)
    return model, batch, verdicts.plans_of(model, batch)[0]


def test_mode_flipped_before_backward_is_set_back_for_the_region(planned):
    """Dropout is drawn again as in the forward, and the flag stays as the user left it."""
    model, batch, plan = planned
    with restored(model, batch):
        torch.manual_seed(0)
        plain = eval_before_backward(model, batch)
    with remat.apply(model, plan), restored(model, batch):
        torch.manual_seed(0)
        loss = square_mean(model, batch)
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, plain[f"gradient of {name}"])


def test_parameter_changed_before_backward_is_refused(planned):
    """The error is ours, names the module's class, and says what to do; a new step works."""
    model, batch, plan = planned
    with remat.apply(model, plan):
        loss = square_mean(model, batch)
        with torch.no_grad():
            model.blocks[1].down.weight.mul_(1.0)
        with pytest.raises(remat.ApplyError, match=r"recomputed Block was written to.*remove"):
            loss.backward()
        square_mean(model, batch).backward()


def test_functional_transforms_are_refused(planned):
    """The transform torch.func.grad under a plan is refused in our words, and works without."""
    model, batch, plan = planned
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def run(given):
        return torch.func.functional_call(model, given, (batch,)).square().mean()

    with remat.apply(model, plan), pytest.raises(remat.ApplyError, match=r"torch\.func\.grad"):
        torch.func.grad(run)(weights)
    model.eval()  # torch.func wants to be told how to draw
    assert set(torch.func.grad(run)(weights)) == set(weights)


def test_change_of_a_global_within_the_step_is_shown_by_verify():
    """What nothing can prevent, verify shows: a global that changes before backward."""
    model, batch = Net(lambda: Block(parts.ReadsGlobal())), torch.randn(ROWS, WIDTH)
    plan = verdicts.plans_of(model, batch)[0]

    def loss(model, batch):
        value = square_mean(model, batch)
        parts.SETTINGS["factor"] = 2.0
        return value

    model.register_forward_pre_hook(lambda *_: parts.SETTINGS.update(factor=1.0))
    try:
        proof = remat.verify(model, batch, plan, loss=loss, optimizer=None)
    finally:
        parts.SETTINGS["factor"] = 1.0
    assert not proof.passed
    assert any(d.name.startswith("gradient of blocks.0") for d in proof.differences)
