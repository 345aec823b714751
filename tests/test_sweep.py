"""Sweeps: which cells there are; a cell that fails stops no other."""

import pytest

import remat
from remat.evaluation.places import LocalProcesses
from remat.evaluation.sweeping import make_cells, sweep


def test_cells_are_seeds_budgets_and_devices(tmp_path):
    """One run for each seed, budget (kept apart) and device; no two share a folder."""
    settings = {"seeds": [0, 1], "budgets": ["80%", "8 GiB"]}
    together = make_cells("w.py", tmp_path, "s", **settings)
    assert [(cell.seed, cell.budgets) for cell in together] == [
        (0, ("80%", "8 GiB")),
        (1, ("80%", "8 GiB")),
    ]
    apart = make_cells("w.py", tmp_path, "s", **settings, apart=True)
    assert len({cell.folder for cell in (*together, *apart)}) == 6
    placed = make_cells("w.py", tmp_path, "s", **settings, devices=["cpu", "cuda:1", "cpu"])
    assert [(cell.device, cell.seed) for cell in placed] == [
        ("cpu", 0), ("cpu", 1), ("cuda:1", 0), ("cuda:1", 1),
    ]  # fmt: skip
    assert len({cell.folder for cell in placed}) == 4
    with pytest.raises(remat.WorkloadError, match="at least one seed"):
        make_cells("w.py", tmp_path, "s", seeds=[], budgets=["80%"])


def test_cell_that_fails_stops_no_other(tmp_path):
    """Each cell has its own end, with its message; runs that are not there are not tagged."""
    cells = [
        *make_cells("nowhere.py", tmp_path, "a", seeds=[0], budgets=["80%"]),
        *make_cells("gone.py", tmp_path, "b", seeds=[0], budgets=["80%"]),
    ]
    seen = []
    ended = sweep(cells, LocalProcesses(jobs=2), tag="t", on_end=seen.append)
    assert [one.cell for one in ended] == cells
    assert len(seen) == 2
    assert all(one.exit_code == 2 for one in ended)
    assert ["'nowhere.py'" in ended[0].message, "'gone.py'" in ended[1].message] == [True, True]


def test_sweep_to_an_unknown_place_is_a_usage_error(run_cli):
    """Only places that there are are taken."""
    done = run_cli("sweep", "nowhere.py", "--budget", "70%", "--on", "mars")
    assert done.code == 2
    assert "there are local, ray" in done.err
