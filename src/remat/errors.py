"""Every error that remat raises on purpose: one root; each branch is also the fitting builtin."""

from __future__ import annotations

from collections.abc import Mapping

from remat.units import format_bytes


class RematError(Exception):
    """Root of all errors raised on purpose; catching it catches every one of them."""


class BudgetFormatError(RematError, ValueError):
    """A budget that cannot be read as bytes, or is not positive."""


class WorkloadError(RematError, ValueError):
    """A model, batch, loss, optimizer or workload file that cannot be used for a training step."""


class CaptureError(RematError, RuntimeError):
    """A training step that could not be traced."""


class BudgetError(RematError, RuntimeError):
    """A budget below the least peak that could be reached.

    Attributes
    ----------
    budget_bytes: what was asked for.
    minimum_bytes: the least peak of one training step that a plan was found for.
    blame: bytes at that least peak by kind ("parameters", "gradients", "activations", ...).
    host_budget_bytes: host memory that could be used; `None` if nothing could be offloaded.
    """

    def __init__(
        self,
        budget_bytes: int,
        minimum_bytes: int,
        blame: Mapping[str, int],
        host_budget_bytes: int | None = None,
    ) -> None:
        self.host_budget_bytes = host_budget_bytes
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.blame = dict(blame)
        largest = sorted(self.blame.items(), key=lambda item: -item[1])
        filled = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in largest if size > 0)
        super().__init__(
            f"the budget of {format_bytes(budget_bytes)} is below the least peak that was reached, "
            f"{format_bytes(minimum_bytes)} ({minimum_bytes} bytes): "
            f"{format_bytes(minimum_bytes - budget_bytes)} are missing. At that peak: {filled}. "
            f"{_advice(largest[0][0] if largest else 'activations', host_budget_bytes)}"
        )

    def __reduce__(self) -> tuple[type[BudgetError], tuple[int, int, dict[str, int], int | None]]:
        return type(self), (
            self.budget_bytes, self.minimum_bytes, self.blame, self.host_budget_bytes,
        )  # fmt: skip


def _advice(largest_kind: str, host_budget_bytes: int | None) -> str:
    """Say what would help most, given what fills the peak."""
    if largest_kind in ("parameters", "gradients", "optimizer"):
        return (
            "Parameters, gradients and optimizer state fill most of the peak: an optimizer with "
            "less state, frozen layers, a smaller model or sharding (FSDP) would help; neither "
            "recomputation nor offloaded activations can."
        )
    host = "host memory for activations (host_budget), "
    if host_budget_bytes is not None:
        host = f"more host memory than {format_bytes(host_budget_bytes)}, "
    return (
        f"A smaller batch or shorter sequences would help most; then {host}a loss in slices, if "
        "chunks were not allowed, or an optimizer with less state."
    )


class PlanFileError(RematError, ValueError):
    """A plan, run or table file that is damaged, of another version, or has unknown fields."""


class PlanMismatchError(RematError, ValueError):
    """A plan applied to another model, batch, mode or version than it was made for."""


class ApplyError(RematError, RuntimeError):
    """A plan that could not be applied, or was applied twice."""


class VerificationError(RematError, RuntimeError):
    """A verification that could not be carried out (not one that found differences)."""


class DeviceError(RematError, ValueError):
    """An unknown device, or a device table with a missing or absurd figure."""


class DataError(RematError, ValueError):
    """Data that cannot be used."""


class RunError(RematError, LookupError):
    """A run that cannot be found or read."""


class GateError(RematError, RuntimeError):
    """A gate whose rules cannot be evaluated."""


class MissingPackageError(RematError, ImportError):
    """An optional package that is needed here and not installed; the message has the command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'remat[{extra}]'"
        )
