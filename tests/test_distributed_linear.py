"""Linear attention over ranks: a state that is handed on gives what one process gives."""

import pytest
import torch

JOBS = "distributed_jobs"
NEAR = {"rtol": 1e-8, "atol": 1e-10}


@pytest.mark.parametrize("kind", ["decay", "beta", "documents", "long keys"])
def test_linear_attention_hands_its_state_from_rank_to_rank(ranks, kind):
    for size in (2, 3):
        mine, exact = ranks.run(size, f"{JOBS}.linear", kind)
        for a, b in zip(mine, exact, strict=True):
            torch.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("name, why", [
    ("observe", "gather the sequence by regard.distributed.unshard"),
    ("return_state", "it lies on the last rank"), ("causal", "is causal"),
])  # fmt: skip
def test_what_is_not_taken_is_refused_with_a_reason(ranks, name, why):
    for said in ranks.all(2, f"{JOBS}.linear_refused", name):
        assert why in said
