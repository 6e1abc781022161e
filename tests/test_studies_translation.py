"""`regard study translation`: BLEU by length, what cross-attention links, several translators."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")
pytest.importorskip("matplotlib")

import torch
from click.testing import CliRunner

from regard.cli import main
from regard.lab.studies import translation
from regard.lab.studies.alignment import LINKINGS, linked
from regard.lab.studies.cross_attention import KEYS, heads_of, joined, word_tables
from regard.lab.training.tokenizer import save_tokenizer
from regard.models import ModelConfig, RecurrentTranslator, Translator
from regard.nn.models.saved import save_model
from regard.training import train_tokenizer

PAIRS = [
    ("A man rides.", "Un homme roule."),
    ("The cat sat on the mat.", "Le chat était assis sur le tapis."),
    ("Two dogs run over the green grass and a child looks on.", "Deux chiens courent."),
    ("A child.", "Un enfant."),
]
KINDS = {
    "softmax": (Translator, {}),
    "seeing": (RecurrentTranslator, {"mixer": "lstm", "cross": "bahdanau"}),
    "blind": (RecurrentTranslator, {"mixer": "lstm", "cross": "none"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Translators that were never trained, a test set, and alignments that people did not make."""
    made = tmp_path_factory.mktemp("translation")
    tokenizer = train_tokenizer((side for pair in PAIRS for side in pair), 290, ends=True)
    for name, (kind, choices) in KINDS.items():
        torch.manual_seed(0)
        config = ModelConfig(
            vocab=tokenizer.get_vocab_size(), dim=16, heads=2, depth=2, pad=0, bos=1, eos=2,
            **choices,
        )  # fmt: skip
        save_model(kind(config), made / name)
        save_tokenizer(tokenizer, made / name)
    data = made / "data"
    (data / "multi30k").mkdir(parents=True)
    for language, lines in zip(("en", "fr"), zip(*PAIRS, strict=True), strict=True):
        text = "".join(f"{line}\n" for line in lines)
        (data / f"multi30k/test_2016_flickr.{language}").write_text(text, "utf-8")
    (data / "alignment").mkdir()
    (data / "alignment/enfr.src-tgt").write_text("the cat sat ||| le chat dort\n" * 4, "utf-8")
    (data / "alignment/enfr.gold").write_text("1-1 2-2 3p3\n" * 4, "utf-8")
    return made


@pytest.fixture
def small(monkeypatch):
    """Full runs of so few sentences as there are."""
    sizes = dict(translation.STUDY.full) | {"pairs": 4, "beams": 2}
    monkeypatch.setattr(translation, "STUDY", replace(translation.STUDY, full=sizes))


def invoke(folder, *names):
    given = [part for name in names for part in ("--translator", folder / name)]
    arguments = ["study", "translation", "--data", folder / "data", "--json", *given]
    return CliRunner().invoke(main, [str(part) for part in arguments])


def test_several_translators_stand_side_by_side(folder, small):
    done = invoke(folder, *KINDS)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["columns"] == ["measure", *KINDS]
    rows = {row[0]: row[1:] for row in found["rows"]}
    assert rows["parameters"][0] > 0
    assert [x is None for x in rows["BLEU, 13 to 15 words"]] == [True] * 3  # there are none
    parts = (*KEYS, *LINKINGS, "layer 0's mean", "mean of all layers")
    for key in (f"AER, {key}" for key in parts):
        seen = rows[key]
        assert all(0 <= x <= 100 for x in seen[:2])
        assert seen[2] is None  # it has no attention
    assert rows["AER, layer 1's mean"][1:] == [None, None]
    assert "nrefs:1|case:mixed" in found["notes"][0]
    ends = " ".join(f" --translator {name}" for name in KINDS).replace("  ", " ")
    assert found["command"].endswith(f"--data ../shared/data{ends}")
    claims = [one["claim"] for one in found["verdicts"]]
    assert any(
        claim.startswith("without attention a recurrent translator loses") for claim in claims
    )
    assert any(claim.startswith("a transformer translates better") for claim in claims)


def test_only_runs_of_the_same_budget_are_compared(folder, small):
    try:
        for name, steps in (("softmax", 7), ("seeing", 5), ("blind", 5)):
            run = {"asked": {"batch": 9, "data": ["a"]}, "decided": {"steps": steps}}
            (folder / name / "run.json").write_text(json.dumps(run))
        found = json.loads(invoke(folder, *KINDS).stdout)
        rows = {row[0]: row[1:] for row in found["rows"]}
        assert rows["steps of training"] == [7, 5, 5]
        claims = " ".join(one["claim"] for one in found["verdicts"])
        assert "a transformer translates better" not in claims
        assert "translates better with attention than without" in claims
    finally:
        for name in KINDS:
            (folder / name / "run.json").unlink()


def test_one_translator_alone(folder, small):
    for name in ("blind", "seeing"):
        found = json.loads(invoke(folder, name).stdout)
        assert found["columns"] == ["measure", name]
        aligns = [one for one in found["verdicts"] if "diagonal" in one["claim"]]
        assert len(aligns) == (name == "seeing")


def test_what_is_no_translator_is_said_in_a_sentence(folder, small):
    done = invoke(folder, "data")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "has no config.json to read" in done.stderr


def test_the_head_and_the_way_to_read_are_chosen_on_one_half_alone(folder, small):
    found = json.loads(invoke(folder, "softmax").stdout)["more"]["translators"][0]
    assert {way.split()[-1] for way in found["alignment"]["output weight"]["ways"]} == {*LINKINGS}
    for one in found["alignment"].values():
        place = one["chosen_on"].index(min(one["chosen_on"]))
        assert one["ways"][place] == one["chosen"]
        assert one["reported_on"][place] == one["aer"][0]


@pytest.mark.parametrize("name", ["softmax", "seeing"])
def test_words_get_what_their_tokens_get_where_they_are_read(folder, name):
    """Against sums by hand: a row of `output` writes the word, that of `input` has read it."""
    from regard.training import load_translator

    model, tokenizer = load_translator(folder / name)
    source, target = ["the", "mat", "."], ["le", "tapis", "."]
    tables = word_tables(model, tokenizer, source, target)
    read, written = (tokenizer.encode(text) for text in ("The mat.", "Le tapis."))
    cells = dict.fromkeys(
        [(where, j, i) for where in (0, 1) for j in range(3) for i in range(3)], 0
    )
    ids = torch.tensor([read.ids])
    before = torch.tensor([[1, *written.ids]])[:, : len(written.ids)]
    with torch.no_grad():
        if name == "seeing":
            weights = model(before, ids, return_weights=True)[1][0]
        else:
            from regard import Rows

            seen = model(before, ids, observe=[Rows(range(before.shape[1]))])[1]
            weights = seen.decoder[1].cross[0].weights[0, 1]
    starts = {"the": 0, "mat": 3, ".": 7}, {"le": 0, "tapis": 2, ".": 8}

    def word(offsets, places):
        inside = [n for n, start in enumerate(places.values()) if start < offsets[1]]
        return inside[-1] if offsets[0] < offsets[1] else None

    for row in range(before.shape[1]):
        for column, weight in enumerate(weights[row].tolist()):
            i = word(read.offsets[column], starts[0])
            for where in (0, 1):
                j = word(written.offsets[row - where], starts[1]) if row >= where else None
                if i is not None and j is not None:
                    cells[where, j, i] += weight
    head = heads_of(model).index("1.1" if name == "softmax" else "0.0")
    for where, key in enumerate(("output weight", "input weight")):
        for j in range(3):
            expected = [cells[where, j, i] for i in range(3)]
            assert tables[key][head, j].tolist() == pytest.approx(expected, abs=1e-6)
            totals = [sum(cells[where, k, i] for k in range(3)) for i in range(3)]
            shares = [one / total for one, total in zip(expected, totals, strict=True)]
            given = tables[key.replace("weight", "share")][head, j]
            assert given.tolist() == pytest.approx(shares, abs=1e-5)


def test_links_of_one_table_by_hand():
    """Source words 0 … 3, target words 0 … 3; argmax links 0, 1 and 2 both ways but for 1."""
    found = linked([0, 0, 2, 2], [0, 2, 2, 3])
    assert found["argmax"] == {(0, 0), (0, 1), (2, 2), (2, 3)}
    assert found["mutual"] == {(0, 0), (2, 2)}
    # (0, 1) lies beside (0, 0), (1, 2) and (2, 3) beside (2, 2); (3, 3), beside (2, 3), comes last
    assert found["grow-diag"] == {(0, 0), (2, 2), (0, 1), (1, 2), (2, 3), (3, 3)}
    # (0, 3) lies beside no link; (1, 0) lies beside one, and all its words have links
    far = linked([0, 1, 2, 0], [0, 0, 2])
    assert far["mutual"] == {(0, 0), (2, 2)}
    assert far["grow-diag"] == {(0, 0), (2, 2), (1, 0), (1, 1)}


def test_a_norm_is_the_length_of_what_a_head_adds(folder):
    """Weight times norm is ‖W_O (weight · v)‖, of each head by itself."""
    from regard.lab.studies.cross_attention import _norms
    from regard.training import load_translator

    model, _ = load_translator(folder / "softmax")
    attention = model.decoder.blocks[0].cross_attention
    memory = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norms = _norms(attention, memory)
        value = attention.remember(memory).value[0]
        for head in range(2):
            alone = torch.zeros(4, 16)
            alone[:, 8 * head : 8 * head + 8] = value[head]
            added = alone @ attention.out_proj.weight.T
            assert norms[head].tolist() == pytest.approx(added.norm(dim=-1).tolist(), rel=1e-5)


def test_words_are_joined_as_they_are_written():
    text, ends = joined(["the", "cat", ",", "me", "and", "a", "mat", "."])
    assert text == "The cat, me and a mat."
    assert [text[:end] for end in ends] == [
        "The", "The cat", "The cat,", "The cat, me", "The cat, me and", "The cat, me and a",
        "The cat, me and a mat", "The cat, me and a mat.",
    ]  # fmt: skip
    text, ends = joined(["je", "ne", "ai", "que", "le", "eau", "et", "la", "mer", "."], french=True)
    assert text == "Je n'ai que l'eau et la mer."
    assert [text[:end] for end in ends][1:6] == [
        "Je n'", "Je n'ai", "Je n'ai que", "Je n'ai que l'", "Je n'ai que l'eau",
    ]  # fmt: skip


def test_bleu_is_sacrebleus_and_lengths_part_all_sources():
    score, signature = translation._bleu(["a b c d e"], ["a b c d e"])
    assert score == pytest.approx(100)
    assert "tok:13a" in signature
    sources = ["w " * n for n in (1, 9, 10, 12, 13, 15, 16, 19, 20, 40)]
    assert translation._buckets(sources) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
