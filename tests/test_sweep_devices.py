"""Where the cells of a sweep run: each on its device, no two on one card, on Ray as here."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import textwrap
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import remat
from remat.evaluation.cells import Cell
from remat.evaluation.places import LocalProcesses, OnRay, next_cell
from remat.evaluation.placing import can_take, cards_here, check_device, placed
from remat.evaluation.sweeping import make_cells, sweep
from remat.runs import RunQuery, list_runs, load_run
from remat.runs.across import by_device
from remat.workloads import load_workload
from sample_runs import sample_run
from test_resume import DROPOUT_WORKLOAD

CARDS = ("cuda:0", "cuda:1", "cuda:2")
# Writes down what cards its process sees, and when; then ends the cell.
# Runs as a cell's Python starts, before it imports anything, and ends the process.
SPY = """
    import os, time
    begun = time.time()
    time.sleep(0.3)
    with open(os.path.join(os.path.dirname(__file__), f"seen-{os.getpid()}"), "w") as file:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        file.write(f"{seen};{os.environ['OMP_NUM_THREADS']};{begun};{time.time()}")
    os._exit(0)
"""


@pytest.fixture
def workload(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(DROPOUT_WORKLOAD), encoding="utf-8")
    return path


@given(
    wanted=st.lists(st.sampled_from([None, "cpu", "cuda", *CARDS]), max_size=12),
    jobs=st.integers(1, 5),
    choices=st.randoms(use_true_random=False),
)
def test_no_two_cells_share_a_card_and_none_waits_forever(wanted, jobs, choices):
    """Whatever ends first, each cell gets a card that it asked for, alone, and every cell runs."""
    cells = [
        Cell(folder=str(number), seed=0, budgets=(), arguments=(), device=device)
        for number, device in enumerate(wanted)
    ]
    waiting, running, ran = list(cells), [], []
    while waiting or running:
        free = set(CARDS) - {card for _, card in running}
        while len(running) < jobs and (found := next_cell(waiting, free)):
            cell, card = found
            assert card is None or card in free
            assert (card is None) == (cell.device in (None, "cpu"))
            assert card is None or can_take(cell.device, card)
            waiting.remove(cell)
            running.append(found)
            free.discard(card)
        assert running  # something always can
        ran.append(running.pop(choices.randrange(len(running)))[0])
    assert Counter(cell.folder for cell in ran) == Counter(cell.folder for cell in cells)


def test_any_card_leaves_those_that_others_name():
    """A cell that takes any card takes one that no other cell is waiting for by name."""
    cells = [
        Cell(folder=name, seed=0, budgets=(), arguments=(), device=name)
        for name in ("cuda", "cuda:0", "cuda:1")
    ]
    assert next_cell(cells, set(CARDS)) == (cells[0], "cuda:2")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cuda:7", "device 'cuda:7' is not here: there is cpu, cuda:0, cuda:1, cuda:2"),
        ("mps", "'mps' is not here: there is cpu, cuda:0"),
        ("H100-80GB", r"nothing to train on: expected one of those here \(cpu, cuda:0"),
        ("", "nothing to train on"),
    ],
)
def test_device_that_is_not_here_is_one_error_with_those_that_are(name, said):
    """A device that cannot be trained on is refused, and the message says which can be."""
    with pytest.raises(remat.DeviceError, match=said):
        check_device(name, CARDS)
    assert [check_device(one, CARDS) for one in ("CPU", " cuda", "cuda:1")] == [
        "cpu", "cuda", "cuda:1",
    ]  # fmt: skip


def test_commands_refuse_a_device_that_is_not_here(run_cli, workload, tmp_path):
    """`evaluate` and `sweep` end with code 2 and one line before anything is trained."""
    for command in (("evaluate",), ("sweep", "--device", "cpu", "--root", tmp_path / "runs")):
        verb, *more = command
        done = run_cli(verb, workload, "--budget", "70%", "--device", "cuda:99", *more)
        assert done.code == 2
        assert "device 'cuda:99' is not here: there is cpu" in done.err
    assert not (tmp_path / "runs").exists()


def test_cells_see_their_own_card_alone(tmp_path, monkeypatch):
    """Two cards, three cells on any of them and one on the CPU: alone on each card, none there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SPY), encoding="utf-8")
    where = ("any.py", tmp_path, "s")
    cells = [
        *make_cells(*where, seeds=[0, 1, 2], budgets=["80%"], devices=["cuda"]),
        *make_cells(*where, seeds=[0], budgets=["80%"], devices=["cpu"]),
        *make_cells(*where, seeds=[0], budgets=["80%"]),
    ]
    place = LocalProcesses(jobs=3, cards={"cuda:0": "GPU-4a", "cuda:1": "7"})
    sweep(cells, place, tag="t", threads=3)
    seen = [path.read_text().split(";") for path in tmp_path.glob("seen-*")]
    assert {threads for _, threads, _, _ in seen} == {"3"}
    on_cards = [row for row in seen if row[0] in ("GPU-4a", "7")]
    assert len(on_cards) == 3
    assert sorted(row[0] for row in seen if row not in on_cards) == ["", "9"]
    for card in ("GPU-4a", "7"):
        times = sorted((float(begin), float(end)) for on, _, begin, end in on_cards if on == card)
        assert all(end < later for (_, end), (later, _) in itertools.pairwise(times))


def test_cards_are_those_that_torch_sees(monkeypatch):
    """Cards carry the names that CUDA_VISIBLE_DEVICES gave them, numbers or not."""
    count = torch.cuda.device_count()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"GPU-{i}" for i in range(count)))
    cards = {name: seen for name, seen in cards_here().items() if name != "mps"}
    assert cards == {f"cuda:{number}": f"GPU-{number}" for number in range(count)}


def test_placed_model_starts_from_the_same_weights(workload):
    """Moving to a device changes no weight; a model on meta cannot be moved, and says so."""
    loaded = load_workload(str(workload))
    moved = placed(loaded, "cpu")
    torch.manual_seed(3)
    here = loaded.model().state_dict()
    torch.manual_seed(3)
    there = moved.model().state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert placed(loaded, None) is loaded
    meta = remat.Workload(
        name="meta", model=lambda: torch.nn.Linear(2, 2, device="meta"), train_data=[1]
    )
    with pytest.raises(remat.WorkloadError, match="Cannot copy out of meta tensor"):
        remat.evaluate(meta, device="cpu", page=False)


def test_results_are_put_together_by_device():
    """Peaks, times and quality by device; losses against the same seed on the first device."""
    run = sample_run()
    other = run.model_copy(
        update={
            "environment": run.environment.model_copy(update={"device": "Card"}),
            "variants": tuple(
                one.model_copy(update={"losses": tuple(loss + 0.5 for loss in one.losses)})
                for one in run.variants
            ),
        }
    )
    results = by_device([run, run, other])
    trained = [one for one in run.variants if one.losses]
    assert trained
    for variant in trained:
        here, there = (
            next(one for one in results if (one.device, one.variant) == (device, variant.label))
            for device in (run.environment.device, "Card")
        )
        assert (here.num_runs, there.num_runs) == (2, 1)
        assert here.peak_bytes == variant.measured_peak_bytes
        assert here.loss_difference is None
        assert there.loss_difference == pytest.approx(0.5)


@pytest.fixture
def ray_folder(monkeypatch):
    """Give Ray a folder of its own, of a short name, as its sockets lie there; and clean it up."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    before = dict(os.environ)
    os.environ["RAY_TMPDIR"] = folder
    yield folder
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


def ray_processes(folder):
    listed = subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [line for line in listed if folder in line]


@pytest.mark.slow
def test_cells_give_the_same_bits_alone_side_by_side_and_on_ray(
    tmp_path, workload, run_cli, ray_folder
):
    """Every loss, weight and verdict of two seeds is the same, and Ray leaves nothing behind."""
    local, document = swept(run_cli, workload, tmp_path / "local", "local")
    for result in document["by_device"]:
        same = [v for run in local for v in run.variants if v.label == result["variant"]]
        assert (result["device"], result["num_runs"], result["num_failed"]) == ("cpu", 2, 0)
        assert result["peak_bytes"] == max(v.measured_peak_bytes for v in same)
    assert len(list_runs(tmp_path / "local", RunQuery(tags=("sweep-mine",)))) == 2
    assert local[0].variants[0].losses != local[1].variants[0].losses
    alone = remat.evaluate(
        load_workload(str(workload)), budgets=["70%"], seed=8, max_steps=2, front_points=0,
        timing_rounds=1, page=False, serving=None, expenses=None, out=tmp_path / "alone",
    )  # fmt: skip
    check_same_bits(alone, local[1])
    pytest.importorskip("ray")
    there, _ = swept(run_cli, workload, tmp_path / "ray", "ray")
    for far, near in zip(there, local, strict=True):
        check_same_bits(far, near)
        assert [v.verdict for v in far.variants] == [v.verdict for v in near.variants]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    deadline = time.monotonic() + 20
    while ray_processes(ray_folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray_processes(ray_folder) == []


def swept(run_cli, workload, root, place):
    done = run_cli(
        "sweep", workload, "--budget", "70%", "--seeds", "2", "--first-seed", "7",
        "--max-steps", "2", "--device", "cpu", "--on", place, "--root", root, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    cells = document["cells"]
    assert [(cell["seed"], cell["device"]) for cell in cells] == [(7, "cpu"), (8, "cpu")]
    return [load_run(cell["path"]) for cell in cells], document


def check_same_bits(run, other):
    for one, two in zip(run.variants, other.variants, strict=True):
        assert (one.label, one.status) == (two.label, two.status)
        assert one.losses == two.losses
        assert one.weights_sha256 == two.weights_sha256
        assert one.measured_peak_bytes == two.measured_peak_bytes


@pytest.mark.slow
def test_ray_refuses_cards_that_its_cluster_has_not(tmp_path, ray_folder):
    """A cluster hands out its cards by itself: a numbered one, or one of none, is refused."""
    pytest.importorskip("ray")
    cells = make_cells("nowhere.py", tmp_path, "s", seeds=[0], budgets=["80%"], devices=["cuda:1"])
    with pytest.raises(remat.DeviceError, match="'cuda:1' is not in the Ray cluster"):
        sweep(cells, OnRay(jobs=1), tag="t")
