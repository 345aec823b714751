"""The how-to page runs as it stands: one block after another, with the names of those before."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "integrations.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what three libraries have to say
def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """Blocks share their names, as on the page; `lightning.pytorch` may be the other package."""
    for name in ("transformers", "accelerate", "pytorch_lightning"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 6
    names = {"__name__": "page"}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        for block in blocks:
            here = block.replace("import lightning.pytorch as pl", "import pytorch_lightning as pl")
            exec(compile(here, str(PAGE), "exec"), names)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert "recomputed: peak" in capsys.readouterr().out
