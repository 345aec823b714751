"""What ONNX Runtime holds to serve a file: growth of resident memory, in a process of its own.

Its allocator keeps no record that could be read, so the operating system's is taken: from before
the file is opened to the highest while it answers. Run as a program, this module is that process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remat.errors import WorkloadError

# Any: ONNX Runtime has no stubs; arrays of NumPy.

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of resident memory to what it is now
_ANSWERS = 2  # the first one lays out memory, the second reuses it
_TIMEOUT_S = 120


def resident_growth(path: Path, feed: Mapping[str, Any], num_threads: int) -> int:
    """Open the file and answer a feed in a new process; return the bytes by which it grew.

    Raises
    ------
    WorkloadError: if that process fails, or this system does not say how much is resident.
    """
    import numpy as np

    if not (_STATUS.exists() and _RESET.exists()):
        raise WorkloadError("this system does not say how much memory of a process is resident.")
    with tempfile.TemporaryDirectory(prefix="remat-") as folder:
        inputs = Path(folder) / "inputs.npz"
        np.savez(inputs, allow_pickle=False, **feed)
        command = [sys.executable, "-m", __name__, os.fspath(path), os.fspath(inputs)]
        try:
            done = subprocess.run(  # noqa: S603  our own module, with words and no shell
                [*command, str(num_threads)],
                capture_output=True,
                text=True,
                check=False,
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise WorkloadError(f"it took more than {_TIMEOUT_S} s in its own process.") from error
    if done.returncode != 0 or not done.stdout.strip().isdecimal():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise WorkloadError(f"its own process ended with: {last}")
    return int(done.stdout)


def open_session(path: Path, num_threads: int) -> Any:
    """Open an ONNX file for the CPU, with so many threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        os.fspath(path), sess_options=options, providers=["CPUExecutionProvider"]
    )


def _measure(path: Path, inputs: Path, num_threads: int) -> int:
    import numpy as np
    import onnxruntime  # noqa: F401  loaded before what is counted

    with np.load(inputs, allow_pickle=False) as data:
        feed = {name: data[name] for name in data.files}
    _RESET.write_text(_RESET_PEAK, encoding="ascii")
    before = _status_bytes("VmRSS")
    session = open_session(path, num_threads)
    for _ in range(_ANSWERS):
        session.run(None, feed)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None  # Linux writes both of every process
    return int(found[1]) * 1024


if __name__ == "__main__":
    _file, _inputs, _threads = sys.argv[1:]
    sys.stdout.write(str(_measure(Path(_file), Path(_inputs), int(_threads))))
