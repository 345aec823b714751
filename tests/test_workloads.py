"""Workloads are loaded by name, and their data gives the same batches every time."""

import os
import sys

import pytest
import torch

from remat.errors import WorkloadError
from remat.workload import Workload
from remat.workloads import build_model, first_batch, load_workload, make_batches

pytestmark = pytest.mark.usefixtures("restored_imports")


def make_workload(**changes):
    settings = {"name": "w", "model": lambda: torch.nn.Linear(2, 2), "train_data": range(10)}
    return Workload(**(settings | changes))


def test_load_workload_from_file_finds_the_default_name(write_workload):
    """`PATH.py` names the object `workload` in that file."""
    assert load_workload(str(write_workload())).name == "tiny"


def test_load_workload_function_is_called(write_workload):
    """`PATH.py:NAME` may name a function, which is called."""
    path = write_workload(
        """
        import remat
        def make():
            return remat.Workload(name="made", model=list, train_data=[1])
        """
    )
    assert load_workload(f"{path}:make").name == "made"


def test_load_workload_runs_the_file_as_it_is_now(write_workload, monkeypatch):
    """A change within the second that leaves size and time alike is seen: no bytecode is reused."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    text = 'import remat\nworkload = remat.Workload(name="{}", model=list, train_data=[1])\n'
    path = write_workload(text.format("one"))
    before = path.stat()
    assert load_workload(str(path)).name == "one"
    path.write_text(text.format("two"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_workload(str(path)).name == "two"


def test_load_workload_from_package_in_the_working_directory(write_workload, tmp_path, monkeypatch):
    """`package.module:NAME` is found in the working directory, as with `python -m`."""
    (tmp_path / "pack").mkdir()
    write_workload(name="pack/sub.py")
    monkeypatch.chdir(tmp_path)
    assert load_workload("pack.sub:workload").name == "tiny"


def test_load_workload_neighbour_is_importable_when_the_model_is_built(write_workload):
    """A file beside the workload can be imported, also only when the model is built."""
    write_workload("import torch\nwidth = 3\n", "helper_widths.py")
    path = write_workload(
        """
        import remat, torch
        def build():
            import helper_widths
            return torch.nn.Linear(1, helper_widths.width)
        workload = remat.Workload(name="w", model=build, train_data=[1])
        """
    )
    assert build_model(load_workload(str(path))).out_features == 3


def test_load_workload_dataclass_in_the_file_works(write_workload):
    """The module is in `sys.modules` while it runs, where dataclasses and pickle look for it."""
    path = write_workload(
        """
        from __future__ import annotations
        import dataclasses, remat
        @dataclasses.dataclass
        class Config:
            width: int = 3
        workload = remat.Workload(name="w", model=Config, train_data=[1])
        """
    )
    assert load_workload(str(path)).model.__module__ in sys.modules


def test_load_workload_missing_file_is_named():
    """A file that is not there is named."""
    with pytest.raises(WorkloadError, match=r"'nowhere/mine\.py': there is no such file"):
        load_workload("nowhere/mine.py:workload")


def test_load_workload_folder_or_other_file_is_refused(tmp_path):
    """A folder or a file that is not Python is refused with the expected form."""
    (tmp_path / "mine.txt").write_text("")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(WorkloadError, match=r"is not a Python file: expected PATH\.py"):
            load_workload(str(path))


@pytest.mark.parametrize("name", ["", ":x", "a b", "a-b", "a:b:"])
def test_load_workload_nonsense_name_says_the_form(name):
    """What is neither a path nor a module is refused with the expected form."""
    with pytest.raises(WorkloadError, match=r"is not a name: expected PATH\.py\[:NAME\]"):
        load_workload(name)


@pytest.mark.parametrize("name", ["nowhere_at_all", "json.nowhere:x"])
def test_load_workload_missing_module_is_named(name):
    """A module that is not installed is named, with a word on files."""
    with pytest.raises(
        WorkloadError, match=r"there is no module .* A file is named with its suffix"
    ):
        load_workload(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import remat\n\nraise KeyError('boom')", r"KeyError: 'boom' \(.*mine\.py, line 3\)"),
        ("x = (", r"SyntaxError: .*never closed \(.*mine\.py, line 1\)"),
        ("import nowhere_at_all", r"No module named 'nowhere_at_all' \(.*mine\.py, line 1\)"),
        ("import sys\nsys.exit(3)", r"SystemExit: 3 \(.*mine\.py, line 2\)"),
        ("import json\njson.loads('{')", r"JSONDecodeError: .* \(.*mine\.py, line 2\)"),
    ],
)
def test_load_workload_file_that_raises_tells_file_line_and_error(write_workload, text, message):
    """An error in the file is told with the user's line, not one inside a library."""
    path = write_workload(text)
    before = sys.modules.get("remat_workload_mine")  # of another file of that name
    with pytest.raises(WorkloadError, match=f"cannot be imported: {message}|{message}"):
        load_workload(str(path))
    assert sys.modules.get("remat_workload_mine") is before


def test_load_workload_missing_name_lists_the_workloads_found(write_workload):
    """A name that is missing is answered with the names that could be meant."""
    path = write_workload()
    with pytest.raises(
        WorkloadError, match=rf"has no 'other'\. Workloads in it: {path}:workload\."
    ):
        load_workload(f"{path}:other")
    empty = write_workload("x = 1", "empty.py")
    with pytest.raises(WorkloadError, match=r"no 'workload'\. There is no Workload in it: define"):
        load_workload(str(empty))


def test_load_workload_something_else_is_refused_by_type(write_workload):
    """What is named must be a Workload; the message says what it is."""
    path = write_workload("workload = 3\nclass Thing: pass\ndef bad(): return []\ndef one(a): pass")
    with pytest.raises(WorkloadError, match=r"workload is a int, not a remat\.Workload"):
        load_workload(str(path))
    with pytest.raises(WorkloadError, match="Thing is a type"):
        load_workload(f"{path}:Thing")
    with pytest.raises(WorkloadError, match="bad is a list"):
        load_workload(f"{path}:bad")
    with pytest.raises(WorkloadError, match=r"calling one\(\) raised TypeError"):
        load_workload(f"{path}:one")


def test_build_model_is_seeded_and_leaves_the_generator_alone():
    """The same seed gives the same weights, whatever was drawn before, and nothing is drawn."""
    workload = make_workload(seed=3)
    one = build_model(workload)
    torch.rand(5)
    state = torch.get_rng_state()
    other = build_model(workload)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_build_model_failure_is_the_workloads():
    """A model function that raises, or returns no module, is told as a fault of the workload."""
    with pytest.raises(WorkloadError, match=r"calling model\(\) raised ZeroDivisionError.*line"):
        build_model(make_workload(model=lambda: 1 / 0))
    with pytest.raises(WorkloadError, match=r"returned a dict, expected a torch\.nn\.Module"):
        build_model(make_workload(model=dict))


def test_make_batches_dataset_is_collated_in_order():
    """A dataset of tuples becomes batches of stacked tensors; the last may be smaller."""
    data = [(torch.tensor([float(i)]), i) for i in range(5)]
    batches = list(make_batches(data, 2))
    assert [batch[1].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches[0][0].shape == (2, 1)
    assert len(list(make_batches(data, 2, drop_last=True))) == 2


def test_make_batches_shuffle_follows_the_seed_alone():
    """One seed, one order; and torch's own generator is neither read nor advanced."""
    state = torch.get_rng_state()
    orders = [
        torch.cat(list(make_batches(torch.arange(50), 8, seed=seed, shuffle=True))).tolist()
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))
    assert torch.equal(state, torch.get_rng_state())


def test_make_batches_function_gives_finished_batches():
    """What a function yields is passed on as it is, and again at the next pass."""

    def batches():
        yield {"x": torch.zeros(3)}
        yield {"x": torch.ones(3)}

    for _ in range(2):
        assert [batch["x"].sum().item() for batch in make_batches(batches, 99)] == [0.0, 3.0]


def test_make_batches_loader_is_iterated_as_it_is():
    """A DataLoader already makes batches, and is not batched again."""
    loader = torch.utils.data.DataLoader(torch.arange(6), batch_size=3)
    assert [batch.tolist() for batch in make_batches(loader, 99)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected a dataset of examples.*got int"),
        (lambda: None, "expected a dataset of examples.*got NoneType"),
        (iter([1, 2]), "list_iterator is used up after one pass: pass a function"),
        (lambda: 1 / 0, r"reading the data raised ZeroDivisionError.*test_workloads\.py, line"),
        ([object()], "reading the data raised TypeError"),
    ],
)
def test_make_batches_unusable_data_is_refused(data, message):
    """Data that is no dataset, can be read only once, or raises, is refused with the reason."""
    with pytest.raises(WorkloadError, match=message):
        next(make_batches(data, 2))


def test_first_batch_is_the_first_in_order():
    """Planning sees the first examples, batched as training would."""
    assert first_batch(make_workload(train_data=list(range(10)), batch_size=4)).tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize("data", [[], list])
def test_first_batch_of_nothing_is_refused(data):
    """A dataset or function without any batch is refused, naming the workload."""
    with pytest.raises(WorkloadError, match="workload 'w': train_data holds no batch"):
        first_batch(make_workload(train_data=data))


def test_first_batch_error_names_the_workload():
    """An error in the data names the workload it belongs to."""
    with pytest.raises(WorkloadError, match="workload 'w': train_data: expected a dataset"):
        first_batch(make_workload(train_data=3))
