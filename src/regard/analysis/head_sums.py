"""The rows of a long call for a `Tally`, without a row of its weights: by compiled passes.

Where a mask shows each query one range of keys (full, causal, windows), who sees what is known
without looking. What a row gives to a set of keys that all rows share (special tokens, punctuation)
is attention itself, with a value of 1 at those keys and 0 elsewhere; a value of the key's place
gives the distance. Copies of a token are looked for among the tokens of its name alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..call.biases import Kind
from ..call.checked import Call
from ..call.observers import Entropy, listed
from ..call.opcodes import Op
from ..call.results import EntropySeen
from ..capture.recorded_layer import RecordedLayer
from ..capture.stored import read
from ..engines import run
from ..engines.second_pass.weigh import weigh
from .head_scores import Tally, TokenKinds, strips

LEAST = 2**22  # weights of a call from which on this is worth its overhead
_ROWS = 128  # of tokens sorted by name, at once
_ONE, _PLACE, _SPECIAL, _PUNCTUATION, _FEATURES = 0, 1, 2, 3, 4


@dataclass(eq=False)
class Ranges:
    """One item's call, and the keys low … high − 1 that each query sees, by their positions.

    given: entropy (1, heads, q_len) where it is known already. rows, keys, low, high: int64.
    """

    call: Call
    lse: Tensor
    low: Tensor
    high: Tensor
    given: Tensor | None = None

    @classmethod
    def of(cls, call: Call, lse: Tensor, entropy: Tensor | None = None) -> Ranges | None:
        """None where a query may see keys with gaps between, or the call is short or float64."""
        place = call.place
        short = place.heads * place.q_len * place.k_len < LEAST
        if short or call.query.dtype == torch.float64:  # which the passes would round
            return None
        rows = torch.arange(place.q_len, dtype=torch.int64, device="cpu") + place.query_start
        low = torch.full_like(rows, place.key_start)
        high = low + place.k_len
        for op, args in call.program.instructions():
            if op == Op.CAUSAL:
                high = torch.minimum(high, rows + 1)
            elif op == Op.WINDOW:
                low = torch.maximum(low, rows - args[0] + 1)
                high = torch.minimum(high, rows + args[1] + 1)
            elif op not in (Op.FULL, Op.AND):
                return None
        floats = replace(call, query=call.query.float(), key=call.key.float())
        return cls(floats, lse, low, torch.maximum(high, low), entropy)

    @cached_property
    def rows(self) -> Tensor:
        """The position of each query."""
        return (
            torch.arange(len(self.low), dtype=torch.int64, device="cpu")
            + self.call.place.query_start
        )

    @cached_property
    def keys(self) -> Tensor:
        """The position of each key."""
        place = self.call.place
        return torch.arange(place.k_len, dtype=torch.int64, device="cpu") + place.key_start

    @cached_property
    def many(self) -> Tensor:
        """How many keys each query sees."""
        return self.high - self.low

    def sees(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Whether queries see keys, by numbers that broadcast with each other."""
        at = keys + self.call.place.key_start
        return (at >= self.low[rows]) & (at < self.high[rows])

    def seen_of(self, marked: Tensor) -> Tensor:
        """How many of the marked keys (bool) each query sees."""
        until = torch.nn.functional.pad(marked.long().cumsum(0), (1, 0))
        start = self.call.place.key_start
        return until[self.high - start] - until[self.low - start]

    def passed(self, features: Tensor, ahead: bool) -> tuple[Tensor, Tensor]:
        """Σ weight · feature (heads, q_len, features), float64, and the entropy (heads, q_len).

        features (k_len, features). ahead: of the keys up to the query's own alone; entropy is 0.
        """
        call, place = self.call, self.call.place
        if ahead:
            code = (*call.program.code, int(Op.CAUSAL), int(Op.AND))
            call = replace(call, program=replace(call.program, code=code))
        wanted = self.given is None and not ahead
        value = features.float().expand(1, place.kv_heads, *features.shape).contiguous()
        call = replace(call, value=value, observers=listed([Entropy()]) if wanted else ())
        out, lse, seen = run(call)
        nothing = torch.zeros(1, place.heads, place.q_len, dtype=torch.float32, device="cpu")
        entropy = nothing if self.given is None else self.given
        if wanted:
            (read,) = weigh(call, lse, seen=seen)
            assert isinstance(read, EntropySeen)
            entropy = read.values
        # An lse of fewer keys is a share of all
        share = (lse - self.lse).exp().nan_to_num(0.0) if ahead else torch.ones_like(lse)
        return (out.double() * share.double()[..., None])[0], entropy[0].double()

    def weights(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Weights (heads, rows, keys) of some queries and keys, by their numbers."""
        call, place = self.call, self.call.place
        group = place.heads // place.kv_heads
        key = call.key[0][:, keys].repeat_interleave(group, 0)
        scores = (call.query[0][:, rows] * call.scale) @ key.mT
        return self._from_scores(scores, rows[:, None], keys)

    def pairs(self, rows: Tensor, keys: Tensor) -> Tensor:
        """Weights (heads, n) of n queries, each of its own key."""
        call, place = self.call, self.call.place
        group = place.heads // place.kv_heads
        made = []
        for head in range(place.heads):
            mine = call.key[0, head // group, keys]
            made.append((call.query[0, head, rows] * call.scale * mine).sum(-1))
        return self._from_scores(torch.stack(made), rows, keys)

    def _from_scores(self, scores: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """exp(score − lse), softcap and biases in between; rows and keys broadcast together."""
        call = self.call
        if call.softcap is not None:
            scores = (scores / call.softcap).tanh() * call.softcap
        for bias in call.biases:
            if bias.kind == Kind.DENSE:
                whole = bias.tensor.expand(-1, -1, call.place.q_len, call.place.k_len)[0]
                scores = scores + whole[:, rows, keys]
            else:
                near = keys + call.place.key_start - rows - call.place.query_start
                floats = replace(bias, tensor=bias.tensor.to(scores.dtype))
                scores = scores + floats.along(near)
        lse = self.lse[0][:, rows].masked_fill(self.lse[0][:, rows] == -torch.inf, torch.inf)
        return (scores - lse).exp() * self.sees(rows, keys)


def tally(
    layer: RecordedLayer, queries: dict[str, Any], keys: dict[str, Any], batch: int = 0
) -> Tally:
    """The scores of one layer. queries, keys: what is known of the texts ("tokens" …)."""
    cross = layer.kind == "cross"
    kinds = TokenKinds.of(keys if cross else queries)
    last = layer.key_start + layer.k_len
    if not cross:
        last = max(last, layer.query_start + layer.q_len)
    if kinds is not None and last > len(kinds):
        kinds = None  # other positions than the text's: a resampled sequence, say
    made = Tally(layer.heads, cross, kinds)
    entropy, at = layer.results.entropy, 0
    for chunk in layer.chunks:
        lse, n = layer.lse(chunk, batch), chunk.query.shape[2]
        known = None if entropy is None else read(entropy.values[batch : batch + 1, :, at : at + n])
        if (ranges := Ranges.of(layer.call(chunk, batch), lse, known)) is not None:
            add(made, ranges)
        else:
            for strip in strips(layer, batch, [chunk]):
                made.add(strip)
        at += n
    return made


def add(made: Tally, ranges: Ranges) -> None:
    """Add a call's rows to the sums and counts of a layer, as strips of its weights would."""
    kinds, cross, keys = made.kinds, made.cross, ranges.keys
    rows = torch.arange(len(ranges.rows), dtype=torch.int64, device="cpu")
    if kinds is not None and not cross:
        rows = rows[~kinds.special[ranges.rows]]
    if not len(rows):
        return
    later = rows if cross else rows[ranges.rows[rows] > keys[0]]
    first = torch.zeros(1, dtype=torch.int64, device="cpu")
    made.count("first", ranges.weights(later, first)[..., 0], ranges.sees(later, first)[None])
    features = torch.zeros(len(keys), _FEATURES, dtype=torch.float32, device="cpu")
    features[:, _ONE], features[:, _PLACE] = 1, keys
    if kinds is not None:
        features[:, _SPECIAL] = kinds.special[keys] & (keys > 0)
        features[:, _PUNCTUATION] = kinds.punctuation[keys]
    sums, entropy = ranges.passed(features, ahead=False)
    made.spread(entropy[:, rows], ranges.many[rows][None])
    if kinds is not None:
        for name, which in (("separator", _SPECIAL), ("punctuation", _PUNCTUATION)):
            marked = features[:, which] > 0
            if marked.any():
                there = ranges.seen_of(marked)[rows][None] > 0
                made.count(name, sums[:, rows, which], there)
    if cross:
        return
    for name, by in (("previous", -1), ("next", 1), ("self", 0)):
        _neighbour(made, ranges, rows, name, by)
    made.sum("distance", _distance(ranges, features, sums)[:, rows])
    if kinds is not None:
        order = kinds.same[keys], kinds.same[(keys - 1).clamp(min=0)].where(keys > 0, -1)
        for name, names in zip(("duplicate", "induction"), order, strict=True):
            for given, there in _copies(ranges, rows, kinds.same[ranges.rows[rows]], names):
                made.count(name, given, there[None])


def _neighbour(made: Tally, ranges: Ranges, rows: Tensor, name: str, by: int) -> None:
    """What is read of the token so many places on; special ones are none."""
    keys, kinds = ranges.keys, made.kinds
    at = ranges.rows[rows] + by - keys[0]
    has = (at >= 0) & (at < len(keys))
    if kinds is not None:
        has &= ~kinds.special[(ranges.rows[rows] + by).clamp(0, len(kinds) - 1)]
    rows, at = rows[has], at[has]
    made.count(name, ranges.pairs(rows, at), ranges.sees(rows, at)[None])


def _distance(ranges: Ranges, features: Tensor, sums: Tensor) -> Tensor:
    """Σ weight · |query − key| (heads, q_len): what lies back minus ahead, the former twice."""
    signed = sums[..., _ONE] * ranges.rows - sums[..., _PLACE]
    if bool((ranges.high <= ranges.rows + 1).all()):
        return signed
    back, _ = ranges.passed(features[:, : _PLACE + 1], ahead=True)
    return 2 * (back[..., _ONE] * ranges.rows - back[..., _PLACE]) - signed


def _copies(
    ranges: Ranges, rows: Tensor, mine: Tensor, names: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """(what each row reads of earlier keys of its name (heads, rows), whether it sees any).

    mine, names: the name of each row, and of each key. Both are sorted by name, so that a strip of
    rows has its keys in one stretch; rows whose name no key has are left out: they see none.
    """
    by_name = torch.argsort(names, stable=True)
    sorted_names = names[by_name].contiguous()
    order = torch.argsort(mine, stable=True)
    rows, mine = rows[order], mine[order].contiguous()
    begin = torch.searchsorted(sorted_names, mine)
    end = torch.searchsorted(sorted_names, mine, right=True)
    there = begin < end
    rows, mine, begin, end = rows[there], mine[there], begin[there], end[there]
    for at in range(0, len(rows), _ROWS):
        part = slice(at, at + _ROWS)
        some, first, last = rows[part], int(begin[part].min()), int(end[part].max())
        keys = by_name[first:last]
        alike = sorted_names[first:last] == mine[part][:, None]
        alike &= ranges.keys[keys] < ranges.rows[some][:, None]
        alike &= ranges.sees(some[:, None], keys)
        yield (ranges.weights(some, keys) * alike).sum(-1), alike.any(-1)
