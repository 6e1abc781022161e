"""What ranks send is what docs/distributed.md and `explain` say, counted at the collectives."""

import pytest
import torch

from regard import NormTopK, Received, TopK
from regard.ops.distributed import formulas

JOBS = "distributed_jobs"


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("how", ["heads", "gather", "ring"])
def test_forward_and_backward(ranks, how, size, dtype):
    for ahead, back, sizes in ranks.all(size, f"{JOBS}.counted", how, dtype, None, True):
        assert ahead == formulas.header(sizes) + formulas.forward(how, sizes)
        assert back == formulas.backward(how, sizes)


def test_observers(ranks):
    """Rows send nothing; what keys receive is summed; the ring sends its keys again."""
    asked = [TopK(2), Received()]
    for how in ("heads", "gather", "ring"):
        for ahead, _, sizes in ranks.all(2, f"{JOBS}.counted", how, torch.float32, asked, False):
            more = ahead - formulas.header(sizes) - formulas.forward(how, sizes)
            ring = formulas.second_ring(sizes) if how == "ring" else 0
            assert more == ring + (0 if how == "heads" else formulas.received(sizes))
    norms = [NormTopK(2)]
    for ahead, _, sizes in ranks.all(2, f"{JOBS}.counted", "ring", torch.float32, norms, False):
        assert ahead == formulas.header(sizes) + 2 * formulas.forward("ring", sizes)
