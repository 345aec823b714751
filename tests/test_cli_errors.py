"""Every bad input ends with its exit code and one line that names it; never with a traceback."""

import json
import signal
import subprocess
import sys
import time

import pytest

from remat import errors
from remat.cli.errors import EXIT_CODES, INTERNAL, report
from remat.planner.records import Fingerprint, Outcome, Plan, Region, TensorSignature
from remat.runs.records import Run, RunStatus

MIB = 2**20


@pytest.fixture
def plan_data() -> dict[str, object]:
    """A plan for some other model, as parsed JSON."""
    made_for = Fingerprint(
        model_class="elsewhere.Other",
        parameters=(TensorSignature(name="weight", shape=(3, 3), dtype="float32"),),
        buffers=(),
        batch=(TensorSignature(name="0", shape=(8, 3), dtype="float32"),),
        device_type="cpu",
        training=True,
        loss="model output",
        optimizer="AdamW",
        torch_version="2.13.0",
        remat_version="0.1.0",
    )
    plan = Plan(
        fingerprint=made_for,
        budget_bytes=80 * MIB,
        predicted_peak_bytes=70 * MIB,
        keep_all_peak_bytes=100 * MIB,
        forward_seconds=0.1,
        step_seconds=0.3,
        recompute_seconds=0.01,
        recompute_fraction=0.1,
        lower_bound_fraction=0.05,
        gap=0.05,
        outcome=Outcome.FEASIBLE,
        regions=(Region(module="block.0", freed_bytes=MIB, recompute_seconds=0.01),),
        breakdown={"parameters": 70 * MIB},
    )
    return plan.model_dump(mode="json")


def check_error(done, code, *parts):
    """One line on stderr that begins with `error:` and has all parts; nothing on stdout."""
    lines = [line for line in done.err.splitlines() if not line.endswith("...")]
    assert done.code == code, done
    assert done.out == ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def all_kinds(kind: type) -> set[type]:
    return {kind}.union(*(all_kinds(child) for child in kind.__subclasses__()))


def test_exit_codes_table_is_complete():
    """Each error that remat raises has its exit code in one table, and 1 is not among them."""
    ours = {kind for kind in all_kinds(errors.RematError) if kind.__module__.startswith("remat.")}
    assert set(EXIT_CODES) == ours
    assert set(EXIT_CODES.values()) == {2, 3}
    assert [kind for kind, code in EXIT_CODES.items() if code == 3] == [errors.BudgetError]


@pytest.mark.parametrize("command", ["plan", "evaluate"])
@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("8 gigs", "budget '8 gigs' is not a size: expected"),
        ("0", "budget '0' is not positive: expected"),
        ("-8GiB", "budget '-8GiB' is not a size: expected"),
        ("0%", "budget '0%' is not positive"),
        ("", "budget '' is not a size"),
    ],
)
def test_budget_unreadable_is_bad_input(run_cli, write_workload, command, budget, message):
    """A budget that is no size names what was given and what is expected."""
    check_error(run_cli(command, write_workload(), f"--budget={budget}"), 2, message, "8GiB")


@pytest.mark.parametrize("command", ["plan", "verify", "evaluate"])
def test_workload_that_does_not_import_is_bad_input(
    run_cli, write_workload, tmp_path, plan_data, command
):
    """A workload file that raises names file, line and error, for every command that reads one."""
    path = write_workload("x = 1\nraise ValueError('two\\nlines')")
    (tmp_path / "plan.json").write_text(json.dumps(plan_data))
    more = {
        "plan": ["--budget", "60%"],
        "verify": ["--plan", tmp_path / "plan.json"],
        "evaluate": ["--out", tmp_path / "run"],
    }
    done = run_cli(command, path, *more[command])
    check_error(done, 2, "cannot be imported: ValueError: two lines", "mine.py, line 2")
    assert not (tmp_path / "run").exists()


def test_workload_without_data_is_bad_input(run_cli, write_workload):
    """A workload whose data hold no batch says so."""
    path = write_workload(
        "import remat, torch\n"
        "workload = remat.Workload(name='w', model=lambda: torch.nn.Linear(1, 1), train_data=[])"
    )
    check_error(run_cli("plan", path, "--budget", "1GiB"), 2, "train_data holds no batch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "not valid at surprise: Extra inputs are not permitted"),
        ({"schema_version": 99}, "has schema_version 99; this remat reads 1"),
        ({"outcome": "maybe"}, "not valid at outcome"),
        ({"regions": [{"module": "a", "colour": 1}]}, "not valid at regions.0.colour"),
    ],
)
def test_plan_file_that_is_not_valid_names_the_field(
    run_cli, write_workload, tmp_path, plan_data, change, message
):
    """An unknown field, value or version of a plan file is named with its path."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data | change))
    check_error(run_cli("verify", write_workload(), "--plan", path), 2, message, str(path))


@pytest.mark.parametrize("content", ["", '{"schema_version": 1', "\x00"])
def test_plan_file_that_is_damaged_is_bad_input(run_cli, write_workload, tmp_path, content):
    """A plan file that was cut off is said to be damaged."""
    path = tmp_path / "plan.json"
    path.write_text(content)
    check_error(run_cli("verify", write_workload(), "--plan", path), 2, "is damaged: not JSON")


def test_plan_for_another_model_is_bad_input(run_cli, write_workload, tmp_path, plan_data):
    """A plan that was made for another model names the first difference."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_data))
    done = run_cli("verify", write_workload(), "--plan", path)
    check_error(done, 2, "elsewhere.Other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plam"], "No such command 'plam'. Did you mean 'plan'?"),
        (["plan", "mine.py", "--budgte", "1GB"], "No such option: --budgte"),
        (["plan", "mine.py"], "give a --budget, or --frontier N"),
        (["plan", "--budget", "1GB"], "give a WORKLOAD, or --hf-config with --batch"),
        (["plan", "a.py", "-b", "1GB", "--batch", "1x1"], "take the place of WORKLOAD"),
        (["plan", "a.py", "-b", "1GB", "-o", "."], "is a directory"),
        (["plan", "a.py", "--frontier", "4", "-o", "x.json"], "give a --budget"),
        (["plan", "a.py", "-b", "1GB", "--device", "abacus"], "abacus"),
        (["verify", "mine.py"], "Missing option '--plan'"),
        (["evaluate"], "Missing argument 'WORKLOAD'"),
        (["report"], "Missing argument 'RUN"),
        (["report", "nowhere"], "there is no run 'nowhere'"),
        (["report", "a", "b", "-o", "x.html"], "there is no run 'a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_usage_error_says_what_to_give(run_cli, tmp_path, monkeypatch, arguments, message):
    """A wrong line is told in one line, with what is missing or misspelt."""
    monkeypatch.chdir(tmp_path)
    check_error(run_cli(*arguments), 2, message)


@pytest.mark.parametrize("arguments", [["plam"], ["plan", "a.py", "-b", "8 gigs"], ["report", "x"]])
def test_error_with_json_is_json_on_stdout(run_cli, arguments):
    """With `--json` a program reads kind, message and exit code on stdout; people read stderr."""
    done = run_cli(*arguments, "--json")
    facts = json.loads(done.out)
    assert facts["exit_code"] == done.code == 2
    assert done.err == f"error: {facts['message']}\n"
    assert facts["error"] in ("UsageError", "BudgetFormatError", "RunError")


def test_missing_package_says_how_to_install_it(run_cli, tmp_path, monkeypatch):
    """Without Transformers, `--hf-config` names the command that installs it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = run_cli("plan", "-b", "1GB", "--hf-config", tmp_path, "--batch", "1x8")
    check_error(done, 2, "pip install 'remat[text]'", "'transformers', which is not installed")


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        ('{"model_type": "lama"}', "1x8", "model_type 'lama' is not one that Transformers"),
        ('{"model_type": "gpt2", "n_layer": "two"}', "1x8", "n_layer"),
        ('{"hidden_size": 8}', "1x8", 'has no "model_type"'),
        ("{", "1x8", "is damaged: not JSON"),
        ('{"model_type": "gpt2", "n_embd": 63}', "1x8", "GPT2LMHeadModel cannot be built"),
        ('{"model_type": "wav2vec2"}', "1x8", "is no language model or image classifier"),
        ('{"model_type": "gpt2"}', "4 by 8", "batch '4 by 8' is not one for GPT2LMHeadModel"),
        ('{"model_type": "gpt2"}', "0x8", "expected SEQUENCESxTOKENS, such as 4x1024"),
        ('{"model_type": "gpt2"}', "1x2048", "has 2048 tokens, but config"),
        ('{"model_type": "t5"}', "1x8", "has no 'decoder_start_token_id', which t5 needs"),
        ('{"model_type": "resnet"}', "1x8", "expected IMAGESxCHANNELSxHEIGHTxWIDTH"),
    ],
)
def test_hf_config_that_cannot_be_used_is_bad_input(run_cli, tmp_path, config, batch, message):
    """An unknown architecture or nonsense batch is named, with what is expected."""
    pytest.importorskip("transformers", reason="needs the extra 'text'", exc_type=ImportError)
    (tmp_path / "config.json").write_text(config)
    done = run_cli("plan", "-b", "1GB", "--hf-config", tmp_path, "--batch", batch)
    check_error(done, 2, message)


def test_hf_config_that_is_missing_is_bad_input(run_cli, tmp_path):
    """A config file that is not there is named."""
    done = run_cli("plan", "-b", "1GB", "--hf-config", tmp_path / "no.json", "--batch", "1x8")
    check_error(done, 2, "no.json' cannot be read: No such file or directory")


def test_fault_of_ours_says_so_and_how_to_report_it(capsys):
    """What remat did not raise on purpose is called its own fault, with versions to report."""
    with pytest.raises(KeyError) as info:
        _ = {}["surprise"]
    assert report(info.value, as_json=False, is_debug=False) == INTERNAL == 70
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: this is a fault of remat, not of your input: KeyError")
    assert "test_cli_errors.py, line" in told.err
    assert "--debug" in told.err
    assert "Traceback" not in told.err
    assert len(told.err.splitlines()) == 1


def test_out_of_memory_and_full_disk_are_no_fault_of_ours(capsys):
    """A machine at its end is told in plain words."""
    assert report(MemoryError("8 GB"), as_json=False, is_debug=False) == 2
    assert "the machine ran out of memory" in capsys.readouterr().err
    full = OSError(28, "No space left on device", "plan.json")
    assert report(full, as_json=False, is_debug=False) == 2
    assert capsys.readouterr().err == "error: 'plan.json': No space left on device.\n"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback(run_cli, monkeypatch, way):
    """`--debug` anywhere in the line, or REMAT_DEBUG=1, shows where an error comes from."""
    if way == "variable":
        monkeypatch.setenv("REMAT_DEBUG", "1")
    done = run_cli("report", "nowhere", *(["--debug"] if way == "option" else []))
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: there is no run 'nowhere'")


def test_infeasible_budget_exits_3_with_the_least_peak(run_cli, write_workload):
    """A budget out of reach says what is reachable and what fills it, for people and programs."""
    path = write_workload()
    done = run_cli("plan", path, "--budget", "1KiB", "--json")
    facts = json.loads(done.out)
    assert done.code == facts["exit_code"] == 3
    assert facts["error"] == "BudgetError"
    assert facts["minimum_bytes"] > facts["budget_bytes"] == 1024
    assert sum(facts["blame"].values()) > 0
    check_error(run_cli("plan", path, "--budget", "1KiB"), 3, "1.0 KiB", "least peak")


def interrupt(marker, *arguments):
    """Run `remat ARGUMENTS`, send Ctrl-C once `marker` is told on stderr, and say how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remat.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    told = ""
    deadline = time.monotonic() + 120
    while marker not in told and time.monotonic() < deadline:
        told += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


INTERRUPTED = "error: interrupted. No file was left half written.\n"


@pytest.mark.slow
def test_interrupt_exits_130_and_leaves_no_file(write_workload, tmp_path):
    """Ctrl-C while a model is built ends with one line, exit code 130, and no file of ours."""
    path = write_workload(
        """
        import sys, time
        import remat
        def build():
            sys.stderr.write("building\\n")
            sys.stderr.flush()
            time.sleep(60)
        workload = remat.Workload(name="slow", model=build, train_data=[1])
        """
    )
    before = set(tmp_path.iterdir())
    ended = interrupt("building", "plan", path, "-b", "1GB", "-o", tmp_path / "plan.json")
    assert ended == (130, "", INTERRUPTED)
    assert set(tmp_path.iterdir()) - {tmp_path / "__pycache__"} == before


@pytest.fixture
def heeds_interrupts():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupt_that_was_swallowed_is_told_again(run_cli, write_workload):
    """As by a destructor or a library's callback that was running when it came."""
    path = write_workload(
        """
        import signal
        import torch
        import remat
        def build():
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
            return torch.nn.Linear(4, 4)
        workload = remat.Workload(
            name="tiny", model=build, train_data=[torch.randn(8, 4)],
            loss=lambda model, batch: model(batch).square().mean(),
        )
        """
    )
    ended = run_cli("plan", path, "-b", "90%")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.endswith(INTERRUPTED)


@pytest.mark.slow
def test_interrupt_of_an_evaluation_leaves_a_run_that_can_be_read(write_workload, tmp_path):
    """Ctrl-C in the middle of an evaluation leaves a whole run.json that says unfinished."""
    folder = tmp_path / "run"
    code, out, err = interrupt(
        "time steps in turn", "evaluate", write_workload(), "-b", "90%", "--out", folder
    )
    assert (code, out) == (130, "")
    assert err.endswith(INTERRUPTED)
    run = Run.load(folder / "run.json")
    assert run.status is RunStatus.UNFINISHED
    assert not run.passed
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]
