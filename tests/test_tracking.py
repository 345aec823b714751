"""Exports to MLflow and TensorBoard: read back by their own readers, with every number kept."""

import struct
import sys

import pytest

import remat
from remat.runs.series import series_of
from remat.runs.tracking import to_mlflow, to_tensorboard
from sample_runs import sample_run, sample_variant


@pytest.fixture
def run():
    return sample_run(sample_variant("no plan", "reference"), sample_variant(), id="one")


@pytest.mark.slow
def test_mlflow_reads_every_series_and_figure(tmp_path, run, run_process):
    """Each variant is a run of MLflow with all its numbers; a second export adds nothing."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run.save(tmp_path / "one" / "run.json")
    database = tmp_path / "tracking" / "mlflow.db"
    export = ("runs", "export", "one", "--root", tmp_path, "--mlflow", database, "--json")
    done = run_process("-W", "ignore", "-m", "remat.cli", *export)
    assert done.code == 0, done.err
    assert '"num_new": 2' in done.out
    assert '"num_new": 0' in run_process("-W", "ignore", "-m", "remat.cli", *export).out
    code = (
        "import json, sys; from mlflow.tracking import MlflowClient\n"
        f"c = MlflowClient(tracking_uri='sqlite:///{database}')\n"
        f"e = c.get_experiment_by_name({run.name!r})\n"
        "r = {r.data.params['variant']: r for r in c.search_runs([e.experiment_id])}\n"
        "h = c.get_metric_history(r['plan 60%'].info.run_id, 'train_loss')\n"
        "print(json.dumps([len(r), [m.value for m in sorted(h, key=lambda m: m.step)],\n"
        "  r['plan 60%'].data.metrics['measured_peak_bytes']]))\n"
    )
    read = run_process("-W", "ignore", "-c", code)
    assert read.code == 0, read.err
    import json

    count, losses, peak = json.loads(read.out.strip().splitlines()[-1])
    assert count == 2
    assert tuple(losses) == run.variants[1].losses
    assert peak == run.variants[1].measured_peak_bytes
    assert sorted(path.name for path in (tmp_path / "tracking").iterdir()) == ["mlflow.db"]


def test_tensorboard_events_hold_every_series(tmp_path, run):
    """The event files, read record by record, hold each number of each series once."""
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.event_pb2 import Event

    assert to_tensorboard([run], tmp_path / "tb") == 2
    folders = sorted(path.name for path in (tmp_path / "tb" / "one").iterdir())
    assert folders == ["no-plan", "plan-60%"]
    [path] = (tmp_path / "tb" / "one" / "plan-60%").iterdir()
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        found += [(one.tag, event.step, one.simple_value) for one in event.summary.value]
        data = data[12 + size + 4 :]
    expected = [(name, index, pytest.approx(v, rel=1e-6)) for name, index, v in
                series_of(run.variants[1])]  # fmt: skip
    assert found == expected
    with pytest.raises(remat.DataError, match="is there already"):
        to_tensorboard([run], tmp_path / "tb")


@pytest.mark.parametrize(
    ("package", "export"), [("mlflow", to_mlflow), ("tensorboard", to_tensorboard)]
)
def test_missing_tracker_is_named_with_the_command_that_installs_it(
    tmp_path, run, monkeypatch, package, export
):
    """Neither package is needed until it is asked for, and then the error says how to get it."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(remat.MissingPackageError, match=r"pip install 'remat\[track\]'"):
        export([run], tmp_path / "x")


def test_export_to_nowhere_is_a_usage_error(tmp_path, run, run_cli):
    """An export says where to."""
    run.save(tmp_path / "one" / "run.json")
    done = run_cli("runs", "export", "one", "--root", tmp_path)
    assert done.code == 2
    assert "where to write" in done.err
