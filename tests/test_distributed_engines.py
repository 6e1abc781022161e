"""Gather and ring under every engine: gradients of one process; `explain` says whose they are."""

import pytest
import torch

from cases import assert_within
from distributed_jobs import BY_NAME, plainly

JOBS = "distributed_jobs"


@pytest.mark.parametrize("how", ["gather", "ring"])
@pytest.mark.parametrize("engine", ["reference", "sdpa", "cpu", "tiled"])
def test_gradients_of_a_named_engine(ranks, engine, how):
    dtype = torch.float32
    mine, said = ranks.run(2, f"{JOBS}.by_engine", "causal", how, engine, dtype)
    case = BY_NAME["causal"]
    exact, plain = plainly(case, dtype, torch.float64), plainly(case, dtype)
    for ours, p, e in zip(mine, plain, exact, strict=True):
        assert_within(ours, p, e)
    assert len(said) == 1
    assert said[0].startswith("by engine cpu, whichever computes the forward")


def test_in_float64_they_are_those_of_plain_torch(ranks):
    _, said = ranks.run(2, f"{JOBS}.by_engine", "causal", "ring", "reference")
    assert said[0].startswith("by engine tiled")
