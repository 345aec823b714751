"""Training in service: update steps in one thread beside requests in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from remat.evaluation.serving.request import Request
from remat.runs.evidence import UpdateStep

_LEAST_STEPS, _PATIENCE = 3, 10


@dataclass(slots=True)
class _Seen:
    """What was measured under one variant."""

    steps: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)


def measure_updates(
    steps: Mapping[str, Callable[[], object]],
    served: nn.Module,
    request: Request,
    publish: Callable[[], None],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[UpdateStep, ...]:
    """Make update steps of every variant in turn while another thread sends requests.

    One client sends the next request as soon as the last is answered. After each step `publish`
    copies the new weights into `served`, between two requests. A request counts to the variant
    whose step or copy it began in; the first round is not counted. Runs about `seconds`, and at
    least three counted rounds, or one where three would take more than ten times as long; up to
    ten times as long where no request came beside some variant.

    Raises
    ------
    Exception: what a step or a request raises; the other thread has ended by then.
    """
    seen = {label: _Seen() for label in steps}
    lock, stop = threading.Lock(), threading.Event()
    failures: list[Exception] = []
    current = [""]  # whose step or copy is under way

    def serve() -> None:
        try:
            while not stop.is_set():
                label, begin = current[0], clock()
                with lock:
                    request.send(served)
                if label:
                    seen[label].requests.append(clock() - begin)
        except Exception as error:  # noqa: BLE001  raised again in the thread that waits
            failures.append(error)

    def wait() -> float:
        # On a busy machine the other thread may not have had its turn beside each variant yet.
        return seconds if all(found.requests for found in seen.values()) else _PATIENCE * seconds

    thread = threading.Thread(target=serve, name="requests", daemon=True)
    thread.start()
    try:
        start, rounds, least = clock(), 0, _LEAST_STEPS
        while not failures and (rounds <= least or clock() - start < wait()):
            for label, step in steps.items():
                current[0] = label if rounds else ""
                begin = clock()
                step()
                made = clock()
                with lock, torch.no_grad():
                    publish()
                if rounds:
                    seen[label].steps.append(made - begin)
                    seen[label].lags.append(clock() - begin)
            if not rounds and (clock() - start) * _LEAST_STEPS > _PATIENCE * seconds:
                least = 1
            rounds += 1
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    return tuple(_summary(label, found) for label, found in seen.items() if found.requests)


def _summary(label: str, seen: _Seen) -> UpdateStep:
    p50, p99 = np.percentile(np.asarray(seen.requests, dtype=np.float64), (50, 99))
    return UpdateStep(
        variant=label,
        step_seconds=float(np.median(seen.steps)),
        requests_p50_seconds=float(p50),
        requests_p99_seconds=float(p99),
        steps_per_minute=60 / float(np.mean(seen.lags)),
        num_steps=len(seen.steps),
        num_requests=len(seen.requests),
        lag_seconds=max(seen.lags),
    )
