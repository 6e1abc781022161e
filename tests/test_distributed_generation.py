"""`generate()` over ranks: the tokens, and all that observers see, are those of one process."""

import pytest
import torch

from distributed_generation import alone, prompt
from distributed_jobs import numbers_of, tensors_of

JOBS = "distributed_generation"
NEAR = {"rtol": 1e-8, "atol": 1e-10}


def assert_same(mine, exact) -> None:
    """Every result of every layer."""
    assert len(mine) == len(exact) > 0
    for ours, theirs in zip(mine, exact, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert numbers_of(a) == numbers_of(b)
            for name, tensor in tensors_of(a).items():
                torch.testing.assert_close(tensor, tensors_of(b)[name], **NEAR)


@pytest.mark.parametrize("size, order, length", [
    (2, "zigzag", 41),
    pytest.param(3, "plain", 260, marks=pytest.mark.slow),  # beyond the window of 200
    pytest.param(4, "zigzag", 10, marks=pytest.mark.slow),  # a rank holds two tokens
])  # fmt: skip
def test_tokens_and_results_are_those_of_one_process(ranks, size, order, length):
    tokens, results = alone(length)
    answers = ranks.all(size, f"{JOBS}.generated", length, order)
    for mine, seen, _ in answers:
        assert torch.equal(mine, tokens)
        assert_same(seen, results)
    held = [sum(keys) for _, _, keys in answers]
    assert sum(held) == len(results) * (tokens.shape[1] - 1)  # each key lies on one rank


def test_unwatched_and_drawn_alike(ranks):
    tokens, _ = alone(20)
    for mine in ranks.all(2, f"{JOBS}.unwatched", 20):
        assert torch.equal(mine, tokens)
    first, second = ranks.all(2, f"{JOBS}.drawn", 20)
    assert torch.equal(first, second)
    assert first.shape[1] == prompt(20)["input_ids"].shape[1] + 5


REFUSED = {
    "outside": "call it inside context_parallel",
    "one token": "at least two tokens",
    "too short": "leaves one of 2 ranks without any",
    "other tokens": "go on from different tokens",
    "beams": "num_beams=1",
    "kept": "without keep_qk",
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_cannot_be_done_is_said_in_every_rank(ranks, what):
    for said in ranks.all(2, f"{JOBS}.refused", what):
        assert REFUSED[what] in said
