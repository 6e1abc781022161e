"""Whatever is wrong with a command is one line that begins with what is wrong, and exit code 2."""

import json
from pathlib import Path

import pytest

for package in ("click", "transformers", "regard_minilm", "starlette"):
    pytest.importorskip(package, reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402

from regard.cli import main  # noqa: E402
from texts import ANIMAL, TROPHY  # noqa: E402
from viewing import recording  # noqa: E402

TIRED, WIDE = (
    f"The animal didn't cross the road because it was too {w}" for w in ("tired", "wide")
)
# {…}: what `places` writes
WRONG = {
    # usage
    "no text": (["look"], "Missing argument 'TEXT'; see regard look --help"),
    "no such option": (["look", "x", "--nope"], "No such option"),
    "no such command": (["looks"], "No such command 'looks'; see regard --help"),
    "out of range": (["look", "x", "--top", "0"], "Invalid value for '--top'"),
    "no number": (["look", "x", "--layer", "first"], "Invalid value for '--layer'"),
    "walk: nothing asked": (["walk", TROPHY], "Missing option '--from'; see regard walk"),
    # the text
    "a word that is not there": (
        ["look", TROPHY, "--from", "trophey"],
        "no word 'trophey' in the text; did you mean 'trophy'? its words: [CLS]",
    ),
    "a word that is there once": (
        ["look", TROPHY, "--from", "it#2"],
        "no word 'it#2': the text has 'it' once",
    ),
    "a word of signs": (["look", "a \x1b[31mb", "--from", "\x1b[31m"], r"no word '\x1b[31m' in"),
    "no text in it": (["look", ""], "the text is empty; there is nothing to look at"),
    "spaces": (["look", "   "], "the text is empty; there is nothing to look at"),
    "line ends": (["look", "\n\t"], "the text is empty; there is nothing to look at"),
    "too long": (
        ["look", "word " * 600],
        "the text has 602 tokens, but all-MiniLM-L6-v2 has positions for 512",
    ),
    "latin": (["look", "@{tmp}/latin"], "{tmp}/latin is not text: byte 3 is not UTF-8"),
    "binary": (["look", "@{tmp}/binary"], "{tmp}/binary is not text: it has a zero byte"),
    "empty file": (["look", "@{tmp}/empty"], "{tmp}/empty is empty"),
    "blank file": (["look", "@{tmp}/blank"], "{tmp}/blank is empty"),
    "no file": (["look", "@{tmp}/none"], "cannot read the file '{tmp}/none': No such file"),
    "a folder": (["look", "@{tmp}"], "cannot read the file '{tmp}': Is a directory"),
    "zero byte": (["look", "a\0b"], "the argument is not text: it has a zero byte"),
    # the model
    "no model folder": (["look", "a", "--model", "{tmp}/none"], "there is no model folder"),
    "no model in it": (["look", "a", "--model", "{tmp}/folder"],
        "{tmp}/folder is no model: the folder has no config.json",
    ),
    "a file for a model": (["look", "a", "--model", "{tmp}/model/config.json"],
        "{tmp}/model/config.json is a file; a model is a folder, or a name on the hub",
    ),
    "no weights": (["look", "a", "--model", "{tmp}/model"], "cannot load the model model: "),
    "not in the cache": (["look", "a", "--model", "nobody/nothing-of-this-name"],
        "no model nobody/nothing-of-this-name: it is not in the cache"
    ),
    "no name of a model": (
        ["look", "a", "--model", "model!"],
        "there is no model folder model!: a model is a folder, or a name on the hub",
    ),
    "a text for a model": (
        ["heads", "A cat sat."],
        "there is no model folder A cat sat.: a model is a folder, or a name on the hub; --help "
        "says where a text stands",
    ),
    "an encoder writes nothing": (
        ["look", "a", "--generate", "3"],
        "all-MiniLM-L6-v2 is an encoder: it generates no text",
    ),
    # layers and heads
    "layer": (["look", "a", "--layer", "6"], "no layer 6: the model has layers 0 to 5"),
    "layer below": (["look", "a", "--layer", "-1"], "no layer -1: the model has layers 0 to 5"),
    "head": (["look", "a", "--head", "12"], "no head 12: the layers have heads 0 to 11"),
    "no head": (
        ["look", "a", "--head", "x"], "--head 'x': give layer and head, as 3.1, or a head, as 1",
    ),
    "a head of no layer": (
        ["look", "a", "--head", "9.1"],
        "no layer 9: the model has layers 0 to 5",
    ),
    "no head of a layer": (
        ["look", "a", "--head", "3.12"], "no head 3.12: layer 3 has heads 0 to 11",
    ),
    "a head of another layer": (
        ["look", "a", "--head", "3.1", "--layer", "2"],
        "no head 3.1: layer 3 has heads 0 to 11, and is not among those shown",
    ),
    # versus, cut, files
    "no counterpart": (
        ["look", TIRED, "--versus", "Hello there", "--from", "it"],
        "the word 'it' has no counterpart",
    ),
    "versus nothing": (["look", TIRED, "--versus", " "], "the text is empty"),
    "versus, no word": (["look", TIRED, "--versus", WIDE, "--from", "dog"], "no word 'dog'"),
    "cut a layer": (["look", ANIMAL, "--cut", "9.1"], "--cut 9.1: the model has layers 0 to 5"),
    "cut a head": (["look", ANIMAL, "--cut", "3.12"], "--cut 3.12: the layer has heads 0 to 11"),
    "cut a word": (["look", ANIMAL, "--cut", "3.1: it→dog"], "no word 'dog'"),
    "cut half": (["look", ANIMAL, "--cut", "3.1: it"],
        "--cut '3.1: it': after the colon stands one word reading another",
    ),
    "a page": (["look", TROPHY, "--html", "{tmp}"], "{tmp} is a folder; --html writes a file"),
    "a page nowhere": (
        ["look", TROPHY, "--html", "{tmp}/none/x.html"], "there is no folder {tmp}/none to write x",
    ),
    "effects saved of two": (
        ["look", "a b", "--from", "a", "--from", "b", "--effect", "--save", "{tmp}/two"],
        "a recording keeps the effect on one target; give one --from",
    ),
    "record: --from alone": (
        ["record", "all-MiniLM-L6-v2", "a b", "{tmp}/new", "--from", "a"],
        "--from says what --effect is measured on; give both",
    ),
    "what of no export": (
        ["view", "{recording}", "--measure", "value"],
        "--measure says what --export writes; give both",
    ),
    "beams of nothing": (
        ["look", "a", "--beams", "2"],
        "beams are for what a model adds: let it generate some tokens, too",
    ),
    "record: beams of nothing": (
        ["record", "all-MiniLM-L6-v2", "a b", "{tmp}/new", "--beams", "2"],
        "beams are for what a model adds: let it generate some tokens, too",
    ),
    "record: effect of a continuation": (
        ["record", "all-MiniLM-L6-v2", "a b", "{tmp}/new", "--effect", "--generate", "2"],
        "--effect reads TEXT as it is; leave --generate out",
    ),
    "record: effect on no token": (
        ["record", "all-MiniLM-L6-v2", "a b", "{tmp}/new", "--effect"],
        "all-MiniLM-L6-v2 names no next token; say whose final vector: --from WORD",
    ),
    "record: effect on no word": (
        ["record", "all-MiniLM-L6-v2", "a b", "{tmp}/new", "--effect", "--from", "c"],
        "no word 'c'",
    ),
    "saved twice": (["look", TROPHY, "--save", "{recording}"], "{recording} is there already"),
    # walk
    "walk: no word": (["walk", TROPHY, "--from", "trophey"], "no word 'trophey'"),
    "walk: half a head": (
        ["walk", TROPHY, "--from", "it", "--head", "3."],
        "--head '3.': give layer and head, as 3.1, or a head, as 1",
    ),
    "walk: layer": (
        ["walk", TROPHY, "--from", "it", "--head", "6.1"],
        "no layer 6: the model has layers 0 to 5",
    ),
    "walk: head": (
        ["walk", TROPHY, "--from", "it", "--head", "3.12"], "no head 12: layer 3 has heads 0 to 11",
    ),
    "walk: a head of another layer": (
        ["walk", TROPHY, "--from", "it", "--head", "3.1", "--layer", "2"],
        "--head 3.1 is in layer 3, not in layer 2",
    ),
    "walk: no layer": (
        ["walk", TROPHY, "--from", "it", "--layer", "6"],
        "no layer 6: the model has layers 0 to 5",
    ),
    "walk: no such head": (
        ["walk", TROPHY, "--from", "it", "--head", "12"],
        "there is no head 12 with softmax attention in which the word reads",
    ),
    "walk: an encoder": (
        ["walk", TROPHY, "--from", "it", "--generate", "2"],
        "all-MiniLM-L6-v2 is an encoder: it generates no text",
    ),
    "walk: no decoder": (["walk", TROPHY, "--from", "it", "--target", "the"],
        "all-MiniLM-L6-v2 has no decoder apart, so there is no target to give it",
    ),
    "walk: no terminal": (
        ["walk", TROPHY, "--from", "it", "--step"],
        "--step waits for keys, so it",
    ),
    "walk: step in JSON": (["walk", TROPHY, "--from", "it", "--step", "--json"], "--step waits"),
    "walk: a page": (["walk", TROPHY, "--from", "it", "--html", "{tmp}"], "{tmp} is a folder"),
    "walk: nothing": (["walk", " ", "--from", "it"], "the text is empty"),
    "walk: target and generate": (
        ["walk", "it", "--model", "{t5}", "--from", "it", "--target", "a", "--generate", "2"],
        "give a target, or let the model generate: not both",
    ),
    "walk: the decoder has no such word": (
        ["walk", "the cat sat as it was big", "--model", "{t5}", "--from", "sat", "--head", "3.0",
         "--target", "the cat"], "no word 'sat' in the text",
    ),
    # heads, scan, view, bench
    "heads: no folder": (["heads", "{tmp}/nope"], "there is no model folder"),
    "heads: two texts": (
        ["heads", "{recording}", "--text", "a"],
        "a recording holds one text already",
    ),
    "heads: a corpus": (
        ["heads", "{recording}", "--conllu", "{tmp}/latin"], "a recording holds one text already",
    ),
    "heads: nothing": (["heads", "--text", " "], "the text is empty"),
    "heads: no file": (["heads", "--conllu", "{tmp}/none"], "cannot read the file"),
    "heads: a page": (
        ["heads", "{recording}", "--html", "{tmp}"],
        "{tmp} is a folder; --html writes a file",
    ),
    "scan: no file": (["scan", "all-MiniLM-L6-v2", "{tmp}/none.txt"], "cannot read the file"),
    "scan: bad line": (
        ["scan", "all-MiniLM-L6-v2", "{tmp}/bad.jsonl"],
        '{tmp}/bad.jsonl, line 1: give {{"text": "…"}} on each line',
    ),
    "scan: blank": (
        ["scan", "all-MiniLM-L6-v2", "{tmp}/blank.txt"],
        "{tmp}/blank.txt has no text that",
    ),
    "scan: out is a file": (
        ["scan", "all-MiniLM-L6-v2", "{tmp}/corpus.txt", "--out", "{tmp}/corpus.txt"],
        "cannot use the folder",
    ),
    "view: no folder": (["view", "{tmp}/absent"], "{tmp}/absent is not a whole recording"),
    "view: no recording": (["view", "{tmp}/folder"], "{tmp}/folder is not a whole recording"),
    "view: a file": (["view", "{tmp}/latin"], "{tmp}/latin is not a whole recording"),
    "view: second": (
        ["view", "{recording}", "{tmp}/absent"], "{tmp}/absent is not a whole recording"
    ),
    "view: port": (["view", "{recording}", "--port", "70000"], "Invalid value for '--port'"),
    "view: nothing": (["view"], "Missing argument"),
    "bench: suite": (
        ["bench", "nope"],
        "no suite is named 'nope'; there are prefill, causal, gqa, ",
    ),
    "bench: only": (
        ["bench", "--only", "x"], "no shape matches 'x'; regard bench --list shows all",
    ),
    "bench: engine": (
        ["bench", "--engine", "fast"], "no engine is named 'fast'; there are auto, ",
    ),
    "bench: out": (
        ["bench", "--out", "{tmp}/none/b.md"],
        "cannot write {tmp}/none/b.md: {tmp}/none is not a folder to write to",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, folders) -> dict[str, Path]:
    """Files that are no text, folders that are no model, a recording."""
    tmp = tmp_path_factory.mktemp("wrong")
    for name, data in {
        "latin": b"caf\xe9", "binary": b"a\x00b", "empty": b"", "blank": b" \n",
        "blank.txt": b"\n\n", "bad.jsonl": b'{"text": 3}\n', "corpus.txt": b"A cat sat.\n",
    }.items():  # fmt: skip
        (tmp / name).write_bytes(data)
    (tmp / "folder").mkdir()
    (tmp / "model").mkdir()
    (tmp / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    recording(20).save(tmp / "recording")
    return {"tmp": tmp, "t5": folders / "t5", "recording": tmp / "recording"}


@pytest.mark.parametrize("arguments, said", WRONG.values(), ids=WRONG)
def test_one_line_says_what_is_wrong(places, arguments, said):
    before = sorted(places["tmp"].rglob("*"))
    arguments = [a.format(**places) if a.startswith(("{", "@{")) else a for a in arguments]
    # What a terminal sets for bench; its process would be started again without it
    done = CliRunner().invoke(
        main, arguments, prog_name="regard", env={"OMP_PROC_BIND": "true", "COLUMNS": "80"}
    )
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.isprintable()
    assert "[Errno" not in line
    assert line.removeprefix("regard: ").startswith(said.format(**places)), line
    assert sorted(places["tmp"].rglob("*")) == before
