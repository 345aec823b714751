"""Files that are never half written, and JSON records whose unknown fields are refused by path."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from remat.errors import PlanFileError

# Any: parsed JSON.


# How records write what JSON has no number for.
_NOT_FINITE = frozenset({"Infinity", "-Infinity", "NaN"})


def write_atomically(path: str | os.PathLike[str], text: str) -> Path:
    """Write text under a temporary name, then rename it: a reader sees all of it or none."""
    return write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write bytes under a temporary name, then rename it: a reader sees all of it or none."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=".part"
    )
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target


class Record(BaseModel):
    """A frozen record that is written as JSON and read back strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record as JSON; a killed run leaves the old file or none, never half of one."""
        return write_atomically(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record written by `save`.

        Raises
        ------
        PlanFileError: if the file is missing, damaged, of another schema version, or has fields
            that this version does not know; the message names the field's path.
        """
        what = cls.__name__
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanFileError(
                f"{what} file {os.fspath(path)!r} cannot be read: {error}."
            ) from error
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanFileError(
                f"{what} file {os.fspath(path)!r} is damaged: not JSON ({error}). Make it again."
            ) from error
        return cls.from_data(data, source=f"{what} file {os.fspath(path)!r}")

    @classmethod
    def from_data(cls, data: object, source: str) -> Self:
        """Build the record from parsed JSON, naming `source` and the field's path on error."""
        expected = cls.model_fields.get("schema_version")
        if expected is not None and isinstance(data, dict):
            version = data.get("schema_version")
            if version != expected.default:
                raise PlanFileError(
                    f"{source} has schema_version {version!r}; this remat reads "
                    f"{expected.default!r}. Make it again with this version."
                )
        try:
            return cls._validated(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the top level"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise PlanFileError(
                f"{source} is not valid at {where}: {first['msg']}{more}. "
                f"`remat schema {cls.__name__.lower()}` prints what is expected."
            ) from error

    @classmethod
    def _validated(cls, data: object) -> Self:
        """Validate without turning text into numbers, but for the words that stand for infinity."""
        try:
            return cls.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            words = [
                problem["loc"]
                for problem in error.errors(include_url=False)
                if problem["type"] == "float_type" and str(problem["input"]) in _NOT_FINITE
            ]
            if not words:
                raise
        return cls.model_validate_json(json.dumps(_with_floats(data, set(words))), strict=True)


def _with_floats(value: Any, places: set[tuple[int | str, ...]]) -> Any:
    """Copy parsed JSON with the words at some places read as floats."""
    if () in places:
        return float(value)
    if not isinstance(value, (dict, list)):
        return value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {
        key: _with_floats(item, {place[1:] for place in places if place and place[0] == key})
        for key, item in items
    }
    return changed if isinstance(value, dict) else list(changed.values())
