"""Where there is nothing to show, the page says so, and what to do; and all of it by keyboard."""

import shutil

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from selenium.webdriver import Keys

import regard
from regard.call.checked import Call
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.recording import Recording
from test_view_page import ViewPage
from viewing import recording, served, streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "r"
    recording(300, layers=1).save(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as (address, _):
        yield address


NOTHING = {
    "values": ("#head=0.0&measure=value&word=7", "#lacking", "record again with --values"),
    "effects": ("#head=0.0&measure=effect&view=text", "#lacking", "record again with --effect"),
    "segments": ("#head=0.0&segments=zebra", "#segments-said", "choose another kind"),
    "documents": (
        r"#head=0.0&segments=(?m)^\s*(?P<name>(?:Document|Passage|Source)\W{0,2}\d%2B[\])]?)",
        "#segments-said", "the text has no documents; choose another kind",
    ),
    "a head that reads": (
        "#head=0.0&metric=reads&from=word7&reads=zebra", "#reads-said", "try another word",
    ),
    "found": ("#head=0.0&view=text&find=zebra", "#found", "try a part of it"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("hash_, where, said", NOTHING.values(), ids=NOTHING)
def test_what_is_not_there_is_said_with_what_to_do(browser, address, hash_, where, said):
    page = ViewPage(browser, address + hash_)
    page.until(f"document.querySelector('{where}').innerText.includes({said!r})")
    assert page.find(where).is_displayed()
    if where == "#lacking":
        assert not page.find("#maps").is_displayed()
        page.find("#lacking button").click()
        page.until("document.getElementById('lacking').hidden")
        assert "measure=" not in page.hash
        page.press("m")
        page.exact()
    assert not page.find("#error").is_displayed()
    logged = [line["message"] for line in browser.get_log("browser")]
    assert all("status of 422" in line for line in logged)  # the browser's own line on a refusal


@pytest.mark.slow
def test_a_token_that_sees_nothing_says_so(browser, tmp_path):
    keep = torch.ones(1, 8, dtype=torch.bool)
    keep[0, 3] = False
    query, key = torch.randn(2, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    mask = regard.Documents(torch.arange(8)[None].where(keep, -1), torch.arange(8)[None])
    _, (lse,) = regard.attention(query, key, key, mask=mask, observe=[regard.LogSumExp()])
    layer = RecordedLayer("layers.0.attention", 0, "self")
    layer.add(Call.checked(query, key, key, mask=mask), lse.values)
    names = [f"word{i}" for i in range(8)]
    Recording([layer], {"model": "small", "tokens": names}).save(tmp_path / "r")
    with served(tmp_path / "r") as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0&view=text&word=3")
        page.until(
            "document.getElementById('headline').innerText.startsWith('word3 reads nothing')"
        )
        assert "choose another token" in page.text("#list .empty")
        page.run("document.querySelector(\"#way [data-way='in']\").click()")
        page.until("document.getElementById('headline').innerText.includes('is read by nobody')")
        page.is_clean()


@pytest.mark.slow
@pytest.mark.parametrize("done", ["deleted", "cut off"])
def test_a_recording_that_is_no_longer_whole_says_what_to_do(browser, tmp_path, done):
    folder = streamed(tmp_path / "r", silent=True)
    with served(folder) as (address, _):
        page = ViewPage(browser, f"{address}#head=0.0").exact()
        assert "nothing to show: it convolves" in page.text("#grid")
        if done == "deleted":
            shutil.rmtree(folder)
        else:
            file = folder / "layer-001.safetensors"
            file.write_bytes(file.read_bytes()[:-1000])
        page.cell("1.1").click()
        page.until("!document.getElementById('error').hidden")
        assert "put it back and reload, or start regard view" in page.text("#error")
        page.browser.get("about:blank")
        page.browser.get(address)
        page.until("!document.getElementById('error').hidden")
        assert "put it back and reload, or start regard view" in page.text("#error")
        browser.get_log("browser")  # what was refused is told there, too


@pytest.mark.slow
@pytest.mark.parametrize("view", ["map", "text"])
def test_tab_reaches_every_control_and_shows_where_it_is(browser, address, view):
    page = ViewPage(browser, f"{address}#head=0.0&view={view}&word=299&segments=0-100,100-300")
    page.until("document.querySelectorAll('.segment').length === 2")
    page.until(
        "document.querySelector('#list tbody tr') && document.querySelector('#ranked button')"
    )
    if view == "map":
        page.exact()
    page.run(
        "window.named = (e) => [e.tagName, e.id, e.className, e.name, e.dataset?.key,"
        " e.dataset?.to, e.textContent?.slice(0, 40)].join(' ');"
        "window.controls = () => [...document.querySelectorAll('button, a[href], input, select,"
        " [tabindex]')].filter(e => e.checkVisibility() && e.tabIndex >= 0 && !e.disabled"
        " && !e.closest('.leaflet-disabled'));"
    )
    wanted = set(page.run("return controls().map(named)"))
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    seen, unseen = set(), set()
    for _ in range(len(wanted) + 30):
        page.press(Keys.TAB)
        name, shown = page.run(
            "const e = document.activeElement, s = getComputedStyle(e);"
            "return [named(e), e === document.body || s.outlineStyle !== 'none'"
            " && parseFloat(s.outlineWidth) > 0]"
        )
        seen.add(name)
        if not shown:
            unseen.add(name)
    assert not wanted - seen
    assert not unseen
    page.press("/")
    page.press(Keys.ESCAPE)
    assert page.run("return document.activeElement === document.body")
    page.press(Keys.ESCAPE)
    page.until("!location.hash.includes('word=')")
    page.is_clean()
