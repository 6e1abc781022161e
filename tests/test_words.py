"""Words from tokens, and word weights by tile against the whole map in float64."""

import pytest
import torch

import regard
from regard.analysis import words as words_module
from regard.analysis.words import Word, Words, columns, find, from_word, label


def split(text, *tokens, special=(), cuts=()):
    """Words of `text` from tokens given as they stand in it; None: a token without characters."""
    offsets, at = [], 0
    for token in tokens:
        at = at if token is None else text.index(token, at)
        offsets.append((at, at + len(token or "")))
        at += len(token or "")
    names = [token or "<s>" for token in tokens]
    marks = [i in special for i in range(len(tokens))]
    return Words.split(text, names, offsets, marks, cuts)


def texts(words):
    return [word.text for word in words]


CASES = [
    (
        "The trophy didn't fit, did it?",
        ["The", " tro", "phy", " didn", "'t", " fit", ",", " did", " it", "?"],
        ["The", "trophy", "didn't", "fit", ",", "did", "it", "?"],
    ),
    (
        'He said: "(well-known)."',
        ["He", "said", ":", '"', "(", "well", "-", "known", ")", ".", '"'],
        ["He", "said", ":", '"', "(", "well-known", ")", ".", '"'],
    ),
    ("Wait... what?!", ["Wait", "..", ".", " what", "?", "!"], ["Wait", "...", "what", "?", "!"]),
    ("big).", ["big", ")."], ["big", ")."]),  # one token over two signs joins them
    ("of the road", ["of the", " road"], ["of the", "road"]),  # nor are words split
    ("--", ["-", "-"], ["--"]),
    ("Über naïve", ["Ü", "ber", " na", "ï", "ve"], ["Über", "naïve"]),
    ("你好。世界 ok", ["你好", "。", "世", "界", " ok"], ["你好", "。", "世", "界", "ok"]),
    ("ที่นี่", ["ท", "ี่", "นี่"], ["ที่", "นี่"]),  # never before a combining mark
    ("a\n\nb\tc", ["a", "\n\n", "b", "\t", "c"], ["a", "\n\n", "b", "\t", "c"]),
    ("a  b", ["a", " ", " b"], ["a", " ", "b"]),
    ("a b", ["a", " ", "b"], ["a", "b"]),  # SentencePiece's ▁ may stand alone
    ("x ", ["x", " "], ["x", " "]),
    ("a \x00 b", ["a", "b"], ["a", "b"]),  # no token, no word
    ("   ", ["   "], ["   "]),
    ("", [], []),
]


@pytest.mark.parametrize("text, tokens, expected", CASES, ids=lambda case: repr(case)[:30])
def test_split(text, tokens, expected):
    words = split(text, *tokens)
    assert texts(words) == expected
    assert words.of_token.tolist() == sorted(words.of_token.tolist())
    assert [i for word in words for i in word.tokens] == list(range(len(tokens)))
    assert all(text[word.start : word.end] == word.text for word in words)


def test_special_tokens_are_words_of_their_own():
    text = "<|user|>hi there<|end|>"
    words = split(text, None, "<|user|>", "hi", " there", "<|end|>", special=(0, 1, 4))
    assert texts(words) == ["<s>", "<|user|>", "hi", "there", "<|end|>"]
    assert [word.special for word in words] == [True, True, False, False, True]


def test_bytes_of_one_character_are_one_word():
    offsets = [(0, 2), (2, 4), (4, 5), (4, 5), (4, 5), (5, 6), (5, 6)]
    words = Words.split("hi a👍\N{NO-BREAK SPACE}", ["?"] * 7, offsets, [False] * 7)
    assert texts(words) == ["hi", "a", "👍", "\N{NO-BREAK SPACE}"]
    assert words.sizes.tolist() == [1, 1, 3, 2]


def test_tokens_without_characters_join_the_next_word():
    offsets = [(0, 0), (0, 2), (3, 3), (3, 5), (5, 5)]
    words = Words.split("ab cd", ["▁", "ab", "▁", "cd", "?"], offsets, [False] * 5)
    assert texts(words) == ["ab", "cd", "?"]
    assert words.sizes.tolist() == [2, 2, 1]


def test_cuts_start_a_word():
    assert texts(split("suit", "su", "it", cuts=[2])) == ["su", "it"]
    assert texts(split("big...", "big", ".", "..", cuts=[4])) == ["big", ".", ".."]


def test_a_long_text_is_split_in_linear_time():
    text = "word, " * 20_000
    tokens = [part for i in range(20_000) for part in ((6 * i, 6 * i + 4), (6 * i + 4, 6 * i + 5))]
    words = Words.split(text, ["?"] * len(tokens), tokens, [False] * len(tokens))
    assert len(words) == 40_000


def test_lengths_must_agree():
    with pytest.raises(regard.RegardError, match="equally long; they are 1, 2 and 1"):
        Words.split("ab", ["ab"], [(0, 1), (1, 2)], [False])


def test_find():
    tokens = ["It", "is", ",", "it", "was", ";", "IT", "it's", "it"]
    words = split("It is, it was; IT it's it", *tokens)
    assert find(words, "it") == (3, 1, 2)
    assert find(words, "it#2") == (8, 2, 2)
    assert find(words, "It") == (0, 1, 1)
    assert find(words, "WAS") == (4, 1, 1)
    assert find(words, ";").number == 5
    with pytest.raises(regard.RegardError, match="no word 'it#3': the text has 'it' 2 times"):
        find(words, "it#3")
    with pytest.raises(regard.RegardError, match=r"no word 'wass' in the text; did you mean 'was'"):
        find(words, "wass")
    assert label(words) == ["It", "is", ",", "it", "was", ";", "IT", "it's", "it#2"]
    assert [find(words, name).number for name in label(words)] == list(range(9))


def test_find_a_word_with_a_hash():
    words = split("a#2 a a", "a#2", "a", "a")
    assert find(words, "a#2").number == 0


def test_find_shortens_the_list():
    words = split(" ".join(f"w{i}" for i in range(40)), *(f"w{i}" for i in range(40)))
    with pytest.raises(regard.RegardError, match=r"w11 and 28 more$"):
        find(words, "none")


# Weights


class Recorded:
    """A recording with given weights, (heads, n, n)."""

    def __init__(self, weights):
        self.layers = [self]
        self.map = weights
        self.name = "layer"
        self.heads, self.q_len, self.k_len = weights.shape

    def weights(self, layer, head=None, rows=None, cols=None, batch=0):
        return self.map[:, rows].clone()


def example(n=41, heads=3, causal=False):
    """A map, and words of 1 to 3 tokens, some of them special."""
    generator = torch.Generator().manual_seed(n)
    scores = 3 * torch.randn(heads, n, n, generator=generator)
    if causal:
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    words, at = [], 0
    while at < n:
        size = min(1 + len(words) % 3, n - at)
        special = len(words) % 7 == 0
        words.append(Word(f"w{len(words)}", at, at + size, range(at, at + size), special))
        at += size
    return Recorded(scores.softmax(-1)), Words(words)


def whole(recorded, words):
    """The word map in float64: (heads, words, words)."""
    weights = recorded.map.double()
    summed = torch.stack([weights[:, :, w.tokens].sum(-1) for w in words], -1)
    return torch.stack([summed[:, w.tokens].mean(1) for w in words], 1)


@pytest.fixture(params=[1 << 22, 300, 1], ids=["one tile", "tiles", "a row a tile"])
def tile(request, monkeypatch):
    monkeypatch.setattr(words_module, "_TILE", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_from_word(heads):
    recorded, words = example()
    exact = whole(recorded, words)[heads or slice(None)]
    for i, word in enumerate(words):
        ours = from_word(recorded, 0, word, words, heads)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact[:, i], atol=1e-6, rtol=0)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("causal", [False, True])
def test_columns(causal):
    recorded, words = example(causal=causal)
    steps = []
    ours = columns(recorded, 0, words, step=steps.append)
    seen = torch.arange(41, 0, -1) if causal else torch.full((41,), 41)
    means = recorded.map.double().sum(1) / seen
    best = torch.stack([means[:, w.tokens].amax(-1) for w in words], -1)
    torch.testing.assert_close(ours.means.double(), best, atol=1e-6, rtol=0)
    received = torch.stack([recorded.map[:, :, w.tokens].sum((1, 2)) / 41 for w in words], -1)
    torch.testing.assert_close(ours.received, received, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.received.sum(1), torch.ones(3), atol=1e-5, rtol=0)
    assert sum(steps) == 41


def test_sinks_need_a_mean_above_the_bound_of_queries_enough():
    words = Words([Word(str(i), i, i + 1, range(i, i + 1)) for i in range(20)])
    itself = torch.eye(20)[None].repeat(2, 1, 1)
    itself[0, 1:] *= 0.5
    itself[0, 1:, 0] = 0.5  # head 0, causal: half of every row goes to the first key
    sinks = columns(Recorded(itself), 0, words).sinks
    assert sinks[0, 0]
    assert columns(Recorded(itself), 0, words).means[0, 0] == pytest.approx(10.5 / 20)
    fading = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    sinks = columns(Recorded(fading[None]), 0, words).sinks
    assert not sinks.any()  # the last keys, seen by few, count for nothing


def test_a_long_word_is_no_sink_for_its_length():
    words = Words([Word("long", 0, 9, range(9)), Word("b", 9, 10, range(9, 20))])
    assert not columns(Recorded(torch.full((1, 20, 20), 1 / 20)), 0, words).sinks.any()


def test_words_of_another_text_are_refused():
    recorded, words = example()
    with pytest.raises(regard.RegardError, match="reads 41 keys, but the words have 2 tokens"):
        from_word(recorded, 0, words[0], split("a b", "a", "b"))
