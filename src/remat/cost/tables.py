"""Tables: TOML files of rows by device, read with their form checked and not yet their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from remat.errors import DeviceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Any: what TOML holds is checked by whoever reads the rows.


def read_table(path: Path, what: str, *, schema_version: int) -> dict[str, Any]:
    """Return what a file holds beside its version; `what` names the table in messages.

    Raises
    ------
    DeviceError: if the file cannot be read, is no TOML, or is of another version.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{what} {str(path)!r} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"{what} {str(path)!r} is damaged: not TOML ({error}).") from error
    version = data.pop("schema_version", None)
    if isinstance(version, bool) or version != schema_version:
        raise DeviceError(
            f"{what} {str(path)!r} has schema_version {version!r}; "
            f"this remat reads {schema_version!r}."
        )
    return data
