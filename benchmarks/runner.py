"""What the benchmarks share: stages in processes of their own, the machine, the source digest.

A stage is `python -m MODULE STAGE MODEL --work DIR ...` and writes one JSON file; a stage whose
file is there is not run again, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Any: stages exchange JSON.
Data = dict[str, Any]

ROOT = Path(__file__).parent.parent
STAGE_LIMIT_S = 3600


def path_of(work: Path, model: str, stage: str, index: int | None = None) -> Path:
    """Return the file that a stage writes."""
    return work / f"{model}.{stage}{'' if index is None else f'-{index}'}.json"


def read(path: Path) -> Data:
    """Read what a stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_if_there(path: Path) -> Data | None:
    """Read what a stage wrote, or `None` if it did not."""
    return read(path) if path.exists() else None


def write(path: Path, data: Data) -> None:
    """Write a stage's results, whole or not at all."""
    from remat.files import write_atomically

    write_atomically(path, json.dumps(data, indent=1) + "\n")


class Runner:
    """Runs stages in processes of their own and remembers which failed."""

    def __init__(self, work: Path, threads: int, module: str = "benchmarks.stages") -> None:
        self._work = work
        self._module = module
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self.failures: list[Data] = []

    def run(
        self,
        stage: str,
        model: str,
        *,
        index: int | None = None,
        points: int | None = None,
        python: str = sys.executable,
        limit_s: int = STAGE_LIMIT_S,
    ) -> bool:
        """Run one stage unless its file is there; return whether it is now."""
        target = path_of(self._work, model, stage, index)
        if target.exists():
            return True
        command = [python, "-m", self._module, stage, model]
        command += ["--work", str(self._work)]
        command += [] if index is None else ["--index", str(index)]
        command += [] if points is None else ["--points", str(points)]
        label = f"{stage}{'' if index is None else f' {index}'}"
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self._environment, capture_output=True, text=True,
                timeout=limit_s, check=False,
            )  # fmt: skip
            problem = "" if done.returncode == 0 else last_line(done.stderr)
        except subprocess.TimeoutExpired:
            problem = f"took longer than {limit_s} s"
        seconds = time.monotonic() - begin
        if target.exists() and not problem:
            print(f"  {model} {label}: {seconds:.1f} s", flush=True)
            return True
        print(f"  {model} {label}: FAILED after {seconds:.1f} s: {problem}", flush=True)
        self.failures.append({"model": model, "stage": label, "problem": problem})
        return False


def last_line(text: str) -> str:
    """Return the last line of a process's complaints."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no message"


# -- where it ran -----------------------------------------------------------------------------


def environment(script: str, threads: int) -> Data:
    """Describe machine, versions, commit and command of a run."""
    import torch

    from remat.evaluation.environment import describe_environment

    torch.set_num_threads(threads)
    command = f"python benchmarks/{script} {' '.join(sys.argv[1:])}".strip()
    described = describe_environment(torch.device("cpu"), command=command)
    return json.loads(described.model_dump_json()) | {"num_cores": os.cpu_count()}


def hardware() -> str:
    """Name the machine for a file: processor and cores."""
    import torch

    from remat.evaluation.environment import describe_environment

    processor = describe_environment(torch.device("cpu")).processor or platform.machine()
    words = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    return f"{words}-{os.cpu_count()}cores"


# What only collects and shows results: changing it makes no stage's result stale.
_SHOWS = frozenset({"core.py", "core_report.py", "peers.py", "peers_report.py"})


def source_digest() -> str:
    """Digest the package and the benchmarks: results of other code are not taken over."""
    digest = hashlib.sha256()
    folders = (ROOT / "src" / "remat", ROOT / "benchmarks")
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        if path.name not in _SHOWS and not _is_presentation(path):
            digest.update(path.read_bytes())
    digest.update((ROOT / "src" / "remat" / "cost" / "devices.toml").read_bytes())
    return digest.hexdigest()[:12]


def _is_presentation(path: Path) -> bool:
    return bool({"cli", "report", "runs", "evaluation"} & set(path.relative_to(ROOT).parts))


def where(results: Data) -> str:
    """Say in one sentence where and how results were made."""
    found = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    changed = " with changes" if found["git_dirty"] else ""
    return (
        f"{found['processor']}, {found['num_cores']} cores, {found['num_threads']} threads per "
        f"process; Python {found['python']}, {versions}; commit "
        f"{(found['git_commit'] or 'unknown')[:12]}{changed}; {results['date']}; "
        f"`{found['command']}`."
    )
