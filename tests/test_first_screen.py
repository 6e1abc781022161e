"""What `regard look` says of a whole text: pairs of words, behaviours of heads, sinks, hints."""

import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from rich.cells import cell_len

from regard.analysis import summary, tables
from regard.analysis.function_words import is_content
from regard.analysis.look import look
from regard.analysis.words import Word
from regard.report.look_json import as_dict
from test_look import answered, printed
from texts import CAT, TROPHY

PLACES = {"previous": -1, "self": 0, "next": 1}
TEXT = "[CLS] whales and dogs swim in the sea because it calls the dogs home [SEP]"


class Given:
    """A recording of given weights (layers, heads, n, n), of words of one token each."""

    def __init__(self, text, weights):
        spans = [match.span() for match in re.finditer(r"\S+", text)]
        tokens = [text[start:end] for start, end in spans]
        special = [token.startswith("[") for token in tokens]
        self.about = {"text": text, "tokens": tokens, "offsets": spans, "special": special}
        self.of_layers = weights
        self.layers = [
            SimpleNamespace(
                name=f"layer.{i}", heads=of.shape[0], q_len=of.shape[1], k_len=of.shape[2],
                pattern=True, kind="self", reason="",
            )
            for i, of in enumerate(weights)
        ]  # fmt: skip

    def weights(self, layer, rows):
        return self.of_layers[layer][:, rows].clone()


def noise(layers, heads, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(layers, heads, n, n, generator=generator)).softmax(-1)


def behaving():
    """Two layers of six heads; five of them do one thing with 0.7 of their mass or more."""
    n = len(TEXT.split())
    weights = noise(2, 6, n)
    for (layer, head), of in {(0, 1): -1, (1, 4): 0, (1, 2): 1}.items():
        for i in range(n):
            row = weights[layer, head, i]
            row *= 0.3
            row[min(max(i + of, 0), n - 1)] += 0.7
    weights[0, 3] *= 0.2
    weights[0, 3, :, 0] += 0.8
    weights[1, 0] *= 0.25
    weights[1, 0, :, n - 1] += 0.75
    return weights


@pytest.fixture(params=[1 << 22, 100, 1], ids=["one block", "blocks", "a word a block"])
def tile(request, monkeypatch):
    monkeypatch.setattr(tables, "_TILE", request.param)


@pytest.mark.usefixtures("tile")
def test_heads_that_read_one_place_are_known():
    found = look(Given(TEXT, behaving()))
    assert {b.place: [head[:2] for head in b.heads] for b in found.summary.behaviours} == {
        "previous": [(0, 1)], "self": [(1, 4)], "next": [(1, 2)], "first": [(0, 3)],
        "separator": [(1, 0)],
    }  # fmt: skip
    weights, words = behaving(), [i for i, w in enumerate(found.words) if not w.special]
    for behaviour in found.summary.behaviours:
        (layer, head, mean), at = behaviour.heads[0], PLACES.get(behaviour.place)
        places = {i: i + at for i in words} if at is not None else dict.fromkeys(
            words, 0 if behaviour.place == "first" else len(found.words) - 1
        )  # fmt: skip
        if at:
            places = {i: j for i, j in places.items() if j in words}
        exact = torch.stack([weights[layer, head, i, j] for i, j in places.items()]).double()
        assert mean == pytest.approx(float(exact.mean()), abs=1e-6)
        assert behaviour.readers == len(places)
    known = {(h["layer"], h["head"]): h["behaviour"] for h in as_dict(found)["heads"]}
    assert known[0, 1] == "previous"
    assert sum(value is not None for value in known.values()) == 5


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("top", [1, 3, 8])
def test_pairs_are_the_strongest_but_for_what_behaviours_explain(top):
    weights = behaving()
    found = look(Given(TEXT, weights), top=top)
    words, part = found.words, found.parts[0]
    best = {"content": {}, "function": {}, "neighbour": {}}
    for row, (layer, head) in enumerate(part.heads):
        if (layer, head) in {(0, 1), (1, 4), (1, 2)}:
            continue
        for i, reader in enumerate(words):
            for j, read in enumerate(words):
                if i == j or reader.special or read.special or part.sinks[row, j]:
                    continue
                kind = "content" if is_content(read) else "function"
                kind = "neighbour" if abs(i - j) == 1 else kind
                links = best[kind].setdefault((reader.text, read.text), {})
                links.setdefault((i, j), []).append(float(weights[layer, head, i, j]))
    for kind, pairs in found.summary.kinds.items():
        exact = [max(links.items(), key=lambda link: max(link[1])) for links in best[kind].values()]
        exact = sorted(exact, key=lambda link: -max(link[1]))[:top]
        assert [(pair.source, pair.target) for pair in pairs] == [places for places, _ in exact]
        for pair, (_, of_heads) in zip(pairs, exact, strict=True):
            ours = [link.weight for link in pair.heads]
            assert ours == pytest.approx(sorted(of_heads, reverse=True)[:3], abs=1e-6)


@pytest.mark.usefixtures("tile")
def test_links_are_the_strongest_of_all_heads():
    weights = behaving()
    found = look(Given(TEXT, weights), top=6)
    words, part = found.words, found.parts[0]
    links = [
        (float(weights[layer, head, i, j]), layer, head, i, j)
        for row, (layer, head) in enumerate(part.heads)
        for i, reader in enumerate(words)
        for j, read in enumerate(words)
        if not (i == j or reader.special or read.special or part.sinks[row, j])
    ]
    for ours, beside in ((found.summary.near, True), (found.summary.far, False)):
        best = sorted((x for x in links if (abs(x[3] - x[4]) == 1) is beside), reverse=True)[:6]
        assert [link[:4] for link in ours] == [link[1:] for link in best]
        assert [link.weight for link in ours] == pytest.approx([link[0] for link in best], abs=1e-6)


def test_a_head_on_the_first_word_is_no_link_to_it():
    """Where no sink is named, a head that parks on the first word would fill the list."""
    weights = noise(1, 2, 6)
    weights[0, 0] *= 0.1
    weights[0, 0, :, 0] += 0.9
    found = look(Given("whales eat fish near cold rivers", weights))
    assert not found.parts[0].sinks.any()
    assert [b.place for b in found.summary.behaviours] == ["first"]
    links = [link for pairs in found.summary.kinds.values() for p in pairs for link in p.heads]
    assert all(link.head == 1 or link.target != 0 for link in links)
    assert any(link.head == 0 for link in links)


@pytest.mark.parametrize("n", [1, 3, 7, 8, 9])
def test_no_sink_is_named_on_fewer_than_eight_queries(n):
    weights = torch.zeros(1, 1, n, n)
    weights[..., 0] = 1
    found = look(Given(" ".join(f"word{i}" for i in range(n)), weights))
    (head,) = as_dict(found)["heads"]
    sinks = [{"word": "word0", "index": 0, "weight": 1.0, "queries": n}]
    assert head["sinks"] == (sinks if n >= 8 else [])


def test_few_words_show_no_behaviour():
    assert summary.LEAST_READERS == 4
    for n, known in ((3, []), (5, ["previous"])):
        weights = torch.eye(n).roll(-1, 1)[None, None]
        found = look(Given(" ".join(f"word{i}" for i in range(n)), weights))
        assert [b.place for b in found.summary.behaviours] == known


def test_content_words():
    said = "The whale, whose 3 calves DON’T swim , … it can't 鲸 it's [SEP]"
    words = [Word(w, 0, 0, range(1), w.startswith("[")) for w in said.split()]
    assert [word.text for word in words if is_content(word)] == [
        "whale,", "3", "calves", "swim", "鲸",
    ]  # fmt: skip


# On the terminal


def test_the_point_of_the_sentence_is_on_the_first_screen():
    lines = printed(TROPHY).splitlines()
    screen = "\n".join(lines[:24])
    assert re.search(r"^it → trophy +█+▌? +3\.1 +0\.58 +4\.3 +0\.41", screen, re.M)
    assert re.search(r"^word before +0\.2 0\.9\d$", screen, re.M)
    assert len(re.findall(r"\b0\.2\b(?! *\d*[.]?\d* %)", screen)) == 1  # one fact, once
    assert re.search(r"^to neighbours +in → fit ", screen, re.M)
    assert re.search(r"^to function words +too → because ", screen, re.M)
    assert re.search(r"^the first: \[CLS\] +4\.5 0\.81 .* and \d+ more$", screen, re.M)
    assert "over the 17 queries here, is above 0.3" in " ".join(lines)
    assert any(line.startswith("3.1: layer 3, head 1;") for line in lines)


def test_the_hints_can_be_followed():
    page = printed(TROPHY)
    (word,) = re.findall(r"^--from (\S+) ", page, re.M)
    assert is_content(Word(word, 0, 0, range(1)))
    assert answered(TROPHY, "--from", word)["links"]
    assert re.search(rf"^regard walk TEXT --from {word} --head \d+\.\d+ ", page, re.M)
    assert "--versus" in page
    assert "--html" in page


@pytest.mark.parametrize("width", [40, 59, 60, 80, 100])
@pytest.mark.parametrize("text", [CAT, "Hello", "奖杯放不进手提箱，因为它太大了。", "... !!"])
def test_it_fits_any_text(text, width):
    page = printed(text, width=width)
    assert max(map(cell_len, page.splitlines())) <= width
    assert page.rstrip().splitlines()[-1].startswith("regard walk TEXT --from ")
    if text == "Hello":
        assert "no links between words" in page
        assert "none is named on a mean of 3 queries" in page.replace("\n", " ")


def test_a_word_with_signs_is_quoted_for_the_shell():
    text = "John's dog's bone isn't Mary's cat's bone and o'clock $HOME `ls`"
    words = re.findall(r"^--from (.+?)(?:  .*)?$", printed(text), re.M)
    assert words[0].isalnum() or words[0].startswith("'")
