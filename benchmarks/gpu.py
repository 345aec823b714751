"""Everything that needs a GPU, in one command and one results file, within eight minutes.

    python benchmarks/gpu.py [--seconds 450] [--out FILE] [--device ROW]

On twelve architectures, in float32 and under autocast to bfloat16: predicted against measured bytes
(allocated within 2 %, reserved within 5 %) and seconds (within 15 %), by a prediction made without
the device and by one made on it; a plan's budget, and every gradient bit for bit. On two of them,
tokens per second of what others do, and of our plan at the same peak.

The file is written after every row. What is not done when `--seconds` are up is listed with the
reason; the same command measures just that later. `--dry-run` does the same with tiny models on the
CPU. Exit codes: 0 all measured and passed, 1 something failed or is missing, 2 it cannot run here.
"""

# ruff: noqa: E402  its folder is put on the path first, as it is run as a file

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import faulthandler
import functools
import json
import math
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
for _place in (ROOT, ROOT / "tests"):
    if str(_place) not in sys.path:  # run as a file
        sys.path.insert(0, str(_place))

import remat
from benchmarks.gpu_rows import RIVALS, TWELVE, Bench
from benchmarks.runner import Data, read, source_digest, write
from benchmarks.zoo import ZOO
from remat.calibrating.hardware import at_hand
from remat.calibrating.measuring import calibrate
from remat.cost.calibration import Calibration
from remat.cost.devices import Device
from remat.cost.model import CostModel
from remat.cost.usual import usual_cost

CONTENDED = ("gpt2", "llama")
ROW_SECONDS = 90.0
CALIBRATION_SECONDS = 40.0
# What may pass between the last moment of a row and the end of the process.
_GRACE_SECONDS = 20.0
# Ends a row; repeated, as an exception in a destructor or a callback of C is lost.
_REPEAT_SECONDS = 2.0


class OutOfTimeError(BaseException):
    """A row's time is up. No `Exception`, or a compiler would take it for a fault of its own."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTimeError` inside the block once so many seconds have passed."""
    if seconds <= 0:
        raise OutOfTimeError

    def stop(_signal: int, _frame: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Results:
    """The results file: head, rows by name, and the verdicts that follow from them."""

    def __init__(self, path: Path, head: Data) -> None:
        self.path = path
        self.data: Data = {**head, "rows": {}}
        if path.exists():
            found = read(path)
            differs = [key for key in head if found.get(key) != head[key] and key != "date"]
            if differs:
                raise remat.DeviceError(
                    f"{path} is of another {', '.join(differs)}: name a new file by --out, "
                    "or delete it."
                )
            self.data = found

    @property
    def rows(self) -> dict[str, Data]:
        """The rows by name, in the order of measuring."""
        return self.data["rows"]  # type: ignore[no-any-return]

    def is_done(self, name: str) -> bool:
        """Whether a row is there and need not be measured again."""
        return self.rows.get(name, {}).get("outcome") in ("measured", "not reached")

    def keep(self, name: str, row: Data) -> None:
        """Add a row and write the file."""
        self.rows[name] = row
        self.data["verdicts"] = verdicts(self.rows)
        write(self.path, self.data)


def verdicts(rows: dict[str, Data]) -> Data:
    """Count for each check how many rows passed and failed, and for rows how they ended."""
    found: Data = {"outcomes": {}, "checks": {}}
    for row in rows.values():
        outcome = row["outcome"]
        found["outcomes"][outcome] = found["outcomes"].get(outcome, 0) + 1
        for check in row.get("checks", ()):
            counts = found["checks"].setdefault(
                check["what"], {"passed": 0, "failed": 0, "not judged": 0}
            )
            counts[{True: "passed", False: "failed", None: "not judged"}[check["passed"]]] += 1
    is_failed = any(counts["failed"] for counts in found["checks"].values())
    # What others do may fail, and our plan need not reach their peak; both are results.
    is_missing = any(
        row["outcome"] == "skipped" or (row["outcome"] != "measured" and not row.get("may_fail"))
        for row in rows.values()
    )
    return found | {"passed": not is_failed and not is_missing}


def measured_within(
    job: Callable[[], Data], deadline: float, most_seconds: float = ROW_SECONDS
) -> Data:
    """Measure one row; return why not, where it is not done in its time or raises."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"outcome": "skipped", "reason": "the time of all rows was up before it began"}
    seconds = min(left, most_seconds)
    try:
        with at_most(seconds):
            return job()
    except OutOfTimeError:
        return {"outcome": "skipped", "reason": f"not done in the {seconds:.0f} s left for it"}
    except remat.BudgetError as error:
        return {"outcome": "not reached", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  the other rows are wanted all the same
        return {"outcome": "error", "reason": f"{type(error).__name__}: {error}"[:300]}


def jobs(bench: Bench, results: Results) -> Iterator[tuple[str, Callable[[], Data], bool]]:
    """Yield each row's name, how to measure it, and whether it may fail; what matters most first.

    Lazily: what a row needs of an earlier one is there by then.
    """
    kinds = [(name, cast) for cast in (False, True) for name in bench.entries]

    def each(label: str, measure: Callable[..., Data]) -> Iterator[tuple[str, Any, bool]]:
        for name, cast in kinds:
            title = f"{name} {'bf16' if cast else 'fp32'}, {label}"
            yield title, functools.partial(measure, name, autocast=cast), False

    yield from each("unplanned", bench.unplanned)
    for name in CONTENDED:
        for rival in RIVALS if name in bench.entries else ():
            title = f"{name} bf16, {rival}"
            yield title, functools.partial(bench.rival, name, rival), True
            theirs = results.rows.get(title)
            if theirs is not None and theirs["outcome"] == "measured":
                yield f"{title}: ours", functools.partial(bench.ours, name, rival, theirs), True
    yield from each("planned", bench.planned)
    yield from each("predicted on the device", bench.predicted_here)


def calibration_of(row: Device, seconds: float) -> Data:
    """Measure the prices of ops by which step times are predicted."""
    found = calibrate(row, seconds=seconds, save=False)
    return {"outcome": "measured", "calibration": found.model_dump(mode="json")}


def priced(results: Results, row: Device) -> CostModel:
    """Return prices of ops: as calibrated for this file, else as any plan's."""
    known = results.rows.get("calibration", {}).get("calibration")
    if known is None:
        return usual_cost(row)
    calibration = Calibration.from_data(known, source=f"the calibration in {results.path}")
    return CostModel(device=row, calibration=calibration)


def run(bench: Bench, results: Results, deadline: float, only: str = "") -> None:
    """Measure every row that the file does not have, and write it after each."""
    # A dry run is there to come to its end, on a machine that may be busy.
    most = ROW_SECONDS if bench.device.type == "cuda" else math.inf
    for name, job, may_fail in jobs(bench, results):
        if results.is_done(name) or not re.search(only, name):
            continue
        results.keep(name, measured_within(job, deadline, most) | {"may_fail": may_fail})
        print(f"{name}: {told(results.rows[name])}", flush=True)


def told(row: Data) -> str:
    """Say a row in one line."""
    if row["outcome"] != "measured":
        return f"{row['outcome']}: {row['reason']}"
    words = {True: "ok", False: "FAILED", None: "not judged"}
    parts = [
        f"{check['what']} {words[check['passed']]}"
        + (f" ({check['error']:+.1%})" if "error" in check else "")
        for check in row.get("checks", ())
    ]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:.0f} tokens/s")
    if "times_theirs" in row:
        parts.append(f"{row['times_theirs']:.2f} times theirs")
    return ", ".join(parts)


def opened(path: Path | None, row: Device, hardware: str, *, is_dry: bool) -> Results:
    """Return the results file, with the rows of an earlier run of the same code and device.

    Raises
    ------
    DeviceError: if the file is of something else.
    """
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")
    head = {
        "hardware": hardware,
        "device": row.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": today,
        "source": source_digest(),
        "command": "python benchmarks/gpu.py" + (" --dry-run" if is_dry else ""),
    }
    return Results(path or ROOT / "benchmarks" / "results" / f"gpu_{slug}_{today}.json", head)


def main(given: list[str] | None = None) -> int:
    """Measure what there is time for; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=450.0, help="time for all rows")
    parser.add_argument("--out", type=Path, help="results file; an earlier one is gone on with")
    parser.add_argument("--device", help="row of the device table; found by the GPU's own name")
    parser.add_argument("--only", default="", help="a pattern (re.search) of the rows to measure")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, on the CPU")
    arguments = parser.parse_args(given)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device; none is here. See --dry-run.")
        return 2
    try:
        row, device, hardware = at_hand("cpu" if arguments.dry_run else arguments.device)
        results = opened(arguments.out, row, hardware, is_dry=arguments.dry_run)
    except remat.DeviceError as error:
        print(error)
        return 2
    deadline = time.monotonic() + arguments.seconds
    # A call into C that does not return is ended from outside; every row until then is written.
    seconds = arguments.seconds + _GRACE_SECONDS
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        seconds = 5.0 if arguments.dry_run else CALIBRATION_SECONDS
        if not results.is_done("calibration") and re.search(arguments.only, "calibration"):
            job = functools.partial(calibration_of, row, seconds)
            results.keep("calibration", measured_within(job, deadline))
        entries = _tiny() if arguments.dry_run else {name: ZOO[name] for name in TWELVE}
        bench = Bench(device=device, cost=priced(results, row), entries=entries)
        run(bench, results, deadline, arguments.only)
    finally:
        faulthandler.cancel_dump_traceback_later()
    found = results.data["verdicts"]
    print(json.dumps(found, indent=1))
    print(f"written to {results.path}")
    return 0 if found["passed"] else 1


def _tiny() -> dict[str, Any]:
    from zoo import TINY

    return {name: TINY[name] for name in CONTENDED}


if __name__ == "__main__":
    sys.exit(main())
