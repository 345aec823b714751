"""The page in headless Chromium: quiet, closed to the outside, and played by mouse and keys."""

import re

import pytest

from browser import Browser, find_chromium
from remat.report.comparison import render_comparison
from remat.report.html import render_html
from remat.runs.records import VariantKind
from sample_evidence import rich_run, rich_variant
from sample_runs import sample_run, sample_variant

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason="needs Chromium or Chrome; none is on the path, nor named by REMAT_CHROMIUM",
    ),
]

WIDTHS = (1280, 390)
STATE = "[...document.querySelectorAll('.tale:not([hidden]) .block')].map(b => b.dataset.state)"
AT = "Number(document.querySelector('.tale:not([hidden])').style.getPropertyValue('--at'))"
SAID = "document.querySelector('[data-part=words]').textContent"
COUNT = "document.querySelector('[data-part=count]').textContent"


@pytest.fixture(scope="module")
def browser():
    found = Browser(str(find_chromium()))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    many = [rich_run(id=f"run-{i}", seed=i) for i in range(49)]
    texts = {
        "rich": render_html(rich_run()),
        "plain": render_html(sample_run()),
        "many": render_comparison([*many, sample_run()]),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture
def page(browser, pages):
    """Open the page with all evidence, on a desktop, as if for the first time."""
    browser.allow_scripts(True)
    browser.emulate()
    browser.resize(WIDTHS[0])
    browser.open(pages["rich"])
    return browser


def click(browser: Browser, part: str) -> None:
    browser.evaluate(f"document.querySelector('[data-part={part}]').click()")


def focus_stage(browser: Browser) -> None:
    browser.evaluate("document.querySelector('[data-part=stage]').focus()")


@pytest.mark.parametrize("name", ["rich", "plain", "many"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_quiet_closed_and_fits_the_screen(browser, pages, name, width, scheme):
    """No word in the console, no request but for the page itself, no scrolling to the side."""
    browser.allow_scripts(True)
    browser.emulate(prefers_color_scheme=scheme)
    browser.resize(width)
    browser.open(pages[name])
    assert browser.evaluate("document.readyState") == "complete"
    assert browser.console == []
    assert browser.requests == [pages[name].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_policy_of_the_page_stops_a_request_and_a_foreign_script(page):
    """What a page could be tricked into is refused by the browser itself."""
    page.evaluate(
        "{const i = new Image(); i.src = 'https://example.invalid/x.png'; document.body.append(i);"
        "const s = document.createElement('script'); s.textContent = 'window.seen = 1';"
        "document.body.append(s)}"
    )
    page.wait_until("true")
    assert page.evaluate("window.seen") is None
    assert len([text for text in page.console if "Content Security Policy" in text]) == 2


def test_buttons_step_through_the_whole_story(page):
    """Step goes through every moment to the end, Back goes back, and words, tiles, curve follow."""
    assert page.evaluate(COUNT) == "1 of 10"
    assert page.evaluate(STATE) == ["forward", "waits", "waits", "waits"]
    assert page.evaluate(SAID).startswith("Forward through stem. It keeps 40.0 MiB")
    seen = [page.evaluate(AT)]
    for _ in range(9):
        click(page, "next")
        seen.append(page.evaluate(AT))
    assert seen == sorted(seen)
    assert len(set(seen)) == 10
    assert seen[-1] == 1
    assert page.evaluate(STATE) == ["done"] * 4
    click(page, "next")
    assert page.evaluate(COUNT) == "10 of 10"
    for _ in range(3):
        click(page, "back")
    assert page.evaluate(STATE) == ["keeps", "again", "done", "done"]
    assert "so blocks.0 runs forward again and holds 40.0 MiB" in page.evaluate(SAID)
    assert page.console == []


def test_cursor_and_veil_stand_where_the_moment_ends(page):
    """The curve is seen up to the moment: the cursor moves over the picture as the story goes."""
    page.emulate(prefers_reduced_motion="reduce")
    script = (
        "(() => {const f = document.querySelector('.tale:not([hidden])');"
        "const c = f.querySelector('.cursor').getBoundingClientRect(),"
        "r = f.querySelector('.curve').getBoundingClientRect();"
        "return (c.x + c.width / 2 - r.x) / r.width})()"
    )
    for moment in range(1, 11):
        assert page.evaluate(script) == pytest.approx(moment / 10, abs=0.005)
        click(page, "next")


def test_keys_step_play_and_pause(page):
    """Arrows, Home and End step from anywhere in the story; space plays and pauses."""
    focus_stage(page)
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.evaluate(COUNT) == "3 of 10"
    page.press("ArrowLeft")
    assert page.evaluate(COUNT) == "2 of 10"
    page.press("End")
    assert page.evaluate(COUNT) == "10 of 10"
    page.press("Home")
    assert page.evaluate(COUNT) == "1 of 10"
    page.press(" ")
    assert page.evaluate("document.querySelector('[data-part=play]').textContent") == "Pause"
    page.press(" ")
    assert page.evaluate("document.querySelector('[data-part=play]').textContent") == "Play"


def test_space_on_a_button_presses_that_button_once(page):
    """A key that an element has of its own is not taken from it."""
    page.evaluate("document.querySelector('[data-part=next]').focus()")
    page.press(" ")
    assert page.evaluate(COUNT) == "2 of 10"
    assert page.evaluate("document.querySelector('[data-part=play]').textContent") == "Play"


def test_play_runs_to_the_end_and_stops_by_itself(page):
    """Played fast, the story ends at its last moment, and Play starts it again."""
    page.evaluate("document.querySelector('[data-part=speed]').value = '250'")
    for _ in range(6):
        click(page, "next")
    click(page, "play")
    live = "document.querySelector('[role=status]').getAttribute('aria-live')"
    assert page.evaluate(live) == "off"
    page.wait_until(f"{COUNT} === '10 of 10'")
    assert page.evaluate("document.querySelector('[data-part=play]').textContent") == "Play"
    assert page.evaluate(live) == "polite"
    click(page, "play")
    page.wait_until(f"{COUNT} !== '10 of 10'")
    click(page, "play")


def test_another_plan_is_another_story_at_the_same_share(page):
    """Choosing a plan shows its picture; the one without a plan runs nothing again."""
    page.evaluate(
        "{const s = document.querySelector('[data-part=plan]'); s.value = '0';"
        "s.dispatchEvent(new Event('change'))}"
    )
    assert (
        page.evaluate("document.querySelector('.tale:not([hidden]) h3').textContent") == "no plan"
    )
    assert page.evaluate("document.querySelectorAll('.tale:not([hidden])').length") == 1
    states = set()
    for _ in range(9):
        states |= set(page.evaluate(STATE))
        click(page, "next")
    assert "again" not in states
    assert "dropped" not in states
    assert {"forward", "keeps", "backward", "done"} <= states


def test_without_scripts_the_picture_is_whole(page, pages):
    """No control that does nothing, no veil over the curve, and every section in sight."""
    page.allow_scripts(False)
    try:
        page.open(pages["rich"])
    finally:
        page.allow_scripts(True)
    height = "document.querySelector('{}').getBoundingClientRect().height"
    assert page.evaluate(height.format(".controls")) == 0
    assert page.evaluate(height.format(".tale:not([hidden]) .lane")) == 0
    assert page.evaluate(height.format(".tale:not([hidden]) .score")) > 100
    for name in ("summary", "evidence", "explain"):
        assert page.evaluate(height.format(f"#{name}")) > 100


def test_print_shows_all_three_depths(page):
    """On paper: no controls, no veil, no hidden plan tables, and more than one page."""
    focus_stage(page)
    page.press("ArrowRight")
    page.emulate("print")
    height = "document.querySelector('{}').getBoundingClientRect().height"
    assert page.evaluate(height.format(".controls")) == 0
    assert page.evaluate(height.format(".tale:not([hidden]) .lane")) == 0
    for name in ("summary", "evidence", "explain"):
        assert page.evaluate(height.format(f"#{name}")) > 100
    pdf = page.print_pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3


def test_reduced_motion_moves_nothing_by_itself(page):
    """Where the reader asks for less motion, tiles and cursor change without a transition."""
    script = "getComputedStyle(document.querySelector('{}')).transitionDuration"
    page.emulate(prefers_reduced_motion="reduce")
    assert {page.evaluate(script.format(name)) for name in (".cursor", ".block i")} == {"0s"}
    page.emulate(prefers_reduced_motion="no-preference")
    assert "0s" not in {page.evaluate(script.format(name)) for name in (".cursor", ".block i")}


def test_text_of_the_page_has_contrast_in_both_schemes(browser, pages):
    """Every piece of text on its own ground reaches 4.5 to 1, as WCAG asks."""
    browser.resize(WIDTHS[0])
    for name in ("rich", "many"):
        for scheme in ("light", "dark"):
            browser.emulate(prefers_color_scheme=scheme)
            browser.open(pages[name])
            assert browser.evaluate(WEAK_TEXTS) == []
    browser.evaluate(
        "{const p = document.createElement('p'); p.textContent = 'planted';"
        "p.style.color = '#777'; p.style.background = '#888'; document.body.prepend(p)}"
    )
    assert [text for text, _ in browser.evaluate(WEAK_TEXTS)] == ["planted"]


def test_controls_have_names_and_show_their_focus(page):
    """Each control says what it is, and the one with the focus has an outline."""
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, select, input, a')]"
        ".filter(e => !(e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0
    page.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(6):
        assert page.evaluate("document.activeElement.tagName") in ("A", "DIV", "BUTTON")
        assert page.evaluate(outline) != "none"
        page.press("Tab")


def test_fifty_runs_are_small_and_light(browser, pages):
    """A comparison of 50 runs is far below 10 MB and 25,000 elements, and opens quickly."""
    assert pages["many"].stat().st_size < 2_000_000
    browser.emulate()
    browser.open(pages["many"])
    assert browser.evaluate("document.querySelectorAll('*').length") < 25_000
    timing = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert browser.evaluate(timing) < 20_000  # 0.4 s alone; this machine may be busy
    links = browser.evaluate(
        "[...document.querySelectorAll('#runs a')].map(a => a.getAttribute('href'))"
    )
    assert len(links) == 50
    assert browser.evaluate("document.querySelectorAll('.told').length") == 50


def test_names_like_tags_do_nothing_on_the_page(browser, tmp_path):
    """A workload, a block or a variant called like a script is shown, and never run."""
    evil = "</script><img src=x onerror='window.seen=1'><script>window.seen=1</script>"
    variant = rich_variant(evil, VariantKind.PLANNED)
    assert variant.story is not None
    story = variant.story.model_copy(update={"blocks": (evil, *variant.story.blocks[1:])})
    run = sample_run(
        sample_variant("no plan", VariantKind.REFERENCE),
        variant.model_copy(update={"story": story}),
        name=evil,
    )
    path = tmp_path / "evil.html"
    path.write_text(render_html(run), encoding="utf-8")
    browser.emulate()
    browser.open(path)
    assert browser.evaluate("window.seen") is None
    assert browser.evaluate("document.querySelector('h1').textContent") == evil
    assert evil in browser.evaluate(SAID)
    assert browser.console == []
    assert browser.requests == [path.as_uri()]


# Walks up from each text to the first opaque ground. Pictures and what is meant for no eye are
# left out: texts in SVG stand on the card in the page's ink, which is measured all the same.
WEAK_TEXTS = """
(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const f = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const weak = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.textContent.trim() || e.closest("svg, script, [aria-disabled=true]")) continue;
    if (!e.getClientRects().length) continue;
    const pair = [light(parse(getComputedStyle(e).color)), light(ground(e))];
    const [a, b] = pair.sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) weak.push([node.textContent.trim().slice(0, 40), ratio.toFixed(2)]);
  }
  return weak.slice(0, 10);
})()
"""
