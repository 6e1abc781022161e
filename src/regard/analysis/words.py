"""Words instead of pieces: what one word reads, which links are strongest, which words are sinks.

A word weight is exact: the weight a head gives from one word to another is summed over the tokens
of the word that is read and averaged over the tokens of the word that reads (Clark et al. 2019,
§4.1). It is computed by tile from ``recording.weights``, so memory stays O(words), never N × N.
"""

from __future__ import annotations

import difflib
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from ..errors import RegardError
from .word_bounds import pieces_of, strip

if TYPE_CHECKING:
    from ..capture.recording import Recording

SINK = 0.3
"""A word is a sink of a head where its column mean is above this (Gu et al. 2025)."""
SINK_QUERIES = 8
"""… and is a mean over at least so many queries: one of fewer says nothing."""

_TILE = 1 << 22  # weights held at once: 16 MB in float32


@dataclass(frozen=True, slots=True)
class Word:
    """A word: the characters ``start:end`` of its text and its tokens, which are contiguous."""

    text: str
    start: int
    end: int
    tokens: range
    special: bool = False


class Words(Sequence[Word]):
    """The words of one text, in order; every token belongs to exactly one of them.

    ``of_token`` int64 (tokens,) is the word of each token, ``sizes`` int64 (words,) the tokens of
    each word.
    """

    def __init__(self, words: Sequence[Word]) -> None:
        self._words = tuple(words)
        self.sizes: Tensor = torch.tensor(
            [len(word.tokens) for word in self._words], dtype=torch.int64, device="cpu"
        )
        self.of_token: Tensor = torch.repeat_interleave(
            torch.arange(len(self._words), dtype=torch.int64, device="cpu"), self.sizes
        )

    @overload
    def __getitem__(self, index: int) -> Word: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Word]: ...
    def __getitem__(self, index: int | slice) -> Word | Sequence[Word]:
        return self._words[index]

    def __len__(self) -> int:
        return len(self._words)

    def sum_tokens(self, weights: Tensor) -> Tensor:
        """Weights (…, tokens) summed over the tokens of each word: (…, words)."""
        if len(self) == len(self.of_token):
            return weights
        total = weights.new_zeros(*weights.shape[:-1], len(self))
        return total.index_add_(-1, self.of_token, weights)

    @classmethod
    def split(
        cls,
        text: str,
        tokens: Sequence[str],
        offsets: Sequence[Sequence[int]],
        special: Sequence[bool],
        cuts: Sequence[int] = (),
    ) -> Words:
        """The words of ``text``, whose token i covers the characters ``offsets[i]``.

        Words end where Unicode's do (UAX #29), so punctuation and emoji stand apart: "suitcase,"
        is two words, "didn't" is one; but hyphens join, and a run of one sign is one word. In
        scripts written without spaces every token starts a word. A special token is a word of
        its own, named by its token; so is a token of whitespace, but for the one space that
        tokenizers set before a word. A token that covers several words joins them, so no token
        is split. Words without a token are left out. ``cuts``: characters at which a word starts
        anyhow.
        """
        if not len(tokens) == len(offsets) == len(special):
            raise RegardError(
                "tokens, offsets and special must be equally long; "
                f"they are {len(tokens)}, {len(offsets)} and {len(special)}"
            )
        spans = [strip(text, int(start), int(end)) for start, end in offsets]
        pieces = pieces_of(text, spans, special, cuts)
        covered: list[tuple[int, int] | None] = [None] * len(spans)  # pieces; None: its own word
        following: tuple[int, int] | None = None
        for i in reversed(range(len(spans))):
            (start, end), raw = spans[i], text[offsets[i][0] : offsets[i][1]]
            if special[i]:
                following = None
            elif start < end:
                first = max(bisect_right(pieces, (start, len(text))) - 1, 0)
                following = first, max(bisect_left(pieces, (end, 0)) - 1, first)
            elif raw not in ("", " ") or text[end : end + 1].isspace():
                following = None
            covered[i] = following
        groups: list[list[int]] = []  # first piece, last piece, first token, last token + 1
        for i, span in enumerate(covered):
            if span and groups and covered[i - 1] and span[0] <= groups[-1][1]:
                groups[-1][1:] = max(groups[-1][1], span[1]), groups[-1][2], i + 1
            elif not span and i and _one_char(text, offsets, special, i):
                groups[-1][3] = i + 1
            else:
                groups.append([*(span or (0, -1)), i, i + 1])
        words: list[Word] = []
        for low, high, first, stop in groups:
            if high >= low:
                start, end = pieces[low][0], pieces[high][1]
                name = text[start:end]
            else:
                start, end = (int(edge) for edge in offsets[first])
                name = tokens[first] if special[first] or start == end else text[start:end]
            words.append(Word(name, start, end, range(first, stop), bool(special[first])))
        return cls(words)

    @classmethod
    def single(
        cls,
        text: str,
        tokens: Sequence[str],
        offsets: Sequence[Sequence[int]],
        special: Sequence[bool],
    ) -> Words:
        """Every token as a word, named by its characters: by its token where these are all told,
        as for the later bytes of one character."""
        words: list[Word] = []
        reached = 0
        for i, (token, span) in enumerate(zip(tokens, offsets, strict=True)):
            low, high = strip(text, *map(int, span))
            low, high = (low, high) if low < high else map(int, span)
            low = max(low, reached)
            high = reached = max(low, high)
            name = token if special[i] or low == high else text[low:high]
            words.append(Word(name, low, high, range(i, i + 1), bool(special[i])))
        return cls(words)

    @classmethod
    def of(cls, about: Mapping[str, Any], cuts: Sequence[int] = ()) -> Words:
        """The words of what a recording's ``about`` tells of a text; its tokens if ``pieces``."""
        text, tokens, offsets = (about.get(key) for key in ("text", "tokens", "offsets"))
        if text is None or tokens is None or offsets is None:
            raise RegardError("the recording has no words: its text, tokens or offsets are missing")
        special = about.get("special") or [False] * len(tokens)
        if about.get("pieces"):
            return cls.single(text, tokens, offsets, special)
        return cls.split(text, tokens, offsets, special, cuts)


def word_tokens(about: Mapping[str, Any]) -> list[list[int]]:
    """The first token and the last + 1 of each word, as a recording names them."""
    return [[word.tokens.start, word.tokens.stop] for word in Words.of(about)]


class Found(NamedTuple):
    """The word that a name stands for: its number, and that it is the nth of ``of`` such."""

    number: int
    nth: int
    of: int


def find(words: Sequence[Word], name: str) -> Found:
    """The word that ``name`` stands for: "it", or "it#2" for the second.

    An exact match comes before one that ignores case. Raises RegardError naming the words.
    """
    base, mark, number = name.rpartition("#")
    numbered = bool(mark and base and number.isdecimal())
    tries = [(name, 1)] + ([(base, int(number))] if numbered else [])
    for fold in (_same, _folded):
        for wanted, nth in tries:
            hits = [i for i, word in enumerate(words) if fold(word.text) == fold(wanted)]
            if 1 <= nth <= len(hits):
                return Found(hits[nth - 1], nth, len(hits))
            if hits:
                times = "once" if len(hits) == 1 else f"{len(hits)} times"
                raise RegardError(f"no word {name!r}: the text has {wanted!r} {times}")
    known = list(dict.fromkeys(word.text for word in words))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    raise RegardError(f"no word {name!r} in the text; {hint}its words: {shown}")


def label(words: Sequence[Word]) -> list[str]:
    """A name for every word that ``find`` takes: its text, from the second on with "#2", …"""
    seen: dict[str, int] = {}
    names = []
    for word in words:
        nth = seen[word.text] = seen.get(word.text, 0) + 1
        names.append(word.text if nth == 1 else f"{word.text}#{nth}")
    return names


def from_word(
    recording: Recording,
    layer: int,
    reader: Word,
    keys: Words,
    heads: Sequence[int] | None = None,
) -> Tensor:
    """What ``reader`` reads in one layer: float32 (heads, words of ``keys``).

    A row sums to 1, or less where a learned sink takes mass. ``heads``: those to compute.
    """
    blocks = _by_rows(recording, layer, reader.tokens, keys, heads)
    total = torch.stack([weights.sum(1) for _, weights in blocks]).sum(0)
    return keys.sum_tokens(total) / len(reader.tokens)


class Columns(NamedTuple):
    """How much each word is read, by head: all (heads, words).

    ``means`` float32: the highest column mean of the word's tokens, over the queries that see
    the token; ``queries`` int64: how many see it. ``received`` float32: the share of all the mass
    that the word takes. ``sinks`` bool: whether the word is a sink of the head.
    """

    means: Tensor
    received: Tensor
    sinks: Tensor
    queries: Tensor


def columns(
    recording: Recording,
    layer: int,
    keys: Words,
    heads: Sequence[int] | None = None,
    step: Callable[[int], object] | None = None,
) -> Columns:
    """The column means of one layer, and its sinks: words with a column mean above SINK.

    A column mean is a token's mean weight over the queries that see it (Gu et al. 2025). A token
    that fewer than SINK_QUERIES of them see makes no sink. ``step`` is told how many rows were
    read.
    """
    recorded = recording.layers[layer]
    count = recorded.heads if heads is None else len(heads)
    sums = torch.zeros(count, recorded.k_len, dtype=torch.float64, device="cpu")
    sees = torch.zeros(recorded.k_len, dtype=torch.float32, device="cpu")
    for rows, weights in _by_rows(recording, layer, range(recorded.q_len), keys, heads):
        sums += weights.sum(1)
        sees += (weights.amax(0) > 0).sum(0)
        if step:
            step(len(rows))
    means = (sums / sees.clamp(min=1)).float()
    firm = means * (sees >= SINK_QUERIES)
    where = keys.of_token.expand_as(means)
    none = torch.zeros(count, len(keys), dtype=torch.float32, device="cpu")
    return Columns(
        none.scatter_reduce(1, where, means, "amax"),
        keys.sum_tokens(sums.float()) / max(1, recorded.q_len),
        none.scatter_reduce(1, where, firm, "amax") > SINK,
        none.scatter_reduce(1, where, sees.expand_as(means), "amax").long(),
    )


class Link(NamedTuple):
    """One word reading another in one head: indices of layer, head and words, and the weight."""

    layer: int
    head: int
    source: int
    target: int
    weight: float


def strongest_of(links: Sequence[Link], top: int) -> list[Link]:
    """The ``top`` links by weight; ties go to the lower layer, head and words."""
    return sorted(links, key=lambda link: (-link.weight, *link[:4]))[:top]


def _by_rows(
    recording: Recording, layer: int, tokens: range, keys: Words, heads: Sequence[int] | None
) -> Iterator[tuple[range, Tensor]]:
    """Blocks of rows with their weights: (heads, rows, tokens of ``keys``)."""
    recorded = recording.layers[layer]
    if recorded.k_len != len(keys.of_token):
        raise RegardError(
            f"layer {layer} ({recorded.name}) reads {recorded.k_len} keys, "
            f"but the words have {len(keys.of_token)} tokens"
        )
    size = max(1, _TILE // max(1, recorded.heads * recorded.k_len))
    for start in range(tokens.start, tokens.stop, size):
        rows = range(start, min(start + size, tokens.stop))
        weights = recording.weights(layer, rows=slice(rows.start, rows.stop))
        if heads is not None:
            weights = weights[list(heads)]
        yield rows, weights


def _one_char(text: str, offsets: Sequence[Sequence[int]], special: Sequence[bool], i: int) -> bool:
    """Whether tokens i - 1 and i are bytes of the same whitespace character."""
    start, end = offsets[i]
    same = tuple(offsets[i - 1]) == (start, end)
    return same and text[start:end].isspace() and not special[i] and not special[i - 1]


def _same(text: str) -> str:
    return text


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()
