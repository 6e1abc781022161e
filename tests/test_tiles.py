"""Tiles of a recorded map at every zoom, and what rows and columns hold, against the reference."""

import pytest
import torch
import torch.nn.functional as F

from cases import FEW, Case, assert_within, at
from regard import Causal, Recording, RegardError, Window
from test_recording import LONG, computed, plainly, recorded, steps


def cells(weights, zoom: int, reduce: str):
    """(rows, cols) as cells of 2**zoom × 2**zoom, by definition."""
    size = 2**zoom
    after = [-n % size for n in weights.shape]
    padded = F.pad(weights, (0, after[1], 0, after[0])).unflatten(1, (-1, size))
    padded = padded.unflatten(0, (-1, size))
    return padded.sum((1, 3)) if reduce == "sum" else padded.amax((1, 3))


def tiles_of(weights, asked: list[tuple[int, int, int, int]], reduce: str):
    """The tiles (head, zoom, row, col) of a map (heads, rows, cols), by definition."""
    whole = {at: cells(weights[at[0]], at[1], reduce) for at in {(h, z) for h, z, *_ in asked}}
    found = []
    for head, zoom, row, col in asked:
        part = whole[head, zoom][row * 128 : row * 128 + 128, col * 128 : col * 128 + 128]
        found.append(F.pad(part, (0, 128 - part.shape[1], 0, 128 - part.shape[0])))
    return torch.stack(found)


def assert_tiles(recording: Recording, truth, plain, layer=0) -> None:
    """Every tile of every head and item at every zoom, those beyond the edges too.

    Error ≤ 2 × (that of the tiles of `plain`, float32 as plain torch has it, + rounding).
    """
    for zoom in range(recording.zooms(layer)):
        side = 128 << zoom
        for b, heads in enumerate(truth):
            rows, cols = (-(-n // side) + 1 for n in heads.shape[1:])
            asked = [
                (h, zoom, r, c)
                for h in range(len(heads)) for r in range(rows) for c in range(cols)
            ]  # fmt: skip
            for reduce in ("sum", "max"):
                found = recording.tiles(layer, asked, reduce, batch=b)
                assert found.dtype == torch.float32
                near, wanted = (tiles_of(of, asked, reduce) for of in (plain[b], heads))
                assert_within(found, near, wanted)


@pytest.mark.sample(every=7)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kind_of_call_has_its_tiles(case):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, truth = computed(query, key, **request)
    recording = Recording([recorded((call, lse))])
    if case.sizes.batch:
        assert_tiles(recording, truth, plainly(query, key, **request))


def test_every_zoom():
    """600 queries and 900 keys: four zooms, and edges that fill no cell."""
    query, key, _ = Case("", at(600, 900, heads=2, kv_heads=1)).tensors()
    call, lse, truth = computed(query, key, mask=Causal() & Window(500))
    plain = plainly(query, key, mask=Causal() & Window(500))
    recording = Recording([recorded((call, lse), kind="cross")])
    assert recording.zooms(0) == 4
    assert_tiles(recording, truth, plain)
    last = recording.tile(0, 1, 3, 0, 0)
    assert_within(last.sum(), plain[1].sum(), torch.tensor(600.0).double())


@pytest.mark.parametrize("tokens, wanted", [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3)])
def test_the_last_zoom_is_the_first_that_fits(tokens, wanted):
    query = torch.zeros(1, 1, tokens, 2)
    call, lse, _ = computed(query, query)
    assert Recording([recorded((call, lse))]).zooms(0) == wanted


@pytest.mark.parametrize("window", [None, 7])
def test_tiles_span_decode_steps(window):
    calls = list(steps([20, 21, 22, 40], window, mask=Causal() & Window(window or 99)))
    query, key, _ = LONG.tensors()
    mask = Causal() & Window(window or 99)
    truth, plain = computed(query, key, mask=mask)[2], plainly(query, key, mask=mask)
    recording = Recording([recorded(*calls)])
    assert_tiles(recording, truth, plain)
    rows = [30, 3, -1]
    distance = torch.arange(40)[:, None] - torch.arange(40)

    def within(ours, read) -> None:
        """What is read of the weights of the item."""
        assert_within(ours, read(plain[b]), read(truth[b]))

    for b in range(2):
        top = recording.top(0, rows=rows, batch=b, k=3)
        within(top.weights, lambda of: of[:, rows].topk(3).values)
        named = top.indices.clamp(min=0).long()
        within(top.weights, lambda of: of[:, rows].gather(-1, named))  # noqa: B023
        within(top.rest, lambda of: 1 - of[:, rows].topk(3).values.sum(-1))
        one = recording.top(0, 2, rows=slice(1, 9), batch=b)
        assert one.weights.shape == (8, 8)
        assert one.indices[0].tolist()[2:] == [-1] * 6
        received = recording.received(0, batch=b)
        within(received.sum, lambda of: of.sum(1))
        assert torch.equal(received.count[0], (truth[b, 0] > 0).sum(0, dtype=torch.int32))
        within(recording.entropy(0, batch=b), lambda of: torch.special.entr(of).sum(-1))
        by = recording.distances(0, 1, batch=b, bins=(0, 1, 5))
        for n, (lo, hi) in enumerate([(0, 1), (1, 5), (5, 99)]):
            there = (distance >= lo) & (distance < hi)
            within(by.past[n], lambda of: of[1][there].sum())  # noqa: B023
        assert not by.future.any()


WRONG = {
    "head": ((0, 4, 0, 0, 0), "head 4 of layer layer: it has 4"),
    "zoom": ((0, 0, 1, 0, 0), "zoom 1 of layer layer: it has 0 … 0"),
    "row": ((0, 0, 0, -1, 0), r"tile \(-1, 0\): rows and columns count from 0"),
    "reduce": ((0, 0, 0, 0, 0, "mean"), "reduce is 'mean'; give 'sum' or 'max'"),
    "batch": ((0, 0, 0, 0, 0, "sum", 2), "batch 2: the recording has 2"),
}


@pytest.mark.parametrize("asked, said", WRONG.values(), ids=WRONG)
def test_a_tile_that_is_none_is_refused(asked, said):
    query, key, _ = LONG.tensors()
    recording = Recording([recorded(computed(query, key)[:2])])
    with pytest.raises(RegardError, match=said):
        recording.tile(*asked)
