"""Every test starts from its own random state, on one thread, and leaves torch as it found it."""

# ruff: noqa: E402  the environment is set before torch and others read it

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import textwrap
import uuid
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch, Transformers and rich are imported: no look-ups, one thread, screens of one width.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    OMP_NUM_THREADS="1",
    COLUMNS="100",
    NO_COLOR="1",
    TERM="dumb",
)
for _name in ("FORCE_COLOR", "GITHUB_ACTIONS", "REMAT_RUNS", "REMAT_DEBUG"):
    os.environ.pop(_name, None)

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.modules.module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

torch.set_num_threads(1)
# The same cases in every run, and none given up because the machine is busy: what was not changed
# must not fail. New cases are drawn by `make fuzz`.
hypothesis.settings.register_profile(
    "remat",
    deadline=None,
    print_blob=True,
    derandomize="REMAT_FUZZ_CASES" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("remat")

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Leave the seeds to the fixture below; pytest-randomly keeps the shuffling."""
    config.option.randomly_reset_seed = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is here"))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]):
    """Seed what several tests share from its own name: whichever of them comes first."""
    if fixturedef.scope != "function":
        seed_all(f"{fixturedef.func.__module__}.{fixturedef.argname}")
    return (yield)


@pytest.fixture(autouse=True)
def fresh_random_state(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's name: the same in any order and on any worker."""
    return seed_all(request.node.nodeid)


def seed_all(name: str) -> int:
    """Seed every generator from a name, and return the seed."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what users' code draws from
    torch.manual_seed(seed)
    return seed


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test a cache of its own: what is known of this machine must not change plans."""
    monkeypatch.setenv("REMAT_CACHE", str(tmp_path_factory.getbasetemp() / uuid.uuid4().hex))


@pytest.fixture(autouse=True)
def unchanged_torch_state():
    """Prove that the test changed no global state of torch; random state is each test's own."""
    before = torch_state()
    yield
    after = torch_state()
    changed = [
        f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]
    ]
    assert not changed, "the test left torch's global state changed: " + "; ".join(changed)


@pytest.fixture
def heap_of_its_own():
    """Keep what other tests left alive out of `gc.get_objects()`: it may go at any moment."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def torch_state() -> dict[str, object]:
    """Read everything global in torch that remat, or a test of it, could leave changed."""
    hooks = {
        name: tuple(value)
        for name, value in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients recorded": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "mkldnn": torch.backends.mkldnn.enabled,
        "threads": torch.get_num_threads(),
        "module hooks": hooks,
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "saved-tensor hooks allowed": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "dispatch modes": [type(mode).__name__ for mode in _get_current_dispatch_mode_stack()],
        "function modes": [type(mode).__name__ for mode in _get_current_function_mode_stack()],
    }


@dataclass(frozen=True)
class Result:
    """How one command ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def restored_imports(monkeypatch: pytest.MonkeyPatch):
    """Give back what loading a workload adds: its folder on the path, and its module."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("remat_workload_"):
            del sys.modules[name]


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str], restored_imports: None) -> Callable[..., Result]:
    """Run `remat ARGUMENTS` in this process; what C code writes is captured as well."""
    from remat.cli import main

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def run_process() -> Callable[..., Result]:
    """Run Python with ARGUMENTS in a process of its own."""

    def run(*arguments: object, **environment: str) -> Result:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def run_pair(run_process: Callable[..., Result]) -> Callable[..., Result]:
    """Run a script with ARGUMENTS in two processes, as torchrun does; it must end well."""
    if not torch.distributed.is_available():
        pytest.skip("torch has no distributed package")

    def run(script: Path, *arguments: object) -> Result:
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
        done = run_process(*launcher, script, *arguments)
        assert done.code == 0, done.err
        return done

    return run


@pytest.fixture(scope="session")
def found_by_pair(
    run_pair: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], dict[str, tuple[Any, ...]]]:
    """Run a worker that writes what each process found: {name: (that of rank 0, of rank 1)}."""

    def find(worker: Path) -> dict[str, tuple[Any, ...]]:
        folder = tmp_path_factory.mktemp("found")
        run_pair(worker, folder)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
        return {name: tuple(rank[name] for rank in ranks) for name in ranks[0]}

    return find


TINY_WORKLOAD = """
    import torch
    import remat

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(32, 128)
            self.down = torch.nn.Linear(128, 32)

        def forward(self, x):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    def build():
        return torch.nn.Sequential(*[Block() for _ in range(4)], torch.nn.Linear(32, 4))

    def loss(model, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    examples = [(torch.full((32,), float(i)), i % 4) for i in range(256)]
    workload = remat.Workload(
        name="tiny", model=build, train_data=examples, eval_data=examples[:64], batch_size=128,
        loss=loss,
    )
"""


@pytest.fixture
def write_workload(tmp_path: Path, restored_imports: None) -> Callable[..., Path]:
    """Write a workload file into the test's folder; a tiny one that works, unless given."""

    def write(text: str = TINY_WORKLOAD, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write
