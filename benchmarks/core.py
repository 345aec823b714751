"""What planning reaches on nine architectures: one command, one results file, one picture.

    python benchmarks/core.py [--models gpt2s vit] [--quick] [--time]

For each model: eight budgets from the least reachable to the keep-everything peak, each planned
from nothing and measured in a process of its own; the best fixed policy at each; verification with
dropout on; a sweep of twenty budgets; the prototype's budgets; and an 8B shape on the meta device.
A stopped run goes on where it was, as long as the package's source is the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

# Before torch is imported, here and in the stages: no look-ups.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from benchmarks.core_report import draw_front, markdown, summarize  # noqa: E402
from benchmarks.runner import (  # noqa: E402
    Data,
    Runner,
    environment,
    hardware,
    path_of,
    read_if_there,
    source_digest,
)
from remat.files import write_atomically  # noqa: E402

MODELS = ("gpt2s", "gpt2", "llama", "t5", "vit", "resnet50", "convnext", "unet", "moe")
ABSTRACT = "llama8b"
PICTURED = "gpt2"


def main() -> int:
    """Run what is not done yet, then write results, table and picture."""
    arguments = _arguments()
    points, sweep = (3, 5) if arguments.quick else (arguments.budgets, arguments.sweep)
    work = arguments.out / ".work" / f"{source_digest()}-{points}-{sweep}-{arguments.threads}"
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    runner = CoreRunner(work, arguments.threads)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        bounded = list(pool.map(lambda m: runner.run("bounds", m, points=points), arguments.models))
        models = [m for m, done in zip(arguments.models, bounded, strict=True) if done]
        waiting = [
            task for model in models for task in runner.tasks(model, points=points, sweep=sweep)
        ]
        if not arguments.quick and not arguments.no_abstract:
            waiting.append(functools.partial(runner.run, "abstract", ABSTRACT))
        for done in [pool.submit(task) for task in waiting]:
            done.result()
    for model in models if arguments.time else ():
        runner.run("times", model, points=points)
    results = _collect(work, arguments, points, runner.failures)
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    stem = arguments.out / f"core_{hardware()}_{date}"
    write_atomically(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(results))
    print(markdown(results))
    print(f"{stem}.json, {stem}.md, {time.monotonic() - started:.0f} s")
    pictured = next((m for m in results["models"] if m["name"] == PICTURED), None)
    if pictured is not None and not arguments.quick:
        write_atomically(arguments.picture, draw_front(pictured))
        print(arguments.picture)
    return 0 if all(row["reached"] for row in results["summary"]) and not runner.failures else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", type=int, default=8, help="budgets for each model")
    parser.add_argument("--sweep", type=int, default=20, help="budgets for monotonicity")
    parser.add_argument("--quick", action="store_true", help="three budgets, five in the sweep")
    parser.add_argument("--time", action="store_true", help="time steps as well (long)")
    parser.add_argument("--no-abstract", action="store_true", help="leave the 8B shape out")
    parser.add_argument("--jobs", type=int, default=2, help="processes that check, at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pareto.svg")
    return parser.parse_args()


class CoreRunner(Runner):
    """Runs the stages of the core benchmark in their order."""

    def tasks(self, model: str, *, points: int, sweep: int) -> list[Callable[[], bool]]:
        """Return what is run of one model once its bounds are known, the longest first."""

        def run(stage: str, **options: int) -> Callable[[], bool]:
            return functools.partial(self.run, stage, model, **options)

        return [
            run("verify", points=points),
            run("sweep", points=sweep),
            run("targets"),
            run("policies"),
            *(run("plan", index=index) for index in range(points)),
            run("unplanned"),
        ]


# -- results ----------------------------------------------------------------------------------


def _collect(work: Path, arguments: argparse.Namespace, points: int, failures: list[Data]) -> Data:
    models = [_model(work, model, points) for model in arguments.models]
    abstract = read_if_there(path_of(work, ABSTRACT, "abstract"))
    return {
        "schema_version": 1,
        "theme": "core",
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment("core.py", arguments.threads),
        "summary": summarize(models, abstract),
        "models": models,
        "abstract": abstract,
        "failures": failures,
    }


def _model(work: Path, model: str, points: int) -> Data:
    found = read_if_there(path_of(work, model, "bounds")) or {}
    policies = read_if_there(path_of(work, model, "policies")) or {"rows": [], "blocks": []}
    times = read_if_there(path_of(work, model, "times")) or {}
    proofs = (read_if_there(path_of(work, model, "verify")) or {}).get("rows", [])
    unplanned = read_if_there(path_of(work, model, "unplanned")) or {}
    rows = []
    for index in range(points):
        row = read_if_there(path_of(work, model, "plan", index))
        if row is None:
            continue
        row.pop("plan", None)
        measured = row["measured_bytes"]
        if measured and row.get("predicted_bytes"):
            row["signed_error"] = row["predicted_bytes"] / measured - 1
        row["best_policy"] = _best_policy(policies["rows"], row["asked_bytes"])
        row["verify"] = proofs[index] if index < len(proofs) else None
        row["time"] = times.get(str(index))
        rows.append(row)
    return {
        "name": model,
        "keep_all_predicted_bytes": found.get("keep_all_bytes"),
        "keep_all_measured_bytes": unplanned.get("peak_bytes"),
        "least_budget_bytes": found.get("least_budget_bytes"),
        "rows": rows,
        "policies": policies["rows"],
        "blocks": policies["blocks"],
        "sweep": (read_if_there(path_of(work, model, "sweep")) or {}).get("rows", []),
        "targets": (read_if_there(path_of(work, model, "targets")) or {}).get("rows", []),
        "times": {name: times[name] for name in ("nothing", "all blocks") if name in times},
    }


def _best_policy(policies: list[Data], asked_bytes: int) -> Data | None:
    """Return the cheapest fixed policy whose predicted peak fits, without any margin."""
    fitting = [policy for policy in policies if policy["peak_bytes"] <= asked_bytes]
    return min(fitting, key=lambda policy: policy["seconds"], default=None)


if __name__ == "__main__":
    sys.exit(main())
