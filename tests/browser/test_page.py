"""The report in a real browser: it loads nothing, runs nothing, and fits every screen. Its numbers come out twice."""

import json
import shutil

import pandas as pd
import pytest
from conftest import copy_workflow

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine (apt-get install chromium)", allow_module_level=True)

from playwright.sync_api import sync_playwright  # noqa: E402

TINY = ("--configfile", "config/presets/tiny.yaml", "browser.yaml")
ATTACK = "<script>alert(1)</script> may i sign for my flatmate"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a hostile query among the worst misses of its page."""
    workflow = copy_workflow(tmp_path_factory.mktemp("page"))
    lines = (workflow.folder / "data/law/test.jsonl").read_text(encoding="utf-8").splitlines()
    triplet = {"anchor": ATTACK, "positive": "zebra", "negative": f"{ATTACK} today", "kind": "scope"}
    (workflow.folder / "own.jsonl").write_text("\n".join([*lines, json.dumps(triplet)]) + "\n", encoding="utf-8")
    (workflow.folder / "browser.yaml").write_text("domains: {law: {test: own.jsonl}}\n", encoding="utf-8")
    result = workflow.run(*TINY)
    assert result.returncode == 0, result.stdout
    return workflow


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(finished, browser):
    """Open the page at a width; what it complains of and what it asks for is kept."""

    def at(width, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("dialog", lambda dialog: page.said.append(dialog.message))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((finished.folder / "results/tiny/benchmark.html").as_uri())
        return page

    return at


@pytest.mark.parametrize("width", [1440, 390])
def test_it_loads_nothing_else_says_nothing_and_fits(opened, width, tmp_path):
    page = opened(width)
    page.wait_for_load_state()
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [page.url]
    # Wide tables scroll in themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure svg").count() == 6
    shot = page.screenshot(path=tmp_path / "page.png", full_page=True)
    # A page that shows nothing compresses to nearly nothing.
    assert len(shot) > 100_000


def test_a_query_is_text_and_nothing_else(opened):
    page = opened(1440)
    assert page.locator("td", has_text=ATTACK).first.inner_text().startswith(ATTACK)
    assert page.locator("script").count() == 0


def test_it_can_be_read_with_a_keyboard_in_the_dark_and_on_paper(opened):
    page = opened(1440, "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#advice"
    summary = page.locator("#details summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#details details").first.get_attribute("open") is not None
    red, *_ = map(
        int, page.evaluate("getComputedStyle(document.querySelector('tbody th')).backgroundColor")[4:-1].split(",")
    )
    assert red < 60
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()


def test_deleting_the_results_and_running_again_gives_the_same_numbers(finished):
    folder = finished.folder / "results/tiny"
    before = pd.read_csv(folder / "benchmark.csv")
    replays = {path.name: json.loads(path.read_text()) for path in folder.glob("replay/*/*.json")}
    shutil.rmtree(folder)
    result = finished.run(*TINY)
    assert result.returncode == 0, result.stdout
    pd.testing.assert_frame_equal(pd.read_csv(folder / "benchmark.csv"), before, check_exact=True)
    for name, replay in replays.items():
        again = json.loads(next(folder.glob(f"replay/*/{name}")).read_text())
        assert again["thresholds"] == replay["thresholds"]
        assert again["frontier"] == replay["frontier"]
