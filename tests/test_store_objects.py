"""Artifacts by content: kept once, checked when read, collected only when nothing names them."""

import csv
import hashlib
import json
import os
import tarfile
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import remat
from remat.evaluation.keeping import keep_files, put_weights
from remat.runs import list_runs, load_run
from remat.runs.collecting import DAY_SECONDS, collect_garbage
from remat.runs.export import export_runs
from remat.runs.objects import Objects, objects_of
from sample_runs import sample_run, sample_variant

NOW = 2_000_000_000.0


def put(root, run_id, *artifacts):
    """Write a small run that names these artifacts into a store."""
    run = sample_run(sample_variant(timeline=(), losses=()), id=run_id, artifacts=artifacts)
    run.save(root / run_id / "run.json")
    return root / run_id


def keep(objects, text, age=0.0):
    """Keep a text as if it had been put some seconds before NOW."""
    artifact = objects.put(text.encode(), name="text", media_type="text/plain")
    os.utime(objects.path(artifact.sha256), (NOW - age, NOW - age))
    return artifact


def test_equal_bytes_lie_once_under_their_digest(tmp_path):
    """The name of an object is the SHA-256 of its bytes, and putting it twice keeps one."""
    objects = Objects(tmp_path / "objects")
    first, again = keep(objects, "hello"), keep(objects, "hello")
    assert first == again
    assert first.sha256 == hashlib.sha256(b"hello").hexdigest()
    assert list(objects.digests()) == [first.sha256]
    assert objects.read(first.sha256) == b"hello"


def test_damaged_object_is_noticed_and_replaced_when_put_again(tmp_path):
    """Bytes that are not those of the name are never given back; the right ones replace them."""
    objects = Objects(tmp_path / "objects")
    artifact = keep(objects, "hello")
    objects.path(artifact.sha256).write_text("hullo", encoding="utf-8")
    with pytest.raises(remat.RunError, match="is damaged"):
        objects.read(artifact.sha256)
    keep(objects, "hello")
    assert objects.read(artifact.sha256) == b"hello"
    with pytest.raises(remat.RunError, match="is not in"):
        objects.read("0" * 64)


TEXTS = st.sampled_from("abcdefgh")


@settings(max_examples=40)
@given(
    kept=st.dictionaries(TEXTS, st.floats(0, 3 * DAY_SECONDS)),
    runs=st.lists(st.lists(TEXTS, max_size=3), max_size=4),
    least_age=st.sampled_from([0.0, DAY_SECONDS, 2 * DAY_SECONDS]),
)
def test_collection_takes_what_is_old_and_unreferenced_and_nothing_else(
    tmp_path_factory, kept, runs, least_age
):
    """Over random stores: all that a run names stays, all that is young stays, the rest goes."""
    root = tmp_path_factory.mktemp("store")
    objects = Objects(root / "objects")
    artifacts = {text: keep(objects, text, age) for text, age in kept.items()}
    named = {text for texts in runs for text in texts if text in artifacts}
    for number, texts in enumerate(runs):
        put(root, f"run-{number}", *(artifacts[text] for text in texts if text in artifacts))
    found = collect_garbage(root, older_than_seconds=least_age, now=NOW)
    gone = {text for text, age in kept.items() if text not in named and age >= least_age}
    assert set(objects.digests()) == {artifacts[text].sha256 for text in set(kept) - gone}
    assert set(found.removed) == {artifacts[text].sha256 for text in gone}
    assert found.freed_bytes == len(gone)


def test_object_put_again_before_its_run_is_written_is_young(tmp_path):
    """An old object that a new run is about to name is not taken from under it."""
    objects = Objects(tmp_path / "objects")
    artifact = keep(objects, "shared", age=9 * DAY_SECONDS)
    os.utime(objects.path(artifact.sha256), (NOW - 9 * DAY_SECONDS,) * 2)
    objects.put(b"shared", name="text", media_type="text/plain")  # and then a crash, or a pause
    assert collect_garbage(tmp_path).removed == ()
    assert objects.read(artifact.sha256) == b"shared"


def test_rests_of_killed_writers_are_collected_by_age(tmp_path):
    """A temporary file goes when it is old; files of others in the folder stay."""
    objects = Objects(tmp_path / "objects")
    keep(objects, "x")
    for name in (".weights.abc.part", ".young.part", "README"):
        (objects.folder / name).write_text("x", encoding="utf-8")
    os.utime(objects.folder / ".weights.abc.part", (NOW, NOW))
    later = NOW + 2 * DAY_SECONDS
    os.utime(objects.folder / ".young.part", (later, later))
    found = collect_garbage(tmp_path, now=later)
    assert ".weights.abc.part" in found.removed
    assert {path.name for path in objects.folder.iterdir()} == {".young.part", "README"}


def test_collection_beside_a_damaged_run_removes_nothing(tmp_path):
    """What a damaged run references cannot be known, so everything stays, with the reason."""
    objects = Objects(tmp_path / "objects")
    artifact = keep(objects, "x", age=9 * DAY_SECONDS)
    folder = put(tmp_path, "bad", artifact)
    text = (folder / "run.json").read_text(encoding="utf-8")
    (folder / "run.json").write_text(text[:-50], encoding="utf-8")
    with pytest.raises(remat.RunError, match=r"'bad' is damaged.*nothing was removed"):
        collect_garbage(tmp_path, now=NOW)
    assert objects.read(artifact.sha256) == b"x"


@pytest.fixture
def store(tmp_path):
    """Give a store of two runs that share an artifact, and one artifact of nobody's."""
    root = tmp_path / "store"
    objects = Objects(root / "objects")
    shared, own, nobodys = (keep(objects, text) for text in ("shared", "own", "nobody"))
    put(root, "a", shared)
    put(root, "b", shared, own)
    return root, shared, own, nobodys


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_exported_archive_unpacked_is_a_store(store, tmp_path, ending):
    """An archive holds the runs with the artifacts that they name, and no others."""
    root, shared, own, nobodys = store
    target = export_runs([root / "a", root / "b"], tmp_path / f"out{ending}")
    unpacked = tmp_path / "unpacked"
    if ending == ".zip":
        zipfile.ZipFile(target).extractall(unpacked)
    else:
        with tarfile.open(target) as archive:
            archive.extractall(unpacked, filter="data")
    assert [entry.id for entry in list_runs(unpacked)] == ["b", "a"]
    assert load_run("b", unpacked) == load_run("b", root)
    assert objects_of(unpacked / "a").read(shared.sha256) == b"shared"
    assert objects_of(unpacked / "b").read(own.sha256) == b"own"
    assert not list(unpacked.rglob(nobodys.sha256))
    assert not list(tmp_path.glob(".export*"))


def test_export_lacking_an_artifact_fails_and_leaves_no_file(store, tmp_path):
    """An archive is whole or not there."""
    root, shared, _, _ = store
    objects_of(root / "a").path(shared.sha256).unlink()
    with pytest.raises(remat.RunError, match="is not in"):
        export_runs([root / "a"], tmp_path / "out.zip")
    with pytest.raises(remat.DataError, match=r"ends in .zip, .tar.gz, .csv"):
        export_runs([root / "a"], tmp_path / "out.xlsx")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_export_as_table_has_a_row_for_each_variant(tmp_path, run_cli):
    """The table reads back with the figures of the runs."""
    run = sample_run(id="a")
    run.save(tmp_path / "a" / "run.json")
    target = tmp_path / "out.csv"
    done = run_cli("runs", "export", "a", "-o", target, "--root", tmp_path, "--json")
    assert json.loads(done.out) == {"num_runs": 1, "path": str(target)}
    rows = list(csv.DictReader(target.read_text(encoding="utf-8").splitlines()))
    assert [row["variant"] for row in rows] == [variant.label for variant in run.variants]
    peaks = [row["measured_peak_bytes"] for row in rows]
    assert peaks == [str(v.measured_peak_bytes or "") for v in run.variants]
    assert rows[0]["accuracy"] == "0.871"


def test_cli_collects_garbage_and_counts_it(store, run_cli):
    """`remat runs gc` says what it removed; a referenced artifact is never among it."""
    root, shared, own, nobodys = store
    done = run_cli("runs", "gc", "--root", root, "--older-than-days", "0", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    # they were put at NOW, which is later than this test runs
    assert found["removed"] == []
    for digest in (shared.sha256, own.sha256, nobodys.sha256):
        os.utime(root / "objects" / digest, (1, 1))
    found = json.loads(run_cli("runs", "gc", "--root", root, "--json").out)
    assert found["removed"] == [nobodys.sha256]
    assert (found["num_runs"], found["num_referenced"], found["freed_bytes"]) == (2, 2, 6)


def test_weights_are_kept_in_safetensors_with_shared_tensors_once(tmp_path):
    """Weights read back equal, tied ones once; equal weights of two variants are one object."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    objects = Objects(tmp_path / "objects")
    first, second = (put_weights(model, objects, label) for label in ("no plan", "plan 60%"))
    assert first.sha256 == second.sha256
    read = load_file(objects.path(first.sha256))
    assert set(read) == (dict(model.named_parameters()) | dict(model.named_buffers())).keys()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items()
               if name in read)  # fmt: skip
    assert [path.name for path in objects.folder.iterdir()] == [first.sha256]


def test_plans_series_and_page_of_a_run_are_kept(tmp_path):
    """Plans, report and page are artifacts; weights that the run holds stay among them."""
    run = sample_run()
    (tmp_path / "report.html").write_text("<p>page</p>", encoding="utf-8")
    objects = Objects(tmp_path / "objects")
    kept = {one.name: one for one in keep_files(run, tmp_path, objects)}
    assert {"plans/plan 60%.json", "report.html", "report.md"} <= kept.keys()
    path = objects.path(kept["plans/plan 60%.json"].sha256)
    assert remat.Plan.load(path) == next(v.plan for v in run.variants if v.label == "plan 60%")
