"""Where words begin and end in any script: UAX #29 and the rules on top, cases and random texts."""

import random
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from unicode_segmentation_rs import graphemes

from regard.analysis.words import Words


def words_of(text, *tokens):
    """The words of `text` from tokens given as they stand in it."""
    offsets, at = [], 0
    for token in tokens:
        start = text.index(token, at)
        at = start + len(token)
        offsets.append((start, at))
    words = Words.split(text, list(tokens), offsets, [False] * len(tokens))
    return [word.text for word in words]


# explosion/spacymoji#9, #10: emoji at the edge of a word, and several in a row. A run of one sign
# is one word; a sequence joined by U+200D, a flag, or a skin tone stays whole.
@pytest.mark.parametrize(
    "text, tokens, right",
    [
        ("nice😄 day", ["nice", "😄", " day"], ["nice", "😄", "day"]),
        ("nice😄😄 day", ["nice", "😄", "😄", " day"], ["nice", "😄😄", "day"]),
        ("🎉done", ["🎉", "done"], ["🎉", "done"]),
        ("ok👋🏽", ["ok", "👋", "🏽"], ["ok", "👋🏽"]),
        ("👋👋🏽", ["👋", "👋", "🏽"], ["👋", "👋🏽"]),
        ("go🇩🇪🇫🇷", ["go", "🇩", "🇪", "🇫", "🇷"], ["go", "🇩🇪", "🇫🇷"]),
        ("us👨\u200d👩\u200d👧!", ["us", "👨", "\u200d", "👩", "\u200d", "👧", "!"],
         ["us", "👨\u200d👩\u200d👧", "!"]),
        ("a❤\ufe0fb", ["a", "❤", "\ufe0f", "b"], ["a", "❤\ufe0f", "b"]),
    ],
)  # fmt: skip
def test_emoji_stand_apart_from_words(text, tokens, right):
    assert words_of(text, *tokens) == right


# ku-nlp/jumanpp#116: scripts without spaces start a word at each token, never before a mark.
@pytest.mark.parametrize(
    "tokens, right",
    [
        (["ｱﾘ", "ﾊﾞﾊﾞ"], ["ｱﾘ", "ﾊﾞﾊﾞ"]),
        (["ｶ", "ﾌ", "ﾞ", "ｼｷ"], ["ｶ", "ﾌﾞ", "ｼｷ"]),
        (["アリ", "ババ"], ["アリ", "ババ"]),
        (["ラー", "メン"], ["ラー", "メン"]),
        (["ㄅㄆ", "ㄇㄈ"], ["ㄅㄆ", "ㄇㄈ"]),
        (["བོད་", "སྐད་"], ["བོད་", "སྐད་"]),
        (["អក្", "សរ"], ["អក្សរ"]),  # the second token begins inside a cluster
        (["អ", "ក្ស", "រ"], ["អ", "ក្ស", "រ"]),
        (["ประ", "เทศ", "ไทย"], ["ประ", "เทศ", "ไทย"]),
        (["ພາ", "ສາ"], ["ພາ", "ສາ"]),
        (["ꦲꦏ", "ꦱꦫ"], ["ꦲꦏ", "ꦱꦫ"]),
        (["日", "-", "本"], ["日", "-", "本"]),
        (["한국", "어"], ["한국어"]),  # Korean has spaces
    ],
)
def test_scripts_without_spaces_start_a_word_at_each_token(tokens, right):
    assert words_of("".join(tokens), *tokens) == right


@pytest.mark.parametrize(
    "tokens, right",
    [
        (["area", "(", "r", "):"], ["area", "(", "r", "):"]),
        (["area", "(", "r", ")", ":"], ["area", "(", "r", ")", ":"]),
        (["x", "[", "0", "]", "+=", "my", "_", "y", ";"], ["x", "[", "0", "]", "+=", "my_y", ";"]),
        (["if", " a", "!=", "b", "&&", "c"], ["if", "a", "!=", "b", "&&", "c"]),
        (["and", "/", "or"], ["and", "/", "or"]),
        (["10", ",", "000", ".", "5"], ["10,000.5"]),
        (["e", ".", "g", "."], ["e.g", "."]),
        (["state", "-", "of", "-", "the", "-", "art"], ["state-of-the-art"]),
        (["a", "-", "-", "b", "—", "c"], ["a", "--", "b", "—", "c"]),
        (["x", "=", "-", "1"], ["x", "=", "-", "1"]),
        (["€", "5", "'", "s"], ["€", "5", "'", "s"]),
    ],
)
def test_code_and_signs(tokens, right):
    assert words_of("".join(tokens), *tokens) == right


CHARS = [
    *"aZé1_²½ \n\u3000\u00a0.,:;'’\"-()+=€日本々かカーｶﾞㄅ་བོกาขអក្ꦲאب١\u0600한",
    *("\u0301", "\u200d", "\u00ad", "\u200b", "\ufe0f", "\u0915\u094d", "\u1112\u1161"),
    *("😄", "👋🏽", "👋", "🏽", "🇩🇪", "🇫", "👨\u200d👩\u200d👧", "❤\ufe0f", "©", "well-known "),
]


def random_text(draw):
    return "".join(draw.choices(CHARS, k=draw.randrange(1, 24)))


def assert_whole(text, words, count):
    """Tokens and characters are in one word each, and no word ends inside a cluster."""
    assert [i for word in words for i in word.tokens] == list(range(count))
    edges = {0}
    for cluster in graphemes(text, True):
        edges.add(max(edges) + len(cluster))
        if any(map(str.isspace, cluster)):  # whitespace is apart, whatever follows it
            edges |= set(range(max(edges) - len(cluster), max(edges)))
    reached = 0
    for word in words:
        assert text[reached : word.start].strip() == "", (text, words[:])
        assert word.start >= reached
        assert {word.start, word.end} <= edges, (text, words[:])
        reached = word.end
    assert text[reached:].strip() == ""


def test_random_tokens_are_words_without_a_gap():
    """Tokens that part characters anyhow, and bytes that share one."""
    draw = random.Random(0)
    for _ in range(3000):
        text = random_text(draw)
        cuts = sorted({0, len(text), *(draw.randrange(len(text)) for _ in range(len(text)))})
        offsets = []
        for start, end in pairwise(cuts):
            offsets += [(start, end)] * draw.choice([1, 1, 1, 3])
        words = Words.split(text, ["?"] * len(offsets), offsets, [False] * len(offsets))
        assert_whole(text, words, len(offsets))


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


@pytest.mark.parametrize("kind", [byte_level, unigram], ids=["byte-level BPE", "unigram"])
def test_random_texts_in_real_tokenizers(kind):
    draw = random.Random(1)
    tokenizer, trainer = kind()
    tokenizer.train_from_iterator([random_text(draw) for _ in range(500)], trainer)
    for _ in range(1000):
        text = random_text(draw)
        found = tokenizer.encode(text)
        words = Words.split(text, found.tokens, found.offsets, [False] * len(found))
        assert_whole(text, words, len(found))


def test_the_bytes_of_one_emoji_go_together():
    tokenizer, trainer = byte_level()
    tokenizer.train_from_iterator(["some words"], trainer)
    text = "ok👨\u200d👩\u200d👧 go🇩🇪🇫🇷"
    found = tokenizer.encode(text)
    words = Words.split(text, found.tokens, found.offsets, [False] * len(found))
    assert [word.text for word in words] == ["ok", "👨\u200d👩\u200d👧", "go", "🇩🇪", "🇫🇷"]
    assert words.sizes.tolist() == [2, 18, 3, 8, 8]
