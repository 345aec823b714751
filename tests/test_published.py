"""Peaks that others measured on GPUs, predicted on this machine; the rest is in `benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if (_ROOT := str(Path(__file__).parent.parent)) not in sys.path:
    sys.path.append(_ROOT)

from benchmarks.published import CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_published_peak_is_predicted_within_its_tolerance(name):
    """The prediction is within a tenth of what the source says was measured on its card."""
    pytest.importorskip("transformers")
    case = CASES[name]
    assert case.predict() == pytest.approx(case.published_bytes, rel=case.tolerance)


def test_every_published_peak_has_a_source():
    """Each case says where its figure is from, and is to be within a tenth."""
    assert len(CASES) >= 3
    assert all(case.source and case.tolerance <= 0.1 for case in CASES.values())
