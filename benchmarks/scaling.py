"""What planning costs against depth, and how little memory the least plan of a deep chain takes.

    python benchmarks/scaling.py [--quick] [--kinds chain --most 400] [--out DIR]

Planning: the processor's seconds of tracing, of listing options, of searching the least peak and
of solving, and the planner's own memory, for a small Llama of 10 to 200 layers and for the residual
chain of 25 to 800 blocks, its blocks in a `Sequential` or called in a loop and returning tuples.
Peak: activations at the least plan, and at the least plan of at most one more forward, for the same
depths, with the fitted exponent: 1 is linear, 0.5 the square root (Chen et al. 2016,
arXiv:1604.06174). And one deep thin network, the ResNet-1202 of He et al. 2016 (arXiv:1512.03385):
32 pixels, batch 64. Every point is a process of its own.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import json
import os
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import numpy as np  # noqa: E402

from benchmarks.core_report import table  # noqa: E402
from benchmarks.runner import Data, environment, hardware, last_line, where  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402
from remat.files import write_atomically  # noqa: E402

if TYPE_CHECKING:
    from remat.program import Program

# Any: what is timed returns what it likes.

_MIB = 2**20
_POINT_LIMIT_S = 1800
LLAMA_LAYERS = (10, 25, 50, 100, 200)
CHAIN_BLOCKS = (25, 50, 100, 200, 400, 800)
QUICK = {"llama": (2, 4), "chain": (4, 8), "tuples": (4, 8), "resnet1202": ()}
FULL = {
    "chain": CHAIN_BLOCKS,
    "tuples": CHAIN_BLOCKS,
    "resnet1202": (1202,),
    "llama": LLAMA_LAYERS,
}
_BUDGET_SHARE = 0.4  # of the way from the least reachable peak to keeping everything


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return b of the least squares fit values = a * sizes^b in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# -- one point --------------------------------------------------------------------------------


def _case(kind: str, depth: int) -> Case:
    """Build one model on the meta device."""
    import torch

    from benchmarks import shapes

    makers: dict[str, Callable[[], shapes.Case]] = {
        "llama": functools.partial(
            shapes.llama, layers=depth, width=256, inner=688, heads=4, key_value_heads=2,
            vocabulary=2000, batch=4, tokens=256,
        ),
        "chain": functools.partial(shapes.chain, blocks=depth, width=128, rows=2048),
        "tuples": functools.partial(
            shapes.chain, blocks=depth, width=128, rows=2048, by_tuples=True
        ),
        "resnet1202": functools.partial(shapes.thin_resnet, depth=depth, batch=64),
    }  # fmt: skip
    with torch.device("meta"):
        case = makers[kind]()
    case.model.train()
    return case


def point(kind: str, depth: int) -> Data:
    """Plan one model and note what each part took."""
    import torch

    from remat.program import Program, Step
    from remat.trace.capture import capture

    optimizer = functools.partial(torch.optim.AdamW, foreach=False)
    seconds: dict[str, float] = {}
    # What only the first trace of a process takes is none of the model's.
    small = _case(kind, 8 if kind == "resnet1202" else 1)
    capture(small.model, small.batch, loss=small.loss, optimizer=optimizer)
    case = _case(kind, depth)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.process_time()  # planning runs on one thread
        result = work()
        seconds[name] = time.process_time() - begin
        return result

    trace = timed(
        "trace", lambda: capture(case.model, case.batch, loss=case.loss, optimizer=optimizer)
    )
    make = functools.partial(
        Program, Step(case.model, case.batch, case.loss, optimizer), trace=trace, device=None,
        cost=None, time_limit_s=300.0, report=lambda _what, _share: None,
    )  # fmt: skip
    program = timed("options", make)
    found, simulation = timed("least", program.least_peak)
    least = program.needed(simulation)
    cheapest = program.solver.cheapest(least, [found.chosen])
    assert cheapest is not None
    budget = least + int(_BUDGET_SHARE * (program.keep_all_peak_bytes - least))
    solved = timed("solve", lambda: program.solve(budget))
    assert solved is not None
    beside = sum(
        simulation.breakdown[kind] for kind in ("parameters", "buffers", "batch", "optimizer")
    ) + sum(p.numel() * p.element_size() for p in case.model.parameters())  # fmt: skip
    row = {
        "kind": kind,
        "depth": depth,
        "num_ops": len(trace.ops),
        "num_options": len(program.options),
        "seconds": seconds,
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "keep_all_bytes": program.keep_all_peak_bytes,
        "least_peak_bytes": simulation.peak_bytes,
        # As published: the peak above parameters and all their gradients.
        "least_activation_bytes": simulation.peak_bytes - beside,
        "least_fraction": _fraction(program, cheapest.chosen),
        "once_activation_bytes": _least_at_one_forward(program) - beside,
        "solved_fraction": _fraction(program, solved[0].chosen),
        "solved_peak_bytes": solved[1].peak_bytes,
        "budget_bytes": budget,
    }
    del program
    tracemalloc.start()
    program = make()
    program.solver.least_peak()
    row["python_bytes"] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return row


def _fraction(program: Program, chosen: Iterable[int]) -> float:
    return sum(program.options[p].seconds for p in chosen) / program.cost.forward_seconds


def _least_at_one_forward(program: Program) -> int:
    """Return the least peak of plans of one whole chain that run the forward at most once again."""
    peaks = [
        program.timeline.curve(chosen).peak_bytes
        for chosen in program.chain_plans
        if _fraction(program, chosen) <= 1.0
    ]
    return min(peaks, default=program.keep_all_peak_bytes)


def _point_in_process(kind: str, depth: int) -> Data:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.scaling", "--point", kind, str(depth)], cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True, text=True, timeout=_POINT_LIMIT_S, check=False,
        )  # fmt: skip
        problem = "" if done.returncode == 0 else last_line(done.stderr)
    except subprocess.TimeoutExpired:
        problem = f"took longer than {_POINT_LIMIT_S} s"
    print(f"  {kind} {depth}: {problem or f'{time.monotonic() - begin:.1f} s'}", flush=True)
    if problem:
        return {"kind": kind, "depth": depth, "error": problem}
    row: Data = json.loads(done.stdout.splitlines()[-1])
    return row


# -- results ----------------------------------------------------------------------------------


def exponents(rows: list[Data]) -> list[Data]:
    """Fit every quantity's growth with depth, for each kind of model that has two depths."""
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        done = [row for row in rows if row["kind"] == kind and "error" not in row]
        if len(done) < 2:
            continue
        depths = [row["depth"] for row in done]
        series = {
            **{
                f"seconds to {part}": [max(row["seconds"][part], 1e-4) for row in done]
                for part in done[0]["seconds"]
            },
            "planner's own memory in Python": [row["python_bytes"] for row in done],
            "activations at keep-all": [
                row["keep_all_bytes"] - row["least_peak_bytes"] + row["least_activation_bytes"]
                for row in done
            ],
            "activations at one more forward": [row["once_activation_bytes"] for row in done],
            "activations at the least plan": [row["least_activation_bytes"] for row in done],
        }
        found += [
            {"kind": kind, "quantity": name, "exponent": fitted_exponent(depths, values)}
            for name, values in series.items()
            if min(values) > 0
        ]
    return found


def markdown(results: Data) -> str:
    """Write the results as a page."""
    parts = ("trace", "options", "least", "solve")
    rows = table(
        ("model", "depth", "ops", "options", *(f"{part} s" for part in parts), "Python MiB",
         "process MiB", "keep all MiB", "least peak MiB", "its activations MiB", "recomputed",
         "activations at one more forward MiB", "recomputed at the budget"),
        (
            (row["kind"], row["depth"], row["error"])
            if "error" in row
            else (
                row["kind"], row["depth"], row["num_ops"], row["num_options"],
                *(f"{row['seconds'][part]:.2f}" for part in parts),
                *(
                    f"{row[name] / _MIB:.1f}"
                    for name in ("python_bytes", "rss_bytes", "keep_all_bytes",
                                 "least_peak_bytes", "least_activation_bytes")
                ),
                f"{row['least_fraction']:.3f}",
                f"{row['once_activation_bytes'] / _MIB:.1f}",
                f"{row['solved_fraction']:.3f}",
            )
            for row in results["rows"]
        ),
    )  # fmt: skip
    fits = table(
        ("model", "quantity", "exponent of depth"),
        ((f["kind"], f["quantity"], f"{f['exponent']:.2f}") for f in results["exponents"]),
    )
    spoken = (
        "Activations are the peak above parameters, their gradients and the optimizer's state. "
        "Options: listing them and the timeline; least: the search for the least reachable peak; "
        "solve: the cheapest plan at the budget "
        f"{_BUDGET_SHARE:.0%} of the way from there to keeping everything; both with a simulation "
        "of what was found. Seconds are the processor's, and half as many again were seen under "
        "other load; bytes depend on none. At one more forward: the least of the plans of one "
        "whole chain that run the forward at most once again."
    )
    return "\n".join(["# Scaling", "", where(results), "", spoken, "", *rows, "", *fits]) + "\n"


def main() -> int:
    """Run every point, fit, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two shallow depths of each")
    parser.add_argument("--most", type=int, metavar="DEPTH", help="leave deeper models out")
    parser.add_argument("--kinds", nargs="+", choices=sorted(FULL), default=list(FULL))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--point", nargs=2, metavar=("KIND", "DEPTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point is not None:
        print(json.dumps(point(arguments.point[0], int(arguments.point[1]))))
        return 0
    depths = QUICK if arguments.quick else FULL
    rows = [
        _point_in_process(kind, depth)
        for kind in arguments.kinds
        for depth in depths[kind]
        if arguments.most is None or depth <= arguments.most
    ]
    results: Data = {
        "schema_version": 1,
        "theme": "scaling",
        "date": dt.datetime.now(tz=dt.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment("scaling.py", 1),
        "rows": rows,
        "exponents": exponents(rows),
    }
    stem = arguments.out / f"scaling_{hardware()}_{results['date'][:10]}"
    write_atomically(stem.with_suffix(".json"), json.dumps(results, indent=1) + "\n")
    write_atomically(stem.with_suffix(".md"), markdown(results))
    print(markdown(results))
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
