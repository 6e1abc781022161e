"""Gradients of parts of a call by Triton, interpreted, on the shared cases against float64."""

import pytest
import torch

from regard import ALiBi, Causal, RegardError
from regard.call.checked import Call
from regard.engines import tiled
from regard.engines.second_pass.triton import gradients
from regard.ops.distributed.parts import engine_of

# Every instruction of a mask is tested in test_triton.py, by the same function
CHOSEN = ["predicate by head", "softcap", "dropout", "placed", "two biases"]


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    found = {}
    for n, name in enumerate(CHOSEN):
        blocks = ((32, 32), (16, 64), (64, 16))[n % 3]
        found[name] = ("interpreted_gradients", "check", name, torch.float32, blocks)
    name = "dim 32, v_dim 40"
    found[f"{name} bfloat16"] = ("interpreted_gradients", "check", name, torch.bfloat16, (32, 32))
    return found


JOBS = jobs()


@pytest.mark.sample(0)
@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


def test_says_what_it_cannot_compute():
    query, value = torch.zeros(1, 2, 5, 16), torch.zeros(1, 2, 5, 300)
    slopes = torch.ones(2, requires_grad=True)
    call = Call.checked(query, query, value, mask=Causal(), bias=ALiBi(slopes))
    assert gradients.why_not(call)[-2:] == [
        "a bias needs gradients; it gives none",
        "v_dim is 300; it takes 1 to 256",
    ]
    wide = Call.checked(query.double(), query.double(), query.double())
    with pytest.raises(RegardError, match=r"give no gradients of .* float64"):
        gradients.part_backward(wide, query[..., 0], query, query[..., 0], [])


def test_who_computes_a_part_is_said_by_the_device():
    on_gpu = Call.checked(*torch.zeros(3, 1, 2, 5, 16, device="meta").unbind())
    assert engine_of(on_gpu) is tiled  # neither a CPU nor CUDA
