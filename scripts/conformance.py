"""Write docs/conformance.md: every pitfall, and what becomes of it under each tool.

    python scripts/conformance.py

Takes a few minutes on one thread, most of them for compiling.
"""

# ruff: noqa: E402  the path and the threads are set before torch is imported

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import torch

from tests.conformance import verdicts
from tests.conformance.cases import CASES, ELSEWHERE, LANGUAGE_CASES
from tests.conformance.processes import WRAPPINGS

WORKER = ROOT / "tests" / "conformance" / "processes.py"
PAGE = ROOT / "docs" / "conformance.md"
COLUMNS = (
    "remat", "remat, compiled", "torch", "torch, reentrant", "Transformers",
    "activation_memory_budget",
)  # fmt: skip
PROCESS_COLUMNS = ("remat", "torch", "torch, reentrant")

HEAD = """# Conformance: what goes wrong when activations are recomputed

Each row is something that users of gradient checkpointing met. A small model that shows it runs
one step as it is and one with its blocks recomputed; loss, gradients, buffers, training flags and
the state of every random generator are compared bit for bit. Written by `scripts/conformance.py`
with torch {torch}; `tests/conformance/` has the models, and tests that the table is true.

| verdict | means |
|---|---|
| identical | recomputed, and everything is equal bit for bit |
| rounding | recomputed; gradients differ by less than 1e-5, as another order of sums does |
| kept | what cannot be recomputed right is not recomputed; the plan says why; equal bit for bit |
| refused | one clear error of ours that says what to do |
| raises | an error of torch's |
| inert | nothing was checkpointed: right, and no memory saved |
| **WRONG** | no error, and another result |

*torch* and *torch, reentrant* checkpoint each block by `torch.utils.checkpoint`; *compiled* is
`aot_eager` against the same model compiled without a plan, `activation_memory_budget` is 0.2 under
`aot_eager_decomp_partition`, against 1.0. "n/a": the case does not apply to the tool.

"""

BETWEEN = """
Where a change happens outside of the step that is traced (row 50), no tool can see it coming: what
a region saves when it runs again is compared with what it saved before, in the first steps and a
few of every thousand, and an error names the module.

## Rows that need several processes

Two processes with gloo on the CPU, each against the wrapped model without checkpointing; the blocks
are checkpointed before wrapping by torch, and planned after wrapping by remat.

"""

TAIL = """
## Rows that a small model on a CPU cannot show

| row | what | where it belongs |
|---|---|---|
"""


def row_of(case, others):
    """Give one line of the table."""
    cells = [
        verdicts.of_remat(case),
        verdicts.of_remat_compiled(case),
        verdicts.of_torch(case, reentrant=False),
        verdicts.of_torch(case, reentrant=True),
        verdicts.of_transformers(others[case.row]) if case.row in others else "n/a",
        verdicts.of_memory_budget(case),
    ]
    shown = [c.replace(verdicts.WRONG, "**WRONG**") for c in cells]
    return f"| {case.row} | {case.title} | {case.thread} | {' | '.join(shown)} |"


def rows_of_processes():
    """Run the cases that need two processes, and give a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
        words = [sys.executable, *command, str(WORKER), str(path)]
        subprocess.run(words, check=True)  # noqa: S603  our own script
        found = json.loads(path.read_text(encoding="utf-8"))
    for case in WRAPPINGS:
        cells = (found[case.name][column] for column in PROCESS_COLUMNS)
        shown = " | ".join(c.replace(verdicts.WRONG, "**WRONG**") for c in cells)
        yield f"| {case.row} | {case.title} | {case.thread} | {shown} |"


def head_of(columns):
    """Give the first two lines of a table."""
    return [f"| row | what | thread | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]


def main() -> None:
    """Run every case and write the page."""
    others = {case.row: case for case in LANGUAGE_CASES}
    lines = head_of(COLUMNS)
    for case in CASES:
        lines.append(row_of(case, others))
        print(lines[-1], flush=True)
    version = ".".join(torch.__version__.split("+")[0].split("."))
    rest = [f"| {row} | {what} | {where} |" for row, (what, where) in sorted(ELSEWHERE.items())]
    shared = [*head_of(PROCESS_COLUMNS), *rows_of_processes()]
    page = HEAD.format(torch=version) + "\n".join([*lines, BETWEEN]) + "\n".join([*shared, TAIL])
    page += "\n".join(rest) + "\n"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
