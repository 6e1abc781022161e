"""What `regard look` prints, and the pieces it is printed with."""

import json
import os
import re
import subprocess
import sys

import pytest

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from rich.cells import cell_len  # noqa: E402

from regard.analysis.look import look  # noqa: E402
from regard.analysis.text_model import load  # noqa: E402
from regard.report import first_screen  # noqa: E402
from regard.report import look_terminal as terminal  # noqa: E402
from regard.report.look_json import as_dict, as_json  # noqa: E402
from regard.report.screen import Bit, bar, clean, fit, grid, wrapped  # noqa: E402
from test_look import printed, run  # noqa: E402
from texts import CAT, HOSTILE, TROPHY  # noqa: E402


def test_the_page_for_a_word():
    page = printed(TROPHY, "--from", "it")
    lines = page.splitlines()
    assert lines[0] == "The trophy didn't fit in the suitcase because [it] was too big."
    assert lines[1].startswith("░░░ ▓▓▓▓▓▓ ")
    assert lines[2] == "all-MiniLM-L6-v2 · 6 layers × 12 heads · where heads read, not why"
    assert re.search(r"^trophy +█+ +0\.089 +14 % +3\.1 +0\.58 +4\.3 +0\.41", page, re.M)
    assert re.search(r"^\[CLS\] +sink +0\.340", page, re.M)
    assert "shown 86 % of the mass" in page
    assert "it → trophy, %" in page
    layers = [line.split() for line in lines if line.startswith("layer ")]
    assert [row[:2] for row in layers] == [["layer", str(i)] for i in range(6)]
    assert [len(row) for row in layers] == [14] * 6
    assert layers[3][3] == "58"
    assert "word weight: sum over its tokens, mean over the reading word's tokens" in page
    rule = "sink: a word whose column mean in a head, over the 17 queries here, is above 0.3"
    assert rule in page.replace("\n", " ")


def test_the_page_without_a_word():
    page = printed(TROPHY)
    assert re.search(r"^it → big +█.* 2\.1 +0\.81 +2\.8 +0\.64 +2\.3 +0\.57$", page, re.M)
    assert re.search(r"^\[CLS\] +43\.6 % +special token, sink in 54 of 72 heads$", page, re.M)
    assert "shown 1.3 % of the mass of all heads and words" in page
    assert sum(line.startswith("layer ") for line in page.splitlines()) == 6


@pytest.mark.sample(1)
@pytest.mark.parametrize("width", [40, 60, 79, 80, 200])
@pytest.mark.parametrize("arguments", [(), ("--from", "it"), ("--from", "The", "--layer", "5")])
def test_the_page_fits(width, arguments):
    page = printed(TROPHY, *arguments, width=width)
    apart = [line for line in page.splitlines() if line.startswith("to ")]  # as many as fit
    assert page.count("…") == sum(line.endswith("…") for line in apart) or width < 80


@pytest.mark.sample(1)
@pytest.mark.parametrize("arguments", [(), ("--from", "end"), ("--from", "it")])
@pytest.mark.parametrize("colour", [False, True])
def test_hostile_text_is_shown_not_obeyed(arguments, colour):
    env = {"FORCE_COLOR": "1"} if colour else {"NO_COLOR": "1"}
    result = run(HOSTILE, *arguments, COLUMNS="80", **env)
    assert result.exit_code == 0
    page = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout) if colour else result.stdout
    assert "\x1b[31m" not in result.stdout
    assert all(char.isprintable() or char in "\n\u200d" for char in page)
    assert "[red]fox[/red]" in page
    assert max(map(cell_len, page.splitlines())) <= 80
    answer = run(HOSTILE, *arguments, "--json").stdout
    assert answer.strip().isprintable()
    assert any("\u202c" in word for word in json.loads(answer)["words"])


def test_colour_needs_no_marks():
    page = run(TROPHY, "--from", "it", FORCE_COLOR="1", COLUMNS="80").stdout
    assert "▓" not in page
    assert "\x1b[" in page
    assert "\x1b[" not in printed(TROPHY, "--from", "it")


def test_a_long_text_is_cut_around_the_word():
    text = " ".join(f"The fox number {i} jumped over it." for i in range(45))
    page = printed(text, "--from", "it#40")
    head = page.split("all-MiniLM")[0]
    assert "[it]" in head
    assert head.startswith("… ")
    assert len([line for line in head.splitlines() if not set(line) <= set(" ░▒▓")]) <= 12


@pytest.mark.slow
def test_what_the_output_cannot_encode_is_replaced():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "regard.cli", "look", "naïve it → 👍", "--from", "it"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"na?ve" in done.stdout
    assert b"####" in done.stdout


@pytest.mark.slow
def test_it_runs_as_a_command():
    """A process of its own, piped: nothing of other libraries on either stream."""
    done = subprocess.run(
        [sys.executable, "-m", "regard.cli", "look", TROPHY, "--from", "it"],
        capture_output=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"},
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.decode() == printed(TROPHY, "--from", "it")


def test_the_default_model_opens_no_connection(monkeypatch):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert load().name == "all-MiniLM-L6-v2"


def test_clean():
    assert clean("a\x1b[0m\x07\x9b\u202eb\u200dc\u2028") == "a␛[0m␇�b\u200dc�"


def test_fit():
    assert fit("ab", 4) == "ab  "
    assert fit("ab", 4, right=True) == "  ab"
    assert fit("abcdef", 4) == "abc…"
    assert fit("日本語", 5) == "日本…"
    assert fit("日本語", 4) == "日… "


def test_bar():
    assert bar(0.5, 4) == "██  "
    assert bar(1, 2) == "██"
    assert bar(7, 2) == "██"
    assert bar(0.5, 2, ascii_only=True) == "# "
    assert cell_len(bar(0.33, 7)) == 7


def test_wrapped_breaks_at_spaces_and_marks_below():
    bits = [Bit("one"), Bit(" "), Bit("(", 0), Bit("two", 3), Bit(")"), Bit(" "), Bit("x" * 12, 1)]
    lines = [line.plain for line in wrapped(bits, 8, colour=False)]
    assert lines == ["one", "(two)", " ▓▓▓", "xxxxxxxx", "░░░░░░░░", "xxxx", "░░░░"]
    assert [line.plain for line in wrapped(bits, 80, colour=True)] == ["one (two) " + "x" * 12]


@pytest.mark.parametrize("heads", [1, 12, 17, 18, 32, 64, 100])
def test_grid_fits_every_number_of_heads(heads):
    cells = {(layer, head): head / heads for layer in range(3) for head in range(heads)}
    lines = [line.plain for line in grid(cells, "title, %", 80, blanks=[1])]
    assert max(map(cell_len, lines)) <= 80
    assert sum("layer 0" in line for line in lines) == (2 if heads == 100 else 1)
    assert any(line == "layer 1  no pattern" for line in lines)


def test_json_escapes_what_a_terminal_obeys(minilm):
    found = look(minilm.record("a \x1b[31m \x7f\u202e\U000e0041 é"), readers=["é"])
    line = as_json(found)
    assert line.isprintable()
    assert json.loads(line) == as_dict(found)
    assert "é" in line
    assert as_json(found, ascii_only=True).isascii()


@pytest.mark.sample(1)
@pytest.mark.parametrize("width", [60, 76, 80, 100])
@pytest.mark.parametrize("asked", [["--from", "it"], []], ids=["a word", "the whole"])
def test_labels_of_layers_and_heads_from_10_on_stand_apart(monkeypatch, asked, width):
    for module in (terminal, first_screen):
        monkeypatch.setattr(module, "head_label", lambda layer, head: f"{layer + 10}.{head + 10}")
    shown = printed(CAT, *asked, width=width)
    assert re.search(r"\b1\d\.1\d\b", shown)
    assert not re.search(r"\b1\d\.1\d\d", shown)
