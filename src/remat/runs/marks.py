"""Tags and notes that people put on runs: a file beside each run that only grows."""

from __future__ import annotations

import datetime as dt
import enum
import getpass
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from remat.errors import DataError
from remat.files import Record
from remat.runs.ledger import append, read

MARKS_FILE = "marks.jsonl"
_TAG = re.compile(r"[\w.:/+-]{1,64}")
_MOST_NOTE_CHARACTERS = 10_000


class MarkKind(str, enum.Enum):
    """What a mark does."""

    TAG = "tag"
    UNTAG = "untag"
    NOTE = "note"


class Mark(Record):
    """One tag put on or taken off, or one note: by whom, and when (UTC, ISO 8601)."""

    at: str
    who: str
    kind: MarkKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The tags that a run has now, and its notes in order."""

    tags: tuple[str, ...] = ()
    notes: tuple[Mark, ...] = ()
    num_damaged: int = 0


def read_marks(folder: Path) -> Marks:
    """Read the tags and notes of the run in a folder; lines that cannot be read are counted."""
    lines, num_damaged = read(folder / MARKS_FILE, Mark)
    tags: dict[str, None] = {}
    for mark in lines:
        if mark.kind is MarkKind.TAG:
            tags[mark.text] = None
        elif mark.kind is MarkKind.UNTAG:
            tags.pop(mark.text, None)
    notes = tuple(mark for mark in lines if mark.kind is MarkKind.NOTE)
    return Marks(tags=tuple(sorted(tags)), notes=notes, num_damaged=num_damaged)


def set_tags(folder: Path, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Marks:
    """Put tags on a run and take others off, and return what it has then.

    Raises
    ------
    DataError: for a tag that is not one word of up to 64 letters, digits and `. _ - : / +`.
    """
    wanted = [(MarkKind.TAG, tag) for tag in add] + [(MarkKind.UNTAG, tag) for tag in remove]
    for _, tag in wanted:
        if not _TAG.fullmatch(tag):
            raise DataError(
                f"tag {tag!r} is not one word of up to 64 letters, digits and . _ - : / +."
            )
    for kind, tag in wanted:
        _add(folder, kind, tag)
    return read_marks(folder)


def add_note(folder: Path, text: str) -> Marks:
    """Add a note to a run, and return all that it has then.

    Raises
    ------
    DataError: for a note that is empty, or longer than 10,000 characters.
    """
    if not text.strip() or len(text) > _MOST_NOTE_CHARACTERS:
        raise DataError(f"a note has 1 to {_MOST_NOTE_CHARACTERS:,} characters, got {len(text)}.")
    _add(folder, MarkKind.NOTE, text.strip())
    return read_marks(folder)


def user_name() -> str:
    """Name of the user that this process runs as; `unknown` where the system does not say."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"


def now_utc() -> str:
    """Return the time now, UTC, ISO 8601, in whole seconds."""
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")


def _add(folder: Path, kind: MarkKind, text: str) -> None:
    append(folder / MARKS_FILE, Mark(at=now_utc(), who=user_name(), kind=kind, text=text))
