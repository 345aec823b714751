"""Every published way to trade recomputation for memory side by side: one command, one table.

    python benchmarks/peers.py [--models six_blocks gpt2s] [--quick] [--time] [--inductor]

Each row is measured in a fresh process. Rows: nothing, all, every-n, first-k and last-k blocks;
`activation_memory_budget` at ten fractions with both solvers; `sac_milp` (needs pulp and pwlf, in
this environment or that of `--sac-python`); rotor's dynamic programme on chains; and ours, at
budgets and at the very peaks of the others. A stopped run goes on where it was, as long as the
source is the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime as dt
import json
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

# Before torch is imported, here and in the stages: no look-ups.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

from benchmarks.peers_report import draw, findings, markdown, score  # noqa: E402
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

MODELS = (
    "six_blocks", "six_blocks_dropout", "gpt2s", "chain32", "chain200", "gpt2", "llama", "t5",
    "vit", "resnet50", "convnext", "unet", "moe", "chain6",
)  # fmt: skip
CHAINS = ("six_blocks", "six_blocks_dropout", "chain6", "chain32", "chain200")
DEFAULT = ("six_blocks", "six_blocks_dropout", "gpt2s", "chain32")


def main() -> int:
    """Run what is not done yet, then write results, table and picture."""
    arguments = _arguments()
    points = 3 if arguments.quick else arguments.budgets
    work = arguments.out / ".work" / f"peers-{source_digest()}-{points}-{arguments.threads}"
    work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    runner = Runner(work, arguments.threads, "benchmarks.peer_stages")
    for number, model in enumerate(arguments.models):
        print(f"[{number + 1}/{len(arguments.models)}] {model}", flush=True)
        _run_model(runner, model, points, arguments)
    models = [_model(work, model, arguments) for model in arguments.models]
    results = {
        "schema_version": 1,
        "theme": "peers",
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment("peers.py", arguments.threads),
        "models": models,
        "reference": _rows(work, "six_blocks", "reference"),
        "findings": findings(models),
        "failures": runner.failures,
    }
    date = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    stem = arguments.out / f"peers_{hardware()}_{date}"
    write_atomically(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(results))
    picture = arguments.picture or stem.with_suffix(".svg")
    write_atomically(picture, draw(models))
    print("\n".join(results["findings"]))
    print(f"{stem}.json, {stem}.md, {picture}, {time.monotonic() - started:.0f} s")
    return 0 if not runner.failures else 1


def peers_of(model: str, arguments: argparse.Namespace) -> list[str]:
    """Return the peers that take part on a model."""
    named = ["fixed", "amb-aot_eager-dp", "amb-aot_eager-ilp"]
    if arguments.inductor:
        named += ["amb-inductor-dp"]
    if arguments.sac_python is not None:
        named += ["sac"]
    return named + (["rotor"] if model in CHAINS else [])


def _run_model(runner: Runner, model: str, points: int, arguments: argparse.Namespace) -> None:
    """Plan each peer, measure it, then plan ours at the peaks that the others reached."""
    if not runner.run("facts", model):
        return
    runner.run("fixed-plan", model)
    peers = peers_of(model, arguments)

    def peer(name: str) -> None:
        python = arguments.sac_python if name == "sac" else sys.executable
        plans = name in ("sac", "rotor")
        if plans and not runner.run(f"{name}-plan", model, points=points, python=python):
            return
        runner.run(name, model, points=points, python=python)

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        names = [*peers, *(["reference"] if model == "six_blocks" else [])]
        for done in [pool.submit(peer, name) for name in names]:
            done.result()
    if runner.run("ours-plan", model, points=points):
        runner.run("ours", model, points=points)
        if arguments.time:
            runner.run("times", model, points=points)


def _model(work: Path, model: str, arguments: argparse.Namespace) -> Data:
    peers = {name: _rows(work, model, name) for name in ("ours", *peers_of(model, arguments))}
    peers = {name: rows for name, rows in peers.items() if rows}
    for rows in peers.values():
        for row in rows:
            if row.get("predicted_bytes") and row.get("measured_bytes"):
                row["signed_error"] = row["predicted_bytes"] / row["measured_bytes"] - 1
    facts = _rows(work, model, "facts")
    return {
        "name": model,
        "facts": facts[0] if facts else None,
        "peers": peers,
        "scores": score(peers),
        "times": _rows(work, model, "times"),
    }


def _rows(work: Path, model: str, stage: str) -> list[Data]:
    found = read_if_there(path_of(work, model, stage))
    return [] if found is None else found["rows"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT))
    parser.add_argument("--budgets", type=int, default=8, help="budgets for each planner")
    parser.add_argument("--quick", action="store_true", help="three budgets")
    parser.add_argument("--time", action="store_true", help="time steps as well (long)")
    parser.add_argument(
        "--inductor", action="store_true", help="compile with inductor too (needs a C++ compiler)"
    )
    parser.add_argument(
        "--sac-python",
        default=None,
        help="Python with pulp and pwlf for sac_milp; default: this one, if it has them",
    )
    parser.add_argument("--jobs", type=int, default=2, help="peers measured at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--picture", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.sac_python is None:
        arguments.sac_python = _python_with_pulp()
    if arguments.inductor and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        parser.error("--inductor needs a C++ compiler (g++ or clang++) on the path")
    return arguments


def _python_with_pulp() -> str | None:
    try:
        import pulp  # noqa: F401
        import pwlf  # noqa: F401
    except ImportError:
        print("sac_milp is left out: pip install pulp pwlf, or name a Python with --sac-python")
        return None
    return sys.executable


if __name__ == "__main__":
    sys.exit(main())
