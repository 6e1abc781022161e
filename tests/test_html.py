"""`regard look --html`, driven in a headless Chromium: numbers, hands, keyboard, hostile text."""

import json
import os
import re

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}  # it is to download nothing

from click.testing import CliRunner  # noqa: E402
from selenium.webdriver import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from browsing import ATTACK, HOSTILE, Page, Written, close  # noqa: E402
from regard.analysis.look import (  # noqa: E402
    look,
    rows_of,
)
from regard.analysis.text_model import load  # noqa: E402
from regard.cli import main  # noqa: E402
from regard.errors import RegardError  # noqa: E402
from regard.report import look_html as html  # noqa: E402
from small_tokenizers import piece_tokenizer  # noqa: E402
from texts import TROPHY  # noqa: E402

ANIMAL = "The animal didn't cross the road because it was "


# What it shows


def test_hovering_a_word_shows_what_it_reads(browser, trophy):
    page = Page(browser, trophy.path)
    page.click(page.cell("3.1"))
    for word in (2, 9, 1, 13):
        page.hover(page.word(word))
        assert page.focus == word
        raw, rest = trophy.exact(word, (3, 1))
        close(page.weights(), raw)
        close(page.weights("rest"), rest)
        assert page.text("#headline").startswith(f"{trophy.found.labels[word]} reads ")
    page.click(page.find("#grid thead button"))
    page.hover(page.word(9, "rest"))
    raw, rest = trophy.exact(9)
    close(page.weights(), raw)
    close(page.weights("rest"), rest)
    page.is_quiet()


def test_it_opens_on_the_word_asked_for_and_its_strongest_head(browser, trophy):
    page = Page(browser, trophy.path)
    assert page.focus == 9
    assert page.text("#headline") == "it reads big 0.810 · head 2.1"
    assert "where heads read, not why" in page.text("#about")
    assert "shown 100 % of the mass" in page.text(".view[data-view=raw] .mass").replace("\xa0", " ")
    assert "shares of the other" in page.text(".view[data-view=rest] .mass")
    close(page.weights(), trophy.exact(9, (2, 1))[0])


def test_the_grid_shows_one_link_in_every_head(browser, trophy):
    page = Page(browser, trophy.path, "#word=9&to=2&head=3.1")
    shown = page.grid()
    assert len(shown) == 72
    for (layer, head), raw in zip(
        trophy.found.parts[0].heads,
        next(iter(rows_of(trophy.recording, trophy.found.parts, 9))).weights,
        strict=True,
    ):
        assert shown[f"{layer}.{head}"] == pytest.approx(float(raw[2]), abs=1e-3)


def test_a_click_keeps_the_word_and_escape_lets_go(browser, trophy):
    page = Page(browser, trophy.path)
    page.click(page.word(9))
    assert page.word(9).get_attribute("aria-pressed") == "true"
    assert "word=9" in page.hash
    before = page.weights()
    page.hover(page.word(7))
    assert page.focus == 9
    assert page.weights() == before
    assert "suitcase" in page.text("#headline")  # the one link that the pointer is on
    page.press(Keys.ESCAPE)
    page.hover(page.word(2))
    assert page.focus == 2
    assert "word=" not in page.hash
    page.click(page.word(2)).click(page.word(2))
    assert page.word(2).get_attribute("aria-pressed") == "false"


def test_a_head_previews_under_the_pointer_and_stays_when_clicked(browser, trophy):
    page = Page(browser, trophy.path, "#word=9&head=2.1")
    before, fan = page.weights(), page.fan
    page.hover(page.cell("3.1"))
    close(page.weights(), trophy.exact(9, (3, 1))[0])
    assert page.fan != fan
    page.hover(page.find("#about"))
    assert page.weights() == before
    page.click(page.cell("3.1"))
    page.hover(page.find("#about"))
    close(page.weights(), trophy.exact(9, (3, 1))[0])
    assert "head=3.1" in page.hash
    assert page.fan != fan
    page.is_quiet()


def test_the_address_holds_what_is_chosen(browser, trophy):
    page = Page(browser, trophy.path, "#word=2&head=4.3&to=7&metric=entropy")
    assert page.focus == 2
    close(page.weights(), trophy.exact(2, (4, 3))[0])
    assert page.run("return document.getElementById('metric').value") == "entropy"
    assert page.hash == "#word=2&head=4.3&to=7&metric=entropy"
    page.run("location.hash = '#word=9&layer=3'")
    page.settled()
    raw = next(iter(rows_of(trophy.recording, trophy.found.parts, 9))).weights[36:48].mean(0)
    close(page.weights(), raw)
    junk = Page(browser, trophy.path, "#word=99999&head=77.x&to=-1&metric=__proto__&all=<b>")
    assert junk.focus == 9
    junk.is_quiet()


def test_the_keyboard_reaches_everything(browser, trophy):
    page = Page(browser, trophy.path, "#head=3.1")
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.type") == "search"
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.dataset.word") == "9"
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert page.focus == 7
    page.press(Keys.ENTER)
    assert "word=7" in page.hash
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.id") == "metric"
    page.press(Keys.TAB)
    for key in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT):
        page.press(key)
    assert page.run("return document.activeElement.dataset.head") == "0.1"
    close(page.weights(), trophy.exact(7, (0, 1))[0])
    page.press(Keys.ENTER)
    assert "head=0.1" in page.hash
    page.press(
        Keys.TAB, Keys.TAB
    )  # the command that walks this head, between its button and the list
    assert page.run("return document.activeElement.textContent").startswith("regard walk ")
    page.press(Keys.TAB, Keys.ENTER)
    assert "to=" in page.hash
    page.is_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_can_be_read_in_both_schemes(browser, trophy, scheme):
    """The ink of a word on the strongest shade: a contrast of at least 4.5 (WCAG 2, AA)."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page = Page(browser, trophy.path, "#word=9&head=0.2")
    rgb = page.run(
        "const word = document.querySelector('.word:not(.special)');"
        "word.style.setProperty('--shade', .9);"
        "const paint = document.createElement('canvas').getContext('2d');"
        "const seen = (colours) => { for (const colour of colours) {"
        "  paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1); }"
        "  return [...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)]; };"
        "const under = getComputedStyle(document.querySelector('.view')).backgroundColor;"
        "const {color, backgroundColor} = getComputedStyle(word);"
        "return [seen([color]), seen([under, backgroundColor])]"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light = []
    for colour in rgb:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (value / 255 for value in colour)]  # fmt: skip
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    assert (light[0] > light[1]) is (scheme == "dark")
    assert (max(light) + 0.05) / (min(light) + 0.05) >= 4.5


def test_cross_attention_has_both_texts(browser, tmp_path):
    """A decoder's word reads its own text in some layers and the encoder's in others."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        vocab_size=len(piece_tokenizer()), decoder_start_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # words, and no end
    model.save_pretrained(tmp_path / "t5")
    piece_tokenizer().save_pretrained(tmp_path / "t5")
    recording = load(str(tmp_path / "t5"), generate=True).record(TROPHY, generate=4)
    written = Written(recording, tmp_path / "look.html")
    page = Page(browser, written.path)
    kinds = [part.kind for part in written.found.parts]
    last = len(written.found.words) - 1
    for kind in ("cross", "decoder", "encoder"):
        part = written.found.parts[kinds.index(kind)]
        word = part.readers.first + len(part.readers.words) - 1
        layer, head = part.heads[-1]
        page.run("location.hash = arguments[0]", f"#word={word}&head={layer}.{head}")
        page.settled()
        shown = page.weights()
        first, stop = part.keys.first, part.keys.first + len(part.keys.words)
        close(shown[first:stop], written.exact(word, (layer, head), kinds.index(kind))[0])
        assert sum(shown[:first] + shown[stop:]) == 0
        assert kind in page.text("#headline")
    page.press(Keys.ESCAPE)
    page.hover(page.word(last))  # no word of the encoder's: the head chosen does not read from it
    assert page.focus == last
    assert "mean of all 8 heads" in page.text("#headline")
    page.is_quiet()


# Hostile text


def test_hostile_text_is_text(browser, minilm, tmp_path):
    recording = minilm.record(HOSTILE)
    recording.about["model"] = f"model {ATTACK}"
    recording.about["tokens"][0] = f"[CLS]{ATTACK}"
    for layer in recording.layers:
        layer.name += ATTACK
    page = Page(browser, Written(recording, tmp_path / "look.html").path)
    for number in range(page.run("return document.querySelectorAll('.word').length / 2")):
        page.hover(page.word(number))
    shown = page.run("return document.body.textContent")
    assert page.run("return window.pwned") is None
    assert page.run("return document.images.length + document.links.length") == 0
    assert page.run("return document.querySelectorAll('script:not([type])').length") == 1
    assert page.run("return document.querySelectorAll('script').length") == 2  # the map is used up
    assert page.word(0).text.startswith("[CLS]</script><img")
    assert "onerror=window.pwned=1" in page.text(".view .text")
    assert "{{data}}" in page.text(".view .text").replace(" ", "")
    assert not re.search("[\x1b\u2028\u2029\u202a-\u202e\u2066-\u2069]", shown)
    page.is_quiet()


def test_the_policy_lets_nothing_in(browser, trophy):
    """Even if markup got in: no handler runs, no image and no address is asked for."""
    page = Page(browser, trophy.path)
    page.run(
        "document.body.insertAdjacentHTML('beforeend',"
        "'<img src=http://localhost/x onerror=window.pwned=1><style>h1{color:red}</style>'"
        "+ '<iframe srcdoc=\"<script>parent.pwned=1<\\/script>\"></iframe>')"
    )
    page.run("fetch('http://localhost/y').catch(() => window.refused = 1)")
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return window.refused"))
    assert page.run("return window.pwned") is None
    written = trophy.path.read_text("utf-8")
    assert written.isascii() or "\u2028" not in written
    assert not re.search(r"""\b(src|href)\s*=|@import|url\(|innerHTML|insertAdjacent""", written)
    browser.get_log("browser")


# Long texts


def test_a_long_text_lists_the_strongest_and_says_so(browser, minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "FULL", 100)
    monkeypatch.setattr(html, "LINKS", 5 * 15 * 79)  # 79: 72 heads, 6 layers' means, one of all
    written = Written(minilm.record(TROPHY), tmp_path / "look.html", ["it"])
    page = Page(browser, written.path, "#word=9&head=3.1")
    assert "the 5 words read most" in page.text("#foot")
    for hash_, exact in (
        ("#word=9&head=3.1", written.exact(9, (3, 1))[0]),
        ("#word=9&all", written.exact(9)[0]),
        ("#word=2&head=1.11", written.exact(2, (1, 11))[0]),
    ):
        page.run("location.hash = arguments[0]", hash_)
        page.settled()
        best = exact.topk(5)
        close(page.weights(), torch.zeros_like(exact).scatter(0, best.indices, best.values))
        said = page.text(".view[data-view=raw] .mass").replace("\xa0", " ")
        share = float(re.match(r"shown ([\d.]+) % of the mass", said)[1])
        assert share == pytest.approx(100 * float(best.values.sum()), abs=0.6)
    page.is_quiet()


def test_whole_units_keep_their_sums():
    table = torch.rand(3, 50, 700).softmax(-1)
    units = html._in_units(table)
    assert (units.long() >= 0).all()
    assert (units / html.UNIT).double() == pytest.approx(table.double(), abs=1 / html.UNIT)
    assert (units.long().sum(-1) == html.UNIT).all()


# What else was asked


@pytest.mark.slow
def test_versus_and_effect_are_on_the_page(browser, tmp_path):
    path = tmp_path / "look.html"
    arguments = ["look", ANIMAL + "tired", "--from", "it", "--versus", ANIMAL + "wide"]
    result = CliRunner().invoke(main, [*arguments, "--effect", "--json", "--html", str(path)])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    page = Page(browser, path, "#word=8&head=3.1&metric=change")
    assert page.text("#headline") == "it reads animal 0.606, then 0.258 · head 3.1"
    links = {x["to"]: x for x in found["versus"][0]["links"] if (x["layer"], x["head"]) == (3, 1)}
    assert page.weights()[2] == pytest.approx(links["animal"]["weight"], abs=1e-3)
    assert page.weights(reading=1)[2] == pytest.approx(links["animal"]["weight2"], abs=1e-3)
    change = links["animal"]["weight2"] - links["animal"]["weight"]
    assert page.grid()["3.1"] == pytest.approx(change, abs=2e-3)
    rows = page.cells(".effects tbody tr")
    effects = found["effect"][0]["links"]
    assert len(rows) == len(effects)
    for cells, link in zip(rows, effects, strict=True):
        assert cells[0] == f"{link['from']} → {link['to']}"
        assert cells[1] == f"{link['layer']}.{link['head']}"
        assert float(cells[2]) == pytest.approx(link["effect"], rel=0.01)
        assert float(cells[3]) == pytest.approx(link["weight"], abs=1e-3)
    page.click(page.find(".effects tbody tr button"))
    assert f"head={effects[0]['layer']}.{effects[0]['head']}" in page.hash
    page.is_quiet()


# The file


def test_where_it_cannot_be_written_it_says_so(tmp_path):
    for path, said in (
        (tmp_path, f"{tmp_path} is a folder; --html writes a file"),
        (tmp_path / "none" / "x.html", f"there is no folder {tmp_path / 'none'} to write x.html"),
    ):
        result = CliRunner().invoke(main, ["look", TROPHY, "--html", str(path)])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert result.stderr.startswith(f"regard: {said}")
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_page(minilm, tmp_path, monkeypatch):
    path = tmp_path / "look.html"
    path.write_text("the old page")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    recording = minilm.record("One sentence.")
    with pytest.raises(RegardError, match="No space left"):
        html.write_html(look(recording), recording, path)
    assert [p.name for p in tmp_path.iterdir()] == ["look.html"]
    assert path.read_text() == "the old page"
    monkeypatch.undo()
    html.write_html(look(recording), recording, path)
    assert path.read_text("utf-8").startswith("<!doctype html>")
