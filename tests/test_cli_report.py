"""`remat report`: one run as page, Markdown or JSON; several on one page."""

import json

import pytest

from remat.report.document import report_data
from remat.report.html import render_html
from remat.report.markdown import render_markdown
from remat.report.sentences import five_sentences
from remat.runs.evidence import PriceSource
from remat.runs.records import EpochQuality, VariantKind
from sample_evidence import rich_run, sample_expense
from sample_runs import sample_run, sample_variant


@pytest.fixture
def store(tmp_path):
    """A store of three runs, as `remat evaluate` leaves them."""
    for i, run in enumerate((rich_run(id="run-a"), sample_run(id="run-b"), sample_run(id="run-c"))):
        run.model_copy(update={"seed": i}).save(tmp_path / run.id / "run.json")
    return tmp_path


def test_json_has_the_sentences_and_tables_of_the_page(run_cli, store):
    """What the page says to people, `--json` says to programs, word for word."""
    done = run_cli("report", "run-a", "--root", store, "--json")
    (told,) = json.loads(done.out)
    page = (store / "run-a" / "report.html").read_text(encoding="utf-8")
    assert done.code == 0
    assert told["report"] == str(store / "run-a" / "report.html")
    assert list(told["sentences"].values()) == [s.text for s in five_sentences(rich_run())]
    titles = [section["title"] for section in told["sections"]]
    assert titles[0] == "Decisions and measurements"
    assert {"Equal over several seeds", "Weak spots", "Serving plan 60%"} <= set(titles)
    for section in told["sections"][1:]:
        assert section["title"] in page
        for table in section["tables"]:
            assert table["rows"]
            assert {len(row) for row in table["rows"]} == {len(table["columns"])}
            assert all(row[0] in page for row in table["rows"] if "<" not in row[0])


def test_markdown_goes_to_stdout_and_writes_no_page(run_cli, store):
    """A job can append it to its summary; lines are whole, whatever the terminal's width."""
    done = run_cli("report", "run-a", "--root", store, "--markdown")
    assert done.code == 0
    assert done.out.startswith("# digits-vit\n\n## Summary\n\n- **What it saves** Training")
    assert "> **Not evaluated** plan 60%: static int8 needs a data loader" in done.out
    assert not (store / "run-a" / "report.html").exists()
    rows = [line for line in done.out.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert len(rows) > 30


def test_markdown_can_be_written_to_a_file(run_cli, store, tmp_path):
    """`--output` names the file, and stdout stays empty."""
    path = tmp_path / "out" / "report.md"
    done = run_cli("report", "run-a", "--root", store, "--markdown", "-o", path)
    assert (done.code, done.out) == (0, "")
    assert path.read_text(encoding="utf-8").startswith("# digits-vit")


def test_several_runs_are_compared_on_one_page(run_cli, store):
    """One page beside the folders, each run linked and told; none of their own pages is written."""
    done = run_cli("report", "run-a", "run-b", "run-c", "--root", store)
    assert done.code == 0, done.err
    page = (store / "comparison.html").read_text(encoding="utf-8")
    assert done.out.rstrip().endswith(f"report  {store / 'comparison.html'}")
    for number, name in enumerate(("run-a", "run-b", "run-c"), start=1):
        assert f'href="#run-{number}"' in page
        assert name in page
        assert not (store / name / "report.html").exists()
    assert "was run from 3 seeds" in page


def test_several_runs_as_markdown_and_json(run_cli, store):
    """The comparison has the same forms as a page of one run."""
    text = run_cli("report", "run-a", "run-b", "--root", store, "--markdown").out
    assert text.startswith("# 2 runs compared\n\n| Run | Id |")
    assert "## 2. digits-vit (run-b)" in text
    told = json.loads(run_cli("report", "run-a", "run-b", "--root", store, "--json").out)
    assert [one["run"] for one in told] == ["run-a", "run-b"]
    assert {one["report"] for one in told} == {str(store / "comparison.html")}


def test_more_runs_than_a_page_holds_are_refused(run_cli, store):
    """The limit is told with the number that was given."""
    done = run_cli("report", *["run-b"] * 51, "--root", store)
    assert done.code == 2
    assert "at most 50 runs, got 51" in done.err


def test_two_forms_for_one_stdout_are_refused(run_cli, store):
    """Markdown and JSON cannot both be printed."""
    done = run_cli("report", "run-a", "--root", store, "--markdown", "--json")
    assert done.code == 2
    assert "give one of them" in done.err


def tables_of(run):
    """Give the rows of every table by its title."""
    found = (table for section in report_data(run)["sections"] for table in section["tables"])
    return {table["title"]: table["rows"] for table in found}


def test_quality_is_told_at_the_last_and_the_best_epoch_and_by_the_target():
    """Every metric, once for all where equal; and when each training reached the target."""
    epochs = tuple(
        EpochQuality(epoch=i, num_examples=90, metrics={"accuracy": found, "macro_f1": found - 0.1})
        for i, found in enumerate((0.9, 0.8))
    )
    reached = {"quality": epochs, "steps_to_target": 7, "seconds_to_target": 2.5}
    without = {"quality": epochs, "steps_to_target": None, "seconds_to_target": None}
    run = sample_run(
        sample_variant("no plan", VariantKind.REFERENCE, **reached),
        sample_variant("plan 60%", **without),
        targets={"accuracy": 0.85},
    )
    tables = tables_of(run)
    assert tables["Validation quality"] == [
        ["all 2 variants", "last, epoch 2 of 2", "80.0%", "0.7"],
        ["all 2 variants", "best by accuracy, epoch 1 of 2", "90.0%", "0.8"],
    ]
    num_steps = len(run.variants[0].losses)
    assert tables["Time in training until accuracy >= 0.85"] == [
        ["no plan", "0", f"7 of {num_steps}", "2.50 s"],
        ["plan 60%", "0", "\N{EN DASH}", "not reached"],
    ]


def test_money_names_its_sources_and_marks_what_was_not_verified():
    """Epoch, run and target cost; a figure from an unverified price has a dagger in every form."""
    source = {"unit": "USD an hour", "source": "a list", "date": "2026-11", "value": 2.0}
    run = sample_run(
        expenses=(
            sample_expense("no plan", "L4", target_usd=7.0),
            sample_expense("no plan", "T4", is_price_verified=False, kilowatt_hours=0.0125),
        ),
        price_sources=(
            PriceSource(name="L4, cloud", is_verified=True, **source),
            PriceSource(name="T4, cloud", is_verified=False, **source),
        ),
    )
    tables = tables_of(run)
    rows = {row[1]: row for row in tables["By variant and device"]}
    assert {"$2.00", "$20.00", "$7.00", "3.5 kWh*"} <= set(rows["L4, cloud"])
    assert {"$2.00\N{DAGGER}", "$20.00\N{DAGGER}", "12 Wh*"} <= set(rows["T4, cloud"])
    assert tables["Where prices, power and rates are from"] == [
        ["L4, cloud", "2 USD an hour", "a list", "2026-11", "yes"],
        ["T4, cloud\N{DAGGER}", "2 USD an hour", "a list", "2026-11", "no"],
    ]
    for text in (render_html(run), render_markdown(run)):
        assert "Figures marked \N{DAGGER} follow from one that was not found" in text
        assert "T4, cloud\N{DAGGER}" in text
