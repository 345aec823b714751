"""Files are whole or not there, and records refuse what they do not know."""

import json
import os
from pathlib import Path

import pytest

from remat.errors import PlanFileError
from remat.files import Record, write_atomically


class Inner(Record):
    """A record inside another."""

    size: int


class Outer(Record):
    """A versioned record."""

    schema_version: int = 2
    name: str
    inner: tuple[Inner, ...] = ()


GOOD = {"schema_version": 2, "name": "a", "inner": [{"size": 1}]}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def write(folder: Path, data: object) -> Path:
    path = folder / "outer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_write_atomically_makes_folders_and_replaces(tmp_path):
    """The folder is made, an older file is replaced, and no other file stays behind."""
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, "one")
    write_atomically(path, "two ✓")
    assert path.read_text(encoding="utf-8") == "two ✓"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_write_atomically_interrupted_leaves_the_old_file(tmp_path, monkeypatch, error):
    """Ctrl-C or a full disk while writing leaves the old content and no temporary file."""
    path = write_atomically(tmp_path / "file.txt", "old")

    def fail(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["file.txt"]


def test_record_saved_is_loaded_equal(tmp_path):
    """What was saved is loaded as an equal record."""
    record = Outer(name="a", inner=(Inner(size=1), Inner(size=2)))
    assert Outer.load(record.save(tmp_path / "a.json")) == record


def test_record_is_frozen():
    """A record cannot be changed after it was made."""
    with pytest.raises(ValueError, match="frozen"):
        Inner(size=1).size = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "not valid at extra: Extra inputs are not permitted"),
        ({"inner": [{"size": 1}, {"size": 2, "colour": 3}]}, r"not valid at inner\.1\.colour"),
        ({"inner": [{"size": "many"}]}, r"not valid at inner\.0\.size"),
        ({"name": None}, "not valid at name"),
        ({"name": 1, "inner": 2}, r"not valid at name.*\(and 1 more\)"),
        ({"schema_version": 1}, "has schema_version 1; this remat reads 2"),
        ({"schema_version": None}, "has schema_version None; this remat reads 2"),
    ],
)
def test_record_load_invalid_names_the_field(tmp_path, change, message):
    """Unknown or wrong fields and other versions are refused with file and path of the field."""
    path = write(tmp_path, GOOD | change)
    with pytest.raises(PlanFileError, match=message) as info:
        Outer.load(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": ', b"\xff\xfe\x00", b"[" * 100_000])
def test_record_load_damaged_says_so(tmp_path, content):
    """A cut, empty, binary or absurdly nested file is damaged, not a traceback."""
    path = tmp_path / "outer.json"
    path.write_bytes(content)
    with pytest.raises(PlanFileError, match=r"is damaged|cannot be read"):
        Outer.load(path)


@pytest.mark.parametrize("data", [[], 3, "text", None])
def test_record_load_not_an_object_is_refused(tmp_path, data):
    """JSON that is no object is refused, naming the top level."""
    with pytest.raises(PlanFileError, match="not valid at the top level"):
        Outer.load(write(tmp_path, data))


def test_record_load_missing_file_is_named(tmp_path):
    """A file that is not there, or a folder, is named in the error."""
    with pytest.raises(PlanFileError, match=r"nowhere\.json.*cannot be read"):
        Outer.load(tmp_path / "nowhere.json")
    with pytest.raises(PlanFileError, match="cannot be read"):
        Outer.load(tmp_path)
