"""What a command works on: a workload's model and first batch, or a Transformers architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from remat.workload import Batch, Workload

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Model and batch of one training step, and the keywords that name its loss and optimizer."""

    name: str
    model: nn.Module
    batch: Batch
    step: dict[str, Any] = field(default_factory=dict)  # Any: the user's loss and optimizer
    num_examples: int | None = None  # of one epoch, where the data say so


def inputs_of(workload: Workload) -> Inputs:
    """Build the model and the first batch of a workload.

    A workload without an optimizer is trained with the default one: the keyword is left out, as
    `optimizer=None` would mean a step without one.
    """
    from remat.workloads import build_model, first_batch, num_examples_in

    step: dict[str, Any] = {"loss": workload.loss}
    if workload.optimizer is not None:
        step["optimizer"] = workload.optimizer
    return Inputs(
        name=workload.name,
        model=build_model(workload),
        batch=first_batch(workload),
        step=step,
        num_examples=num_examples_in(workload.train_data),
    )


def load_inputs(workload: str | None, hf_config: str | None, batch: str | None) -> Inputs:
    """Load what the command line names: WORKLOAD, or `--hf-config` with `--batch`."""
    if workload is not None:
        if hf_config is not None or batch is not None:
            raise typer.BadParameter("--hf-config and --batch take the place of WORKLOAD.")
        from remat.workloads import load_workload

        return inputs_of(load_workload(workload))
    if hf_config is None or batch is None:
        raise typer.BadParameter("give a WORKLOAD, or --hf-config with --batch.")
    from remat.architectures import load_architecture

    made = load_architecture(hf_config, batch)
    return Inputs(name=made.name, model=made.model, batch=made.batch)
