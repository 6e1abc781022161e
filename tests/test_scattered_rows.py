"""Queries that lie anywhere, asked for together: as exact as one by one, in one reading of keys."""

import pytest
import torch

from cases import FEW, assert_within
from regard import Causal, Recording
from regard.capture import recorded_layer
from regard.capture.recorded_layer import RecordedLayer
from test_recording import LONG, computed, plainly, recorded, steps


def scattered(n):
    """The last, some that follow each other, one twice."""
    return [n - 1, *range(min(3, n)), n // 2, n - 1]


@pytest.mark.sample(every=8)
@pytest.mark.parametrize("case", FEW[::2], ids=str)
def test_every_kind_of_call(case):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, exact = computed(query, key, **request)
    if not (case.sizes.batch and call.place.q_len):
        return
    rows = scattered(call.place.q_len)
    plain = plainly(query, key, **request)
    recording = Recording([recorded((call, lse))])
    for b in range(case.sizes.batch):
        found = recording.weights(0, rows=rows, batch=b)
        assert_within(found, plain[b][:, rows], exact[b][:, rows])


def test_of_a_prefill_and_steps():
    """Rows of several calls, in the order in which they are asked for."""
    query, key, _ = LONG.tensors()
    whole = computed(query, key, mask=Causal())[2]
    recording = Recording([recorded(*steps([20, 21, 22, 40], mask=Causal()))])
    rows = [*scattered(query.shape[2]), -2]
    torch.testing.assert_close(
        recording.weights(0, rows=rows, batch=1).double(), whole[1][:, rows], rtol=1e-5, atol=1e-6
    )


def test_keys_are_read_once(tmp_path, monkeypatch):
    """However many rows: one call, of whose file the keys are filled in one time."""
    query, key, _ = LONG.tensors()
    made = Recording([recorded(computed(query, key, mask=Causal())[:2])])
    made.save(tmp_path / "r")
    opened, asked = Recording.load(tmp_path / "r"), []
    whole, loaded = RecordedLayer.call, recorded_layer.loaded

    def call(*given):
        asked.append("call")
        return whole(*given)

    def load(tensor, parts):
        asked.extend("keys" for part in parts if part[2] == slice(None))  # of queries: one each
        return loaded(tensor, parts)

    monkeypatch.setattr(RecordedLayer, "call", call)
    monkeypatch.setattr(recorded_layer, "loaded", load)
    rows = list(range(0, query.shape[2], 3))
    found = opened.weights(0, rows=rows)
    assert sorted(asked) == ["call", "keys"]
    torch.testing.assert_close(found, made.weights(0)[:, rows])
