"""The store's index, marks and objects: fast, rebuilt from the folders, and shared by processes."""

import json
import multiprocessing
import os
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

import remat
from remat.runs import RunQuery, list_runs
from remat.runs.entries import EntryStatus
from remat.runs.index import INDEX_FILE, Sort
from remat.runs.marks import add_note, read_marks, set_tags
from remat.runs.records import VariantKind
from sample_runs import sample_run, sample_variant


def put(root, run_id, *variants, **changes):
    """Write a small sample run into a store."""
    folder = root / run_id
    run = sample_run(*(variants or (sample_variant(timeline=(), losses=()),)), id=run_id, **changes)
    run.save(folder / "run.json")
    return folder


def rewrite_in_place(path):
    """Change a file's bytes so that its name, size and time of change stay: nobody may read it."""
    facts = path.stat()
    with path.open("r+b") as stream:
        stream.write(b"x" * facts.st_size)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def ids(root, **query):
    return [entry.id for entry in list_runs(root, RunQuery(**query))]


def test_listing_with_a_fresh_index_opens_no_run(tmp_path):
    """The second listing comes from the index alone: files whose bytes are gone do not show."""
    for number in range(20):
        put(tmp_path, f"run-{number:02}")
    first = list_runs(tmp_path)
    for path in tmp_path.glob("*/run.json"):
        rewrite_in_place(path)
    assert list_runs(tmp_path) == first
    assert len(first) == 20


def test_index_reads_again_only_the_run_that_changed(tmp_path):
    """A run written again, added, tagged or removed shows at once, and no other is opened."""
    kept, changed, gone = (put(tmp_path, name) for name in ("kept", "changed", "gone"))
    list_runs(tmp_path)
    rewrite_in_place(kept / "run.json")
    put(tmp_path, "changed", name="renamed")
    shutil.rmtree(gone)
    put(tmp_path, "new")
    set_tags(changed, ["good"])
    found = {entry.id: entry for entry in list_runs(tmp_path)}
    assert set(found) == {"kept", "changed", "new"}
    assert found["changed"].name == "renamed"
    assert found["changed"].tags == ("good",)
    assert found["kept"].status is EntryStatus.COMPLETE


def damage_wholly(path):
    path.write_bytes(b"this is no database" * 200)


def damage_inside(path):
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(size // 4)
        stream.write(random.Random(0).randbytes(size // 2))


def damage_by_cutting(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def lose_table(path):
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE runs")


def come_from_another_version(path):
    with sqlite3.connect(path) as connection:
        connection.execute("ALTER TABLE runs RENAME COLUMN name TO title")
        connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, damage_wholly, damage_inside, damage_by_cutting, lose_table,
     come_from_another_version],
)  # fmt: skip
def test_index_is_made_again_from_the_folders(tmp_path, damage):
    """Whatever happens to the index, the list is what the folders say."""
    for number in range(30):
        put(tmp_path, f"run-{number:02}", created=f"2026-01-{number + 1:02}T00:00:00+00:00")
    before = list_runs(tmp_path)
    damage(tmp_path / INDEX_FILE)
    assert list_runs(tmp_path) == before
    assert list_runs(tmp_path) == before


def test_store_that_cannot_be_written_is_listed_all_the_same(tmp_path):
    """Where the index cannot be made, its place taken by a folder, the list comes without it."""
    put(tmp_path, "a")
    (tmp_path / INDEX_FILE / "inside").mkdir(parents=True)
    assert ids(tmp_path) == ["a"]


def test_damaged_run_is_listed_until_it_is_repaired(tmp_path):
    """A damaged run is indexed as such, and read again when its file changes."""
    folder = put(tmp_path, "a")
    good = (folder / "run.json").read_text(encoding="utf-8")
    (folder / "run.json").write_text(good[:-200], encoding="utf-8")
    assert [entry.status for entry in list_runs(tmp_path)] == [EntryStatus.DAMAGED]
    (folder / "run.json").write_text(good, encoding="utf-8")
    assert [entry.status for entry in list_runs(tmp_path)] == [EntryStatus.COMPLETE]


@pytest.fixture
def mixed(tmp_path):
    """Give a store of three runs that differ in all that a list can ask for."""
    reference = sample_variant("no plan", VariantKind.REFERENCE, peak_mib=197, ms=120)
    put(tmp_path, "a", reference, sample_variant(peak_mib=118, ms=134), name="digits",
        created="2026-01-01T00:00:00+00:00")  # fmt: skip
    put(tmp_path, "b", reference, sample_variant(peak_mib=90, ms=150), name="Digits-big",
        created="2026-03-01T00:00:00+00:00", notes=("100% of it, under_scored",))  # fmt: skip
    put(tmp_path, "c", name="bytes", status="unfinished", created="2026-02-01T00:00:00+00:00")
    set_tags(tmp_path / "a", ["baseline", "v1"])
    set_tags(tmp_path / "b", ["baseline-old"])
    add_note(tmp_path / "c", "the loader was slow")
    return tmp_path


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "bca"),
        ({"limit": 2}, "bc"),
        ({"tags": ("baseline",)}, "a"),
        ({"tags": ("baseline", "v2")}, ""),
        ({"name": "digits"}, "ba"),
        ({"text": "LOADER"}, "c"),
        ({"text": "100%"}, "b"),
        ({"text": "r_s"}, "b"),
        ({"text": "%"}, "bca"),
        ({"status": EntryStatus.UNFINISHED}, "c"),
        ({"sort": Sort.NAME}, "bca"),
        ({"sort": Sort.PEAK}, "bca"),
        ({"sort": Sort.TIME, "name": "digits"}, "ab"),
    ],
)
def test_runs_are_found_by_what_was_said_about_them(mixed, query, expected):
    """Tags match whole, names and text in part, in any case; wildcards stand for themselves."""
    assert "".join(ids(mixed, **query)) == expected


def test_tags_and_notes_outlive_each_other_and_a_torn_line(tmp_path):
    """Marks only grow; a line that a killed process left is counted and spoils no other."""
    folder = put(tmp_path, "a")
    set_tags(folder, ["one", "two"])
    add_note(folder, "  hello ")
    with (folder / "marks.jsonl").open("ab") as stream:
        stream.write(b'{"at": "2026')
    set_tags(folder, ["three"], remove=["one"])
    marks = read_marks(folder)
    assert marks.tags == ("three", "two")
    assert [note.text for note in marks.notes] == ["hello"]
    assert marks.num_damaged == 1


@pytest.mark.parametrize("tag", ["", "two words", "x" * 65, "new\nline"])
def test_bad_tag_is_refused_before_anything_is_written(tmp_path, tag):
    """A tag is one short word; where one of several is not, none is put."""
    folder = put(tmp_path, "a")
    with pytest.raises(remat.DataError, match="not one word"):
        set_tags(folder, ["good", tag])
    assert not (folder / "marks.jsonl").exists()
    with pytest.raises(remat.DataError, match="a note has"):
        add_note(folder, " \n")


def write_many(root, writer, count, start):
    """Write runs, tags of a shared run and artifacts, and list all the while."""
    from remat.runs.objects import Objects

    objects = Objects(root / "objects")
    start.wait()
    for number in range(count):
        put(root, f"{writer}-{number:02}")
        set_tags(root / "shared", [f"{writer}-{number}"])
        objects.put(f"both {number}".encode(), name="both", media_type="text/plain")
        objects.put(f"{writer} {number}".encode(), name="own", media_type="text/plain")
        list_runs(root)


@pytest.mark.slow
def test_two_processes_writing_to_one_store_lose_nothing(tmp_path):
    """Real processes that write, tag, keep artifacts and index at once: all of it is there."""
    put(tmp_path, "shared")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remat.runs.store", "sample_runs"])
    start, count = context.Barrier(2), 15
    writers = [
        context.Process(target=write_many, args=(tmp_path, name, count, start)) for name in "xy"
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(240)
    assert [writer.exitcode for writer in writers] == [0, 0]
    expected = {f"{name}-{number:02}" for name in "xy" for number in range(count)} | {"shared"}
    found = list_runs(tmp_path)
    assert {entry.id for entry in found} == expected
    assert all(entry.status is EntryStatus.COMPLETE for entry in found)
    tags = {f"{name}-{number}" for name in "xy" for number in range(count)}
    assert set(read_marks(tmp_path / "shared").tags) == tags
    assert len(list((tmp_path / "objects").iterdir())) == 3 * count
    with sqlite3.connect(tmp_path / INDEX_FILE) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_list_says_peak_time_and_quality(mixed):
    """The index holds the figures that a list sorts by."""
    entry = list_runs(mixed, RunQuery(name="digits-big"))[0]
    assert entry.peak_bytes == 90 * 2**20
    assert entry.reference_peak_bytes == 197 * 2**20
    assert (entry.step_seconds, entry.metric, entry.quality) == (0.15, "accuracy", 0.871)


def test_cli_lists_filters_and_sorts(mixed, run_cli):
    """`remat runs` lists by itself; its options choose; JSON has tags and figures."""
    done = run_cli("runs", "--root", mixed, "--tag", "baseline", "--json")
    assert done.code == 0
    [entry] = json.loads(done.out)
    assert (entry["id"], entry["tags"], entry["status"]) == ("a", ["baseline", "v1"], "complete")
    assert entry["path"] == str(mixed / "a")
    done = run_cli("runs", "search", "loader", "--root", mixed)
    assert done.out.splitlines()[1].startswith("c ")
    done = run_cli("runs", "--root", mixed, "--name", "nowhere")
    assert (done.code, done.out) == (0, "")
    assert "no such runs" in done.err
    assert run_cli("runs", "--root", mixed, "--sort", "colour").code == 2


def test_cli_lists_many_runs_a_line_each(tmp_path, run_cli):
    """Beyond some hundred runs each is one plain line, and none is left out."""
    text = put(tmp_path, "first").joinpath("run.json").read_text(encoding="utf-8")
    for number in range(250):
        folder = tmp_path / f"run-{number:03}"
        folder.mkdir()
        (folder / "run.json").write_text(text, encoding="utf-8")
    done = run_cli("runs", "--root", tmp_path)
    assert done.code == 0
    lines = done.out.splitlines()
    assert len(lines) == 251
    assert {line.split()[1] for line in lines} == {"passed"}


def test_cli_shows_tags_and_notes_of_a_run(mixed, run_cli):
    """Tags and notes are put and shown by command; bad ones are one line of error."""
    assert run_cli("runs", "tag", "c", "wip", "--root", mixed).out == "wip\n"
    assert run_cli("runs", "tag", "c", "--remove", "wip", "--json", "--root", mixed).out == "[]\n"
    assert run_cli("runs", "note", "c", "two", "words", "--root", mixed).out == "2 notes\n"
    done = run_cli("runs", "show", "c", "--root", mixed)
    assert "two words" in done.out
    shown = json.loads(run_cli("runs", "show", "c", "--json", "--root", mixed).out)
    assert [note["text"] for note in shown["notes"]] == ["the loader was slow", "two words"]
    assert shown["run"]["name"] == "bytes"
    assert run_cli("runs", "tag", "c", "two words", "--root", mixed).code == 2
    assert run_cli("runs", "show", "nowhere", "--root", mixed).code == 2
