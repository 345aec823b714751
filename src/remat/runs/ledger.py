"""Files that only grow, one JSON record a line: several processes append, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

from remat.errors import PlanFileError
from remat.files import Record
from remat.runs.locking import locked

_Line = TypeVar("_Line", bound=Record)


def append(path: Path, record: Record) -> None:
    """Write one more line and wait until the disk has it.

    A line that a killed process left unfinished is ended first, so that it spoils no other.
    """
    path.touch()
    with locked(path), path.open("r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        is_torn = False
        if end:
            stream.seek(end - 1)
            is_torn = stream.read(1) != b"\n"
        line = record.model_dump_json().encode() + b"\n"
        stream.write((b"\n" if is_torn else b"") + line)
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path, kind: type[_Line]) -> tuple[list[_Line], int]:
    """Return the lines that can be read, in order, and the number of those that cannot.

    A file that is not there has no lines.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    read_lines = [_parsed(line, kind) for line in lines if line]
    found = [line for line in read_lines if line is not None]
    return found, len(read_lines) - len(found)


def _parsed(line: bytes, kind: type[_Line]) -> _Line | None:
    try:
        return kind.from_data(json.loads(line), source="the line")
    except (PlanFileError, ValueError, RecursionError):
        return None
