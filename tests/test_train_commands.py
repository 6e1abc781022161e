"""`regard train`, `regard generate`, `regard translate`: from the command to what they print."""

from __future__ import annotations

import json

import pytest
import torch

for package in ("tokenizers", "click", "rich", "matplotlib"):
    pytest.importorskip(package, reason='needs pip install "regard[train]"')

from click.testing import CliRunner  # noqa: E402

from regard.cli import main  # noqa: E402
from regard.models import beam_search, generate  # noqa: E402
from regard.training import load_translator, load_writer  # noqa: E402

SMALL = ["--dim", "16", "--heads", "2", "--depth", "1", "--vocab", "300", "--steps", "10"]
NUMBERS = [(a, b) for a in range(9) for b in range(9)]
ENGLISH = [f"the {a} cats saw {b} dogs ." for a, b in NUMBERS]
FRENCH = [f"les {a} chats ont vu {b} chiens ." for a, b in NUMBERS]


def regard(*arguments, stdin=None):
    given = [str(one) for one in arguments]
    return CliRunner().invoke(main, given, prog_name="regard", input=stdin, env={"COLUMNS": "80"})


def printed(*arguments, stdin=None):
    done = regard(*arguments, stdin=stdin)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data; a folder of each kind of model, trained for ten steps from the command."""
    tmp = tmp_path_factory.mktemp("train")
    (tmp / "pairs").mkdir()
    for name, lines in {
        "pairs/train.en": ENGLISH, "pairs/train.fr": FRENCH, "short.fr": FRENCH[:-1],
        "text.txt": ENGLISH, "few.txt": ENGLISH[:2],
    }.items():  # fmt: skip
        (tmp / name).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    names = ("pairs", "text.txt", "tr", "lstm", "lm", "begun")
    at = {name: tmp / name for name in names} | {"tmp": tmp}
    at["begun"].mkdir()
    (at["begun"] / "run.json").write_text("{}")
    at["said"] = printed(
        "train", "translate", "--data", at["pairs"], "--out", at["tr"], "--batch", 256, *SMALL
    )
    printed("train", "translate", "--data", f"{tmp}/pairs/train.en,{tmp}/pairs/train.fr", "--out",
            at["lstm"], "--mixer", "lstm", "--json", *SMALL)  # fmt: skip
    at["lm_said"] = printed("train", "lm", "--data", at["text.txt"], "--out", at["lm"],
                            "--length", 16, "--batch", 2, "--json", *SMALL)  # fmt: skip
    return at


def test_a_trained_folder_says_what_it_is(places):
    assert places["said"].startswith(f"trained: {places['tr']}, 10 steps, ")
    said = json.loads(places["lm_said"])
    assert said == json.loads((places["lm"] / "run.json").read_text("utf-8"))
    assert said["result"]["steps"] == said["decided"]["steps"] == 10
    assert json.loads((places["lstm"] / "config.json").read_text())["cross"] == "bahdanau"


def test_the_same_command_again_changes_nothing(places):
    before = (places["tr"] / "model.safetensors").read_bytes()
    printed("train", "translate", "--data", places["pairs"], "--out", places["tr"], "--batch", 256,
            *SMALL)  # fmt: skip
    assert (places["tr"] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["tr", "lstm"])
def test_translate_prints_a_line_for_each(places, name):
    lines = [ENGLISH[7], "", "the cats .", ENGLISH[30]]
    (places["tmp"] / "lines").write_text("\n".join(lines) + "\n")
    model, tokenizer = load_translator(places[name])
    expected = []
    for line in lines:
        source = torch.tensor([tokenizer.encode(line).ids])
        found = beam_search(model, source, beams=2, cache=False)[0] if line else []
        expected.append(tokenizer.decode(found).strip())
    said = printed("translate", places[name], f"@{places['tmp']}/lines", "--beams", 2, "--json")
    pairs = json.loads(said)["translations"]
    assert [pair["source"] for pair in pairs] == lines
    assert [pair["target"] for pair in pairs] == expected
    assert len(set(expected)) > 1
    plain = printed("translate", places[name], "-", "--beams", 2, stdin="\n".join(lines))
    assert plain == "".join(f"{line}\n" for line in expected)


def test_generate_goes_on_with_the_text(places):
    model, tokenizer = load_writer(places["lm"])
    prompt = torch.tensor([tokenizer.encode("the 3 cats").ids])
    tokens = generate(model, prompt, 6, cache=False)[0, prompt.shape[1] :]
    asked = ("generate", places["lm"], "the 3 cats", "--count", 6)
    said = printed(*asked, "--temperature", 0)
    assert said == "the 3 cats" + tokenizer.decode(tokens.tolist()) + "\n"
    drawn = [json.loads(printed(*asked, "--top-k", 9, "--seed", s, "--json")) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0]["written"] != drawn[2]["written"]
    assert (drawn[0]["text"], drawn[0]["count"], drawn[0]["top_k"]) == ("the 3 cats", 6, 9)


@pytest.mark.parametrize("command", [["train"], ["train", "lm"], ["train", "translate"],
                                     ["generate"], ["translate"]], ids=" ".join)  # fmt: skip
def test_help_fits_the_screen(command):
    lines = printed(*command, "--help").splitlines()
    assert lines[0].startswith("Usage: regard " + " ".join(command))
    assert max(map(len, lines)) <= 80


TRAIN = ["train", "translate", "--data", "{pairs}", "--out", "{tmp}/new", *SMALL]
WRITE = ["train", "lm", "--data", "{text.txt}", "--out", "{tmp}/new", *SMALL, "--length", "16"]
WRONG = {
    "no data": ([*TRAIN[:2], "--out", "{tmp}/new"], "Missing option '--data'"),
    "missing data": ([*TRAIN, "--data", "{tmp}/none"], "cannot read {tmp}/none: No such file"),
    "a folder of none": (
        [*TRAIN, "--source", "de"],
        "{pairs} has no train.de and train.fr, and no .tsv or .zip",
    ),
    "unequal lines": (
        [*TRAIN, "--data", "{tmp}/pairs/train.en,{tmp}/short.fr"],
        "{tmp}/pairs/train.en has 81 lines, {tmp}/short.fr 80; parallel files have a sentence a l",
    ),
    "no table": ([*TRAIN, "--data", "{text.txt}"], "{text.txt} is no table: no line has two"),
    "mixer": ([*TRAIN, "--mixer", "mamba"], "mixer is 'mamba'; give softmax, window, linear"),
    "a mixer one way": ([*TRAIN, "--mixer", "delta"], "the mixer delta reads one way; an encoder"),
    "heads": ([*TRAIN, "--heads", "3"], "heads 3 do not divide dim 16"),
    "cross": ([*TRAIN, "--cross", "none"], "cross is 'none', which RecurrentTranslator takes"),
    "vocab": ([*TRAIN, "--vocab", "100"], "vocab is 100; bytes alone need 259"),
    "no steps": (
        [one for one in TRAIN if one not in ("--steps", "10")],
        "give steps or a budget in minutes, one of them",
    ),
    "both": ([*TRAIN, "--budget", "1"], "give steps or a budget in minutes, one of them"),
    "another run": (
        [*TRAIN, "--out", "{tr}", "--batch", "256", "--seed", "5"],
        "{tr} has a run with another plan; give the same, or another folder",
    ),
    "a run of another kind": (
        [*WRITE, "--out", "{tr}"], "{tr} has a run with another config, data, batch; give the",
    ),
    "out is a file": ([*TRAIN, "--out", "{text.txt}"], "{text.txt} is a file; give a folder"),
    "lm: missing data": ([*WRITE, "--data", "{tmp}/none"], "cannot read {tmp}/none: No such"),
    "lm: no texts": ([*WRITE, "--data", "{pairs}"], "{pairs} has no .txt or .raw files to read"),
    "lm: too short": ([*WRITE, "--data", "{tmp}/few.txt"], "the text has "),
    "lm: mixer": ([*WRITE, "--mixer", "mamba"], "mixer is 'mamba'; give softmax"),
    "translate: no folder": (["translate", "{tmp}/none", "a"], "{tmp}/none is no model: there is"),
    "translate: not over": (["translate", "{begun}", "a"], "{begun} is no model: its training is"),
    "translate: no model": (["translate", "{pairs}", "a"], "{pairs} is no model: it has no"),
    "translate: a language model": (
        ["translate", "{lm}", "a"], "{lm} is of kind lm, no translator: use regard generate",
    ),
    "translate: no text": (["translate", "{tr}", " "], "the text is empty"),
    "translate: no file": (["translate", "{tr}", "@{tmp}/none"], "cannot read the file"),
    "translate: beams": (["translate", "{tr}", "a", "--beams", "0"], "Invalid value for '--beams'"),
    "generate: a translator": (
        ["generate", "{tr}", "a"], "{tr} is a translator; it does not go on with a text",
    ),
    "generate: no text": (["generate", "{lm}", ""], "the text is empty"),
    "generate: temperature": (
        ["generate", "{lm}", "a", "--temperature", "-1"], "Invalid value for '--temperature'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("arguments, said", WRONG.values(), ids=WRONG)
def test_one_line_says_what_is_wrong(places, arguments, said):
    before = sorted(places["tmp"].rglob("*"))

    def filled(text):
        for name, path in places.items():
            text = text.replace(f"{{{name}}}", str(path))
        return text

    done = regard(*map(filled, arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert line.removeprefix("regard: ").startswith(filled(said)), line
    assert sorted(places["tmp"].rglob("*")) == before


def test_what_was_trained_can_be_looked_at(places):
    """By the command, with the model's own tokens."""
    found = json.loads(printed("look", ENGLISH[0], "--model", places["lm"], "--json"))
    assert found["model"] == "lm"
    assert found["links"]
    walked = printed("walk", ENGLISH[0], "--model", places["lm"], "--from", found["words"][1])
    assert walked.splitlines()[-1].startswith("✓")
