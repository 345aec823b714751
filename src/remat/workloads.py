"""Workloads by name, and the batches that their data gives: the one place that makes batches."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from remat.errors import WorkloadError
from remat.workload import Batch, Workload

if TYPE_CHECKING:
    from torch import nn

_T = TypeVar("_T")
DEFAULT_NAME = "workload"
# Where code lies that is not the user's: remat, installed packages, Python, its import system.
_NOT_THE_USERS = (
    str(Path(__file__).parent),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("stdlib"),
    "<frozen ",
)
_EXPECTED = "PATH.py[:NAME] or package.module[:NAME]"


def load_workload(name: str) -> Workload:
    """Load the workload that `PATH.py[:NAME]` or `package.module[:NAME]` names.

    NAME is `workload` unless given; a function is called. The file's directory (or, for a module,
    the working directory) is put at the end of `sys.path` and stays there, because a workload may
    import its neighbours only when its model is built.

    Raises
    ------
    WorkloadError: if there is no such file or module, if importing or calling it raises (with the
        file, line and error), or if what is named is missing or no Workload.

    Example
    -------
    >>> load_workload("nowhere.py")
    Traceback (most recent call last):
    remat.errors.WorkloadError: workload 'nowhere.py': there is no such file.
    """
    place, attribute = _split(name)
    module = _import_file(Path(place)) if _is_path(place) else _import_module(place)
    if not hasattr(module, attribute):
        raise WorkloadError(
            f"workload {name!r}: {place} has no {attribute!r}. {_workloads_in(module, place)}"
        )
    found = getattr(module, attribute)
    if inspect.isroutine(found):
        try:
            found = found()
        except Exception as error:  # the user's function may raise anything
            raise WorkloadError(
                f"workload {name!r}: calling {attribute}() raised {where_raised(error)}."
            ) from error
    if not isinstance(found, Workload):
        raise WorkloadError(
            f"workload {name!r}: {attribute} is a {type(found).__name__}, not a remat.Workload (or "
            f"a function that returns one). {_workloads_in(module, place)}"
        )
    return found


def build_model(workload: Workload) -> nn.Module:
    """Build the workload's model from its seed; torch's global generator is left as it was.

    Raises
    ------
    WorkloadError: if building it raises (with the file, line and error), or gives no module.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        return call_model(workload)


def call_model(workload: Workload) -> nn.Module:
    """Build the workload's model from the random state as it stands; errors as `build_model`."""
    import torch

    try:
        model: object = workload.model()
    except Exception as error:  # the user's function may raise anything
        raise WorkloadError(
            f"workload {workload.name!r}: calling model() raised {where_raised(error)}."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise WorkloadError(
            f"workload {workload.name!r}: model() returned a {type(model).__name__}, expected a "
            "torch.nn.Module."
        )
    return model


def first_batch(workload: Workload) -> Batch:
    """Make the first batch that training would see, in the order of the data.

    Raises
    ------
    WorkloadError: if the training data cannot be read, or holds no batch.
    """
    return next(workload_batches(workload, "train_data", seed=workload.seed))


def workload_batches(
    workload: Workload,
    part: Literal["train_data", "eval_data"],
    *,
    seed: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Yield one pass over the workload's data as `make_batches` does; errors name the workload.

    Raises
    ------
    WorkloadError: if there is no batch, or reading the data raises.
    """
    count = 0
    try:
        for batch in make_batches(
            getattr(workload, part),
            workload.batch_size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
        ):
            count += 1
            yield batch
    except WorkloadError as error:
        where = f" behind {count} batches" if count else ""
        raise WorkloadError(f"workload {workload.name!r}: {part}{where}: {error}") from error
    if count == 0:
        raise WorkloadError(
            f"workload {workload.name!r}: {part} holds no batch. Expected at least one example "
            "or, from a function, one batch; a function must give a new iterable at each call."
        )


def num_examples_in(data: Any) -> int | None:  # the user's dataset, or what gives batches
    """Count the examples of a dataset; `None` for data that come as finished batches."""
    is_dataset = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    # a class, such as a dataset's own that was not called, is refused where batches are made
    return len(data) if is_dataset and not isinstance(data, type) else None


def make_batches(
    data: Any,  # the user's dataset, or a function that gives batches
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = False,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Yield the batches of one pass over `data`.

    Arguments
    ---------
    data: a map-style dataset of examples, batched and collated here; or a function that returns an
        iterable of finished batches, which `batch_size`, `shuffle` and `drop_last` leave alone.
    seed: of the shuffle. The same seed gives the same order, and torch's global generator is
        neither read nor advanced.
    drop_last: leave out an incomplete last batch, unless it is the only one.

    Raises
    ------
    WorkloadError: if `data` is neither, or reading it raises (with the file, line and error).
    """
    try:
        if isinstance(data, type) or (callable(data) and not hasattr(data, "__getitem__")):
            yield from _finished_batches(data())
        elif (count := num_examples_in(data)) is not None:
            from torch.utils.data import DataLoader

            yield from DataLoader(
                data,
                batch_size=batch_size,
                # an empty dataset gives no batch; DataLoader's random sampler would raise instead
                shuffle=shuffle and count > 0,
                drop_last=drop_last and count >= batch_size,
                generator=_generator(seed),
            )
        else:
            _refuse_one_pass(data)
            yield from _finished_batches(data)
    except WorkloadError:
        raise
    except Exception as error:  # the user's dataset may raise anything
        raise WorkloadError(f"reading the data raised {where_raised(error)}.") from error


def _generator(seed: int) -> Any:  # a torch.Generator; torch is imported only where it is needed
    import torch

    return torch.Generator().manual_seed(seed)


def _refuse_one_pass(data: object) -> None:
    if isinstance(data, Iterator):
        raise WorkloadError(
            f"a {type(data).__name__} is used up after one pass: pass a function that makes it."
        )


def _finished_batches(data: object) -> Iterable[Batch]:
    if isinstance(data, Iterable):
        return data
    raise WorkloadError(
        "expected a dataset of examples (with __len__ and __getitem__), or a function that returns "
        f"an iterable of finished batches, got {type(data).__name__}."
    )


def _split(name: str) -> tuple[str, str]:
    """Split `PLACE[:NAME]`; a colon that no identifier follows belongs to the place."""
    place, colon, attribute = name.rpartition(":")
    if colon and place and attribute.isidentifier():
        return place, attribute
    if not name or (colon and not _is_path(name)):
        raise WorkloadError(f"workload {name!r} is not a name: expected {_EXPECTED}.")
    return name, DEFAULT_NAME


def _is_path(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _import_file(path: Path) -> ModuleType:
    if not path.exists():
        raise WorkloadError(f"workload {str(path)!r}: there is no such file.")
    if path.is_dir() or path.suffix != ".py":
        raise WorkloadError(f"workload {str(path)!r} is not a Python file: expected {_EXPECTED}.")
    path = path.resolve()
    name = f"remat_workload_{path.stem}"
    loader = _SourceLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # the loader is given
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.parent)
    previous = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses and pickle look their module up while it runs
    try:
        _run_import(lambda: loader.exec_module(module), str(path))
    except BaseException:
        if previous is None:
            del sys.modules[name]
        else:
            sys.modules[name] = previous
        raise
    return module


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Runs a file's source as it is now.

    Python's cache of bytecode goes by the file's size and its time in seconds: a file that was
    changed within the second would run, and be recorded, as what it was before.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise WorkloadError(f"workload {name!r} is not a name: expected {_EXPECTED}.")
    _make_importable(Path.cwd())
    try:
        return _run_import(lambda: importlib.import_module(name), name)
    except WorkloadError as error:
        missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
        if missing is not None and (name == missing or name.startswith(f"{missing}.")):
            raise WorkloadError(
                f"workload {name!r}: there is no module {missing!r} here or among the installed "
                f"packages. A file is named with its suffix: expected {_EXPECTED}."
            ) from error
        raise


def _run_import(execute: Callable[[], _T], what: str) -> _T:
    try:
        return execute()
    except (Exception, SystemExit) as error:  # the user's file may raise, or even exit
        raise WorkloadError(
            f"workload {what!r} cannot be imported: {where_raised(error)}."
        ) from error


def _make_importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _workloads_in(module: ModuleType, place: str) -> str:
    names = [name for name, value in vars(module).items() if isinstance(value, Workload)]
    if not names:
        return "There is no Workload in it: define `workload = remat.Workload(...)`."
    return "Workloads in it: " + ", ".join(f"{place}:{name}" for name in names) + "."


def where_raised(error: BaseException) -> str:
    """Say what was raised, and in which line of the user's own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    places = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    place = f" ({places[-1][0]}, line {places[-1][1]})" if places else ""
    text = str(error).strip()
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"
