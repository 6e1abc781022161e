"""Coarse tiles of weight · ‖W_O v‖: from maps that were pooled while recording, against float64."""

from dataclasses import replace

import pytest
import torch

import regard
from cases import FEW
from recorded_truths import kept
from regard import Recording, RegardError
from regard.capture import pyramid
from regard.capture.by_value import pooled_maps
from regard.capture.pyramid import Results
from regard.capture.stored_layer import open_layer
from regard.engines.second_pass.weigh import weigh
from regard.report.view.first_answers import first_answers
from test_record import RUNS, ids, tiny
from test_record_beams import recorded as searched
from test_recording import computed, plainly, recorded
from test_stored import FILE, rewritten
from test_tiles_by_value import by_value, drawn_norms

MAPS = ("value_sums", "value_maxima")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """So short a text has coarse tiles: cells of 2 tokens and more."""
    monkeypatch.setattr(pyramid, "LEAST", 2)
    monkeypatch.setattr(pyramid, "MOST", 256)


def held(layer, zoom=2, head=0, reduce="sum", batch=0):
    """A tile as the stored maps have it, or None."""
    starts = (layer.query_start, layer.key_start)
    return layer.results.tile(starts, (head, zoom, 0, 0), reduce, batch, by_value=True)


def check(recording, layer=1):
    """Every tile is exact, and the coarse ones are those of the maps."""
    found = recording.layer(layer)
    exact, plain = (of.weights for of in kept(found))
    norm = found.norm.float()
    by_value(recording, norm, exact, plain, layer)
    assert recording.zooms(layer) > 1
    for batch in range(found.batch):
        for reduce in ("sum", "max"):
            tile = recording.tile(layer, 1, 1, 0, 0, reduce, batch, "value")
            assert torch.equal(tile, held(found, 1, 1, reduce, batch))


@pytest.mark.parametrize("name", ["chunks", "chunks and steps"])
def test_of_calls_that_continue(name, tmp_path):
    model, ends = tiny(), RUNS[name]
    given = ids(ends[-1])

    def run():
        cache = None
        for start, end in zip([0, *ends], ends, strict=False):
            cache = model(given[:, start:end], past_key_values=cache).past_key_values

    check(regard.record(model, run, tmp_path / "r", values=True, dtype=None))


@pytest.mark.slow
def test_of_beams(tmp_path, monkeypatch):
    """The norms follow the beams, as the keys do, also across files."""
    monkeypatch.setattr("regard.capture.stored_layer.STEPS", 2)
    *_, recording = searched("Llama", tmp_path / "r")
    layer = recording.layer(0)
    exact, _ = (of.weights for of in kept(layer))
    truth = exact * layer.norm.double()[:, :, None]
    maps = layer.results.value_sums
    cells = torch.nn.functional.pad(truth, [p for n in truth.shape[:1:-1] for p in (0, -n % 2)])
    cells = cells.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((3, 5))
    torch.testing.assert_close(maps.weights.double(), cells, rtol=1e-5, atol=1e-6)


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("case", FEW[::4], ids=str)
def test_every_kind_of_call(case):
    """Calls that begin anywhere."""
    (query, key, _), request = case.tensors(), case.request()
    call, lse, exact = computed(query, key, **request)
    layer = recorded((call, lse))
    norms = drawn_norms(layer)
    if not (case.sizes.batch and layer.q_len):
        return
    seen = Results(*weigh(replace(call, observers=pyramid.observers(1)), lse))
    sums, maxima = pooled_maps(call, lse, norms, seen.sums)
    assert (sums.rows, sums.cols) == (seen.sums.rows, seen.sums.cols)
    assert sums.weights.shape == seen.sums.weights.shape
    layer.results = replace(seen, value_sums=sums, value_maxima=maxima)
    by_value(Recording([layer]), norms, exact, plainly(query, key, **request))


def test_an_older_recording_computes_them(tmp_path):
    """Without the maps, and with them: the same tiles."""
    made = regard.record(tiny(), ids(300), tmp_path / "r", values=True)
    tiles = [made.tile(0, 1, 2, 0, 0, reduce, by="value") for reduce in ("sum", "max")]
    for layer in made.layers:
        layer.results = replace(layer.results, value_sums=None, value_maxima=None)
    made.save(tmp_path / "old")
    old = Recording.load(tmp_path / "old")
    assert held(old.layer(0)) is None
    for tile, reduce in zip(tiles, ("sum", "max"), strict=True):
        torch.testing.assert_close(old.tile(0, 1, 2, 0, 0, reduce, by="value"), tile)
    (first,) = first_answers([tmp_path / "old"])
    assert first.tile(0, (1, 2, 0, 0), "sum", 0, "value") is None


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_they_are_answered_before_torch(reduce, tmp_path):
    made = regard.record(tiny(), ids(300), tmp_path / "r", values=True)
    (first,) = first_answers([tmp_path / "r"])
    data = first.tile(1, (3, 2, 0, 0), reduce, 0, "value")
    found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(128, 128)
    torch.testing.assert_close(found, made.tile(1, 3, 2, 0, 0, reduce, by="value"))


def test_without_values_or_observers_there_are_none(tmp_path):
    for more in ({}, {"values": True, "observe": False}):
        made = regard.record(tiny(), ids(20), tmp_path / "r", overwrite=True, **more)
        assert made.layer(0).results.value_sums is None


@pytest.mark.parametrize("name", MAPS)
def test_maps_of_another_shape_are_refused(name, tmp_path):
    regard.record(tiny(), ids(20), tmp_path / "r", values=True)

    def turned(header):
        shape = header[f"{name}.weights"]["shape"]
        shape[2:] = [shape[2] * shape[3], 1]

    rewritten(tmp_path / "r", turned)
    with pytest.raises(RegardError, match=rf"{FILE}.*{name}.weights is \(1, 4, 100, 1\)"):
        open_layer([tmp_path / "r" / FILE])
