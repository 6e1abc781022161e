"""The page by fingers: two zoom the map, one moves it, a tap does what the pointer does."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from regard import Recording
from test_view_page import ViewPage
from viewing import recording, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("touch") / "r"
    recording(600, layers=1).save(folder)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as (address, _):
        yield address


@pytest.fixture
def fingers(browser):
    """A phone: its size, and fingers instead of a pointer."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2}
    )
    yield Fingers(browser)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


class Fingers:
    def __init__(self, browser):
        self.browser = browser

    def touch(self, kind, *points):
        given = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        self.browser.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": given}
        )

    def tap(self, x, y):
        self.touch("touchStart", (x, y))
        self.touch("touchEnd")

    def drag(self, *steps):
        """Fingers at each of these places, one after another: each a list of points."""
        self.touch("touchStart", *steps[0])
        for points in steps[1:]:
            self.touch("touchMove", *points)
        self.touch("touchEnd")


def middle(page, selector):
    page.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
    page.settled()
    box = page.run(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2]", selector,
    )  # fmt: skip
    return box


def zoomed(page):
    return float(
        page.run("return new URLSearchParams(location.hash.slice(1)).get('at')").split(",")[0]
    )


@pytest.mark.slow
def test_two_fingers_zoom_the_map_and_one_moves_it(browser, address, folder, fingers):
    page = ViewPage(browser, f"{address}#head=0.0&at=4.00,300,299").exact()
    x, y = middle(page, ".map")
    apart = [[(x - d, y), (x + d, y)] for d in (20, 40, 60, 80)]
    fingers.drag(*apart)
    page.until(
        "Number(/at=(\\d+\\.\\d+)/.exec(decodeURIComponent(location.hash))?.[1]) > 5.5"
    ).exact()
    near = zoomed(page)
    assert near == pytest.approx(6.0, abs=0.1)  # four times as far apart
    assert page.text(".map-status").startswith("a cell is one weight")
    fingers.tap(x + 3, y + 3)
    page.until("document.getElementById('headline').dataset.weight")
    words = page.text("#headline").split()
    row, col = (int(words[at].removeprefix("word")) for at in (0, 2))
    shown = float(page.find("#headline").get_attribute("data-weight"))
    exact = float(Recording.load(folder).weights(0, 0, [row], [col])[0, 0])
    assert shown == pytest.approx(exact, abs=1e-7)
    page.until(f"location.hash.includes('word={row}')")  # the tap keeps the query, too
    before = page.run("return location.hash")
    fingers.drag([(x, y)], [(x, y - 20)], [(x, y - 40)], [(x, y - 60)])
    page.until(f"location.hash !== {before!r}")
    fingers.drag(*apart[::-1])
    page.until("Number(/at=(\\d+\\.\\d+)/.exec(decodeURIComponent(location.hash))?.[1]) < 5")
    page.exact().is_clean()


@pytest.mark.slow
def test_a_tap_reads_and_keeps_a_word(browser, address, folder, fingers):
    page = ViewPage(browser, f"{address}#head=0.1&view=text")
    page.until("document.querySelector(\".word[data-word='40']\")")
    assert (
        page.run("return getComputedStyle(document.querySelector('.scroll')).touchAction") == "auto"
    )
    fingers.tap(*middle(page, ".word[data-word='40']"))
    page.until("document.querySelector('.word.locked')?.dataset.word === '40'")
    page.until("document.getElementById('shown').textContent.startsWith('shown')")
    row = Recording.load(folder).weights(0, 1, [40])[0]
    first = page.all("#list tbody tr", "Number(e.dataset.key)")[0]
    assert first == int(row.argmax())
    fingers.tap(*middle(page, ".word[data-word='44']"))
    page.until("document.querySelector('.word.locked')?.dataset.word === '44'")
    fingers.tap(*middle(page, ".word[data-word='44']"))
    page.until("!location.hash.includes('word=')")
    page.is_clean()
