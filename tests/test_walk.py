"""`regard walk`: each number against eager attention and the model itself; hostile text; errors."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402
from rich.cells import cell_len  # noqa: E402
from rich.console import Console  # noqa: E402

import zoo  # noqa: E402
from regard.analysis.text_model import TextModel, load  # noqa: E402
from regard.analysis.walk import walk  # noqa: E402
from regard.cli import main  # noqa: E402
from regard.errors import RegardError  # noqa: E402
from regard.report.walk_html import walk_html  # noqa: E402
from regard.report.walk_steps import as_dict, as_json  # noqa: E402
from regard.report.walk_terminal import print_walk, vector  # noqa: E402
from small_tokenizers import byte_tokenizer, piece_tokenizer  # noqa: E402
from texts import HOSTILE, TROPHY  # noqa: E402

SHORT = "the cat sat as it was big"


def run(*arguments, **env):
    result = CliRunner().invoke(main, ["walk", *map(str, arguments)], env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments, width=80, **env):
    result = run(*arguments, COLUMNS=str(width), **env)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= 50
    return result.stdout


def ids_of(found):
    return torch.tensor([[token.id for token in side.tokens] for side in [found.reader]])


def assert_follows(found):
    """Each step follows from the one before, and the checks of its end hold."""
    w = found.weighing
    shown = w.visible
    near = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(w.dots, found.keys @ found.query, **near)
    torch.testing.assert_close(w.scaled, w.dots * w.scale, **near)
    scores = w.scaled if w.capped is None else w.softcap * (w.scaled / w.softcap).tanh()
    scores = scores if w.bias is None else scores + w.bias
    torch.testing.assert_close(w.scores[shown], scores[shown], **near)
    assert (w.scores[~shown] == -torch.inf).all()
    torch.testing.assert_close(w.exps, (w.scores - w.shift).exp(), **near)
    assert float(w.exps.sum()) + w.sink_exp == pytest.approx(w.total)
    torch.testing.assert_close(w.weights, w.exps / w.total, **near)
    assert float(w.weights.sum()) + w.sink_weight == pytest.approx(1)
    torch.testing.assert_close(found.mixed, w.weights @ found.values, **near)
    whole = found.written.sum(0) + (0 if found.bias is None else found.bias)
    torch.testing.assert_close(found.attended, whole, **near)
    assert float(found.shares.sum()) == pytest.approx(1)
    assert [check.what for check in found.checks if not check.fine] == []


def assert_eager(found, reader, inputs):
    """The weights are eager attention's."""
    exact = zoo.eager_attentions(reader.model.base_model, inputs)[found.module].exact[
        0, found.head, found.at
    ]
    torch.testing.assert_close(found.weighing.weights.float(), exact, rtol=0, atol=1e-4)


# The numbers


@pytest.mark.parametrize("word, head", [("it", (3, 1)), ("it", (0, 2)), ("suitcase", (5, 11))])
def test_minilm(minilm, word, head):
    found = walk(minilm, TROPHY, word, head=head)
    assert_follows(found)
    assert {check.what for check in found.checks} == {"weights", "head", "output"}
    inputs = {"input_ids": ids_of(found)}
    assert_eager(found, minilm, inputs)
    # From the model's own layers, without regard
    model = minilm.model
    layer = model.encoder.layer[head[0]]
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        x = states[head[0]][0].double()
        own = layer.attention.self
        part = slice(32 * head[1], 32 * head[1] + 32)
        query, key, value = (
            x @ p.weight.double()[part].mT + p.bias.double()[part]
            for p in (own.query, own.key, own.value)
        )
        dots = key @ query[found.at]
        mixed = (dots / 32**0.5).softmax(0) @ value
    close = dict(rtol=0, atol=1e-4)
    torch.testing.assert_close(found.x, x[found.at], **close)
    torch.testing.assert_close(found.query, query[found.at], **close)
    torch.testing.assert_close(found.weighing.dots, dots, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.mixed, mixed, **close)
    torch.testing.assert_close(found.entered, states[0][0, found.at].double(), **close)
    handed = states[head[0] + 1][0, found.at].double()
    torch.testing.assert_close(found.handed, handed, **close)
    assert [part.kind for part in found.embedded] == ["word", "position", "type"]
    assert [part.row for part in found.embedded] == [found.token.id, found.at, 0]
    assert found.normed
    torch.testing.assert_close(found.residual, found.x + found.attended, **close)


def test_minimind(shared):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no shared/models/minimind2-small")
    reader = load(str(folder), generate=True)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for head in (0, 0), (3, 1), (7, 6):
        found = walk(reader, prompt, "capital", head=head)
        assert_follows(found)
        assert_eager(found, reader, {"input_ids": ids_of(found), "use_cache": False})
        assert int((~found.weighing.visible).sum()) == len(found.source.tokens) - found.at - 1
        assert found.rotary
        assert found.token.piece.startswith("…")
    later = walk(reader, prompt, "capital#2", head=(3, 1), generate=12)
    assert_follows(later)
    assert_eager(later, reader, {"input_ids": ids_of(later), "use_cache": False})


@pytest.mark.parametrize("layer", range(6))
def test_t5_with_cross_attention(folders, layer):
    reader = load(str(folders / "t5"))
    found = walk(
        reader, TROPHY, "it" if layer < 2 else "cat", head=(layer, 2), target="the cat was"
    )
    assert_follows(found)
    assert found.kind == ("encoder" if layer < 2 else "decoder" if layer % 2 == 0 else "cross")
    decoder = walk(reader, TROPHY, "cat", head=(3, 0), target="the cat was").reader
    said = [token.id for token in decoder.tokens]
    assert said[0] == 0  # the decoder's start, and no end
    assert reader.tokenizer.eos_token_id not in said
    inputs = {"input_ids": torch.tensor([reader.encode(TROPHY).ids])}
    assert_eager(found, reader, inputs | {"decoder_input_ids": torch.tensor([said])})
    assert found.weighing.scale == 1
    assert (found.weighing.bias is None) == (found.kind == "cross")


def test_t5_words_that_it_generated(folders):
    reader = load(str(folders / "t5"), generate=True)
    word = walk(reader, TROPHY, "<pad>", head=(3, 1), generate=4).reader.tokens[1].word
    found = walk(reader, TROPHY, word, head=(5, 3), generate=4)
    assert found.kind == "cross"
    assert found.source.text == TROPHY
    assert_follows(found)
    page = printed(
        TROPHY, "--model", folders / "t5", "--from", word, "--head", "5.3", "--generate", 4
    )
    assert "encoder's words" in " ".join(page.split())


TEXT = [f for f in zoo.FAMILIES if f.inputs in (zoo.encoder, zoo.decoder, zoo.seq2seq)]
GATED = zoo.HYBRIDS[-1]


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("family", [*TEXT, *zoo.UNUSUAL, GATED], ids=str)
def test_every_family(family):
    """Rotations, windows, soft caps, sinks, gates, shared layers, torch's own calls."""
    arguments = family.arguments | {"vocab_size": 400}
    if family is GATED:
        arguments = zoo.DECODER | arguments
    model = zoo.seeded(lambda: family.model(family.settings(**arguments)))
    seq2seq = model.config.is_encoder_decoder
    kind = "encoder-decoder" if seq2seq else "causal" if "LM" in type(model).__name__ else "encoder"
    tokenizer = piece_tokenizer() if seq2seq else byte_tokenizer()
    reader = TextModel("random", model, tokenizer, kind)
    target = "the cat was big" if seq2seq else None
    last = 5 if seq2seq else 1
    found = walk(reader, SHORT, "was#2" if seq2seq else "was", head=(last, 1), target=target)
    assert_follows(found)
    assert found.kind == ("cross" if seq2seq else "self")
    assert found.scaled == (family is GATED)
    name = str(family)
    assert (found.weighing.sink is not None) == (name == "gpt-oss")
    assert (found.weighing.softcap is not None) == (name == "Gemma 2")
    assert found.embedded[0].row == found.token.id
    assert found.residual is not None or name in ("Gemma 2", "Gemma 3", "Falcon")
    if name not in ("ALBERT", "Falcon"):
        text = torch.tensor([reader.encode(SHORT).ids])
        inputs = {"input_ids": text}
        if seq2seq:
            inputs["decoder_input_ids"] = ids_of(found)
        assert_eager(found, reader, inputs)
    assert len(as_dict(found, 3)["read"]) == 3
    assert 'class="bad"' not in walk_html(found)


def test_half_precision(minilm):
    """bfloat16 rounds by its own measure."""
    half = transformers.AutoModel.from_pretrained(
        minilm.model.name_or_path, dtype=torch.bfloat16
    ).eval()
    found = walk(TextModel("half", half, minilm.tokenizer, "encoder"), TROPHY, "it", head=(3, 1))
    assert [check.fine for check in found.checks] == [True] * 3


def test_a_check_that_does_not_hold_is_said(minilm, monkeypatch):
    """A W_O that is not the model's."""
    import regard.analysis.walk as module

    right = module.output_projection

    def wrong(*arguments):
        return right(*arguments) * 1.01

    monkeypatch.setattr(module, "output_projection", wrong)
    with pytest.raises(StopIteration):  # it is no module's weight
        walk(minilm, TROPHY, "it", head=(3, 1))
    monkeypatch.undo()
    monkeypatch.setattr(module, "_ROUNDINGS", 0)
    assert not all(check.fine for check in walk(minilm, TROPHY, "it", head=(3, 1)).checks)
    result = run(TROPHY, "--from", "it", "--head", "3.1")
    assert result.exit_code == 1
    assert "but off by" in result.stdout


def test_nothing_stays_on_the_model(minilm):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in minilm.model.modules())
    walk(minilm, TROPHY, "it", head=(3, 1))
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in minilm.model.modules())
    assert after == hooks


# Which head, which word


def test_the_head_that_is_chosen(minilm):
    found = walk(minilm, TROPHY, "it")
    recording = minilm.record(TROPHY)
    special = torch.tensor([token.special for token in found.source.tokens])
    special[found.at] = True
    best = max(
        float(recording.weights(i, rows=[found.at])[:, 0].masked_fill(special, 0).max())
        for i in range(6)
    )
    assert found.chosen[1] == pytest.approx(best)
    target = next(i for i, t in enumerate(found.source.tokens) if t.word == found.chosen[0])
    assert float(found.weighing.weights[target]) == pytest.approx(best, abs=1e-4)
    page = printed(TROPHY, "--from", "it")
    assert f"head {found.layer}.{found.head}: of all heads the strongest link from it" in page
    assert walk(minilm, TROPHY, "it", head=(3, 1)).chosen is None


def test_a_word_of_several_tokens_walks_its_last(minilm):
    text = "unbelievably well-known trophies"
    found = walk(minilm, text, "unbelievably", head=(2, 3))
    word = found.reader.words[found.word]
    assert len(word.tokens) > 1
    assert found.at == word.tokens[-1]
    page = " ".join(printed(text, "--from", "unbelievably", "--head", "2.3").split())
    assert f"unbelievably has {len(word.tokens)} tokens; the last, …" in page


def test_the_second_of_two(minilm):
    text = "it was as big as it was"
    assert walk(minilm, text, "it#2", head=(1, 1)).at == 6
    assert "it#2 is token 6 of 9" in printed(text, "--from", "it#2", "--head", "1.1")


# The pages


def test_the_page_says_what_json_says():
    arguments = (TROPHY, "--from", "it", "--head", "3.1")
    page = printed(*arguments)
    found = json.loads(run(*arguments, "--json").stdout)
    table = re.findall(r"^  (\S+) +([\d.]+) +([\d.]+) +([\d.]+) +(0\.\d+) █", page, re.M)
    assert [row[0] for row in table] == ["trophy", "suitcase"]
    for row, said in zip(table, found["read"], strict=False):
        numbers = [said["dot"], said["scaled"], said["exp"]]
        assert [float(x) for x in row[1:4]] == pytest.approx(numbers, abs=0.0051)
        assert float(row[4]) == pytest.approx(said["weight"], abs=0.00051)
    assert re.search(r"^  sum +182\.15 +1\.000 ✓$", page, re.M)
    assert found["weight_sum"] == pytest.approx(1)
    assert sum(found["weights"]) == pytest.approx(1, abs=1e-5)
    assert page.count("✓") == 4
    assert [float(f"{x:.2f}") for x in found["mixed"][:3]] == [0.32, -0.49, 0.12]
    assert [c["agrees"] for c in found["checks"]] == [True] * 3


def test_it_waits_between_steps(minilm):
    """Before each step but the first, and before the check."""
    console = Console(file=io.StringIO(), width=80)
    seen = []

    def pause():
        text = console.file.getvalue()
        seen.append(re.findall(r"^(\d) ", text, re.M)[-1])

    print_walk(walk(minilm, TROPHY, "it", head=(3, 1)), console, pause=pause)
    assert seen == list("1234567")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits_the_screen(width):
    page = printed(TROPHY, "--from", "it", "--head", "3.1", width=width)
    assert len(page.splitlines()) <= (46 if width < 80 else 40)
    assert all(f"\n{n} " in page for n in range(1, 8))


@pytest.mark.slow
def test_colour_and_ascii():
    plain = printed(TROPHY, "--from", "it", "--head", "3.1")
    assert "\x1b" not in plain
    done = subprocess.run(
        [sys.executable, "-m", "regard.cli", "walk", TROPHY, "--from", "it", "--head", "3.1"],
        capture_output=True,
        check=True,
        env={"PYTHONIOENCODING": "ascii", "COLUMNS": "80", "PATH": ""},
    )
    assert done.stderr == b""
    assert b"/sqrt32" in done.stdout
    assert done.stdout.count(b"?") == 0


def test_masked_words_and_a_learned_sink():
    family = next(f for f in zoo.FAMILIES if f.name == "gpt-oss")
    config = family.settings(**family.arguments | {"vocab_size": 400})
    reader = TextModel("r", zoo.seeded(lambda: family.model(config)), byte_tokenizer(), "causal")
    page = walk_html(walk(reader, SHORT, "it", head=(1, 0)))
    assert "masked" in page
    assert "learned sink" in page
    assert "rotates query and key" in page


class Markup(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]


def test_hostile_text_is_shown_and_not_obeyed(minilm, tmp_path):
    text = HOSTILE + ' <script>alert(1)</script> <img src=x onerror="alert(2)"> &amp; </style>'
    plain, hostile = (walk(minilm, t, "end", head=(0, 0)) for t in ("the end", text))
    tags = [Markup(walk_html(found, 40)).tags for found in (plain, hostile)]
    assert set(tags[1]) == set(tags[0])
    assert tags[1].count("script") == 1
    page = walk_html(hostile, 40)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert "&lt;" in page
    shown = printed(text, "--from", "end", "--head", "0.0", "--top", 5)
    assert all(line.isprintable() or "\u200d" in line for line in shown.splitlines())
    assert as_json(hostile, 40).isprintable()


def test_the_page_needs_nothing_but_itself(tmp_path):
    target = tmp_path / "walk.html"
    result = run(TROPHY, "--from", "it", "--head", "3.1", "--html", target)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"page: {target}\n", "")
    page = target.read_text("utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["walk.html"]
    names = {(tag, name) for tag, name, _ in Markup(page).attributes}
    assert not {name for _, name in names} & {"src", "href", "style", "onclick", "action"}
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|url\(|@import", page)
    for said in ("26.37", "105.85", "0.581", "÷√32", "1.000", "within"):
        assert said in page


def test_vector():
    numbers = torch.tensor([0.25, -0.5, 0.125])
    assert vector(numbers, 40) == "[ 0.250 -0.500  0.125]"
    assert vector(numbers, 18) == "[ 0.250 -0.500 …]"
    assert vector(numbers * 100, 40) == "[ 25.00 -50.00  12.50]"
    assert vector(numbers[:0], 10) == "[]"


# What it refuses


def test_a_layer_without_a_pattern():
    model = zoo.HYBRIDS[0].build()
    model.resize_token_embeddings(400)
    with pytest.raises(RegardError, match="has no pattern"):
        walk(TextModel("r", model, byte_tokenizer(), "causal"), SHORT, "it", head=(0, 0))
