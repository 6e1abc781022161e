"""Effect by Triton, interpreted, on the shared cases against the closed form in float64."""

import pytest
import torch

from regard import Causal, Effect, RegardError, TopK, explain
from regard.call.checked import Call
from regard.engines.second_pass.triton import effect as measuring

# Every instruction of a mask is tested in test_triton.py, by the same function
CHOSEN = [
    "full", "an item of padding", "predicate by head", "block sparse", "edges", "nothing", "alibi",
    "relative", "bias that hides", "two biases", "softcap", "sinks alone", "dropout",
    "all at once, v_dim 5", "placed dropout", "placed", "40 × 3", "sliced", "6 heads of 2",
]  # fmt: skip
NARROW = ["dim 24, v_dim 1", "dim 32, v_dim 40", "alibi of 6 heads"]


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where, jobs = "interpreted_effect", {}
    for n, name in enumerate(CHOSEN):
        k, blocks = ((3, (64, 64)), (5, (32, 32)), (1, (16, 128)))[n % 3 if n % 5 == 0 else 0]
        jobs[name] = (where, "check", name, torch.float32, k, blocks)
    for n, name in enumerate(NARROW):
        dtype = (torch.float16, torch.bfloat16)[n % 2]
        jobs[f"{name} {dtype}"] = (where, "check", name, dtype, 3, (32, 32))
    for name in ("alone_and_ties", "nearly_alone", "bad_numbers", "inside_attention"):
        jobs[name] = (where, name)
    return jobs


JOBS = jobs()


@pytest.mark.sample(0)
@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


def test_says_what_it_cannot_measure():
    query, value = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 300)
    call = Call.checked(query, query, value)
    assert measuring.refuses(Effect(65), call) == [
        "Effect(k=65, norm=False) is longer than the 64 that registers hold",
        "v_dim is 300; it takes 1 to 256",
    ]
    call = Call.checked(query, query, query)
    assert measuring.refuses(Effect(2, norm=True), call) == [
        "Effect(k=2, norm=True) is of several scalars; it measures one"
    ]
    assert measuring.refuses(Effect(64), call) == []
    said = explain(query, query, query, observe=[TopK(1), Effect(65)], mask=Causal())
    assert said["second pass by triton"] == [
        "query is on cpu; the kernel runs on cuda",
        "Effect(k=65, norm=False) is longer than the 64 that registers hold",
    ]
    lse = torch.zeros(1, 2, 5)
    with pytest.raises(RegardError, match=r"cannot measure .* float64; .*k=65"):
        measuring.effect(Call.checked(query.double(), query.double(), None), lse, query, 65, query)
