"""As test_hidden, on CUDA: what a hidden NaN spoils in PyTorch's kernels is mended, interpreted.

Without a GPU: plain torch stands in for PyTorch's kernels. What their backward kernels are handed
is compared with what autograd hands them.
"""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from regard import Causal, Padding, Window, explain
from regard.call.checked import Call
from regard.engines import sdpa, sdpa_cuda, sdpa_op
from regard.engines.blocks import launch as blocks
from test_gpu_engines import HOPPER, call_of


def jobs() -> dict[str, tuple]:
    """What the workers do: (module, function, arguments)."""
    where = "interpreted_hidden"
    names = (
        "the future", "padding", "window", "documents", "by head", "a bias of −∞", "square causal"
    )  # fmt: skip
    types = (torch.float32, torch.bfloat16, torch.float16)
    found = {
        f"unseen: {name}": (where, "unseen", name, types[n % 3], 1 + n % 2)
        for n, name in enumerate(names)
    }
    for n, name in enumerate(("square causal", "the future", "a bias of −∞", "window")):
        for part in (2, n % 2):
            found[f"partly: {name}, {part}"] = (where, "partly", name, part)
    found["clean"] = (where, "clean")
    found["compiled"] = (where, "compiled")
    forwards = ("full", "documents", "longformer", "softcap and bias", "sinks and window", "alibi")
    for n, name in enumerate((*forwards, "dim 80, v_dim 80", "transposed")):
        tile = ((16, 32), (32, 16), (64, 64))[n % 3]
        found[f"forward: {name}"] = (where, "forward", name, types[n % 3], tile)
    found["pages: as many as keys"] = (where, "pages", 70, 16, [70, 70])
    found["pages: more than few"] = (where, "pages", 20, 48, [21, 130])
    return found


JOBS = jobs()


@pytest.mark.sample(0)
@pytest.mark.triton
@pytest.mark.parametrize("job", JOBS)
def test_interpreted(job, interpreting):
    assert not interpreting(JOBS[job])


class Handed(TorchDispatchMode):
    """Keeps what each backward kernel of PyTorch is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention_backward" in str(func):
            self.given.append((str(func), *args, kwargs))
        return func(*args, **(kwargs or {}))


def described(given: tuple) -> list:
    return [
        (g.shape, g.stride(), g.dtype) if isinstance(g, torch.Tensor) and g.numel() > 2 else
        (g.shape, g.dtype) if isinstance(g, torch.Tensor) else g
        for g in given
    ]  # fmt: skip


KEPT = torch.ones(2, 48, dtype=torch.bool, device="meta")
REQUESTS = {
    "causal": {"mask": Causal()},
    "grouped": {"mask": Causal(), "kv_heads": 2},
    "window": {"mask": Window(5)},
    "padding, grouped": {
        "mask": Padding(torch.ones(2, 48, dtype=torch.bool, device="meta")),
        "kv_heads": 2,
    },
    "narrow values": {"mask": Causal(), "v_dim": 32},
    "single": {"mask": Causal(), "dtype": torch.float32},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_backward_kernels_are_handed_what_autograd_hands_them(name):
    """To the shape, the strides and the type, for each of PyTorch's kernels."""
    request = dict(REQUESTS[name])
    given = call_of(request.pop("dtype", torch.bfloat16), **request)
    able = [k for k in sdpa_cuda.preference(HOPPER) if not k.why_not(given, HOPPER)]
    assert sdpa_cuda.EFFICIENT in able
    for kernel in able:
        leaves = [t.requires_grad_() for t in (given.query, given.key, given.value)]
        laid = kernel.mask(given)
        with Handed() as handed:
            out, _ = kernel.forward(given, laid)
            grads = torch.autograd.grad(out, leaves, torch.empty_like(out))
        with torch.no_grad():
            out, lse = kernel.forward(given, laid)
        with Handed() as ours:
            mine = kernel.backward(given, laid, out, lse.contiguous(), torch.empty_like(out))
        wanted, found = (described(m.given[0]) for m in (handed, ours))
        # But for the strides of the output, which is filled with 0 where a row sees nothing
        place = 6 if kernel is sdpa_cuda.EFFICIENT else 5
        assert found[place][::2] == wanted[place][::2], kernel.name
        del found[place], wanted[place]
        assert found == wanted, kernel.name
        assert [g.shape for g in mine] == [g.shape for g in grads]


def test_the_last_query_has_nothing_hidden():
    """So that flash takes it, and nobody looks through what comes out."""
    one = torch.zeros(1, 2, 1, 16)
    key = torch.zeros(1, 2, 40, 16)
    last = Call.checked(one, key, key, mask=Causal())
    assert sdpa.in_order(last).program.full
    assert not blocks.mendable(last)
    earlier = Call.checked(one, key, key, mask=Causal(), query_start=38)
    assert sdpa.in_order(earlier).program is earlier.program
    assert blocks.mendable(earlier) or "triton" in blocks.refusals(earlier)[0]


def test_explain_says_who_mends():
    tensors = [torch.zeros(1, 2, 40, 16).bfloat16() for _ in range(3)]
    with (
        patch.object(sdpa_cuda, "serves", lambda call: True),
        patch.object(sdpa, "capability", lambda call: HOPPER),
        patch.object(blocks, "refusals", lambda call: []),
        patch("regard.engines._device", lambda call: "cuda"),
    ):
        (said,) = explain(*tensors, mask=Causal())["hidden"]
        assert said.startswith("sdpa multiplies what is hidden by 0: blocks of rows")
        assert "hidden" not in explain(tensors[0][:, :, :1], *tensors[1:], mask=Causal())
        with patch.object(blocks, "refusals", lambda call: ["it cannot"]):
            (said,) = explain(*tensors, mask=Causal())["hidden"]
        assert said.endswith("the kernel that would mend them cannot: it cannot")
        needed = [t.clone().requires_grad_() for t in tensors]
        assert sdpa_op.wanted(Call.checked(*needed, mask=Causal()))
        assert not sdpa_op.wanted(Call.checked(*tensors, mask=Causal()))
        assert not sdpa_op.wanted(Call.checked(*needed))
