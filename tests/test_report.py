"""The report: a page that opens anywhere, says what the run says, and reads on any screen."""

import base64
import hashlib
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import remat
from remat.report import palette
from remat.report.document import report_data
from remat.report.html import render_html, write_report
from remat.report.labels import Point, place_labels
from remat.report.markdown import render_markdown
from remat.report.pages import content_policy, page_script
from remat.report.terminal import run_view
from remat.runs.records import Run, RunStatus, VariantKind, VariantStatus
from remat.units import format_bytes
from sample_evidence import rich_run, rich_variant
from sample_runs import sample_run, sample_variant

# Attributes through which a page can load or call something.
LOADING = {
    "src", "srcset", "href", "xlink:href", "action", "formaction", "data", "poster", "background",
    "ping", "manifest", "cite",
}  # fmt: skip


OWN_SCRIPTS = {"", ' type="application/json" id="explain-data"'}


class Page(HTMLParser):
    """Collects what a page refers to and what it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(rich_run())


def test_page_refers_to_nothing_outside_itself(page):
    """No attribute loads anything, no style imports anything, and no script but our own runs."""
    parsed = Page(page)
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(parsed.tags)
    scripts = re.findall(r"<script(?: [^>]*)?>(.*?)</script>", page, re.DOTALL)
    assert scripts[-1] == page_script()
    assert set(re.findall(r"<script([^>]*)>", page)) <= OWN_SCRIPTS
    assert "eval(" not in page_script()
    loaded = [found for found in parsed.attributes if found[1] in LOADING]
    assert all(value.startswith("#") for _, _, value in loaded), loaded
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", page))
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"[a-z]+://[^\"'\s<)]+", page)) <= namespaces


def test_ids_of_the_page_are_unique_and_all_references_hit(page):
    """Pictures of one page share no id: a clip of the first would cut the second."""
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page))
    used |= {value for _, name, value in Page(page).attributes if name == "aria-labelledby"}
    assert used <= set(ids)


def test_every_picture_is_well_formed_and_told_in_words(page):
    """Each SVG parses as XML, and stands in an element that says what it shows."""
    pictures = re.findall(r'role="img" aria-label="([^"]+)">(<svg.*?</svg>)', page, re.DOTALL)
    drawn = page.count("<svg ") - page.count('preserveAspectRatio="none" aria-hidden="true"')
    assert len(pictures) == drawn >= 14
    for told, svg in pictures:
        assert len(told) > 40
        ET.fromstring(svg)


def test_colours_of_the_page_are_defined_for_light_and_dark(page):
    """Every variable that a picture or a style uses has a value in both colour schemes."""
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) - {"c", "fill", "at", "y", "names"}
    defined = re.findall(r"--([a-z0-9-]+):", page)
    assert used <= {name for name in defined if defined.count(name) >= 2}


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(
    ("colours", "card"), [(palette.LIGHT, "#ffffff"), (palette.DARK, "#1b2128")]
)
def test_marks_of_variants_stand_out_from_their_ground(colours, card):
    """Marks and lines have the contrast of 3 to 1 that WCAG asks of graphics; text of 4.5."""
    ratios = {}
    for role, colour in colours.items():
        high, low = sorted((luminance(colour), luminance(card)), reverse=True)
        ratios[role] = (high + 0.05) / (low + 0.05)
    weak = {
        role: round(ratio, 2)
        for role, ratio in ratios.items()
        if not role.startswith("kind-") and ratio < (4.5 if role == "budget" else 3.0)
    }
    assert not weak


def test_variants_keep_their_colour_and_no_two_of_a_kind_share_one():
    """Colours are given by the order of plans and of policies, up to the size of the palette."""
    run = sample_run()
    roles = palette.variant_roles(run.variants)
    assert roles["no plan"] == "reference"
    assert len(set(roles.values())) == len(run.variants)
    assert set(roles.values()) <= set(palette.LIGHT) == set(palette.DARK)


def test_policy_of_the_page_names_the_one_script_by_its_hash(page):
    """A browser runs the page's own script and nothing else, and the page may load nothing."""
    policy = next(v for _, name, v in Page(page).attributes if name == "content" and "src" in v)
    assert policy == content_policy(page_script())
    found = re.search(r"script-src 'sha256-([^']+)'", policy)
    assert found is not None
    digest = hashlib.sha256(page_script().encode()).digest()
    assert base64.b64decode(found[1]) == digest
    assert policy.startswith("default-src 'none'")
    assert "script-src 'none'" in content_policy()


def test_headings_of_the_page_descend_one_step_at_a_time(page):
    """Screen readers walk the headings: one h1, and no level is left out."""
    levels = [int(tag[1]) for tag in Page(page).tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_page_says_what_the_run_says():
    """Summary, budgets, peaks, times, verdicts and reasons are all on the page."""
    run = sample_run()
    text = " ".join(" ".join(Page(render_html(run)).text).split())
    assert run.summary in text
    for told in (
        "118.0 MiB", "134.0 ms", "+12%", "87.1%", "passed", "infeasible",
        "the least peak found is 71.0 MiB", "blocks.0.mlp … blocks.4.mlp",
        "frees 16.0 MiB at the peak", "Sample CPU", "remat demo",
    ):  # fmt: skip
        assert told in text, told


def test_names_are_text_and_never_markup():
    """A workload or a variant called like a tag shows as such and runs nothing."""
    evil = '<script>alert("x")</script>'
    run = sample_run(
        sample_variant("no plan", VariantKind.REFERENCE),
        rich_variant(evil, VariantKind.PLANNED),
        name=evil,
    )
    text = render_html(run)
    assert set(re.findall(r"<script([^>]*)>", text)) == OWN_SCRIPTS
    assert text.count("<script") == 2
    for told, svg in re.findall(r'role="img" aria-label="([^"]+)">(<svg.*?</svg>)', text, re.S):
        assert told
        ET.fromstring(svg)


@pytest.mark.parametrize(
    "run",
    [
        sample_run(sample_variant("no plan", VariantKind.REFERENCE)),
        sample_run(sample_variant(step_times=None, losses=(), timeline=(), quality=())),
        sample_run(sample_variant(status=VariantStatus.FAILED, measured_peak_bytes=None)),
        sample_run(sample_variant(losses=(1.0, float("nan"), float("inf")))),
        sample_run(status=RunStatus.UNFINISHED, front=()),
        sample_run(sample_variant("a", peak_mib=100, ms=5), sample_variant("b", ms=5)),
    ],
    ids=["reference only", "nothing measured", "failed", "diverged", "unfinished", "one time"],
)
def test_page_can_be_drawn_of_any_run(run):
    """What is missing is left out; the page is drawn all the same."""
    text = render_html(run)
    assert run.name in text
    assert "NaN" not in text


def broken_evidence(value: float) -> Run:
    """Put one figure in the place of every figure of the evidence."""

    def spoiled(found: object, name: str = "") -> object:
        if isinstance(found, float) and name != "level":
            return value
        if isinstance(found, dict):
            return {key: spoiled(one, key) for key, one in found.items()}
        return [spoiled(one) for one in found] if isinstance(found, (list, tuple)) else found

    run = rich_run().model_dump()
    for part in ("equivalences", "representation", "serving", "expenses"):
        run[part] = spoiled(run[part])
    for variant in run["variants"]:
        for part in ("repeats", "calibration", "coverage", "slices", "quality"):
            variant[part] = spoiled(variant[part])
    return Run.model_validate(run)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e300])
def test_figures_that_are_none_are_said_in_words_and_break_nothing(value):
    """A run whose evidence is not a number, endless, or nought has its page and its Markdown."""
    run = broken_evidence(value)
    page, text = render_html(run), render_markdown(run)
    for written in (" ".join(Page(page.split("<script")[0]).text), text):
        assert re.findall(r".{,30}\b(?:nan|inf)\b", written) == []
    if math.isnan(value):
        assert "not a number" in text
    json.dumps(report_data(run), allow_nan=False)


def test_missing_package_is_named_with_its_install_command(tmp_path, monkeypatch):
    """Without the drawing packages the error has the command, and the old page stays."""
    page = tmp_path / "report.html"
    page.write_text("old", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(remat.MissingPackageError, match=r"pip install 'remat\[eval\]'"):
        write_report(sample_run(), page)
    assert page.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@given(
    st.lists(
        st.tuples(st.floats(0, 700), st.floats(0, 300), st.integers(1, 14)), min_size=1, max_size=6
    )
)
def test_labels_cover_no_point_and_no_label_where_there_is_room(found):
    """Every label that is not the last resort is free of all points and earlier labels."""
    points = [Point(x, y, "m" * length) for x, y, length in found]
    boxes = []
    for point, place in zip(points, place_labels(points, 700, 300), strict=True):
        size = 7.4 * len(point.label)
        left = place.x - {"left": 0, "center": size / 2, "right": size}[place.align]
        box = (left, place.y - 8, left + size, place.y + 8)
        is_fallback = (place.align, place.y) == ("left", point.y)
        others = [(p.x - 7, p.y - 7, p.x + 7, p.y + 7) for p in points] + boxes
        assert is_fallback or not any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in others
        )
        boxes.append(box)


def test_labels_of_two_close_points_go_to_different_sides():
    """The second of two points side by side does not write over the first."""
    points = [Point(100, 100, "plan 60%"), Point(112, 100, "plan 80%")]
    first, second = place_labels(points, 700, 300)
    assert (first.align, first.y) != (second.align, second.y)


def test_label_keeps_off_a_line_that_it_can_avoid():
    """A label goes to the other side of its point where a line stands on the usual one."""
    (usual,) = place_labels([Point(300, 100, "all blocks")], 700, 300)
    (moved,) = place_labels([Point(300, 100, "all blocks")], 700, 300, rules=[330])
    assert (usual.align, moved.align) == ("left", "right")


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_breaks_no_word(width):
    """Every figure, label and verdict of the table stands in one piece."""
    run = sample_run()
    console = Console(width=width, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(run_view(run))
    table = capture.get().partition("variant")[2]
    for variant in run.variants:
        assert variant.label in table
        if variant.measured_peak_bytes:
            assert format_bytes(variant.measured_peak_bytes) in table
    for word in ("predicted", "no plan", "accuracy", "reference", "infeasible", "158.0 MiB"):
        assert word in table


def test_terminal_view_shows_every_variant_and_what_went_wrong():
    """The table fits 100 columns and names every variant, verdict and failure."""
    run = sample_run(
        sample_variant("no plan", VariantKind.REFERENCE),
        sample_variant("plan 60%", losses_identical=False),
    )
    console = Console(width=100, file=None, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(run_view(run))
    text = capture.get()
    assert "plan 60%: its loss curve differs" in text
    assert "FAILED" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_markdown_table_is_whole_whatever_the_names():
    """Every row has the columns of the head, also where a name holds a bar."""
    run = sample_run(sample_variant("a|b", VariantKind.REFERENCE), sample_variant())
    text = render_markdown(run)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables[0]) == 2 + len(run.variants)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert run.summary in text
