"""Going on with a run that was interrupted: what is finished stays, and only the same may go on.

Every stage of an evaluation starts from the run's seed, whatever ran before it in the process; so
the stages that are left give what they would have given, and the losses are equal bit for bit.
That holds for the same workload, settings, versions, machine and threads: anything else is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from remat.errors import RunError
from remat.evaluation.contenders import Contender
from remat.evaluation.identity import weights_sha256
from remat.evaluation.pricing import ExpenseOptions
from remat.evaluation.serving.options import ServingOptions
from remat.planner.policies import AbstractPolicy
from remat.runs.records import Origin, Run, Settings, Variant
from remat.workload import Batch

# Any: arguments of several types, by name.


def make_settings(
    listed: Sequence[Contender],
    policies: Sequence[AbstractPolicy],
    peers: Sequence[AbstractPolicy],
    *,
    front_points: int,
    max_steps: int | None,
    timing_rounds: int,
    warmup_rounds: int,
    keeps_weights: bool,
    seeds: int,
    margin: float | None,
    check_every: int | None,
    serving: ServingOptions | None,
    expenses: ExpenseOptions | None,
    device: str | None,
) -> Settings:
    """Record what an evaluation was asked for, as far as it shows in the results."""
    asked = (one.budget for one in listed)
    return Settings(
        budgets=tuple(budget for budget in asked if budget is not None),
        policies=tuple(policy.label for policy in policies),
        peers=tuple(policy.label for policy in peers),
        front_points=front_points,
        max_steps=max_steps,
        timing_rounds=timing_rounds,
        warmup_rounds=warmup_rounds,
        keeps_weights=keeps_weights,
        seeds=seeds,
        margin=margin,
        check_every=check_every,
        serving=None if serving is None else _as_data(serving),
        expenses=None if expenses is None else _as_data(expenses),
        device=device,
    )


def make_origin(model: torch.nn.Module, batch: Batch) -> Origin:
    """Digest what training starts from: the weights that the seed gives, and the first batch."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            tensor = leaf.detach().to("cpu").contiguous()
            digest.update(f"{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
    return Origin(weights_sha256=weights_sha256(model), batch_sha256=digest.hexdigest())


def as_begun(run: Run) -> dict[str, Any]:
    """Return the arguments of `evaluate` that a run was begun with, but for its policies."""
    asked = run.settings
    if asked is None:
        return {"seed": run.seed, "epochs": run.epochs}
    return {
        "seed": run.seed,
        "epochs": run.epochs,
        "budgets": asked.budgets,
        "max_steps": asked.max_steps,
        "front_points": asked.front_points,
        "timing_rounds": asked.timing_rounds,
        "warmup_rounds": asked.warmup_rounds,
        "keep_trained_weights": asked.keeps_weights,
        "seeds": asked.seeds,
        "margin": asked.margin,
        "targets": run.targets,
        "check_every": asked.check_every,
        "device": asked.device,
        "serving": None if asked.serving is None else ServingOptions(**_tuples(asked.serving)),
        "expenses": None if asked.expenses is None else ExpenseOptions(**_tuples(asked.expenses)),
    }


def _as_data(options: ServingOptions | ExpenseOptions) -> dict[str, Any]:
    """Write options as JSON has them: lists, and paths as text."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return data


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}


def is_repeated(run: Run, variant: Variant, seed: int) -> bool:
    """Say whether a variant was trained from a further seed already, or could not be."""
    failed = any(
        gap.section == "repeats"
        and gap.variant == variant.label
        and gap.reason.startswith(f"seed {seed}:")
        for gap in run.gaps
    )
    return failed or any(repeat.seed == seed for repeat in variant.repeats)


def resumed(old: Run, begun: Run) -> Run:
    """Return the run as far as it had come, if what is asked for now is what it was begun with.

    Raises
    ------
    RunError: that names everything in which the two differ, with both values.
    """
    differences = list(_differences(old, begun))
    if differences:
        raise RunError(
            f"run {old.id!r} cannot be resumed with other settings than it was begun with: "
            f"{'; '.join(differences)}. Resume it with the same, or begin a new run."
        )
    return old


def _differences(old: Run, begun: Run) -> Iterator[str]:
    pairs: list[tuple[str, object, object]] = [
        ("workload", old.name, begun.name),
        ("seed", old.seed, begun.seed),
        ("epochs", old.epochs, begun.epochs),
        ("batch size", old.batch_size, begun.batch_size),
        ("batch", ", ".join(old.batch_signature), ", ".join(begun.batch_signature)),
        ("parameters", old.num_parameters, begun.num_parameters),
        ("variants", _labels(old), _labels(begun)),
        ("targets", tuple(sorted(old.targets.items())), tuple(sorted(begun.targets.items()))),
    ]
    before, now = old.settings, begun.settings
    if before is None or now is None or old.origin is None or begun.origin is None:
        yield "it was recorded by a version of remat that did not record its settings"
        return
    pairs += [
        (name.replace("_", " "), getattr(before, name), getattr(now, name))
        for name in Settings.model_fields
    ]
    there, here = old.environment, begun.environment
    pairs += [
        ("first weights", old.origin.weights_sha256[:12], begun.origin.weights_sha256[:12]),
        ("first batch", old.origin.batch_sha256[:12], begun.origin.batch_sha256[:12]),
        ("torch", there.versions.get("torch"), here.versions.get("torch")),
        ("remat", there.versions.get("remat"), here.versions.get("remat")),
        ("device", there.device, here.device),
        ("processor", there.processor, here.processor),
        ("threads (OMP_NUM_THREADS)", there.num_threads, here.num_threads),
    ]
    for what, was, is_now in pairs:
        if was != is_now:
            yield f"{what} was {_shown(was)}, now {_shown(is_now)}"


def _labels(run: Run) -> str:
    return ", ".join(variant.label for variant in run.variants)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
