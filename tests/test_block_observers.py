"""Blocks of keys under the log-sum-exp of all: compiled, they give what the second pass gives."""

from dataclasses import replace

import pytest
import torch

from cases import CASES, assert_within
from regard import Distances, Entropy, LogSumExp, Map, MaxScore, Received, Rows, TopK
from regard.call.checked import Call
from regard.call.geometry import Span
from regard.engines import tiled
from regard.engines.second_pass.weigh import weigh
from regard.ops.distributed.block_observers import read_block

OBSERVERS = (
    TopK(3), Received(), Distances(8), Entropy(), MaxScore(), Received(queries=(40, 90)), Map(9, 9),
    Map(70, 70, "max"), Map(3, 40), Rows([-1]), LogSumExp(), Received(heads="group_mean"),
)  # fmt: skip
NAMES = ("causal", "documents", "left padding", "sinks", "three biases", "softcap", "all at once")


def call_of(case, dtype) -> Call:
    tensors, request = case.exactly(torch.float32)
    request |= {"observe": OBSERVERS, "dropout": None}
    exact = Call.checked(*tensors, **request)
    if dtype == torch.float64:
        return exact
    return Call.checked(*case.tensors(dtype=dtype), **case.request(dtype) | request_of(request))


def request_of(request) -> dict:
    return {name: request[name] for name in ("observe", "dropout")}


def block_of(call: Call, start: int, stop: int) -> Call:
    """Some keys of a call."""
    span = Span(0, call.place.q_len, start, stop)
    place = replace(call.place, k_len=stop - start, key_start=call.place.key_start + start)
    return replace(
        call, key=call.key[:, :, start:stop], value=call.value[:, :, start:stop], place=place,
        program=call.program.part(span), biases=tuple(b.part(span) for b in call.biases),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_block_under_the_log_sum_exp_of_all_keys(name):
    case = next(c for c in CASES if c.name == name)
    exact, ours = call_of(case, torch.float64), call_of(case, torch.float32)
    lse = tiled.log_sum_exp(exact)
    length = ours.place.k_len
    for start, stop in ((0, length // 3), (length // 3, length // 2), (length // 2, length)):
        mine = read_block(block_of(ours, start, stop), lse.float())
        plain = weigh(block_of(ours, start, stop), lse.float(), shard=True)
        truth = weigh(block_of(exact, start, stop), lse, shard=True)
        for a, p, e in zip(mine, plain, truth, strict=True):
            for field, tensor in vars(e).items():
                if not isinstance(tensor, torch.Tensor) or field == "indices":
                    continue  # of equal weights any may be listed
                found = getattr(a, field)
                if tensor.is_floating_point():
                    assert_within(found, getattr(p, field), tensor)
                else:
                    assert torch.equal(found, tensor), field
