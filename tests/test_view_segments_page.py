"""Words and segments on the page of `regard view`, by hand."""

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from click.testing import CliRunner

from regard.capture.recording import Recording
from regard.cli import main
from test_view_page import ViewPage
from viewing import recording, served

WORDS = [[0, 1], [1, 3], [3, 4], [5, 8], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("view") / "documents"
    made = recording(40, words=[f"Document{n}" if n % 10 == 0 else f"part{n}" for n in range(40)])
    made.about["words"] = WORDS
    made.save(where)
    return where


@pytest.fixture(scope="module")
def site(folder):
    with served(folder) as (address, _):
        yield address


@pytest.mark.slow
def test_words_are_the_unit_until_tokens_are_chosen(browser, site, folder):
    page = ViewPage(browser, f"{site}#head=1.2&view=text&word=6")
    page.until("document.querySelector('.word.focus')?.dataset.word === '5'")
    assert page.text("#headline").startswith("part5 part6 part7 reads ")
    assert not page.run("return document.querySelector(\".word[data-word='6']\")")
    expected = Recording.load(folder).to_words().weights(1, 2)[3]
    weights = page.all(".word[data-weight]", "[e.dataset.word, e.dataset.weight]")
    shown = {int(word): float(weight) for word, weight in weights}
    for word, (first, _) in enumerate(WORDS):
        if first in shown:
            assert shown[first] == pytest.approx(float(expected[word]), rel=1e-4)
    assert len(shown) > 3
    page.find("#units [data-units=tokens]").click()
    page.until("document.querySelector('.word.focus')?.dataset.word === '6'")
    assert "by=tokens" in page.hash
    page.is_clean()


@pytest.mark.slow
def test_the_word_of_the_address_is_in_sight(browser, tmp_path):
    made = recording(2000)
    made.about["words"] = [[n, n + 2] for n in range(0, 2000, 2)]
    made.save(tmp_path / "long")
    with served(tmp_path / "long") as (address, _):
        for word in (900, 1500, 101):
            page = ViewPage(browser, f"{address}#head=1.2&view=text&word={word}")
            page.until(f"document.querySelector('.word.focus')?.dataset.word === '{word // 2 * 2}'")
            page.until(
                "(([word, frame]) => word.top >= frame.top && word.bottom <= frame.bottom)"
                "(['.word.focus', '.pane .scroll']"
                ".map((one) => document.querySelector(one).getBoundingClientRect()))"
            )


@pytest.mark.slow
def test_segments_are_shared_out_and_rank_the_heads(browser, site, folder):
    page = ViewPage(browser, f"{site}#head=0.0&word=35&view=text&by=tokens")
    page.type("#segments [name=given]", r"Document\d+")
    page.find("#segments button").click()
    page.until("document.querySelectorAll('.segment').length === 4")
    weights = Recording.load(folder).weights(0)[:, 35]
    expected = weights.view(4, 4, 10).sum(-1)
    shown = page.all(".segment", "Number(e.dataset.share)")
    torch.testing.assert_close(torch.tensor(shown), expected[0], rtol=0, atol=2e-6)
    page.find(".segment:nth-child(3)").click()
    page.settled()
    # The answers of other layers draw the list again; what has the focus stays
    assert page.run("return document.activeElement.querySelector('.name').textContent") == (
        "Document20"
    )
    cell = "document.querySelector(\"#grid [data-head='0.3']\")?.dataset.value"
    page.until(f"Math.abs({cell} - {float(expected[3, 2])}) < 2e-6")
    every = "document.querySelectorAll('#grid [data-value]').length === 8"
    page.until(f"{every} && document.querySelectorAll('[data-ranked]').length === 8")
    best, values = page.run(
        "return [document.querySelector('[data-ranked]').dataset.ranked,"
        "Object.fromEntries([...document.querySelectorAll('#grid [data-value]')]"
        ".map((e) => [e.dataset.head, Number(e.dataset.value)]))]"
    )
    assert best == max(values, key=values.get)
    assert "“Document20”" in page.text("#metric-title")
    again = ViewPage(browser, page.run("return location.href"))
    again.until("document.querySelectorAll('.segment').length === 4")
    assert again.find(".segment[aria-pressed=true] .name").text == "Document20"
    again.is_clean()
    again.type("#segments [name=given]", "(")
    again.find("#segments button").click()
    again.until("document.getElementById('segments-said').textContent.includes('is none')")


@pytest.mark.slow
def test_an_exported_page_shows_words(browser, folder, tmp_path):
    page = tmp_path / "page.html"
    command = ["view", str(folder), "--export", str(page), "--head", "1.2", "--from", "part6"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    browser.get("about:blank")
    browser.get(page.as_uri())
    shown = ViewPage(browser, f"{page.as_uri()}#head=1.2&word=6&view=text")
    shown.until("document.querySelector('.word.focus')?.dataset.word === '5'")
    assert shown.text("#headline").startswith("part5 part6 part7 reads ")
    assert not shown.find("#segments input").is_displayed()
    shown.find("#units [data-units=tokens]").click()
    shown.until("document.querySelector('.word.focus')?.dataset.word === '6'")
