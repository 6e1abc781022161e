"""The page of `regard look --html` as it is read: find, switch, walk, flips, phones, loading."""

import json
import re
import shlex

import pytest

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from click.testing import CliRunner
from selenium.webdriver import Keys

from browsing import HOSTILE, Page, Written, close
from regard.cli import main
from regard.report import look_html as html
from test_html import ANIMAL
from texts import TROPHY

LONG = " ".join(f"The whale number {i} followed a ship to the sea." for i in range(12))


@pytest.fixture(scope="module")
def long(minilm, tmp_path_factory):
    return Written(minilm.record(LONG), tmp_path_factory.mktemp("page") / "look.html")


@pytest.fixture(scope="module")
def versus(tmp_path_factory):
    """A page of two texts, and the object that goes with it."""
    path = tmp_path_factory.mktemp("page") / "look.html"
    arguments = [ANIMAL + "tired", "--versus", ANIMAL + "wide", "--from", "it", "--top", "99"]
    result = CliRunner().invoke(main, ["look", *arguments, "--json", "--html", str(path)])
    assert result.exit_code == 0, result.stderr
    return path, json.loads(result.stdout)["versus"][0]


@pytest.fixture
def phone(browser):
    """A screen of 390 pixels without a mouse."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_find_goes_from_word_to_word(browser, long):
    page = Page(browser, long.path)
    hits = [i for i, word in enumerate(long.found.words) if word.text == "whale"]
    page.press("/")
    assert page.run("return document.activeElement.type") == "search"
    page.press(*"WHALE")
    assert page.text("#found") == "12 words; Enter goes to the next"
    assert page.all(".word[data-hit]", "Number(e.dataset.word)") == hits
    for at, word in enumerate([*hits[:3], hits[0]], 1):
        page.press(Keys.ENTER)
        if at == 4:
            page.press(Keys.HOME, *[Keys.ENTER] * 9)  # round once
        assert page.focus == word
    assert page.text("#found") == "1 of 12"
    page.press(Keys.ESCAPE)
    assert page.text("#found") == ""
    assert page.all(".word[data-hit]", "e.dataset.word") == []
    page.press(*"xyzzy")
    assert page.text("#found") == "no such word"
    page.is_quiet()


def test_a_long_text_stands_once_with_a_switch(browser, long):
    page = Page(browser, long.path, "#word=3&head=3.1")
    assert page.all(".view", "e.dataset.view") == ["raw"]
    raw, rest = long.exact(3, (3, 1))
    close(page.weights(), raw)
    page.click(page.find("#switch [data-shows=rest]"))
    close(page.weights("rest"), rest)
    assert page.find("#switch [data-shows=rest]").get_attribute("aria-pressed") == "true"
    assert "view=rest" in page.hash
    close(Page(browser, long.path, page.hash).weights("rest"), rest)


def test_a_short_text_stands_twice_where_there_is_room(browser, trophy):
    page = Page(browser, trophy.path)
    assert page.shown() == ["raw", "rest"]
    assert not page.find("#switch").is_displayed()


def test_the_head_can_be_walked(browser, trophy):
    page = Page(browser, trophy.path, "#word=9&head=3.1")
    command = page.text("#walk code")
    assert shlex.split(command) == [
        "regard", "walk", TROPHY, "--from", "it", "--head", "3.1",
    ]  # fmt: skip
    walked = CliRunner().invoke(main, [*shlex.split(command)[1:], "--json"])
    assert walked.exit_code == 0, walked.stderr
    page.click(page.find("#walk button"))
    said = "return document.getElementById('walk-said').textContent"
    assert page.run(said) in ("copied", "selected: copy it with the keyboard")
    page.click(page.find("#grid thead button"))
    assert "--head" not in page.text("#walk code")
    page.run("location.hash = '#word=0'")
    page.settled()
    assert not page.find("#walk").is_displayed()  # a special token is no word to walk
    page.is_quiet()


@pytest.mark.parametrize("text", [HOSTILE, LONG * 2, "a\nb", "@home it is", '$(ls) `it` "is"'])
def test_what_a_shell_would_obey_is_not_in_the_command(minilm, tmp_path, text):
    written = Written(minilm.record(text), tmp_path / "look.html")
    command = html._command(written.found)
    split = shlex.split(command)
    assert split[:2] == ["regard", "walk"]
    assert split[2] in (text, "@FILE")
    assert command.isprintable()
    assert (split[2] == "@FILE") is not text.startswith("$(")


def test_versus_opens_on_the_head_that_changed_most_and_lists_flips(browser, versus):
    path, found = versus
    page = Page(browser, path)
    others = [x for x in found["links"] if x["to"] not in ("[CLS]", "[SEP]", "it")]
    most = max(others, key=lambda x: abs(x["weight2"] - x["weight"]))
    assert (most["layer"], most["head"], most["to"]) == (3, 1, "animal")
    assert page.text("#headline") == "it reads animal 0.606, then 0.258 · head 3.1"
    assert page.run("return document.getElementById('metric').value") == "change"
    rows = page.cells("#versus tbody tr")
    sure = found["flips"]
    assert 0 < len(sure) == len(rows)
    for cells, flip in zip(rows, sure, strict=True):
        assert cells[0] == f"{flip['layer']}.{flip['head']}"
        assert cells[1].startswith(flip["to"])
        assert cells[2].startswith(flip["to2"])
    assert f"{len(sure)} of 72 heads flip" in page.text("#versus h2")
    page.click(page.find("#versus tbody tr button"))
    assert f"head={sure[0]['layer']}.{sure[0]['head']}" in page.hash
    page.is_quiet()


def test_nothing_is_clipped_on_a_phone(phone, trophy, versus):
    for path in (trophy.path, versus[0]):
        page = Page(phone, path)
        clipped = page.run(
            "return [...document.querySelectorAll('#grid td, #list td, #versus td, #walk, .view')]"
            ".filter(e => e.offsetParent && e.getBoundingClientRect().right > innerWidth + 0.5)"
            ".map(e => e.textContent)"
        )
        assert clipped == []
        assert page.run("return document.documentElement.scrollWidth") <= 390
        assert page.find("#grid [data-head]").text  # numbers, not bare shades
        for row in page.cells("#list tbody tr"):
            assert re.search(r"\d\.\d+ 0\.\d\d", " ".join(row)) or "0.00" in row
        assert page.text("#note").startswith("Tap a word")
        assert set(page.shown()) == {"raw"}
        page.run("document.querySelector('#switch [data-shows=rest]').click()")
        page.settled()
        assert set(page.shown()) == {"rest"}


def test_a_page_says_that_it_is_loading_until_it_is_not(browser, trophy):
    written = trophy.path.read_text("utf-8")
    markup = written[written.index("<body>") : written.index('<script type="application/json"')]
    assert 'id="loading" role="status"' in markup
    page = Page(browser, trophy.path)
    assert page.all("#loading", "e.id") == []
    style = written[written.index("<style>") : written.index("</style>")]
    assert "prefers-reduced-motion: reduce" in style
