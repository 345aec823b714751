"""remat: fit a PyTorch training step into a memory budget, and prove that nothing else changed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from remat.adapting.adapt import Adaptive, Planned, adapt
    from remat.calibrating.measuring import calibrate
    from remat.cost.calibration import Calibration
    from remat.cost.devices import Device, load_devices
    from remat.cost.measured import measure_cost
    from remat.errors import (
        ApplyError,
        BudgetError,
        BudgetFormatError,
        CaptureError,
        DataError,
        DeviceError,
        GateError,
        MissingPackageError,
        PlanFileError,
        PlanMismatchError,
        RematError,
        RunError,
        VerificationError,
        WorkloadError,
    )
    from remat.evaluation.evaluate import evaluate
    from remat.evaluation.pricing import ExpenseOptions
    from remat.evaluation.serving.options import ServingOptions
    from remat.fit import auto_checkpoint, frontier, plan
    from remat.guarding import Guard, guard
    from remat.planner.records import Hazard, Outcome, Plan, Region, Severity
    from remat.prove.check import check
    from remat.prove.measure import measure
    from remat.prove.records import (
        CheckReport,
        GuardEvent,
        Measurement,
        Simulation,
        Verification,
    )
    from remat.prove.simulate import simulate
    from remat.prove.verify import verify
    from remat.regions.apply import Handle, apply
    from remat.replacing import replace_checkpointing
    from remat.sizing.largest import LargestBatch, largest_batch
    from remat.workload import Workload

# Public name -> module that defines it; imported on first use: `import remat` loads no torch.
_HOME = {
    "auto_checkpoint": "remat.fit",
    "plan": "remat.fit",
    "frontier": "remat.fit",
    "apply": "remat.regions.apply",
    "Handle": "remat.regions.apply",
    "measure": "remat.prove.measure",
    "measure_cost": "remat.cost.measured",
    "calibrate": "remat.calibrating.measuring",
    "Calibration": "remat.cost.calibration",
    "simulate": "remat.prove.simulate",
    "verify": "remat.prove.verify",
    "check": "remat.prove.check",
    "replace_checkpointing": "remat.replacing",
    "adapt": "remat.adapting.adapt",
    "Adaptive": "remat.adapting.adapt",
    "Planned": "remat.adapting.adapt",
    "guard": "remat.guarding",
    "Guard": "remat.guarding",
    "GuardEvent": "remat.prove.records",
    "evaluate": "remat.evaluation.evaluate",
    "ServingOptions": "remat.evaluation.serving.options",
    "ExpenseOptions": "remat.evaluation.pricing",
    "CheckReport": "remat.prove.records",
    "Measurement": "remat.prove.records",
    "Simulation": "remat.prove.records",
    "Verification": "remat.prove.records",
    "Hazard": "remat.planner.records",
    "Outcome": "remat.planner.records",
    "Plan": "remat.planner.records",
    "Region": "remat.planner.records",
    "Severity": "remat.planner.records",
    "Device": "remat.cost.devices",
    "load_devices": "remat.cost.devices",
    "largest_batch": "remat.sizing.largest",
    "LargestBatch": "remat.sizing.largest",
    "Workload": "remat.workload",
    "ApplyError": "remat.errors",
    "BudgetError": "remat.errors",
    "BudgetFormatError": "remat.errors",
    "CaptureError": "remat.errors",
    "DataError": "remat.errors",
    "DeviceError": "remat.errors",
    "GateError": "remat.errors",
    "MissingPackageError": "remat.errors",
    "PlanFileError": "remat.errors",
    "PlanMismatchError": "remat.errors",
    "RematError": "remat.errors",
    "RunError": "remat.errors",
    "VerificationError": "remat.errors",
    "WorkloadError": "remat.errors",
}

__all__ = [
    "auto_checkpoint",
    "plan",
    "frontier",
    "apply",
    "Handle",
    "measure",
    "measure_cost",
    "calibrate",
    "Calibration",
    "simulate",
    "verify",
    "check",
    "replace_checkpointing",
    "adapt",
    "Adaptive",
    "Planned",
    "guard",
    "Guard",
    "GuardEvent",
    "evaluate",
    "ServingOptions",
    "ExpenseOptions",
    "CheckReport",
    "Measurement",
    "Simulation",
    "Verification",
    "Hazard",
    "Outcome",
    "Plan",
    "Region",
    "Severity",
    "Device",
    "load_devices",
    "largest_batch",
    "LargestBatch",
    "Workload",
    "ApplyError",
    "BudgetError",
    "BudgetFormatError",
    "CaptureError",
    "DataError",
    "DeviceError",
    "GateError",
    "MissingPackageError",
    "PlanFileError",
    "PlanMismatchError",
    "RematError",
    "RunError",
    "VerificationError",
    "WorkloadError",
]


def __getattr__(name: str) -> Any:  # Any: each public name has its own type
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'remat' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
