"""The commands do the work: plan, verify, evaluate, report, runs, and say how it went."""

import json

import pytest

from remat.cli.inputs import inputs_of
from remat.fit import plan_policy
from remat.planner.policies import AllBlocks
from remat.planner.records import Plan
from remat.prove.records import Verification
from remat.runs.records import Run
from remat.workloads import load_workload

PRINTS = """
    import os
    import torch
    import remat

    def build():
        print("python says hello")
        os.write(1, b"C says hello\\n")
        return torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])

    def loss(model, batch):
        return model(batch).square().mean()

    workload = remat.Workload(
        name="chatty", model=build, train_data=[torch.zeros(64)] * 64, batch_size=64, loss=loss
    )
"""


def test_plan_writes_a_plan_and_shows_it(run_cli, write_workload, tmp_path):
    """The plan on the screen is the one in the file, and it keeps the budget."""
    path, output = write_workload(), tmp_path / "out" / "plan.json"
    done = run_cli("plan", path, "--budget", "90%", "-o", output)
    assert done.code == 0, done.err
    plan = Plan.load(output)
    assert plan.predicted_peak_bytes <= plan.budget_bytes < plan.keep_all_peak_bytes
    assert plan.regions
    assert f"Recomputed: {len(plan.regions)} region" in done.out
    assert f"{plan.recompute_fraction:.1%}" in done.out
    assert "Pareto front" in done.out
    assert "●" in done.out
    assert f"note: plan written to {output}\n" in done.err
    assert max(len(line) for line in done.out.splitlines()) <= 100


def test_plan_json_is_a_plan_file(run_cli, write_workload, tmp_path):
    """What `--json` prints on stdout can be saved and read as a plan."""
    done = run_cli("plan", write_workload(), "--budget", "90%", "--json")
    plan = Plan.from_data(json.loads(done.out), source="stdout")
    assert plan.schema_version == 1
    assert done.code == 0


def test_plan_frontier_alone_needs_no_budget(run_cli, write_workload):
    """`--frontier N` gives N plans without a budget, each with less memory or less work."""
    done = run_cli("plan", write_workload(), "--frontier", "3", "--json")
    facts = json.loads(done.out)
    front = [Plan.from_data(point, source="stdout") for point in facts["frontier"]]
    assert done.code == 0
    assert facts["plan"] is None
    assert 1 <= len(front) <= 3
    in_order = sorted(front, key=lambda plan: plan.predicted_peak_bytes)
    fractions = [plan.recompute_fraction for plan in in_order]
    assert fractions == sorted(fractions, reverse=True)


def test_plan_without_sketch(run_cli, write_workload):
    """`--frontier 0` leaves the sketch out."""
    done = run_cli("plan", write_workload(), "--budget", "90%", "--frontier", "0")
    assert done.code == 0
    assert "Pareto" not in done.out


def test_plan_for_a_generous_budget_recomputes_nothing(run_cli, write_workload):
    """Above the keep-everything peak nothing is recomputed, and it says so."""
    done = run_cli("plan", write_workload(), "--budget", "1GiB", "--frontier", "0")
    assert done.code == 0
    assert "Recomputed: nothing; every activation is kept" in done.out


@pytest.mark.slow
def test_plan_json_stdout_is_json_alone(run_process, write_workload):
    """What the user's model prints, from Python or C, never reaches stdout with `--json`."""
    path = write_workload(PRINTS)
    done = run_process("-m", "remat.cli", "plan", path, "--budget", "1GiB", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["schema_version"] == 1
    assert "python says hello" in done.err
    assert "C says hello" in done.err


@pytest.mark.slow
def test_plan_of_an_architecture_needs_no_weights(run_cli, tmp_path):
    """`--hf-config` plans a model that would not fit this machine, on the meta device."""
    pytest.importorskip("transformers", reason="needs the extra 'text'", exc_type=ImportError)
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run_cli(
        "plan", "--hf-config", tmp_path, "--batch", "4x1024", "--budget", "95%", "--json"
    )
    assert done.code == 0, done.err
    plan = Plan.from_data(json.loads(done.out), source="stdout")
    assert plan.fingerprint.model_class.endswith("LlamaForCausalLM")
    assert plan.keep_all_peak_bytes > 2**33


def test_verify_passes_a_good_plan(run_cli, write_workload, tmp_path):
    """A plan of ours passes: identical, within its budget, exit code 0."""
    path, output = write_workload(), tmp_path / "plan.json"
    assert run_cli("plan", path, "-b", "90%", "-o", output, "--frontier", "0").code == 0
    done = run_cli("verify", path, "--plan", output)
    assert done.code == 0, done.out
    assert "verification passed" in done.out
    assert "identical, bit for bit" in done.out
    proof = Verification.model_validate_json(
        run_cli("verify", path, "--plan", output, "--json").out
    )
    assert proof.identical
    assert proof.within_budget


def test_verify_fails_where_the_step_changes_when_it_runs_again(run_cli, write_workload, tmp_path):
    """A module that gives other values when it runs again is caught: exit code 1."""
    path = write_workload(
        """
        import torch
        import remat

        class Counter(torch.nn.Module):
            calls = 0  # changed in forward: a recomputation sees another value
            def __init__(self):
                super().__init__()
                self.up, self.down = torch.nn.Linear(32, 256), torch.nn.Linear(256, 32)
            def forward(self, x):
                Counter.calls += 1
                scale = torch.full((), float(Counter.calls))
                return x + self.down(torch.tanh(self.up(x)) * scale)

        def loss(model, batch):
            Counter.calls = 0
            return model(batch).square().mean()

        workload = remat.Workload(
            name="counter", model=lambda: torch.nn.Sequential(*[Counter() for _ in range(6)]),
            train_data=[torch.ones(32)] * 256, batch_size=256, loss=loss,
        )
        """
    )
    output = tmp_path / "plan.json"
    # the planner would make single results again, which are right whatever the module counts
    inputs = inputs_of(load_workload(str(path)))
    plan_policy(inputs.model, inputs.batch, AllBlocks(), **inputs.step).save(output)
    done = run_cli("verify", path, "--plan", output)
    assert done.code == 1, done.out + done.err
    assert "verification failed" in done.out
    assert "Differences" in done.out


@pytest.mark.slow
def test_evaluate_report_and_runs_go_together(run_cli, write_workload, tmp_path, monkeypatch):
    """A run is recorded, listed, and its page can be written again; `--json` is one document."""
    monkeypatch.setenv("REMAT_RUNS", str(tmp_path / "runs"))
    path = write_workload()
    done = run_cli("evaluate", path, "--budget", "90%", "--json", "--no-serving")
    facts = json.loads(done.out)
    assert done.code == 0, facts["run"]["summary"]
    run = Run.from_data(facts["run"], source="stdout")
    assert Run.load(facts["path"]) == run
    assert run.passed

    (entry,) = json.loads(run_cli("runs", "--json").out)
    assert entry["id"] == run.id
    assert entry["passed"] is True
    assert run.id in run_cli("runs").out

    page = tmp_path / "again.html"
    again = run_cli("report", run.id, "-o", page)
    assert again.code == 0
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert run.summary.split()[0] in again.out
    (written,) = json.loads(run_cli("report", run.id, "--json").out)
    assert (written["run"], written["report"]) == (run.id, facts["report"])
    assert set(written["sentences"]) == {"saves", "costs", "right", "watch", "do"}
    assert all(v.story is not None for v in run.variants)


@pytest.mark.slow
def test_evaluate_takes_length_and_seed_from_the_line(run_cli, write_workload, tmp_path):
    """`--epochs`, `--max-steps` and `--seed` take the place of the workload's own."""
    done = run_cli(
        "evaluate", write_workload(), "-b", "90%", "--out", tmp_path / "run", "--seed", 7,
        "--no-serving", "--epochs", 3, "--max-steps", 5,
    )  # fmt: skip
    assert done.code == 0, done.err
    run = Run.load(tmp_path / "run" / "run.json")
    assert (run.seed, run.epochs) == (7, 3)
    assert {len(v.losses) for v in run.variants if v.losses} == {5}  # two steps to an epoch


@pytest.mark.parametrize("option", ["--epochs", "--max-steps", "--seed"])
def test_evaluate_length_or_seed_out_of_range_is_a_usage_error(run_cli, write_workload, option):
    """A number below the least is refused at once, naming the option."""
    done = run_cli("evaluate", write_workload(), option, "-1")
    assert done.code == 2
    assert option in done.err


@pytest.mark.slow
def test_evaluate_infeasible_budget_exits_3(run_cli, write_workload, tmp_path):
    """A budget out of reach is recorded with the least peak, and is the exit code."""
    done = run_cli(
        "evaluate", write_workload(), "--budget", "1KiB", "--out", tmp_path / "run", "--no-serving"
    )
    assert done.code == 3, done.err
    assert Run.load(tmp_path / "run" / "run.json").variants


def test_runs_damaged_one_is_listed_with_the_reason(run_cli, tmp_path):
    """One damaged run hides no other, and no list fails because of it."""
    (tmp_path / "20260101-000000-broken").mkdir()
    (tmp_path / "20260101-000000-broken" / "run.json").write_text("{")
    done = run_cli("runs", "--root", tmp_path)
    assert done.code == 0
    assert "damaged" in done.out
    assert "not JSON" in done.out


def test_runs_of_an_empty_store_says_how_to_make_one(run_cli, tmp_path):
    """An empty list is explained on stderr; stdout stays empty, or `[]` for programs."""
    done = run_cli("runs", "--root", tmp_path)
    assert (done.code, done.out) == (0, "")
    assert "no runs in" in done.err
    assert json.loads(run_cli("runs", "--root", tmp_path, "--json").out) == []
