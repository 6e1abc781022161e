"""The page of `regard view` in a headless Chromium: what it shows, by pointer and keyboard."""

import base64
import json
import shutil
import time
import zlib

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from click.testing import CliRunner
from selenium.webdriver import Keys
from selenium.webdriver.support.wait import WebDriverWait

from browsing import Page
from regard.capture.recording import Recording
from regard.cli import main
from viewing import HOSTILE, recording, served


class ViewPage(Page):
    """The page at an address."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get(address)
        self.until("'ready' in document.documentElement.dataset")

    def until(self, script, seconds=60):
        """Wait until a condition of JavaScript holds."""
        WebDriverWait(self.browser, seconds).until(
            lambda b: b.execute_script(f"return {script}"), script
        )
        return self.settled()

    def exact(self):
        """Once every tile of the map is there."""
        script = (
            "document.querySelectorAll('.map canvas').length > 0 &&"
            "!document.querySelector('.map canvas.pending') &&"
            "document.querySelector('.map-status').textContent.endsWith('exact')"
        )
        return self.until(script)

    def text(self, selector):
        return super().text(selector).replace("\xa0", " ")

    def token(self, number):
        return self.find(f".word[data-word='{number}']")

    def over(self, selector, x, y):
        """The pointer at a place of an element, from its middle."""
        return self.hover(self.find(selector), x, y)

    def choose(self, name, value):
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('change'))", name, value,
        )  # fmt: skip
        return self.settled()

    def type(self, selector, words):
        self.find(selector).clear()
        self.find(selector).send_keys(words)
        return self.settled()

    def is_clean(self):
        """Nothing complained, and nothing was asked for elsewhere."""
        assert self.browser.get_log("browser") == []
        names = self.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert all(name.startswith(self.run("return location.origin")) for name in names)
        assert not self.find("#error").is_displayed()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("view")
    recording(300).save(where / "one")
    recording(300, seed=1).save(where / "two")
    return where / "one", where / "two"


@pytest.fixture(scope="module")
def known(folders):
    return Recording.load(folders[0])


@pytest.fixture(scope="module")
def site(folders):
    with served(folders[0]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def pair(folders):
    with served(*folders) as (address, _):
        yield address


def test_hover_on_one_cell_reads_the_exact_weight(browser, site, known):
    page = ViewPage(browser, f"{site}#head=1.2&at=7.00,200,199").exact()
    weights = known.weights(1, 2)
    for x, y in ((8, 8), (8 - 64, 8), (8 + 64, 8 + 128)):
        page.over(".map", x, y)
        row, col = 200 + (y - 8) // 64, 199 + (x - 8) // 64
        assert page.text("#headline").startswith(f"word{row} reads word{col} ")
        shown = float(page.find("#headline").get_attribute("data-weight"))
        assert shown == pytest.approx(float(weights[row, col]), abs=1e-7)
        assert f"query {row} → key {col}" in page.text("#note")
    page.is_clean()


@pytest.mark.slow
def test_the_whole_map_zooms_to_one_cell_by_hand(browser, site):
    page = ViewPage(browser, f"{site}#head=0.0").exact()
    page.find(".map").send_keys("+" * 6)
    page.until("document.querySelector('.map-status').textContent.startsWith('a cell is one')")
    page.until("location.hash.includes('at=')").exact()
    page.find(".corner").click()
    page.settled()
    assert "at=" not in page.hash


@pytest.mark.slow
def test_hovering_a_word_shows_its_fan_and_a_click_keeps_it(browser, site, known):
    page = ViewPage(browser, f"{site}#head=0.0&view=text")
    page.until("document.querySelector(\".word[data-word='40']\")")
    page.hover(page.token(40))
    page.until("document.querySelector('.word.focus')?.dataset.word === '40'")
    row = known.weights(0, 0)[40]
    shown = page.run(
        "return [...document.querySelectorAll('.word[data-weight]')]"
        ".map(w => [Number(w.dataset.word), Number(w.dataset.weight)])"
    )
    for word, weight in shown:
        assert weight == pytest.approx(float(row[word]), rel=1e-4)
    mass = sum(weight for _, weight in shown)
    assert mass >= 0.9 - 1e-4
    assert f"shown {round(100 * mass)} % of the mass" in page.text("#shown")
    page.click(page.token(40))
    page.hover(page.token(60))
    page.until("document.querySelector('.word.locked')?.dataset.word === '40'")
    assert "word=40" in page.hash
    page.press(Keys.ESCAPE)
    assert "word=" not in page.hash
    page.is_clean()


@pytest.mark.slow
def test_what_reads_a_word_is_its_column(browser, site, known):
    page = ViewPage(browser, f"{site}#head=0.2&view=text&word=40&way=in")
    page.until("document.querySelector('#list tbody tr')")
    column = known.weights(0, 2)[:, 40]
    assert page.all("#list tbody tr", "Number(e.dataset.key)")[0] == int(column.argmax())
    assert f"{float(column.sum()):.2f} in sum" in page.text("#list .mass")


@pytest.mark.slow
def test_the_mass_slider_shows_as_much_as_it_says(browser, site, known):
    page = ViewPage(browser, f"{site}#head=0.1&view=text&word=120&share=50")
    page.until("document.getElementById('shown').textContent.startsWith('shown')")
    row = known.weights(0, 1)[120].sort(descending=True).values
    tokens = int((row.cumsum(0) < 0.5).sum()) + 1
    assert f"{tokens} tokens of 121" in page.text("#shown")


@pytest.mark.slow
def test_targets_out_of_sight_are_chips_that_jump(browser, tmp_path):
    made = recording(4000, layers=1)
    made.save(tmp_path / "long")
    with served(tmp_path / "long") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.1&view=text&word=3900")
        page.until("document.querySelector('.chips.above .chip[data-to]')")
        chip = page.find(".chips.above .chip[data-to]")
        to = int(chip.get_attribute("data-to"))
        row = made.weights(0, 1)[3900]
        assert chip.text.startswith(f"↑ {to:,} word{to} ")
        assert float(row[to]) >= float(row.topk(8).values[-1])
        assert "word=3900" in page.hash
        count = page.run("return document.querySelectorAll('.word').length")
        assert count < 2500  # of 4,000: what is out of sight is not drawn
        chip.click()
        page.until(
            f"(() => {{ const w = document.querySelector(\".word[data-word='{to}']\");"
            "if (!w) return false; const b = w.getBoundingClientRect(),"
            "f = w.closest('.scroll').getBoundingClientRect();"
            "return b.bottom > f.top && b.top < f.bottom; })()"
        )
        page.is_clean()


@pytest.mark.slow
def test_the_finder_ranks_heads_and_chooses_the_best(browser, site, known):
    page = ViewPage(browser, f"{site}#head=1.1")
    page.type("#reads [name=source]", "word90").type("#reads [name=target]", "word89" + Keys.ENTER)
    page.until("document.getElementById('reads-said').textContent.startsWith('mean')")
    values = {
        f"{layer}.{head}": float(known.weights(layer, head, [90], [89]))
        for layer in range(2)
        for head in range(4)
    }
    best = max(values, key=values.get)
    page.until(f"location.hash.includes('head={best}')")
    ranked = page.run(
        "return [...document.querySelectorAll('[data-ranked]')].map(b => b.dataset.ranked)"
    )
    assert ranked == sorted(values, key=values.get, reverse=True)
    assert page.grid() == pytest.approx(values, abs=1e-5)
    page.type("#reads [name=target]", "nowhere" + Keys.ENTER)
    page.until("document.getElementById('reads-said').textContent.includes('no token')")


@pytest.mark.slow
def test_two_recordings_move_together_and_differ_by_their_difference(browser, pair, folders):
    page = ViewPage(browser, f"{pair}#head=0.0&compare=both").exact()
    assert len(page.all(".map", "e.className")) == 2
    page.find(".frame:first-child .leaflet-control-zoom-in").click()
    time.sleep(0.6)  # Leaflet's zoom takes a quarter of a second, and says nowhere that it ended
    page.exact()
    shown = []
    for frame in (".frame:first-child .map", ".frame:last-child .map"):
        page.over(frame, 8, 8)
        shown.append(page.text("#headline").partition(" 0.")[0])
    assert shown[0] == shown[1]
    assert shown[0].startswith("word")
    page = ViewPage(browser, f"{pair}#head=0.0&compare=change&at=7.00,200,199").exact()
    page.over(".map", 8, 8)
    assert page.text("#headline").startswith("word200 reads word199 ")
    one, two = (float(Recording.load(folder).weights(0, 0)[200, 199]) for folder in folders)
    shown = float(page.find("#headline").get_attribute("data-weight"))
    assert shown == pytest.approx(two - one, abs=1e-6)
    page.is_clean()


@pytest.mark.slow
def test_pictures_hold_what_is_in_sight(browser, site):
    page = ViewPage(browser, f"{site}#head=0.0").exact()
    page.run(
        "window.links = []; const click = HTMLAnchorElement.prototype.click;"
        "HTMLAnchorElement.prototype.click = function () {"
        "  window.links.push([this.download, this.href]);"
        "};"
    )
    page.find("#png").click()
    page.find("#svg").click()
    page.until("window.links.length === 2")
    found = page.run("return window.links")
    assert sorted(name for name, _ in found) == ["one-head-0.0.png", "one-head-0.0.svg"]
    assert all(href.startswith("blob:") for _, href in found)


@pytest.mark.slow
def test_hostile_tokens_are_shown_as_signs(browser, tmp_path):
    recording(len(HOSTILE), words=HOSTILE).save(tmp_path / "hostile")
    with served(tmp_path / "hostile") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0&view=text&word=5")
        page.until("document.querySelector('#list tbody tr')")
        shown = page.run("return document.body.textContent")
        assert "onerror=window.pwned" in shown
        assert not any(char in shown for char in "\x1b\u202e\u202c\u2028\0")
        assert page.run("return document.querySelectorAll('#panes img, #panes script').length") == 0
        page.find("#switch [data-view=map]").click()
        page.exact()
        assert page.run("return window.pwned ?? null") is None
        width = page.run("return document.documentElement.scrollWidth - innerWidth")
        assert width <= 0
        page.is_clean()


@pytest.mark.slow
def test_two_tabs_stand_where_each_was_put(browser, site):
    first = browser.current_window_handle
    ViewPage(browser, f"{site}#head=0.1&view=text&word=7")
    browser.switch_to.new_window("tab")
    page = ViewPage(browser, f"{site}#head=1.3")
    assert "head=1.3" in page.hash
    browser.close()
    browser.switch_to.window(first)
    assert "head=0.1" in browser.execute_script("return location.hash")
    assert "word=7" in browser.execute_script("return location.hash")


@pytest.mark.slow
def test_a_recording_deleted_while_open_is_said(browser, tmp_path):
    recording(300).save(tmp_path / "gone")
    with served(tmp_path / "gone") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0").exact()
        shutil.rmtree(tmp_path / "gone")
        page.cell("1.1").click()
        page.until("!document.getElementById('error').hidden")
        assert "no longer where it was opened" in page.text("#error")
        browser.get_log("browser")


@pytest.mark.slow
def test_the_keyboard_reaches_map_text_and_heads(browser, site):
    page = ViewPage(browser, f"{site}#head=0.0")
    page.press("t")
    assert "view=text" in page.hash
    page.run("document.querySelector('.scroll').focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    page.until("document.querySelector('.word.locked')?.dataset.word === '1'")
    page.run("document.querySelector(\"[data-head='0.0']\").focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ENTER)
    assert "head=1.1" in page.hash
    page.press("/")
    assert page.run("return document.activeElement.type") == "search"


@pytest.mark.slow
def test_an_exported_file_shows_the_same_without_a_server(browser, folders, known, tmp_path):
    file = tmp_path / "page.html"
    arguments = [
        "view",
        str(folders[0]),
        "--export",
        str(file),
        "--head",
        "1.2",
        "--from",
        "word90",
    ]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output) == (0, f"page: {file}\n")
    page = ViewPage(browser, file.as_uri()).exact()
    row = known.weights(1, 2)[90]
    page.until("document.querySelector('#list tbody tr')")
    lines = page.all("#list tbody tr", "[e.dataset.key, e.cells[2].innerText]")
    shown = {int(key): float(weight.replace("<.001", "0")) for key, weight in lines}
    assert shown == pytest.approx({key: float(row[key]) for key in shown}, abs=6e-4)
    page.press("t")
    page.until("document.querySelector('.word.locked')?.dataset.word === '90'")
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
    held = page.run("return document.getElementById('held').textContent")
    assert len(zlib.decompress(base64.b64decode(next(
        value for name, value in json.loads(held)["answers"].items() if "tiles" in name
    )))) == 4 * 128 * 128  # fmt: skip
    page.cell("0.0").click()
    page.until("!document.getElementById('error').hidden")
    assert "open the recording with regard view" in page.text("#error")
