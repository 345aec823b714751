"""Rules read from `gate.toml`, with an error that names the file and the field."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from remat.errors import BudgetFormatError, GateError, PlanFileError
from remat.operate.gate.records import Gate
from remat.units import parse_budget

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_rules(path: str | os.PathLike[str] | None) -> Gate:
    """Read the rules of a gate; without a file, the default ones.

    Raises
    ------
    GateError: if the file cannot be read, is no TOML, has another schema version, a field that is
        not known, or a value that is not allowed; names the file and the field.
    """
    if path is None:
        return Gate()
    source = f"rules file {os.fspath(path)!r}"
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GateError(f"{source} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise GateError(f"{source} is not TOML: {error}.") from error
    try:
        # dates, which no rule has, become text, and are refused as such
        rules = Gate.from_data(json.loads(json.dumps(data, default=str)), source)
    except PlanFileError as error:
        raise GateError(str(error)) from error
    if rules.peak.max is not None:
        try:
            parse_budget(rules.peak.max)
        except BudgetFormatError as error:
            raise GateError(f"{source} is not valid at peak.max: {error}") from error
    return rules
