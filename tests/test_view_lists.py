"""The page of `regard view`: ranges, the line along the text, lists that stay the same elements."""

import shutil

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from selenium.webdriver import ActionChains, Keys

from regard.capture.recording import Recording
from test_view_page import ViewPage
from viewing import served, streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return streamed(tmp_path_factory.mktemp("lists") / "one", tokens=300)


@pytest.fixture(scope="module")
def site(folder):
    with served(folder) as (address, _):
        yield address


@pytest.mark.slow
def test_a_range_of_columns_is_all_that_the_rows_are_of(browser, site, folder):
    page = ViewPage(browser, f"{site}#head=1.2").exact()
    page.until("document.querySelector('.map-sight').textContent.includes('shown 100')")
    page.run("document.querySelector('.profile.top').focus()")
    page.press(Keys.ARROW_RIGHT)
    shift = ActionChains(browser, duration=0).key_down(Keys.SHIFT)
    shift.send_keys(Keys.ARROW_RIGHT * 20).key_up(Keys.SHIFT).perform()
    page.until("location.hash.includes('range=col')")
    kept = page.run("return new URLSearchParams(location.hash.slice(1)).get('range')")
    first, stop = (int(n) for n in kept.split(",")[1:])
    assert stop - first >= 21
    share = float(Recording.load(folder).weights(1, 2)[:, first:stop].double().sum()) / 300
    shown = f"{100 * share:.1f}" if share < 0.0995 else f"{round(100 * share)}"
    page.until("!document.querySelector('.loose').hidden")
    assert page.text(".map-sight") == (f"queries 0–299 × keys 0–299 · shown {shown} % of the mass")
    page.find(".loose").click()
    page.until("!location.hash.includes('range')")
    page.is_clean()


@pytest.mark.slow
def test_a_drag_beside_the_map_keeps_its_rows_and_a_click_one(browser, site):
    page = ViewPage(browser, f"{site}#head=1.2").exact()
    page.over(".profile.right", 0, -60)
    chain = ActionChains(browser, duration=50).click_and_hold()
    chain.move_by_offset(0, 40).move_by_offset(0, 40).release().perform()
    page.until("location.hash.includes('range=row')")
    page.press(Keys.ESCAPE)
    assert "range" not in page.hash
    page.over(".profile.right", 0, 0)
    ActionChains(browser, duration=0).click().perform()
    page.until("location.hash.includes('word=')")
    page.is_clean()


@pytest.mark.slow
def test_the_line_along_the_text_keeps_a_token(browser, site, folder):
    page = ViewPage(browser, f"{site}#head=1.2&view=text&by=tokens&along=received")
    page.until("document.querySelector('#along-line canvas')")
    page.over("#along-line .u-over", 0, 0)
    page.until("document.getElementById('along-said').textContent.includes('Click keeps')")
    token, summed = page.text("#along-said").removesuffix(". Click keeps the token.").split(" ")
    index = int(token.removeprefix("word"))
    column = Recording.load(folder).weights(1, 2)[:, index]
    assert float(summed) == pytest.approx(float(column.sum()), abs=1e-3)
    ActionChains(browser, duration=0).click().perform()
    page.until(f"location.hash.includes('word={index}')")
    assert "way=in" in page.hash
    page.is_clean()


@pytest.mark.slow
def test_what_is_drawn_again_stays_the_same_element(browser, site):
    page = ViewPage(browser, f"{site}#head=0.0&view=text&word=200")
    page.until("document.querySelector('#list tbody tr')")
    page.until("document.querySelectorAll('[data-ranked]').length === 8")
    page.run(
        "window.kept = ['#list tbody button', '[data-ranked]', '#grid button', '#list table']"
        ".map((name) => [name, document.querySelector(name)]);"
        "kept[0][1].focus();"
    )
    key = page.find("#list tbody tr").get_attribute("data-key")
    page.choose("metric", "before")
    page.run("document.querySelector('[data-way=in]').click()")
    page.run("document.querySelector('[data-way=out]').click()")
    page.until("document.querySelector('#list caption').textContent.includes(' reads')")
    page.until(f"document.querySelector(\"#list tr[data-key='{key}']\")")
    assert page.run("return kept.slice(1).every(([, e]) => e.isConnected)")
    page.run("kept[0][1] = document.querySelector('#list tbody button'); kept[0][1].focus()")
    page.run(
        "const s = document.getElementById('share'); s.value = 50;"
        "s.dispatchEvent(new Event('input'))"
    )
    page.until("location.hash.includes('share=50')")
    assert page.run("return kept[0][1].isConnected && document.activeElement === kept[0][1]")


@pytest.mark.slow
def test_what_keys_add_is_listed(browser, site, folder):
    page = ViewPage(browser, f"{site}#head=1.2&view=text&by=tokens&word=200&measure=value")
    page.until("document.querySelector('#list tbody tr')")
    added = Recording.load(folder).norm_weights(1, 2, [200])[0]
    keys = page.all("#list tbody tr", "[Number(e.dataset.key), e.cells[2].textContent]")
    assert keys[0][0] == int(added.argmax())
    for key, shown in keys:
        assert float(shown.replace("<", "")) == pytest.approx(float(added[key]), abs=6e-4)
    assert "of the lengths added" in page.text("#shown")
    page.press("m")
    page.exact()
    page.is_clean()


@pytest.mark.slow
def test_a_recording_cut_off_while_open_is_said_until_it_is_whole(browser, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    with served(tmp_path / "one") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0").exact()
        page.until("document.querySelectorAll('#grid [data-value]').length === 8")
        page.until("document.querySelector('#along-line canvas')")
        path = tmp_path / "one" / "layer-001.safetensors"
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(100)
        page.cell("1.1").click()
        page.until("!document.getElementById('error').hidden")
        assert "layer-001.safetensors is cut off" in page.text("#error")
        page.until("document.querySelector('.map-status').textContent.endsWith('missing')")
        path.write_bytes(whole)
        page.cell("1.2").click()
        page.exact()
        assert not page.find("#error").is_displayed()
        browser.get_log("browser")
