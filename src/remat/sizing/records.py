"""What fits where, as data."""

from __future__ import annotations

import enum

from pydantic import Field

from remat.files import Record


class Mode(str, enum.Enum):
    """What is recomputed."""

    NOTHING = "nothing"
    ALL_BLOCKS = "all blocks"
    PLANNED = "planned"


class Size(Record):
    """The largest batch of one device in one mode, and what a step of it takes.

    `largest` is 0 where not even one example fits; `needed_bytes` is then that of one example.
    """

    mode: Mode
    largest: int = Field(
        ge=0, description="Of the dimension: examples per step and device, tokens, pixels, layers."
    )
    needed_bytes: int = Field(description="Of the device's memory, context and margin included.")
    step_seconds: float = Field(description="Estimated, recomputation included.")
    recompute_fraction: float = Field(description="Recomputed cost over that of the forward pass.")
    samples_per_second: float = Field(description="Of all shards together.")
    epoch_seconds: float | None = None
    epoch_usd: float | None = None


class DeviceFit(Record):
    """What fits on one device, in each mode."""

    device: str
    available_bytes: int
    usd_per_hour: float | None = None
    price_source: str = ""
    is_price_verified: bool = Field(
        default=True, description="The price was found in its source again; else remembered."
    )
    sizes: tuple[Size, ...]

    @property
    def best(self) -> Size | None:
        """Return the mode with the most samples per second among those that fit."""
        fitting = [size for size in self.sizes if size.largest > 0]
        return max(fitting, key=lambda size: size.samples_per_second, default=None)

    @property
    def price_mark(self) -> str:
        """Return what stands behind each amount of money whose price nobody verified."""
        return "" if self.is_price_verified else " *"


class Survey(Record):
    """What fits where for one workload: `remat fit`."""

    schema_version: int = 1
    workload: str
    dimension: str = Field(
        description="What was made as large as possible: batch, sequence, image size or depth."
    )
    asked: int = Field(description="The size that the workload itself has.")
    shards: int = 1
    examples_per_epoch: int | None = None
    cost_source: str = Field(default="", description="Where the seconds come from.")
    devices: tuple[DeviceFit, ...]
    cheapest: str | None = Field(
        default=None, description="Cheapest device on which the asked size fits, by an epoch's or "
        "else an hour's price."
    )  # fmt: skip
    notes: tuple[str, ...] = ()
