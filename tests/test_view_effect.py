"""Effects on the page: offered where they were recorded, tiles and lists of them, what on."""

import shutil

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')

import regard
from regard import Recording, RegardError
from regard.report.view.answers import Answers
from regard.report.view.first_answers import first_answers
from regard.report.view.opened import Opened
from test_record import ids, tiny
from test_view_page import ViewPage
from viewing import served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects") / "r"
    names = [f"word{i}" for i in range(140)]
    regard.record(tiny(), ids(140), folder, effect=True, values=True, tokens=names)
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    return Answers([Opened.load(folder)])


def test_the_page_is_told_what_on_and_where(folder, answers):
    about = answers.answer("about", {})["recordings"][0]
    assert about["effect"] == {
        "target": "log-probability of the likeliest next token", "edges": 64,
    }  # fmt: skip
    assert [layer["effects"] for layer in about["layers"]] == [True, True]
    (first,) = first_answers([folder])
    assert first.about["layers"] == about["layers"]
    assert first.about["effect"] == about["effect"]


def test_tiles_and_fans_are_of_effects(folder, answers):
    edges = Recording.load(folder).effect(1, 2)
    truth = torch.zeros(140, 141)
    keys = edges.indices.long()
    truth.scatter_(1, keys.where(keys >= 0, 140), edges.effects.abs())
    asked = {"layer": "1", "head": "2", "measure": "effect", "zoom": "0", "at": "0.0"}
    (tile,) = answers.tiles(asked)
    shown = torch.frombuffer(bytearray(tile), dtype=torch.float32).view(128, 128)
    torch.testing.assert_close(shown, truth[:128, :128])
    (tile,) = answers.tiles(asked | {"sinks": "0", "zoom": "1"})
    shown = torch.frombuffer(bytearray(tile), dtype=torch.float32).view(128, 128)
    truth[:, 0] = 0
    wanted = truth[:, :140].unflatten(0, (70, 2)).unflatten(2, (70, 2)).sum((1, 3))
    torch.testing.assert_close(shown[:70, :70], wanted, rtol=1e-4, atol=1e-8)
    for way, line in (("out", truth[139, :140]), ("in", truth[:, 139])):
        fan = answers.answer("fan", {"layer": "1", "head": "2", "index": "139", "way": way,
                                     "measure": "effect"})  # fmt: skip
        listed = dict(fan["items"])
        for key in line.nonzero().flatten().tolist():
            assert listed[key] == pytest.approx(float(line[key]), rel=1e-5)


def test_damaged_effects_leave_the_page_its_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "r")
    file = tmp_path / "r" / "effect-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert first_answers([tmp_path / "r"]) is None  # the recording itself says what is wrong
    opened = Answers([Opened.load(tmp_path / "r")])
    about = opened.answer("about", {})["recordings"][0]
    assert [layer["effects"] for layer in about["layers"]] == [False, True]
    assert "effect-000.safetensors" in about["damaged"][0]
    with pytest.raises(RegardError, match=r"effect-000\.safetensors is not whole"):
        list(opened.tiles({"layer": "0", "head": "0", "measure": "effect", "zoom": "0",
                           "at": "0.0"}))  # fmt: skip


@pytest.mark.slow
def test_effects_are_chosen_and_listed(browser, folder):
    with served(folder) as (address, _):
        page = ViewPage(browser, f"{address}#head=1.2&view=text&by=tokens&word=139")
        page.until("document.querySelector('#list tbody tr')")
        assert page.all("#measure option", "[e.value, e.hidden]") == [
            ["weight", False], ["value", False], ["effect", False],
        ]  # fmt: skip
        assert "likeliest next token" in page.run("return document.getElementById('measure').title")
        page.run(
            "const s = document.querySelector('#measure select'); s.value = 'effect';"
            "s.dispatchEvent(new Event('change'))"
        )
        page.until("document.querySelector('#list th:nth-child(3)').textContent === 'effect'")
        page.until("document.getElementById('shown').textContent.includes('effects kept')")
        edges = Recording.load(folder).effect(1, 2, [139])
        (key, shown), *_ = page.all(
            "#list tbody tr", "[Number(e.dataset.key), Number(e.cells[2].textContent)]"
        )
        assert key == int(edges.indices[0, 0])
        assert shown == pytest.approx(abs(float(edges.effects[0, 0])), rel=5e-3)
        assert "measure=effect" in page.run("return location.hash")
        page.press("m")
        page.exact()
        page.is_clean()
