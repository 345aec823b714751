"""Artifacts by their content: written once under their SHA-256, referenced by runs, collected.

NOTE [ Collection ]
A run that is being written puts its artifacts first and names them in run.json afterwards, so that
a reference always has its object. Between the two, and after a crash there, an object has no
reference: `collect` leaves what is younger than a given age. Putting what is there already makes it
young again, under the lock that `collect` holds while it removes: an object is never taken from
under the run that is about to name it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remat.errors import RunError
from remat.files import write_bytes_atomically
from remat.runs.locking import locked
from remat.runs.records import Artifact

OBJECTS_FOLDER = "objects"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Objects:
    """The artifacts in one folder, each in a file named by the SHA-256 of its bytes."""

    folder: Path

    def put(self, data: bytes, *, name: str, media_type: str) -> Artifact:
        """Keep some bytes, and return how a run names them."""
        digest = hashlib.sha256(data).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            if not self._touched(digest):
                write_bytes_atomically(self.path(digest), data)
        return Artifact(name=name, sha256=digest, size_bytes=len(data), media_type=media_type)

    def put_file(self, source: Path, *, name: str, media_type: str) -> Artifact:
        """Take a file that was written into this folder under a name of its own, and name it."""
        digest, size = _digest_of(source), source.stat().st_size
        with locked(self.folder):
            if self._touched(digest):
                source.unlink()
            else:
                source.replace(self.path(digest))
                os.utime(self.path(digest))
        return Artifact(name=name, sha256=digest, size_bytes=size, media_type=media_type)

    def path(self, digest: str) -> Path:
        """Where the object of a digest lies, if it is there."""
        return self.folder / digest

    def read(self, digest: str) -> bytes:
        """Return the bytes of an object, checked against its name.

        Raises
        ------
        RunError: if it is not there, or its bytes are not those that were put.
        """
        try:
            data = self.path(digest).read_bytes()
        except OSError as error:
            raise RunError(
                f"artifact {digest} is not in {os.fspath(self.folder)!r}: {error.strerror}."
            ) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise RunError(
                f"artifact {digest} in {os.fspath(self.folder)!r} is damaged: its bytes are not "
                "those that were put."
            )
        return data

    def digests(self) -> Iterator[str]:
        """Yield the digest of every object that is there."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as found:
            for entry in found:
                if _DIGEST.fullmatch(entry.name):
                    yield entry.name

    def collect(
        self, referenced: frozenset[str], *, older_than_seconds: float, now: float | None = None
    ) -> tuple[list[str], int]:
        """Remove what is not referenced and old enough; return the digests and bytes removed.

        What a killed writer left unfinished goes by age, too. See NOTE [ Collection ].
        """
        limit = (time.time() if now is None else now) - older_than_seconds
        removed: list[str] = []
        freed = 0
        if not self.folder.is_dir():
            return removed, freed
        with locked(self.folder), os.scandir(self.folder) as found:
            for entry in list(found):
                is_object = _DIGEST.fullmatch(entry.name) is not None
                is_part = entry.name.startswith(".") and entry.name.endswith(".part")
                if not (is_object or is_part) or entry.name in referenced:
                    continue
                facts = entry.stat()
                if facts.st_mtime <= limit:
                    Path(entry.path).unlink()
                    removed.append(entry.name)
                    freed += facts.st_size
        return sorted(removed), freed

    def _touched(self, digest: str) -> bool:
        """Make an object young again; False where it is not there, or is not what it should be."""
        path = self.path(digest)
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return _digest_of(path) == digest


def objects_of(folder: Path) -> Objects:
    """Return where the artifacts of the run in a folder lie: in it, or beside it in its store."""
    inside = folder / OBJECTS_FOLDER
    return Objects(inside if inside.is_dir() else folder.resolve().parent / OBJECTS_FOLDER)


def _digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
