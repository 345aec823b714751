"""The command line starts fast: what needs no model needs no torch."""

import json

import jsonschema
import pytest

from remat import __version__
from remat.cli.schema import SCHEMAS

NO_TORCH = (
    "import sys\n"
    "sys.modules['torch'] = None\n"  # importing torch now raises ImportError
    "from remat.cli import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plan", "--help"],
        ["evaluate", "--help"],
        ["schema", "plan"],
        ["schema", "run"],
        ["runs"],
    ],
    ids=" ".join,
)
def test_command_without_a_model_imports_no_torch(run_process, tmp_path, arguments):
    """Help, version, schemas and lists come at once, on a machine without torch too."""
    done = run_process("-c", NO_TORCH, *arguments, REMAT_RUNS=str(tmp_path))
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mine.py", "--budget", "8 gigs"], "budget '8 gigs' is not a size"),
        (["verify", "mine.py", "--plan", "nowhere.json"], "nowhere.json"),
        (["evaluate", "mine.py", "--budget", "0"], "budget '0' is not positive"),
        (["report", "nowhere"], "there is no run 'nowhere'"),
        (["plan", "nowhere.py", "--budget", "1GB"], "no such file"),
        (["plan", "mine.py", "-b", "1GB", "--device", "abacus"], "device 'abacus' is not in"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_bad_input_is_known_before_torch_is_loaded(run_process, tmp_path, arguments, message):
    """What is wrong with the line itself is told before seconds are spent on imports."""
    done = run_process("-c", NO_TORCH, *arguments, REMAT_RUNS=str(tmp_path))
    assert done.code == 2
    assert message in done.err


def test_version_is_the_packages(run_cli):
    """`remat --version` prints name and version, and nothing else."""
    assert run_cli("--version") == (0, f"remat {__version__}\n", "") or (
        run_cli("--version").out == f"remat {__version__}\n"
    )


def test_no_arguments_show_the_help(run_cli):
    """`remat` alone shows what there is."""
    alone, asked = run_cli(), run_cli("--help")
    assert alone == asked
    assert alone.code == 0
    assert "evaluate" in alone.out


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_valid_json_schema(run_cli, name):
    """Each schema is one JSON document on stdout, and a valid JSON Schema that refuses extras."""
    done = run_cli("schema", name)
    schema = json.loads(done.out)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert done.code == 0
    assert done.err == ""
    assert schema["additionalProperties"] is False


def test_schema_without_name_lists_the_names(run_cli):
    """`remat schema` lists the names, one per line or as JSON."""
    assert run_cli("schema").out.split() == list(SCHEMAS)
    assert json.loads(run_cli("schema", "--json").out) == list(SCHEMAS)


def test_schema_unknown_name_lists_the_names(run_cli):
    """An unknown schema is answered with those there are."""
    done = run_cli("schema", "plam")
    assert done.code == 2
    assert "there is no schema 'plam'; there are plan, run" in done.err


def test_completion_knows_commands_and_files(run_process, write_workload):
    """Tab completion offers the commands, the names of schemas, and Python files."""
    path = write_workload()
    for line, expected in (
        ("remat ev", "evaluate"),
        ("remat schema ver", "verification"),
        (f"remat plan {path.parent}/mi", str(path)),
    ):
        done = run_process(
            "-m",
            "remat.cli",
            _REMAT_COMPLETE="complete_bash",
            COMP_WORDS=line,
            COMP_CWORD=str(len(line.split()) - 1),
        )
        assert done.out.split() == [expected], done.err
