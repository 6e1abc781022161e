"""Recordings of unequal lengths in `regard view`: both whole, moved by token, their difference."""

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from regard.capture.recording import Recording
from regard.report.view.page_facts import alike
from test_view_page import ViewPage
from viewing import recording, served

LONG, SHORT, PARTED = 300, 101, 60  # tokens; where the texts part


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("unequal")
    recording(LONG, layers=1).save(where / "long")
    words = [f"word{i}" if i != PARTED else "else" for i in range(SHORT)]
    recording(SHORT, layers=1, seed=1, words=words).save(where / "short")
    return where / "long", where / "short"


@pytest.fixture(scope="module")
def address(folders):
    with served(*folders) as (address, _):
        yield address


def sights(page):
    return page.all(".map-sight", "e.textContent.split(' · ')[0]")


def titles(page):
    return page.all("#maps h2", "e.textContent")


@pytest.mark.slow
def test_side_by_side_both_are_whole_and_move_by_token(browser, address):
    page = ViewPage(browser, f"{address}#head=0.2&compare=both").exact()
    assert titles(page) == [
        f"long · {LONG} tokens · the texts part at token {PARTED}", f"short · {SHORT} tokens",
    ]  # fmt: skip
    assert sights(page) == ["queries 0–299 × keys 0–299", "queries 0–100 × keys 0–100"]
    page = ViewPage(browser, f"{address}#head=0.2&compare=both&at=6.00,50,40").exact()
    one, two = sights(page)
    assert one == two != "queries 0–100 × keys 0–100"
    page.over("#maps .frame:nth-child(2) .map", 4, 4)
    assert page.text("#headline").startswith("word50 reads word40 ")
    page.find("#maps .frame:nth-child(2) .map").send_keys("+")
    page.until("!location.hash.includes('at=6.00')").exact()
    one, two = sights(page)
    assert one == two
    page.choose("compare", "one")
    page.exact()
    assert "299" not in sights(page)[0]  # the one that is left stays
    page.choose("compare", "both")
    page.exact()
    one, two = sights(page)  # the second comes to where the first stands
    assert one == two != "queries 0–100 × keys 0–100"
    page.is_clean()


@pytest.mark.slow
def test_their_difference_is_of_what_both_have(browser, address, folders):
    page = ViewPage(browser, f"{address}#head=0.2&compare=change&at=6.00,50,49").exact()
    assert titles(page) == [
        f"short − long · of the {SHORT} × {SHORT} that both have · the texts part at token {PARTED}"
    ]
    one, two = (Recording.load(folder).weights(0, 2, [50], [49]) for folder in folders)
    page.over(".map", 4, 4)
    shown = float(page.find("#headline").get_attribute("data-weight"))
    assert shown == pytest.approx(float(two - one), abs=1e-6)
    page.is_clean()


def test_where_texts_part():
    assert alike("abcd", "abxd") == 2
    assert alike("ab", "abxd") == 2
    assert alike("", "ab") == 0
