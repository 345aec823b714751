"""The run store and its records: round trips, naming, damage, and the series as CSV."""

import csv
import datetime as dt
import io
import json

import pytest

import remat
from remat.errors import PlanFileError
from remat.runs import Run, list_runs, load_run, new_run_dir
from remat.runs.records import VariantKind
from remat.runs.series import metrics_csv
from remat.runs.store import EntryStatus, claim_run_dir, store_root
from sample_runs import sample_run, sample_variant


def put(root, run_id, **changes):
    """Write a sample run into a store."""
    folder = root / run_id
    sample_run(id=run_id, **changes).save(folder / "run.json")
    return folder


def test_run_written_and_read_is_the_same(tmp_path):
    """run.json reads back as the record it was written from, plan and all."""
    run = sample_run()
    assert Run.load(run.save(tmp_path / "run.json")) == run


def test_run_with_losses_that_are_no_numbers_reads_back(tmp_path):
    """A diverged training, whose losses are infinite, survives the file too."""
    run = sample_run(sample_variant(losses=(1.0, float("inf"), float("-inf"))))
    assert Run.load(run.save(tmp_path / "run.json")).variants[0].losses == run.variants[0].losses


def test_run_with_unknown_field_is_refused_with_its_path(tmp_path):
    """A field that this version does not know is named by its full path."""
    data = json.loads(sample_run().model_dump_json())
    data["variants"][1]["colour"] = "red"
    (tmp_path / "run.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanFileError, match=r"not valid at variants\.1\.colour"):
        Run.load(tmp_path / "run.json")


def test_run_of_another_version_is_refused(tmp_path):
    """A file of a schema version to come is not read as if it were ours."""
    data = json.loads(sample_run().model_dump_json()) | {"schema_version": 99}
    (tmp_path / "run.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(PlanFileError, match="schema_version 99"):
        Run.load(tmp_path / "run.json")


@pytest.mark.parametrize("name", ["20261105-1", "20261105-1-a", "20261105-1-a-000001"])
def test_load_run_takes_an_id_or_its_unique_beginning(tmp_path, name):
    """The whole id or as much of it as is unique names a run."""
    put(tmp_path, "20261105-1-a-000001")
    put(tmp_path, "20261106-1-b-000002")
    assert load_run(name, tmp_path).id == "20261105-1-a-000001"


def test_load_run_takes_a_folder_or_file(tmp_path):
    """A path to the folder or to its run.json works from anywhere."""
    folder = put(tmp_path, "one")
    assert load_run(folder) == load_run(folder / "run.json") == load_run(str(folder))


def test_load_run_prefers_the_exact_id(tmp_path):
    """An id that begins another one still names its own run."""
    put(tmp_path, "a")
    put(tmp_path, "ab")
    assert load_run("a", tmp_path).id == "a"


def test_load_run_refuses_what_names_several(tmp_path):
    """An ambiguous beginning is an error that lists the runs."""
    put(tmp_path, "aa")
    put(tmp_path, "ab")
    with pytest.raises(remat.RunError, match="names 2 runs: aa, ab"):
        load_run("a", tmp_path)


def test_load_run_that_is_missing_says_what_there_is(tmp_path):
    """The message names what was asked for and the runs that exist."""
    put(tmp_path, "here")
    with pytest.raises(remat.RunError, match=r"no run 'gone'.*latest runs there: here"):
        load_run("gone", tmp_path)
    with pytest.raises(LookupError, match="latest runs there: none"):
        load_run("gone", tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', "\x00"])
def test_damaged_run_is_listed_and_hides_no_other(tmp_path, text):
    """A file that cannot be read is one line of the list, with the reason."""
    put(tmp_path, "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(text, encoding="utf-8")
    entries = {entry.id: entry for entry in list_runs(tmp_path)}
    assert entries["good"].status is EntryStatus.COMPLETE
    assert entries["bad"].status is EntryStatus.DAMAGED
    assert "run.json" in entries["bad"].message
    with pytest.raises(remat.RunError, match="'bad' is damaged"):
        load_run("bad", tmp_path)


def test_list_runs_is_newest_first_and_leaves_other_folders_out(tmp_path):
    """The order is that of the start of the runs, whatever their folders are called."""
    put(tmp_path, "z-old", created="2026-01-01T00:00:00+00:00")
    put(tmp_path, "a-new", created="2026-02-01T00:00:00+00:00")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("x", encoding="utf-8")
    assert [entry.id for entry in list_runs(tmp_path)] == ["a-new", "z-old"]


def test_list_runs_says_whether_a_run_passed_or_was_not_finished(tmp_path):
    """An unfinished run has neither passed nor failed."""
    put(tmp_path, "done")
    put(tmp_path, "cut", status="unfinished")
    entries = {entry.id: entry for entry in list_runs(tmp_path)}
    assert (entries["done"].status, entries["done"].passed) == (EntryStatus.COMPLETE, True)
    assert (entries["cut"].status, entries["cut"].passed) == (EntryStatus.UNFINISHED, None)


def test_list_runs_of_no_store_is_empty(tmp_path):
    """A store that does not exist yet holds no runs."""
    assert list_runs(tmp_path / "nowhere") == []


def test_store_is_the_argument_then_the_environment_then_the_default(tmp_path, monkeypatch):
    """The nearest setting wins."""
    assert str(store_root()) == "remat-runs"
    monkeypatch.setenv("REMAT_RUNS", str(tmp_path / "env"))
    assert store_root() == tmp_path / "env"
    assert store_root(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize(
    ("name", "slug"),
    [("Digits ViT!", "digits-vit"), ("../../etc", "etc"), ("数字", "run"), ("a" * 99, "a" * 40)],
)
def test_new_run_dir_is_named_by_time_and_workload(tmp_path, name, slug):
    """Whatever a workload is called, its folder lies inside the store and two never collide."""
    now = dt.datetime(2026, 11, 5, 14, 32, 10, tzinfo=dt.timezone.utc)
    first, second = (new_run_dir(name, tmp_path, now=now) for _ in range(2))
    assert first != second
    assert first.parent == tmp_path
    assert first.is_dir()
    assert first.name.rpartition("-")[0] == f"20261105-143210-{slug}"


def test_new_run_dir_that_cannot_be_made_says_so(tmp_path):
    """A store that is a file is one clear error."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(remat.RunError, match="cannot be made"):
        new_run_dir("x", tmp_path / "file")


def test_claimed_folder_is_never_written_over(tmp_path):
    """A folder that holds a run is refused as the place of another."""
    put(tmp_path, "one")
    with pytest.raises(remat.RunError, match="already holds a run"):
        claim_run_dir(tmp_path / "one")
    assert claim_run_dir(tmp_path / "two").is_dir()


def test_metrics_csv_reads_back_exactly():
    """Every loss, step time and metric is in the table, and not a bit is lost in the text."""
    losses = (1 / 3, 2.0**-40, 1e300)
    variant = sample_variant("no plan", VariantKind.REFERENCE, losses=losses)
    rows = list(csv.DictReader(io.StringIO(metrics_csv(sample_run(variant)))))
    read = {
        name: tuple(float(row["value"]) for row in rows if row["series"] == name)
        for name in {row["series"] for row in rows}
    }
    assert read["train_loss"] == losses
    assert variant.step_times is not None
    assert read["step_seconds"] == variant.step_times.seconds
    assert read["validation_accuracy"] == (0.871,)
    assert {row["variant"] for row in rows} == {"no plan"}
