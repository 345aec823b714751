"""Ten thousand runs: how long `remat runs` takes to list them, first and with a fresh index.

    python benchmarks/store.py [--runs 10000]

Each listing is a process of its own, from the start of Python to the last line, on one thread; the
runs lie in a temporary folder that is removed. Prints JSON: seconds of the processor, and by the
clock, which on a busy machine are more.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5


def recorded(folder: Path) -> dict[str, object]:
    """Record one real run of a few steps, as the pattern of all."""
    import torch

    import remat

    data = [(torch.full((32,), float(i)), i % 4) for i in range(64)]
    workload = remat.Workload(
        name="pattern",
        model=lambda: torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(8)]),
        train_data=data,
        batch_size=32,
        loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
    )
    settings = {"budgets": ["95%"], "timing_rounds": 5, "warmup_rounds": 0, "page": False}
    remat.evaluate(workload, out=folder / "pattern", max_steps=20, **settings)
    return json.loads((folder / "pattern" / "run.json").read_text(encoding="utf-8"))


def fill(root: Path, count: int, pattern: dict[str, object]) -> None:
    """Write copies of a run, each with an id and a time of its own."""
    begin = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
    for number in range(count):
        moment = begin + dt.timedelta(minutes=number)
        name = f"{moment:%Y%m%d-%H%M%S}-pattern-{number:06x}"
        (root / name).mkdir(parents=True)
        data = pattern | {"id": name, "created": moment.isoformat()}
        (root / name / "run.json").write_text(json.dumps(data), encoding="utf-8")


def listed(root: Path, *options: str) -> dict[str, float]:
    """List the runs once, and count the lines."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "remat.cli", "runs", "--root", str(root), *options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    clock = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": clock, "processor": used, "lines": done.stdout.count("\n")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        fill(root, count, recorded(Path(folder)))
        first = listed(root)
        cases = {"all": (), "latest": ("--limit", "20"), "search": ("--text", "pattern-0000ff")}
        fresh = {
            name: [listed(root, *options) for _ in range(ROUNDS)] for name, options in cases.items()
        }
        document = {
            "num_runs": count,
            "bytes_per_run": (next(root.glob("*/run.json"))).stat().st_size,
            "first_listing": first,
            "fresh_index": {
                name: {
                    key: statistics.median(one[key] for one in rounds)
                    for key in ("clock", "processor", "lines")
                }
                for name, rounds in fresh.items()
            },
            "index_bytes": (root / "index.sqlite").stat().st_size,
            "rounds": ROUNDS,
            "machine": platform.processor() or platform.machine(),
        }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
