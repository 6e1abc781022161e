"""Numbers of a call go through registered ops and into files as their fields say."""

import json

import pytest
import torch

from regard import Causal, Dropout
from regard.call.checked import Call
from regard.call.op_schema import DEFAULTS, NUMBERS, pack, unpack
from regard.capture import chunk_json
from regard.capture.recorded_layer import Chunk
from regard.capture.saved_files import Fields

QUERY = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "request_",
    [{}, {"softcap": 2.0, "scale": 0.0}, {"dropout": Dropout(0.5, 3), "query_start": 7}],
    ids=["none", "scores", "others"],
)
def test_a_call_comes_back(request_):
    call = Call.checked(QUERY, QUERY, QUERY, mask=Causal(), **request_)
    back = unpack(QUERY, QUERY, QUERY, *pack(call))
    for name in ("scale", "softcap", "place"):
        assert getattr(back, name) == getattr(call, name), name
    assert back.program.code == call.program.code
    assert (back.dropout is None) == (call.dropout is None)
    if call.dropout is not None:
        assert back.dropout.p == call.dropout.p
        assert torch.equal(back.dropout.seed, call.dropout.seed)


def test_a_file_older_than_a_number_has_its_default(monkeypatch):
    call = Call.checked(QUERY, QUERY, None)
    chunk, tensors = Chunk(QUERY, QUERY[..., 0], pack(call), (0, 5)), {"key": QUERY}
    said = json.loads(json.dumps(chunk_json.to_json(chunk, 0, tensors)))
    monkeypatch.setitem(NUMBERS, "tilt", "float")
    with pytest.raises(ValueError, match="has no tilt"):
        chunk_json.from_json(Fields(said, "chunk"), 0, tensors)
    monkeypatch.setitem(DEFAULTS, "tilt", 0.5)
    assert chunk_json.from_json(Fields(said, "chunk"), 0, tensors).packed == (*chunk.packed, 0.5)
