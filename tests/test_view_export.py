"""What is in view as a file of its own: `--export`, and the page's buttons; read offline."""

import json
import zlib
from base64 import b64decode

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')

from click.testing import CliRunner

import regard
from regard import Recording, RegardError
from regard.cli import main
from regard.report.view.export import export_page
from regard.report.view.held import Held
from regard.report.view.in_view import InView
from regard.report.view.opened import Opened
from test_record import ids, tiny
from test_view_page import ViewPage
from viewing import recording, served

TOKENS = 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With values and effects."""
    folder = tmp_path_factory.mktemp("export") / "r"
    names = [f"word{i}" for i in range(TOKENS)]
    regard.record(tiny(), ids(TOKENS), folder, effect=True, values=True, tokens=names)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Of more tokens than a file holds the weights of."""
    recording(1500, layers=1).save(tmp_path_factory.mktemp("export") / "long")
    return next(tmp_path_factory.getbasetemp().glob("export*/long"))


def exported(file, *arguments):
    result = CliRunner().invoke(main, ["view", *map(str, arguments), "--export", str(file)])
    assert (result.exit_code, result.output) == (0, f"page: {file}\n")
    return file


def alone(page):
    """Nothing was asked for, and nothing complained."""
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.browser.get_log("browser") == []
    assert not page.find("#error").is_displayed()


def listed(page):
    """Key → what the list shows of it."""
    lines = page.all("#list tbody tr", "[e.dataset.key, e.cells[2].innerText]")
    return {int(key): float(value.replace("<", "0")) for key, value in lines}


def tiles(held, measure):
    """The tiles held of one measure, by place."""
    found = {}
    for name, packed in held["answers"].items():
        path, _, said = name.partition(" ")
        asked = dict(json.loads(said))
        if path == "tiles" and asked.get("measure", "weight") == measure:
            data = bytearray(zlib.decompress(b64decode(packed)))
            place = (int(asked["zoom"]), *map(int, asked["at"].split(".")))
            found[place] = torch.frombuffer(data, dtype=torch.float32).view(128, 128)
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("measure", ["weight", "value", "effect"])
@pytest.mark.parametrize("pool", ["sum", "max"])
def test_tiles_are_those_in_view(folder, measure, pool):
    opened = Opened.load(folder)
    view = InView.read(f"#head=1.2&measure={measure}&pool={pool}", [opened])
    held = Held([opened], view).all()
    found = tiles(held, measure)
    assert {zoom for zoom, *_ in found} == {0, 1}
    for (zoom, row, col), tile in found.items():
        exact = opened.recording.tile(1, 2, zoom, row, col, pool, by=measure)
        assert torch.equal(tile, exact.float())
    assert (held["measures"], held["whole"]) == (["weight", "value", "effect"], True)


def test_what_the_address_says(folder, long):
    one, other = Opened.load(folder), Opened.load(long)
    view = InView.read("#head=1.3&word=7&way=in&at=1.50,70,71&compare=change&sinks=off&by=tokens",
                       [one, one])  # fmt: skip
    assert (view.layer, view.head, view.word, view.way) == (1, 3, 7, "in")
    assert (view.place, view.compared, view.sinks) == ((1.5, 70, 71), (0, 1), False)
    wrong = InView.read("head=9.9&word=2000000000&pool=most&at=1,2&compare=change&measure=effect",
                        [other])  # fmt: skip
    assert (wrong.layer, wrong.head, wrong.word, wrong.reduce) == (0, 0, None, "sum")
    assert (wrong.place, wrong.compared, wrong.measure) == (None, (0,), "weight")


def test_near_what_is_in_view_every_zoom_is_held(long):
    opened = Opened.load(long)
    held = Held([opened], InView.read("head=0.1&at=8,1300,1299", [opened])).all()
    assert (held["least"], held["whole"]) == (0, False)
    assert (0, 10, 10) in tiles(held, "weight")
    assert (0, 0, 0) not in Held([opened], InView.read("head=0.1&at=4.2,100,100", [opened])).answers
    whole = Held([opened], InView.read("head=0.1", [opened])).all()
    assert whole["least"] == 1
    assert len(tiles(whole, "weight")) <= 85


REFUSED = {
    "no effects": (["{long}", "--measure", "effect"], "has no effects: record it with --effect"),
    "no values": (["{long}", "--measure", "value"], "has no values: record it with --values"),
    "both": (["{long}", "--address", "head=0.1", "--head", "0.1"], "--address says all; leave out"),
    "two": (["{long}", "{folder}"], "--export of two recordings needs --address"),
    "no word": (["{long}", "--from", "zebra"], "no token of the text holds 'zebra'"),
    "no segment": (["{long}", "--address", "segments=zebra"], "the text nowhere matches 'zebra'"),
    "no head": (["{long}", "--head", "1"], "--head '1': give layer and head, as 3.1"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_said(arguments, said, folder, long, tmp_path):
    given = [word.format(folder=folder, long=long) for word in arguments]
    result = CliRunner().invoke(main, ["view", *given, "--export", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_a_text_of_too_many_tokens_is_refused(long, monkeypatch):
    monkeypatch.setattr("regard.report.view.export.TOKENS", 1000)
    with pytest.raises(RegardError, match="holds texts of up to 1,000 tokens"):
        export_page([Opened.load(long)], "head=0.0")


@pytest.mark.slow
def test_values_and_effects_are_shown_offline(browser, folder, tmp_path):
    file = exported(
        tmp_path / "p.html", folder, "--head", "1.2", "--from", "word139", "--measure", "value"
    )
    known = Recording.load(folder)
    page = ViewPage(browser, file.as_uri()).exact()
    page.until("document.querySelector('#list tbody tr')")
    row = known.norm_weights(1, 2, [139])[0]
    assert listed(page) == pytest.approx({key: float(row[key]) for key in listed(page)}, abs=6e-4)
    assert page.text("#list th:nth-child(3)") == "adds"
    page.run(
        "const s = document.querySelector('#measure select'); s.value = 'effect';"
        "s.dispatchEvent(new Event('change'))"
    )
    page.until("document.querySelector('#list th:nth-child(3)').textContent === 'effect'").exact()
    edges = known.effect(1, 2, [139])
    exact = dict(zip(edges.indices[0].tolist(), edges.effects[0].abs().tolist(), strict=True))
    assert listed(page) == pytest.approx({key: exact[key] for key in listed(page)}, rel=6e-3)
    page.over(".map", 8, 8)
    shown = float(page.find("#headline").get_attribute("data-weight"))
    row, col = (int(n) for n in page.run(
        "return /queries? (\\d+) → key (\\d+)|x/.exec(document.getElementById('note').textContent)"
        "?.slice(1) ?? ['-1', '-1']"
    ))  # fmt: skip
    if row >= 0:
        assert shown == pytest.approx(float(known.tile(1, 2, 0, 0, 0, by="effect")[row, col]))
    page.press("t")
    page.until("document.querySelector('.word.locked')?.dataset.word === '139'")
    page.hover(page.token(100))
    alone(page)


@pytest.mark.slow
def test_the_button_saves_what_is_in_view(browser, long, tmp_path):
    """A place at the finest zoom, maxima without sinks, segments and what is looked for."""
    asked = "head=0.1&at=8.00,1300,1299&pool=max&sinks=off&word=1300&find=word1300"
    asked += "&segments=0-700,700-1500"
    with served(long) as (address, _):
        page = ViewPage(browser, f"{address}#{asked}").exact()
        page.until("document.querySelector('.segment')")
        page.run(
            "const make = URL.createObjectURL; URL.createObjectURL = (blob) => {"
            "  blob.text().then((text) => (window.saved = text)); return make(blob); };"
            "HTMLAnchorElement.prototype.click = function () { window.named = this.download; };"
        )
        page.find("#html").click()
        page.until("window.saved")
        assert page.run("return window.named") == "long-head-0.1.html"
        (tmp_path / "p.html").write_text(page.run("return window.saved"), "utf-8")
    known = Recording.load(long)
    page = ViewPage(browser, (tmp_path / "p.html").as_uri()).exact()
    page.over(".map", 8, 8)
    assert page.text("#headline").startswith("word1300 reads word1299 ")
    shown = float(page.find("#headline").get_attribute("data-weight"))
    assert shown == pytest.approx(float(known.weights(0, 1, [1300], [1299])[0, 0]), abs=1e-7)
    shares = page.all(".segment", "Number(e.dataset.share)")
    row = known.weights(0, 1, [1300])[0]
    assert shares == pytest.approx([float(row[:700].sum()), float(row[700:].sum())], abs=1e-5)
    page.press("t")
    page.until("document.querySelector(\".word[data-word='1300']\")?.hasAttribute('data-hit')")
    page.hover(page.token(1290))
    alone(page)


@pytest.mark.slow
def test_a_difference_is_exported(browser, tmp_path):
    for seed, name in enumerate(("one", "two")):
        recording(300, layers=1, seed=seed).save(tmp_path / name)
    where = "head=0.0&compare=change&at=7.00,200,199"
    file = exported(tmp_path / "p.html", tmp_path / "one", tmp_path / "two", "--address", where)
    page = ViewPage(browser, file.as_uri()).exact()
    page.over(".map", 8, 8)
    one, two = (
        float(Recording.load(tmp_path / name).weights(0, 0)[200, 199]) for name in ("one", "two")
    )
    shown = float(page.find("#headline").get_attribute("data-weight"))
    assert shown == pytest.approx(two - one, abs=1e-6)
    alone(page)


@pytest.mark.slow
@pytest.mark.parametrize("view", ["map", "text"])
def test_pictures_say_what_they_show(browser, folder, view):
    """SVG is XML that names head, token and words in sight; PNG is the same, as pixels."""
    with served(folder) as (address, _):
        page = ViewPage(browser, f"{address}#head=1.2&view={view}&word=139&measure=value")
        page.until("document.querySelector('#list tbody tr')")
        if view == "map":
            page.exact()
        page.run(
            "window.saved = {}; const make = URL.createObjectURL; URL.createObjectURL = (blob) => {"
            "  window.last = blob; return make(blob); };"
            "HTMLAnchorElement.prototype.click = function () {"
            "  window.saved[this.download] = window.last; };"
        )
        for kind in ("svg", "png"):
            page.find(f"#{kind}").click()
            page.until(f"window.saved['r-head-1.2-value.{kind}']")
        text = page.browser.execute_async_script(
            "window.saved['r-head-1.2-value.svg'].text().then(arguments[0])"
        )
        page.run(
            "window.svg = new DOMParser().parseFromString(arguments[0], 'image/svg+xml')", text
        )
        said = page.run("return [...window.svg.querySelectorAll('text')].map(e => e.textContent)")
        assert said[0].startswith("r, head 1.2, word139 reads word")
        if view == "map":
            assert "weight · ‖W_O v‖" in said[1]
            assert page.run("return window.svg.querySelectorAll('image').length") == 3
        else:
            assert "of the lengths added" in said[1]
            assert "word139" in said[2:]
            assert page.run("return window.svg.querySelectorAll('path').length") > 0
        sizes = page.browser.execute_async_script(
            "const done = arguments[0]; createImageBitmap(window.saved['r-head-1.2-value.png'])"
            ".then(b => done([b.width / devicePixelRatio,"
            " Number(window.svg.documentElement.getAttribute('width'))]))"
        )
        assert sizes[0] == pytest.approx(sizes[1], abs=1)
        page.is_clean()
