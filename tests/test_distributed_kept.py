"""`watch(keep_qk=True)` over ranks: each keeps its part, and the first reads the whole."""

import pytest
import torch

import regard
from distributed_recordings import DIM, KV_HEADS, LENGTH, inputs, model

JOBS = "distributed_recordings"


@pytest.mark.parametrize("size, how, most", [
    (2, "ring", 2**30), pytest.param(3, "gather", 1, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_first_rank_reads_what_all_kept_and_holds_its_part(ranks, size, how, most):
    made = model()
    with torch.no_grad(), regard.watch(made, observe=[regard.TopK(3)], keep_qk=True) as seen:
        made(**inputs())
    exact = seen.recording()
    (first, *rows), *others = ranks.all(size, f"{JOBS}.kept", how, most)
    assert list(first) == list(range(len(exact.layers)))
    for layer, weights in first.items():
        torch.testing.assert_close(weights, exact.weights(layer), rtol=1e-6, atol=1e-7)
    for gathered, shapes, left in (rows, *(rest for _, *rest in others)):
        for layer, mine in enumerate(gathered):
            torch.testing.assert_close(mine, seen.layers[layer].seen[0].weights)
        whole = {s for s in shapes if len(s) == 4 and s[2] == LENGTH and s[3] in (DIM, 2 * DIM)}
        assert {s[1] for s in whole} <= ({1} if how == "gather" else set())
        assert any(len(s) == 4 and s[1] == KV_HEADS and s[3] == DIM for s in shapes)
        assert not left  # what is mapped needs no name
    for said, *_ in others:
        assert said == "what ranks kept is read in the first of them; make it there"


def test_ranks_that_share_no_folder_bring_it_together(ranks):
    (first, *_), *_ = ranks.all(2, f"{JOBS}.kept_apart")
    made = model()
    with torch.no_grad(), regard.watch(made, keep_qk=True) as seen:
        made(**inputs())
    for layer, weights in first.items():
        torch.testing.assert_close(weights, seen.recording().weights(layer), rtol=1e-6, atol=1e-7)
