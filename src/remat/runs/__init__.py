"""Finished and unfinished evaluations on disk: written, listed and loaded."""

from __future__ import annotations

from remat.runs.records import Run
from remat.runs.store import RunEntry, RunQuery, list_runs, load_run, new_run_dir

__all__ = ["Run", "RunEntry", "RunQuery", "list_runs", "load_run", "new_run_dir"]
