"""Some rows of a long call: the same weights as in the whole, for no more work than theirs."""

import pytest
import torch

import regard
from regard.call.checked import Call
from regard.call.mask_program import Program
from regard.engines.second_pass.weigh import whole_rows

N = 700
IDS = (torch.arange(N) // 90)[None]
MASKS = {
    "causal": regard.Causal(),
    "window": regard.Causal() & (regard.Window(33) | regard.First(4)),
    "documents": regard.Documents(IDS) & regard.Causal(),
    "edges": regard.Causal() & ~regard.Edges([(500, 3), (501, 400), (699, 0)]),
    "predicate": regard.Predicate(lambda b, h, q, k: (q * 7 + k) % 5 > 0),
    "padding": regard.Padding(torch.arange(N)[None] > 40) & regard.Causal(),
    "dense": regard.Dense(torch.rand(1, 2, N, N, generator=torch.Generator().manual_seed(0)) > 0.3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rows_are_those_of_the_whole_and_ask_for_no_other_tiles(mask, monkeypatch):
    query, key = torch.randn(2, 1, 2, N, 16).unbind()
    call = Call.checked(query, key, key, mask=mask)
    _, (lse,) = regard.attention(query, key, key, mask=mask, observe=[regard.LogSumExp()])
    whole = whole_rows(call, lse.values, (0, N))
    asked, classes = [], Program.classes
    monkeypatch.setattr(
        Program, "classes", lambda self, *of: asked.append(self.q_len) or classes(self, *of)
    )
    for first, last in ((0, 1), (255, 257), (300, 301), (511, 600), (699, 700)):
        found = whole_rows(call, lse.values, (first, last))
        torch.testing.assert_close(found, whole[:, :, first:last], rtol=1e-6, atol=1e-8)
    assert len(asked) == 5
    assert max(asked) <= 512
