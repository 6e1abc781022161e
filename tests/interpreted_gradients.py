"""What test_triton_gradients.py has its workers do, in which Triton interprets its kernels."""

from __future__ import annotations

from itertools import pairwise

import torch

from cases import plain
from interpreted import case_of
from regard.call.checked import Call
from regard.engines.second_pass.triton import gradients
from test_block_observers import block_of


def check(name: str, dtype: torch.dtype, blocks: tuple[int, int]) -> None:
    """Two parts of a call's keys, under the log-sum-exp and D of all, against float64."""
    case = case_of(name)
    request = case.request(dtype)
    exact = [t.to(dtype).double().requires_grad_() for t in case.tensors(dtype=dtype)]
    out, lse = plain(*exact, **case.request(torch.float64))
    rng = torch.Generator().manual_seed(1)
    g = torch.randn(out.shape, generator=rng).to(dtype)
    h = torch.randn(lse.shape, generator=rng)
    seen = lse.masked_fill(lse == -torch.inf, 0)
    ((out * g.double()).sum() + (seen * h.double()).sum()).backward()
    delta = ((out.detach() * g.double()).sum(-1) - h.double()).float()
    call = Call.checked(*case.tensors(dtype=dtype), **request)
    length = call.place.k_len
    edges = sorted({0, length // 3 // 4 * 4, length})
    parts = [
        gradients.part_backward(block_of(call, a, b), lse.detach().float(), g, delta,
                                [False] * len(call.biases), blocks)
        for a, b in pairwise(edges)
    ]  # fmt: skip
    d_query = sum(part[0] for part in parts)
    d_key, d_value = (torch.cat([part[n] for part in parts], 2) for n in (1, 2))
    near = 2e-4 if dtype == torch.float32 else 2e-2
    for ours, tensor in zip((d_query, d_key, d_value), exact, strict=True):
        assert ours.dtype == torch.float32
        bound = near * max(float(tensor.grad.abs().amax()), 1)
        torch.testing.assert_close(ours.double(), tensor.grad, rtol=near, atol=bound)
