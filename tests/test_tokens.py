"""--tokens: tokens instead of words, wherever words are; and tokens that have no characters."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")

from click.testing import CliRunner

from regard.analysis.text_model import TextModel, load
from regard.analysis.words import Words
from regard.cli import main

TEXT = "He was unbelievably tired"
PIECES = ["[CLS]", "He", "was", "un", "bel", "ie", "va", "bly", "tired", "[SEP]"]


def run(command, *arguments):
    done = CliRunner().invoke(main, [command, TEXT, "--tokens", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def answered(command, *arguments):
    return json.loads(run(command, *arguments, "--json"))


def test_look_lists_tokens():
    found = answered("look", "--from", "bel")
    assert found["words"] == PIECES
    assert {link["from"] for link in found["links"]} == {"bel"}
    assert "unbelievably" not in run("look").split("\n\n", 1)[1]
    assert "bel reads" in run("look", "--from", "bel")


@pytest.mark.sample(0)
@pytest.mark.parametrize(
    "asked, key", [(("--cut", "3.1: bel->un"), "cut"), (("--effect", "--from", "bel"), "effect")]
)
def test_what_is_asked_is_of_tokens(asked, key):
    found = answered("look", *asked)[key]
    words = [word["word"] for word in found["words"]] if key == "cut" else [found[0]["word"]]
    assert set(words) <= set(PIECES)
    assert "bel" in words


def test_versus_aligns_tokens():
    (found,) = answered("look", "--from", "bel", "--versus", TEXT.replace("tired", "untired"))[
        "versus"
    ]
    assert found["words"][0] == PIECES
    assert found["words"][1][8:] == ["un", "ti", "red", "[SEP]"]


def test_another_model_s_tokens_are_tokens_too(folders):
    found = answered("look", "--versus-model", folders / "gpt2")
    assert len(found["versus"][0]["words"][1]) > len(TEXT.split())


def test_generated_tokens_are_tokens(folders):
    words = answered("look", "--model", folders / "gpt2", "--generate", 6)["words"]
    plain = answered("look", "--model", folders / "gpt2")["words"]
    assert len(words) == len(plain) + 6


def test_the_page_has_tokens(tmp_path):
    assert run("look", "--html", tmp_path / "page") == f"page: {tmp_path / 'page'}\n"
    page = (tmp_path / "page").read_text("utf-8")
    assert '"bel"' in page
    assert '"unbelievably"' not in page


def test_walk_names_tokens(tmp_path):
    found = answered("walk", "--from", "bel", "--head", "3.1")
    assert found["token"]["word"] == "bel"
    assert "un[bel]ievably" in run("walk", "--from", "bel")
    assert run("walk", "--from", "bel", "--html", tmp_path / "page").startswith("page: ")


def test_bytes_of_one_character_are_named_by_their_tokens():
    """The first has the character; the text is told once."""
    text, tokens = "a👍", ["a", "ð", "Ł", "ĳ"]
    words = Words.single(text, tokens, [(0, 1), (1, 2), (1, 2), (1, 2)], [False] * 4)
    assert [word.text for word in words] == ["a", "👍", "Ł", "ĳ"]
    assert [(word.start, word.end) for word in words] == [(0, 1), (1, 2), (2, 2), (2, 2)]


class Unplaced:
    """A tokenizer that says where tokens begin but not where they end (tokenizers #1553)."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        batch = self.tokenizer(*arguments, **options)
        batch["offset_mapping"] = [(start, start) for start, _ in batch["offset_mapping"]]
        return batch


@pytest.mark.parametrize("text", ["The cat sat, didn't it?", "ok👍🏽 日本\n\nend ", "  x"])
def test_empty_offsets_fall_back_to_decoding(text, folders):
    reader = load(str(folders / "gpt2"))
    right = reader.encode(text)
    reader.tokenizer = Unplaced(reader.tokenizer)
    ours = reader.encode(text)
    assert ours.text == text
    assert ours.offsets == right.offsets
    assert ours.special == right.special


def test_what_a_tokenizer_changed_is_shown_as_it_reads_it():
    reader = load()
    reader.tokenizer = Unplaced(reader.tokenizer)
    found = reader.encode("The TROPHY, unbelievably!")
    words = [word.text for word in Words.of(found.about())]
    assert words == ["[CLS]", "the", "trophy", ",", "unbelievably", "!", "[SEP]"]
    assert isinstance(reader, TextModel)
