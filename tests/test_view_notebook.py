"""A recording in a notebook: what the widget answers, and its page in Chromium.

The kernel's side is the widget itself; the front end is anywidget's contract with a module, a model
with get, on, off and send, as JupyterLab and others give it.
"""

import base64
import json
import time

import pytest
import torch

pytest.importorskip("anywidget", reason='needs pip install "regard[notebook]"')
pytest.importorskip("selenium", reason='needs pip install "regard[dev]"')

from selenium.webdriver.support.wait import WebDriverWait

from regard.capture import recording as recordings
from regard.report.view import notebook
from regard.report.view.answers import Answers
from regard.report.view.notebook import RecordingWidget
from regard.report.view.opened import Opened
from regard.report.view.page_facts import SIDE
from viewing import recording

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class Sent:
    """A widget, and what it sends."""

    def __init__(self, made, monkeypatch):
        self.widget, self.messages = RecordingWidget(made), []
        monkeypatch.setattr(self.widget, "send", self.send)

    def send(self, content, buffers=None):
        self.messages.append((content, [bytes(buffer) for buffer in buffers or []]))

    def ask(self, number, path, **given):
        """All that is sent about a question, once its last message is."""
        self.widget._asked(None, {"id": number, "path": path, "given": given}, [])
        end = time.monotonic() + 120
        while not any(said["id"] == number and "more" not in said for said, _ in self.messages):
            assert time.monotonic() < end, f"{path} is not answered"
            time.sleep(0.005)  # a thread answers, and tells nobody
        return [message for message in self.messages if message[0]["id"] == number]


@pytest.fixture(scope="module")
def made():
    return recording(300)


@pytest.fixture
def sent(made, monkeypatch):
    return Sent(made, monkeypatch)


def test_it_answers_as_the_server_does(sent, made):
    answers = Answers([Opened.of(made)])
    for number, (path, given) in enumerate(
        [("about", {}), ("tokens", {"page": "0"}), ("overview", {"layer": "1"}),
         ("fan", {"layer": "0", "head": "1", "index": "40"})]
    ):  # fmt: skip
        ((said, buffers),) = sent.ask(number, path, **given)
        assert said == {"id": number, "answer": answers.answer(path, given)}
        assert buffers == []


def test_tiles_come_one_by_one(sent, made):
    *tiles, (last, _) = sent.ask(7, "tiles", layer=1, head=2, zoom=1, at="0.0,1.0")
    assert last == {"id": 7}
    found = torch.stack([torch.frombuffer(bytearray(b), dtype=torch.float32) for _, (b,) in tiles])
    expected = made.tiles(1, [(2, 1, 0, 0), (2, 1, 1, 0)], "sum")
    assert torch.equal(found.view(-1, SIDE, SIDE), expected)


def test_a_question_that_is_taken_back_is_answered_no_further(sent, monkeypatch):
    slow, tile = [], Opened.tile

    def dropping(self, *arguments):
        slow.append(arguments)
        sent.widget._asked(None, {"id": 1, "drop": True}, [])
        return tile(self, *arguments)

    monkeypatch.setattr(Opened, "tile", dropping)
    assert sent.ask(1, "tiles", layer=0, head=0, zoom=0, at="0.0,0.1,1.1") == [({"id": 1}, [])]
    assert len(slow) == 1


@pytest.mark.parametrize(
    "path, given, said",
    [
        ("fan", {"layer": "9", "head": "0", "index": "0"}, "no layer 9"),
        ("tiles", {"layer": "0", "head": "0", "zoom": "0", "at": "x"}, "places"),
        ("__init__", {}, "nothing is called"),
    ],
)
def test_a_wrong_question_gets_one_sentence(sent, path, given, said):
    ((message, _),) = sent.ask(3, path, **given)
    assert said in message["error"]
    assert "\n" not in message["error"]


@pytest.mark.parametrize("said", [None, "x", {}, {"id": "1"}, {"id": 1, "drop": True}])
def test_what_is_no_question_is_passed_over(sent, said):
    sent.widget._asked(None, said, [])
    assert sent.messages == []


def test_a_recording_shows_itself_where_the_extra_is_there(made, monkeypatch):
    data = made._repr_mimebundle_()
    assert WIDGET_VIEW in (data[0] if isinstance(data, tuple) else data)
    assert recordings.Recording([])._repr_mimebundle_() is None  # `_repr_html_` says so
    monkeypatch.setattr(recordings, "find_spec", lambda name: None)
    assert made._repr_mimebundle_() is None


FRONT_END = """
const [source, page] = arguments;
window.sent = [];
const model = { get: (name) => ({ page, height: 800 })[name],
  on: (name, heard) => (window.heard = heard), off: () => {},
  send: (said) => window.sent.push(said) };
document.body.replaceChildren();
import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))
  .then((module) => (window.gone = module.default.render({ model, el: document.body })));
"""

HEAR = """
for (const [said, texts] of arguments[0])
  window.heard(said, texts.map((text) => new DataView(
    Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer)));
"""


class Cell:
    """An output of a notebook in the browser, and the widget that answers it."""

    def __init__(self, browser, sent):
        self.browser, self.sent = browser, sent
        browser.get("about:blank")
        browser.get_log("browser")
        browser.execute_script(FRONT_END, notebook._file("notebook.js"), sent.widget.page)
        WebDriverWait(browser, 30).until(lambda b: b.find_elements("css selector", "iframe"))

    def inside(self, script):
        """What JavaScript in the frame gives."""
        self.browser.switch_to.frame(self.browser.find_element("css selector", "iframe"))
        try:
            return self.browser.execute_script(f"return {script}")
        finally:
            self.browser.switch_to.default_content()

    def until(self, script, seconds=30):
        """Carry messages to and fro until a condition holds in the frame."""
        ends = time.monotonic() + seconds
        while not self.inside(script):
            assert time.monotonic() < ends, (script, self.browser.get_log("browser"))
            for said in self.browser.execute_script("return window.sent.splice(0)"):
                self.sent.widget._asked(None, said, [])
            ready, self.sent.messages[:] = list(self.sent.messages), []
            coded = [[said, [base64.b64encode(b).decode() for b in buffers]]
                     for said, buffers in ready]  # fmt: skip
            self.browser.execute_script(HEAR, json.loads(json.dumps(coded)))
        return self


@pytest.mark.slow
def test_the_page_stands_in_a_cell(browser, sent, made):
    cell = Cell(browser, sent).until("'ready' in document.documentElement.dataset")
    cell.until("document.querySelector('.map-status')?.textContent.endsWith('exact')")
    cell.inside("document.querySelector(\"[data-head='1.2']\").click()")
    cell.inside("document.querySelector('[data-view=text]').click()")
    cell.until("document.querySelector(\".word[data-word='40']\")")
    cell.inside("document.querySelector(\".word[data-word='40']\").click()")
    cell.until("document.querySelector('#list tbody tr')")
    key = int(cell.inside("document.querySelector('#list tbody tr').dataset.key"))
    assert key == int(made.weights(1, 2)[40].argmax())
    shown = float(
        cell.inside(f"document.querySelector(\".word[data-word='{key}']\").dataset.weight")
    )
    assert shown == pytest.approx(float(made.weights(1, 2)[40, key]), rel=1e-4)
    assert cell.inside("document.getElementById('error').hidden")
    assert browser.get_log("browser") == []
    browser.execute_script("window.gone()")
    assert browser.execute_script("return document.querySelector('iframe')") is None


@pytest.mark.slow
def test_the_page_is_as_dark_as_the_notebook_around_it(browser, sent):
    say = "document.body.dataset.jpThemeLight = arguments[0]"
    cell = Cell(browser, sent).until("'ready' in document.documentElement.dataset")
    for light, ground in (("false", "rgb(23, 24, 27)"), ("true", "rgb(252, 251, 248)")):
        browser.execute_script(say, light)
        cell.until(f"getComputedStyle(document.body).backgroundColor === '{ground}'")
    cell.until("document.querySelector('.map-status')?.textContent.endsWith('exact')")
    browser.execute_script("window.gone()")
