"""What CONTRIBUTING says of adding a mask or an observer, done here from outside the package."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import regard
from regard import Causal, Full, Rows, attention
from regard.cache import KVCache
from regard.call.masks import Mask
from regard.call.observers import PerRow
from regard.call.opcodes import Op
from regard.call.results import RowSeen
from regard.engines.second_pass.readers import Accumulator


@dataclass(frozen=True)
class Before(Mask):
    """A new mask: the keys before a position, and none for the queries beyond."""

    n: int

    def _write(self, to):
        to.write(Op.FIRST, self.n)

    def __str__(self):
        return f"Before({self.n})"


class Focus(PerRow):
    """A new observer: the sum of each row's squared weights."""

    def result(self, tensors, place):
        return RowSeen(tensors[0])


class FocusReader(Accumulator, of=Focus):
    """Its accumulator, in plain torch."""

    def read(self, seen):
        self.tensors[0][seen.strip.here] = seen.weights.square().sum(-1)


def drawn(*shape):
    torch.manual_seed(0)
    return [torch.randn(*shape) for _ in range(3)]


ENGINES = ["reference", "tiled", "sdpa", "cpu"]


QUERY, KEY = torch.arange(9)[:, None], torch.arange(9)
MASKS = {
    "alone": (Before(4), (KEY < 4).expand(9, 9)),
    "and": (Causal() & Before(4), (KEY <= QUERY) & (KEY < 4)),
    "and not": (Causal() & ~Before(2), (KEY <= QUERY) & (KEY >= 2)),
    "or": (Causal() | Before(4), (KEY <= QUERY) | (KEY < 4)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask, shown", MASKS.values(), ids=MASKS)
def test_every_engine_takes_a_new_mask(engine, mask, shown):
    q, k, v = drawn(2, 3, 9, 8)
    scores = (q @ k.mT / 8**0.5).masked_fill(~shown, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v
    torch.testing.assert_close(attention(q, k, v, mask=mask, engine=engine), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=str)
def test_every_engine_shows_a_new_observer(engine, mask):
    """None fuses it, so a second pass reads it, beside one that is fused."""
    q, k, v = drawn(2, 3, 9, 8)
    out, (focus, rows) = attention(
        q, k, v, mask=mask, observe=[Focus(), Rows(range(9))], engine=engine
    )
    torch.testing.assert_close(focus.values, rows.weights.square().sum(-1))
    torch.testing.assert_close(out, attention(q, k, v, mask=mask, engine=engine))


def test_a_cache_and_a_watch_take_it_along():
    q, k, v = drawn(1, 2, 6, 4)
    _, (whole,) = attention(q, k, v, mask=Causal(), observe=[Focus()])
    cache, parts = KVCache(), []
    for t in range(6):
        tokens = (x[:, :, t : t + 1] for x in (q, k, v))
        parts.append(cache.attend(*tokens, observe=[Focus()])[1][0].values)
    torch.testing.assert_close(torch.cat(parts, -1), whole.values)

    class Model(nn.Module):
        def forward(self, x):
            return attention(x, x, x, mask=Causal())

    model = Model()
    with regard.watch(model, observe=[Focus()]) as seen:
        model(q)
    _, (alone,) = attention(q, q, q, mask=Causal(), observe=[Focus()])
    torch.testing.assert_close(seen[0][Focus].values, alone.values)
