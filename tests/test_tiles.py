"""Tiles of a recorded map at every zoom, and what rows and columns hold, against the reference."""

import pytest
import torch
import torch.nn.functional as F

from cases import FEW, Case, at
from regard import Causal, Recording, RegardError, Window
from test_recording import LONG, computed, recorded, steps


def cells(weights, zoom: int, reduce: str):
    """(rows, cols) as cells of 2**zoom × 2**zoom, by definition."""
    size = 2**zoom
    after = [-n % size for n in weights.shape]
    padded = F.pad(weights, (0, after[1], 0, after[0])).unflatten(1, (-1, size))
    padded = padded.unflatten(0, (-1, size))
    return padded.sum((1, 3)) if reduce == "sum" else padded.amax((1, 3))


def tile_of(weights, zoom: int, row: int, col: int, reduce: str):
    whole = cells(weights, zoom, reduce)[row * 128 : row * 128 + 128, col * 128 : col * 128 + 128]
    return F.pad(whole, (0, 128 - whole.shape[1], 0, 128 - whole.shape[0]))


def assert_tiles(recording: Recording, truth, layer=0, zooms=None) -> None:
    """Every tile of every head and item at every zoom, those beyond the edges too."""
    for zoom in range(recording.zooms(layer)) if zooms is None else zooms:
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
                wanted = [tile_of(heads[h], *where, reduce) for h, *where in asked]
                torch.testing.assert_close(
                    found, torch.stack(wanted).float(), rtol=1e-5, atol=1e-6 * 4**zoom
                )


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kind_of_call_has_its_tiles(case):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, truth = computed(query, key, **request)
    recording = Recording([recorded((call, lse))])
    if case.sizes.batch:
        assert_tiles(recording, truth)


def test_every_zoom():
    """600 queries and 900 keys: four zooms, and edges that fill no cell."""
    query, key, _ = Case("", at(600, 900, heads=2, kv_heads=1)).tensors()
    call, lse, truth = computed(query, key, mask=Causal() & Window(500))
    recording = Recording([recorded((call, lse), kind="cross")])
    assert recording.zooms(0) == 4
    assert_tiles(recording, truth)
    last = recording.tile(0, 1, 3, 0, 0)
    torch.testing.assert_close(last.sum(), torch.tensor(600.0))


@pytest.mark.parametrize("tokens, wanted", [(1, 1), (128, 1), (129, 2), (256, 2), (257, 3)])
def test_the_last_zoom_is_the_first_that_fits(tokens, wanted):
    query = torch.zeros(1, 1, tokens, 2)
    call, lse, _ = computed(query, query)
    assert Recording([recorded((call, lse))]).zooms(0) == wanted


@pytest.mark.parametrize("window", [None, 7])
def test_tiles_span_decode_steps(window):
    calls = list(steps([20, 21, 22, 40], window, mask=Causal() & Window(window or 99)))
    query, key, _ = LONG.tensors()
    truth = computed(query, key, mask=Causal() & Window(window or 99))[2]
    recording = Recording([recorded(*calls)])
    assert_tiles(recording, truth)
    rows = [30, 3, -1]
    for b in range(2):
        top = recording.top(0, rows=rows, batch=b, k=3)
        weights, _ = truth[b][:, rows].sort(descending=True)
        torch.testing.assert_close(top.weights.double(), weights[..., :3], rtol=1e-5, atol=1e-6)
        at = truth[b][:, rows].gather(-1, top.indices.clamp(min=0))
        torch.testing.assert_close(top.weights.double(), at, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            top.rest.double(), 1 - weights[..., :3].sum(-1), rtol=1e-5, atol=1e-6
        )
        one = recording.top(0, 2, rows=slice(1, 9), batch=b)
        assert one.weights.shape == (8, 8)
        assert one.indices[0].tolist()[2:] == [-1] * 6
        received = recording.received(0, batch=b)
        torch.testing.assert_close(received.sum.double(), truth[b].sum(1), rtol=1e-5, atol=1e-5)
        assert torch.equal(received.count[0], (truth[b, 0] > 0).sum(0, dtype=torch.int32))
        entropy = -torch.special.xlogy(truth[b], truth[b]).sum(-1)
        torch.testing.assert_close(
            recording.entropy(0, batch=b).double(), entropy, rtol=1e-5, atol=1e-5
        )
        by = recording.distances(0, 1, batch=b, bins=(0, 1, 5))
        distance = torch.arange(40)[:, None] - torch.arange(40)
        for n, (lo, hi) in enumerate([(0, 1), (1, 5), (5, 99)]):
            mass = (truth[b, 1] * ((distance >= lo) & (distance < hi))).sum()
            torch.testing.assert_close(by.past[n].double(), mass, rtol=1e-5, atol=1e-5)
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
