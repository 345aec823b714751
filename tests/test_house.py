"""The house: imports point down, planning needs no torch, and importing remat costs nothing."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import remat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "remat"
FILES = sorted(path for path in SOURCE.rglob("*.py"))

# From the ground up; a room may import itself and what lies below. `remat/__init__.py` only names
# where things live, and stands outside.
FLOORS = (
    {"units", "errors", "files"},
    {"workload", "workloads", "architectures"},
    {"trace"},
    {"cost"},
    {"planner"},
    {"regions"},
    {"prove"},
    {"program"},
    {"rewriting"},
    {"fit"},
    {"replacing"},
    {"guarding"},
    {"adapting"},
    {"integrations"},
    {"sizing"},
    {"runs"},
    {"report"},
    {"operate"},
    {"calibrating"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and module of every import in a file, also inside functions and for types only.

    A public name (`remat.plan`, `from remat import plan`) stands for the module that it lives in.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "remat":
                for alias in node.names:
                    yield node.lineno, remat._HOME.get(alias.name, f"remat.{alias.name}")
            else:
                yield node.lineno, node.module or ""
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "remat":
            yield node.lineno, remat._HOME.get(node.attr, f"remat.{node.attr}")


def torch_free() -> list[str]:
    """List the modules that must import without torch: planning, records, and what is below."""
    free = [path for path in FILES if path.name == "records.py"]
    free += [
        path for path in FILES if room_of_path(path) in ("planner", "units", "errors", "files")
    ]
    return sorted({module_name(path) for path in free})


def room_of_path(path: Path) -> str:
    name = module_name(path)
    return room_of(name) if "." in name else ""


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    """A room imports only itself and rooms below, even inside functions and for types."""
    room = room_of_path(path)
    if not room:
        return
    assert room in FLOOR_OF, f"{room} has no floor yet: add it to FLOORS and docs/architecture.md"
    upward = [
        f"line {line}: {module}"
        for line, module in imports_of(path)
        if module.startswith("remat.")
        and module != "remat.__version__"
        and FLOOR_OF[room_of(module)] > FLOOR_OF[room]
    ]
    assert not upward, f"{module_name(path)} imports from above: {', '.join(upward)}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_module_begins_with_a_docstring(path):
    """Every module says in its first line what it is for."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    assert text.split("\n")[0].strip(), f"{module_name(path)} does not say what it is for"
    assert tree.body[0].lineno == 1


def test_planning_and_records_import_no_torch(run_process):
    """Plans, solvers and every record are plain data: they load where torch is not installed."""
    code = (
        "import sys, importlib\n"
        "sys.modules['torch'] = None\n"  # importing torch now raises ImportError
        f"for name in {torch_free()!r}: importlib.import_module(name)\n"
    )
    done = run_process("-c", code)
    assert done.code == 0, done.err


@pytest.mark.slow
def test_import_remat_is_fast_and_loads_no_torch(run_process):
    """`import remat` takes under 0.1 s of the processor, the best of five; torch stays out."""
    code = (
        "import sys, time\n"
        "start = time.process_time()\n"
        "import remat\n"
        "print(time.process_time() - start)\n"
        "assert not {'torch', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    results = [run_process("-c", code) for _ in range(5)]
    assert all(done.code == 0 for done in results), results[0].err
    assert min(float(done.out) for done in results) < 0.1


def test_public_names_are_listed_once_and_importable():
    """`__all__` is what the table of homes says, and each name is there and documented."""
    assert len(set(remat.__all__)) == len(remat.__all__)
    assert set(remat.__all__) == set(remat._HOME)
    assert set(remat.__all__) <= set(dir(remat))
    undocumented = [name for name in remat.__all__ if not getattr(remat, name).__doc__]
    assert not undocumented


def test_public_names_for_type_checkers_are_the_same():
    """What type checkers see under TYPE_CHECKING is what is imported at run time."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("remat.")
        for alias in node.names
    }
    assert seen == remat._HOME


def test_unknown_public_name_is_an_attribute_error():
    """A name that is not public fails as any module attribute does."""
    with pytest.raises(AttributeError, match="module 'remat' has no attribute 'plam'"):
        _ = remat.plam


def test_every_error_is_public_and_a_builtin_too():
    """Each error can be caught as `remat.X`, as `RematError`, and as the fitting builtin."""
    errors = importlib.import_module("remat.errors")
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RematError)
    ]
    for kind in kinds:
        assert kind.__name__ in remat.__all__
        builtins = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert kind is errors.RematError or len(builtins) > 3, f"{kind} is no other builtin"


def test_makefile_installs_the_dev_group():
    """The tools that `make` installs are those of the group `dev`, and all of them are pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = {requirement_name(line) for line in project["dependency-groups"]["dev"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^DEV := (.*)$", makefile, re.MULTILINE)
    assert named is not None
    assert set(named[1].split()) == wanted
    extras = project["project"]["optional-dependencies"].values()
    direct = [*project["project"]["dependencies"], *(line for extra in extras for line in extra)]
    wanted |= {requirement_name(line) for line in direct if "python_version <" not in line}
    assert wanted <= pinned(), f"not pinned: {wanted - pinned()}"


def test_constraints_pin_exactly_and_no_build_of_one_machine():
    """Every line pins one release, without a local build label that other machines lack."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.match(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*( ;|$)", line)


def requirement_name(line: str) -> str:
    name = re.match(r"[A-Za-z0-9_.-]+", line)
    assert name is not None
    return name[0].lower().replace("_", "-")


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {requirement_name(line) for line in lines if not line.startswith("#")}
