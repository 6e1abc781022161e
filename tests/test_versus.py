"""--versus: words aligned, heads compared one by one, and which of them flip."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner
from rich.cells import cell_len

from regard import RegardError
from regard.analysis.compare import Pair, Reading, align, compare, counterpart
from regard.analysis.words import Word
from regard.cli import main

TIRED = "The animal didn't cross the road because it was tired"
WIDE = "The animal didn't cross the road because it was wide"
BIG = "The trophy didn't fit in the suitcase because it was too big."
SMALL = "The trophy didn't fit in the suitcase because it was too small."
HOSTILE = "The \x1b[31mred\x1b[0m [red]fox[/red] \u202ejumped because it was \x9b31m wild 日本語"


def words(text: str) -> tuple[Word, ...]:
    return tuple(
        Word(w, 0, 0, range(i, i + 1), w.startswith("[")) for i, w in enumerate(text.split())
    )


def reading(text: str, word: int, *rows: list[float]) -> Reading:
    split = words(text)
    labels = tuple(w.text for w in split)
    heads = tuple((0, i) for i in range(len(rows)))
    return Reading("m", text, "self", split, labels, word, heads, torch.tensor(rows))


@pytest.mark.parametrize(
    "one, two, pairs",
    [("a b c", "a b c", [(0, 0), (1, 1), (2, 2)]),
     ("a b c", "A x c", [(0, 0), (1, 1), (2, 2)]),
     ("a b c", "a c", [(0, 0), (1, None), (2, 1)]),
     ("a c", "a b c", [(0, 0), (None, 1), (1, 2)]),
     ("a b c", "a x y c", [(0, 0), (1, None), (None, 1), (None, 2), (2, 3)]),
     ("it a it", "it it", [(0, 0), (1, None), (2, 1)])],
)  # fmt: skip
def test_alignment(one, two, pairs):
    assert align(words(one), words(two)) == [Pair(*pair) for pair in pairs]


def test_a_word_without_counterpart_is_refused():
    with pytest.raises(RegardError, match="'b' has no counterpart in the second text"):
        counterpart(words("a b c"), words("a c"), 1)
    assert counterpart(words("a b c"), words("a c"), 2) == 1


def test_moves_and_flips():
    one = reading(
        "[x] cat dog it", 3, [0.1, 0.6, 0.2, 0.1], [0.8, 0.1, 0.0, 0.1], [0, 0.4, 0.3, 0.3]
    )
    two = reading(
        "[x] cat big pig it", 4,
        [0.1, 0.2, 0.0, 0.6, 0.1], [0.0, 0.9, 0.0, 0.1, 0.0], [0, 0.4, 0.3, 0.2, 0.1],
    )  # fmt: skip
    versus = compare(one, two, "it")
    assert versus.pairs == (
        Pair(0, 0), Pair(1, 1), Pair(2, None), Pair(None, 2), Pair(None, 3), Pair(3, 4)
    )  # fmt: skip
    (flip,) = versus.flips
    assert (flip.head, flip.one, flip.two) == (0, 1, 3)
    assert flip.weights == pytest.approx((0.6, 0.2, 0.0, 0.6))
    first, second = versus.moves(2)
    assert (first.head, first.pair, first.one) == (1, Pair(0, 0), pytest.approx(0.8))
    assert (second.head, second.pair) == (1, Pair(1, 1))
    assert all(move.pair != Pair(0, 0) for move in versus.moves(99, special=False))
    assert versus.moved == pytest.approx((0.6 + 0.85 + 0.4) / 3, abs=0.06)
    same = compare(one, one, "it")
    assert (same.flips, same.moved) == ([], 0)


@pytest.mark.parametrize(
    "first, second, flips",
    [
        ([0.60, 0.30], [0.30, 0.60], 1),
        ([0.30, 0.29], [0.29, 0.31], 1),  # the lead that changed hands is 0.03
        ([0.30, 0.295], [0.30, 0.305], 0),  # 0.01
        ([0.30, 0.00], [0.00, 0.019], 0),  # the second reads next to nothing
        ([0.015, 0.0], [0.0, 0.5], 0),
        ([0.021, 0.0], [0.0, 0.022], 1),
    ],
)
def test_a_flip_of_less_than_two_hundredths_is_noise(first, second, flips):
    one, two = (reading("a b it", 2, [*weights, 0.0]) for weights in (first, second))
    assert len(compare(one, two, "it").flips) == flips


def test_other_heads_are_compared_by_their_means():
    one = reading("a b", 1, [0.5, 0.5], [0.1, 0.9])
    two = reading("a b", 1, [0.9, 0.1])
    versus = compare(one, two, "b")
    assert not versus.same_heads
    assert (versus.moves(3), versus.flips) == ([], [])
    assert versus.means[0][1:] == pytest.approx((0.3, 0.9))
    assert versus.moved == pytest.approx(0.6)


def run(*arguments):
    result = CliRunner().invoke(main, ["look", *arguments], env={"COLUMNS": "80"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answered(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def weights(found, layer, head, word):
    (versus,) = found["versus"]
    (link,) = (
        x for x in versus["links"] if (x["layer"], x["head"], x["to"]) == (layer, head, word)
    )
    return link["weight"], link["weight2"]


def test_tired_to_wide_moves_head_3_1():
    found = answered(TIRED, "--versus", WIDE, "--from", "it", "--top", "99")
    assert weights(found, 3, 1, "animal") == pytest.approx((0.61, 0.26), abs=0.0051)
    assert weights(found, 3, 1, "road") == pytest.approx((0.07, 0.23), abs=0.0051)
    (versus,) = found["versus"]
    assert versus["aligned"][-2] == [10, 10]
    assert len(versus["links"]) == 72 * 12
    before = {(x["layer"], x["head"], x["to_index"]): x["weight"] for x in found["links"]}
    for link in versus["links"]:
        key = link["layer"], link["head"], link["to_index"]
        assert link["weight"] == pytest.approx(before.get(key, 0), abs=1e-6)


def test_big_to_small_does_not_flip_the_trophy():
    found = answered(BIG, "--versus", SMALL, "--from", "it", "--top", "99")
    assert weights(found, 3, 1, "trophy") == pytest.approx((0.58, 0.61), abs=0.0051)
    assert (3, 1) not in [(f["layer"], f["head"]) for f in found["versus"][0]["flips"]]


def test_the_page_fits_and_says_what_is_meant():
    page = run(TIRED, "--versus", WIDE, "--from", "it").stdout
    assert max(map(cell_len, page.splitlines())) <= 80
    assert "animal                             0.61     0.26       −0.35   3.1" in page
    assert "of 72 heads flip" in page
    assert "where heads read, not why" in page
    overview = run(TIRED, "--versus", WIDE).stdout
    assert max(map(cell_len, overview.splitlines())) <= 80
    assert "reading changed" in overview


def test_the_same_text_in_the_same_model_changes_nothing():
    found = answered(TIRED, "--versus-model", "all-MiniLM-L6-v2", "--from", "it")
    (versus,) = found["versus"]
    assert (versus["moved"], versus["flips"]) == (0, [])


@pytest.mark.slow
def test_hostile_words_are_shown_not_sent():
    for extra in ([], ["--from", "it"], ["--from", "it", "--cut", "3.1", "--effect"]):
        result = run(HOSTILE, "--versus", HOSTILE.replace("wild", "\x1b]0;x\x07 tame"), *extra)
        assert result.exit_code == 0, result.stderr
        assert all(c.isprintable() or c == "\n" for c in result.stdout)
        assert max(map(cell_len, result.stdout.splitlines())) <= 80
