"""The address of the page of `regard view` holds what is chosen: reload, and the way back."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from test_view_page import ViewPage
from viewing import HOSTILE, recording, served

TOP = (
    "Math.min(...[...document.querySelectorAll('.word')].filter(w => w.getBoundingClientRect().top"
    " >= document.querySelector('.scroll').getBoundingClientRect().top)"
    ".map(w => Number(w.dataset.word)))"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("address") / "long"
    recording(1200, layers=1).save(folder)
    with served(folder) as (address, _):
        yield address


@pytest.mark.slow
def test_the_way_back_goes_through_what_was_chosen(browser, address):
    page = ViewPage(browser, f"{address}#head=0.0").exact()
    page.cell("0.3").click()
    page.until("location.hash.includes('head=0.3')")
    page.press("t")
    page.until("location.hash.includes('view=text')")
    page.run("history.back()")
    page.until("!location.hash.includes('view=text')").exact()
    assert page.find("#map-view").is_displayed()
    page.run("history.back()")
    page.until("document.querySelector('[aria-pressed=true][data-head]').dataset.head === '0.0'")
    page.run("history.forward()")
    page.until("document.querySelector('[aria-pressed=true][data-head]').dataset.head === '0.3'")
    page.is_clean()


@pytest.mark.slow
def test_moving_the_map_is_no_step_of_the_way_back(browser, address):
    page = ViewPage(browser, f"{address}#head=0.0").exact()
    before = page.run("return history.length")
    page.find(".map").send_keys("++")
    page.until("location.hash.includes('at=')").exact()
    assert page.run("return history.length") == before


@pytest.mark.slow
def test_a_reload_finds_the_search_the_ranking_and_the_place_in_the_text(browser, address):
    page = ViewPage(
        browser, f"{address}#head=0.1&view=text&metric=reads&from=word90&reads=word89&find=word500"
    )
    page.until("document.getElementById('reads-said').textContent.startsWith('mean')")
    page.until("document.getElementById('found').textContent.startsWith('1 place')")
    assert page.find("#reads [name=target]").get_attribute("value") == "word89"
    page.until("document.querySelector('.word')")
    page.run("document.querySelector('.scroll').scrollTop = 900")
    page.until("location.hash.includes('top=')")
    stood = page.run(f"return {TOP}")
    assert f"top={stood}&" in page.hash
    page = ViewPage(browser, page.run("return location.href"))
    page.until(f"{TOP} === {stood}")
    page.is_clean()


@pytest.mark.slow
def test_another_width_leaves_the_text_where_it_stood(browser, address):
    size = browser.get_window_size()
    page = ViewPage(browser, f"{address}#head=0.1&view=text&top=600")
    near = f"Math.abs({TOP} - 600) < 16"  # the first word of its line
    page.until(f"{near} && /top=(5[89]|600)/.test(location.hash)")
    try:
        browser.set_window_size(700, size["height"])
        page.until(f"innerWidth < 800 && {near}")
    finally:
        browser.set_window_size(size["width"], size["height"])


@pytest.mark.slow
def test_a_token_of_10_000_characters_is_cut_and_says_so(browser, tmp_path):
    recording(len(HOSTILE), words=HOSTILE).save(tmp_path / "hostile")
    with served(tmp_path / "hostile") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0&view=text")
        page.until("document.querySelector('.word .more')")
        assert page.text(".word .more") == "… 9,800 more characters"
        assert page.run("return document.documentElement.scrollHeight") < 6000
        page.is_clean()


@pytest.mark.slow
def test_a_dark_picture_has_a_dark_ground(browser, address):
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        page = ViewPage(browser, f"{address}#head=0.0").exact()
        page.run(
            "window.svg = ''; const make = URL.createObjectURL;"
            "URL.createObjectURL = (blob) => {"
            "  blob.text().then((text) => (window.svg = text)); return make(blob); };"
            "HTMLAnchorElement.prototype.click = () => {};"
        )
        page.find("#svg").click()
        page.until("window.svg")
        rect = page.run(
            "return new DOMParser().parseFromString(window.svg, 'image/svg+xml')"
            ".querySelector('rect').getAttribute('fill')"
        )
        assert rect == "rgb(23, 24, 27)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_the_keyboard_names_the_cell_in_the_middle_and_keeps_its_query(browser, address):
    page = ViewPage(browser, f"{address}#head=0.0&at=6.00,600,599").exact()
    page.run("document.querySelector('.map').focus()")
    page.press("+")
    page.until("document.getElementById('headline').textContent.startsWith('word60')")
    page.press("\ue007")
    page.until("/word=60\\d/.test(location.hash)")
