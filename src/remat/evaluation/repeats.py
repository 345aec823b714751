"""The same training from further seeds: what a difference between variants is held against."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

from remat.evaluation.equivalence import TRAIN_LOSS
from remat.evaluation.reaching import Aim
from remat.evaluation.training import train
from remat.planner.records import Plan
from remat.runs.evidence import Repeat
from remat.runs.reading import closing_loss
from remat.workload import Workload


def repeat(
    workload: Workload,
    plan: Plan | None,
    *,
    seed: int,
    epochs: int,
    max_steps: int | None = None,
    aim: Aim | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> Repeat:
    """Train once more from another seed, and keep what comparisons need.

    Raises as `train` does.
    """
    training = train(
        workload, plan, seed=seed, epochs=epochs, max_steps=max_steps, aim=aim, on_step=on_step
    )
    final = training.quality[-1].metrics if training.quality else {}
    return Repeat(
        seed=seed,
        train_seconds=training.seconds,
        steps_to_target=None if training.reached is None else training.reached.steps,
        seconds_to_target=None if training.reached is None else training.reached.seconds,
        metrics=final | {TRAIN_LOSS: closing_loss(training.losses)},
        weights_sha256=training.weights_sha256,
        losses_sha256=losses_sha256(training.losses),
    )


def compared(repeated: Repeat, references: Sequence[Repeat]) -> Repeat:
    """Say whether the training gave what that without a plan gave from the same seed."""
    same = [one for one in references if one.seed == repeated.seed]
    if not same:
        return repeated
    return repeated.model_copy(
        update={
            "losses_identical": repeated.losses_sha256 == same[0].losses_sha256,
            "weights_identical": repeated.weights_sha256 == same[0].weights_sha256,
        }
    )


def losses_sha256(losses: Sequence[float]) -> str:
    """Digest a loss curve by the bits of its values."""
    return hashlib.sha256(struct.pack(f"<{len(losses)}d", *losses)).hexdigest()
