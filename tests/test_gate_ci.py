"""The gate in CI: commands, files that CI reads, promotions, and templates whose commands exist."""

import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from remat.cli.app import make_app
from remat.operate.gate.promotion import BASELINES_FILE, current, history
from remat.operate.gate.records import GateCheck, GateReport, Outcome
from remat.operate.gate.writing import gate_markdown, github_annotations, junit_xml
from remat.units import MIB
from sample_runs import sample_run, sample_variant

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path):
    """Give a store with a baseline, a run that is as good, and one whose peak grew."""
    grown = sample_variant(
        peak_mib=130, peak_by_module={"mlp": 30 * MIB}, predicted_peak_bytes=130 * MIB,
        budget_bytes=140 * MIB,
    )  # fmt: skip
    usual = sample_variant(peak_by_module={"mlp": 18 * MIB})
    for run_id, variant in (("old", usual), ("same", usual), ("grown", grown)):
        sample_run(variant, id=run_id).save(tmp_path / run_id / "run.json")
    return tmp_path


def test_cli_gate_passes_fails_and_refuses_by_exit_code(store, run_cli, tmp_path):
    """0 where the rules are kept, 1 with the place where one is broken, 2 for bad rules."""
    done = run_cli("gate", "same", "--baseline", "old", "--root", store)
    assert done.code == 0, done.err
    assert "gate passed" in done.out
    done = run_cli("gate", "grown", "--baseline", "old", "--root", store)
    assert done.code == 1
    shown = " ".join(done.out.split())
    assert "+12.0 MiB, 12.0 MiB of it in `mlp`" in shown
    done = run_cli("gate", "grown", "--baseline", "old", "--root", store, "--json")
    report = json.loads(done.out)
    assert (done.code, report["passed"], report["run"]) == (1, False, "grown")
    rules = tmp_path / "gate.toml"
    rules.write_text("schema_version = 1\n[peak]\nmax_growth = 0.2\n", encoding="utf-8")
    assert (
        run_cli("gate", "grown", "--baseline", "old", "--root", store, "--rules", rules).code == 0
    )
    rules.write_text("schema_version = 1\n[peek]\n", encoding="utf-8")
    done = run_cli("gate", "grown", "--baseline", "old", "--root", store, "--rules", rules)
    assert done.code == 2
    assert "gate.toml" in done.err
    assert "peek" in done.err


def test_cli_gate_writes_for_ci(store, run_cli, tmp_path, monkeypatch):
    """JUnit, Markdown, annotations and the job's summary say the same as the terminal."""
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    files = ("--junit", tmp_path / "gate.xml", "--markdown", tmp_path / "gate.md")
    done = run_cli("gate", "grown", "--baseline", "old", "--root", store, "--github", *files)
    assert done.code == 1
    lines = done.out.splitlines()
    [error] = [line for line in lines if line.startswith("::error title=remat gate%3A")]
    assert "peak / plan 60%25" in error
    assert "+12.0 MiB" in error
    suite = ET.parse(tmp_path / "gate.xml").getroot()
    assert suite.attrib["failures"] == "1"
    [failed] = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert failed.attrib["name"] == "peak / plan 60%"
    text = (tmp_path / "gate.md").read_text(encoding="utf-8")
    assert summary.read_text(encoding="utf-8") == "before\n" + text
    assert "### Failed" in text
    machine = run_cli("gate", "same", "--baseline", "old", "--root", store, "--github", "--json")
    assert json.loads(machine.out)["passed"] is True


HOSTILE = "a|b%\r\n::error::x <&\"'> \x07, y:z"


def test_files_for_ci_hold_any_text():
    """Names and messages of any letters stay inside their line, cell and element."""
    checks = tuple(
        GateCheck(rule="slice", variant=HOSTILE, subject=HOSTILE, outcome=outcome, message=HOSTILE)
        for outcome in Outcome
    )
    report = GateReport(run="r", baseline="b", rules="", passed=False, checks=checks)
    lines = list(github_annotations(report))
    assert len(lines) == 3
    assert all(re.fullmatch(r"::(error|notice) title=[^:,\r\n]*::[^\r\n]*", one) for one in lines)
    suite = ET.fromstring(junit_xml(report))
    assert [suite.attrib[name] for name in ("tests", "failures", "skipped")] == ["3", "1", "1"]
    rows = [line for line in gate_markdown(report).splitlines() if line.startswith("| slice")]
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_baseline_is_promoted_by_somebody_for_a_reason(store, run_cli):
    """The promoted run is the baseline that the gate takes; each promotion is kept for good."""
    done = run_cli("gate", "same", "--root", store)
    assert (done.code, "no baseline of 'digits-vit' was promoted" in done.err) == (2, True)
    done = run_cli("gate", "promote", "old", "--who", "Ada", "--why", "first", "--root", store)
    assert done.code == 0, done.err
    first = (store / BASELINES_FILE).read_bytes()
    assert run_cli("gate", "same", "--root", store).code == 0
    assert run_cli("gate", "grown", "--root", store).code == 1
    done = run_cli("gate", "promote", "grown", "--who", "Bo", "--why", "wider", "--root", store)
    assert done.out == "grown is the baseline of digits-vit instead of old\n"
    assert (store / BASELINES_FILE).read_bytes().startswith(first)
    assert run_cli("gate", "grown", "--root", store).code == 0
    assert [(one.who, one.why, one.run, one.previous) for one in history(store)] == [
        ("Ada", "first", "old", None),
        ("Bo", "wider", "grown", "old"),
    ]
    listed = run_cli("gate", "baselines", "--root", store, "--json")
    assert [one["who"] for one in json.loads(listed.out)] == ["Ada", "Bo"]


def test_promotion_needs_a_name_a_reason_and_a_run_that_passed(store, run_cli):
    """Nothing is promoted by nobody, without a reason, or from a run that failed its checks."""
    promote = ("gate", "promote", "old", "--root", store)
    assert run_cli(*promote, "--who", "Ada").code == 2
    done = run_cli(*promote, "--who", " ", "--why", "x")
    assert (done.code, "--who is empty" in done.err) == (2, True)
    sample_run(sample_variant(weights_identical=False), id="bad").save(store / "bad" / "run.json")
    done = run_cli("gate", "promote", "bad", "--who", "A", "--why", "x", "--root", store)
    assert (done.code, "did not pass its checks" in done.err) == (2, True)
    assert current("digits-vit", store) is None


def test_baseline_that_was_changed_after_its_promotion_is_refused(store, run_cli):
    """The promotion holds for the bytes that were promoted, not for what takes their place."""
    run_cli("gate", "promote", "old", "--who", "Ada", "--why", "first", "--root", store)
    run = sample_run(sample_variant(peak_mib=999), id="old")
    run.save(store / "old" / "run.json")
    done = run_cli("gate", "same", "--root", store)
    assert done.code == 2
    assert "is not the file that Ada promoted" in done.err
    with (store / BASELINES_FILE).open("ab") as stream:
        stream.write(b"{torn")
    done = run_cli("gate", "same", "--root", store)
    assert (done.code, "cannot be read: repair" in done.err) == (2, True)


def scripts_of(path):
    """Return the shell lines of a template."""
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "runs" in data:
        assert data["runs"]["using"] == "composite"
        assert set(data["outputs"]["run"]) == {"description", "value"}
        return [step["run"] for step in data["runs"]["steps"]]
    [job] = data.values()
    assert job["artifacts"]["reports"]["junit"] == "gate.xml"
    return job["script"]


@pytest.mark.parametrize("name", ["action.yml", "ci/gitlab-remat.yml"])
def test_templates_call_commands_and_options_that_exist(name):
    """Each `remat` line of a template names a command, and options, of this command line."""
    import typer

    root = typer.main.get_command(make_app())
    lines = [
        line.strip()
        for script in scripts_of(ROOT / name)
        for line in script.splitlines()
        if line.strip().startswith("remat ") or "options+=" in line or "budgets+=" in line
    ]
    assert {line.split()[1] for line in lines if line.startswith("remat ")} == {"evaluate", "gate"}
    known = {
        option
        for command in ("evaluate", "gate")
        for one in [root.commands[command]]
        for leaf in ([one.commands["default"]] if hasattr(one, "commands") else [one])
        for parameter in leaf.params
        for option in parameter.opts
    }
    used = set(re.findall(r"--[a-z][a-z-]+", " ".join(lines)))
    assert used
    assert used <= known


def test_inputs_of_the_action_are_all_used_and_none_is_put_into_the_script():
    """Inputs reach the script as environment, so that no text of theirs is run as code."""
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    yaml = pytest.importorskip("yaml")
    data = yaml.safe_load(text)
    used = set(re.findall(r"\$\{\{ inputs\.([a-z]+) \}\}", text))
    assert used == set(data["inputs"])
    assert all("${{" not in step["run"] for step in data["runs"]["steps"])
    assert shlex.split(data["inputs"]["budgets"]["default"]) == ["80%", "60%"]
