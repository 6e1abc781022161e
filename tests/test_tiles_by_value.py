"""Tiles of weight · ‖W_O v‖ at every zoom, against the definition in float64."""

import pytest
import torch

import regard
from cases import FEW, Case, assert_within, at
from recorded_truths import kept
from regard import Causal, Recording, RegardError
from test_record import ids, tiny
from test_recording import computed, plainly, recorded
from test_tiles import tiles_of


def by_value(recording, norms, exact, plain, layer=0):
    """All tiles of all zooms, of both kinds, against weights times norms (batch, heads, keys)."""
    for b, norm in enumerate(norms):
        truth, near = exact[b] * norm.double()[:, None], plain[b] * norm[:, None]
        for zoom in range(recording.zooms(layer)):
            side = 128 << zoom
            rows, cols = (-(-n // side) + 1 for n in truth.shape[1:])
            asked = [
                (h, zoom, r, c) for h in range(len(truth)) for r in range(rows) for c in range(cols)
            ]
            for reduce in ("sum", "max"):
                found = recording.tiles(layer, asked, reduce, b, "value")
                theirs, wanted = (tiles_of(of, asked, reduce) for of in (near, truth))
                assert_within(found, theirs, wanted)


def drawn_norms(layer):
    """Norms of all sizes, and of 0, for the keys of a layer, which keeps them."""
    drawn = torch.Generator().manual_seed(3)
    norms = torch.rand(layer.batch, layer.heads, layer.k_len, generator=drawn).mul(8).exp()
    norms[..., :2] = 0
    layer.norms = [(layer.key_start, norms)]
    return norms


@pytest.mark.sample(every=9)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kind_of_call(case):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, exact = computed(query, key, **request)
    layer = recorded((call, lse))
    norms = drawn_norms(layer)
    if case.sizes.batch:
        by_value(Recording([layer]), norms, exact, plainly(query, key, **request))


def test_of_a_recorded_model(tmp_path):
    recording = regard.record(tiny(), ids(300), tmp_path / "r", values=True, dtype=None)
    assert recording.valued
    for layer in (0, 1):
        exact, plain = (of.weights for of in kept(recording.layer(layer)))
        by_value(recording, recording.layer(layer).norm, exact, plain, layer)
    one = recording.tile(0, 1, 0, 0, 0, by="value")
    torch.testing.assert_close(one, recording.norm_weights(0, 1)[:128, :128])


def test_without_values_it_says_so():
    query, key, _ = Case("", at(40, heads=2, kv_heads=1)).tensors()
    recording = Recording([recorded(computed(query, key, mask=Causal())[:2])])
    assert not recording.valued
    with pytest.raises(RegardError, match=r"keeps no values; record with values=True"):
        recording.tile(0, 0, 0, 0, 0, by="value")
    with pytest.raises(RegardError, match="by is 'length'; give 'weight', 'value' or 'effect'"):
        recording.tile(0, 0, 0, 0, 0, by="length")
