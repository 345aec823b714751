"""`remat schema`: the JSON Schema of each file and document."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final

import typer

from remat.cli.options import JsonOption

NAME = "schema"
EXAMPLE = "Example: remat schema plan > plan.schema.json"

# Name -> module and class; imported when asked for. None of them imports torch.
SCHEMAS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "plan": ("remat.planner.records", "Plan"),
        "run": ("remat.runs.records", "Run"),
        "verification": ("remat.prove.records", "Verification"),
        "measurement": ("remat.prove.records", "Measurement"),
        "survey": ("remat.sizing.records", "Survey"),
        "simulation": ("remat.prove.records", "Simulation"),
        "gate": ("remat.operate.gate.records", "Gate"),
        "gatereport": ("remat.operate.gate.records", "GateReport"),
        "comparison": ("remat.runs.comparison", "Comparison"),
        "calibration": ("remat.cost.calibration", "Calibration"),
        "experience": ("remat.cost.calibration", "Experience"),
        "check": ("remat.prove.records", "CheckReport"),
    }
)


def _names() -> list[str]:
    return list(SCHEMAS)


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            show_default=False,
            autocompletion=_names,
            help=f"One of {', '.join(SCHEMAS)}. Without it, the names are listed.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Print the JSON Schema of a file or document. Schemas are JSON with or without --json."""
    if name is None:
        typer.echo(json.dumps(list(SCHEMAS)) if as_json else "\n".join(SCHEMAS))
        return 0
    if name not in SCHEMAS:
        raise typer.BadParameter(f"there is no schema {name!r}; there are {', '.join(SCHEMAS)}.")
    module, record = SCHEMAS[name]
    schema = getattr(importlib.import_module(module), record).model_json_schema()
    typer.echo(json.dumps(schema, indent=1))
    return 0
