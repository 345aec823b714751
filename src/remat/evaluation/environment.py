"""Where a run was made: machine, versions, commit, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import remat
from remat.calibrating.hardware import processor_name
from remat.runs.records import Environment

_RECORDED_PACKAGES = ("torch", "numpy", "highspy", "pydantic", "torchmetrics", "transformers")


def describe_environment(device: torch.device, command: str | None = None) -> Environment:
    """Record the machine, the versions and the command that this process was started with."""
    commit, dirty = _git_state()
    return Environment(
        command=command or _command(),
        machine=f"{platform.system()} {platform.machine()}",
        processor=processor_name(),
        num_threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        python=platform.python_version(),
        versions=_versions(),
        git_commit=commit,
        git_dirty=dirty,
    )


def _command() -> str:
    program = [Path(sys.argv[0]).name or "python"]
    if program == ["__main__.py"]:  # python -m PACKAGE
        package = getattr(sys.modules["__main__"], "__package__", None)
        program = ["python", "-m", package] if package else program
    return shlex.join([*program, *sys.argv[1:]])


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    installed = {name: _version(name) for name in _RECORDED_PACKAGES}
    return {"remat": remat.__version__} | {name: v for name, v in installed.items() if v}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Commit of the working folder, and whether files differ from it; nothing without git."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        # a folder's own git configuration could start programs of its own: none of that here
        done = subprocess.run(  # noqa: S603
            ["git", "-c", "core.fsmonitor=false", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
