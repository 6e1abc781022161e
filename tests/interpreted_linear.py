"""What test_triton_linear.py has its workers do: processes in which Triton interprets its kernels.

Chunks of 16 tokens, the least there are, so that a short sequence takes several.
"""

from __future__ import annotations

from dataclasses import replace

import numpy
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

import interpreted  # noqa: F401  makes Triton's interpreter faster
import regard.ops.linear.triton.launch
import regard.ops.linear.triton.launch_bf16
from cases import Case, Sizes, assert_within, at, floats
from linear_cases import CASES, FORMS, gate, short
from regard import Documents, NoEngine, linear_attention
from regard.linear import LinearState
from regard.ops.linear.triton import engine as by_triton
from test_linear import answers, by, in_pieces, plainly, typical

regard.ops.linear.triton.launch.CHUNK = regard.ops.linear.triton.launch_bf16.CHUNK = 16
by_triton.DEVICE = "cpu"


def numbers(handle):
    """Its numbers: NumPy has no bfloat16, so that the interpreter holds its bits."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(numpy.uint32) << 16).view(numpy.float32)


def create_dot(self, a, b, d, *options):
    """Triton's interpreter multiplies the bits of bfloat16 as if they were integers."""
    product = numpy.matmul(numbers(a), numbers(b), dtype=d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def cast_impl(self, source, target):
    """Triton's interpreter cuts float32 off to bfloat16; a GPU rounds."""
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return cast(self, source, target)
    given = torch.from_numpy(numpy.ascontiguousarray(source.data))
    bits = given.bfloat16().view(torch.int16).numpy().view(numpy.uint16)
    return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)


cast = InterpreterBuilder.cast_impl
InterpreterBuilder.create_dot = create_dot
for name in ("create_fp_trunc", "cast_impl"):
    setattr(InterpreterBuilder, name, cast_impl)


def sized(name: str, sizes: Sizes) -> Case:
    """The shared case of that name, in other sizes."""
    return replace(next(c for c in CASES if c.name == name), sizes=sizes)


def check(name: str, sizes: Sizes, dtype: torch.dtype, back: bool) -> None:
    """Out, state and (back) all gradients within the bar of the twin in float64."""
    case = sized(name, sizes)
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    if not back:
        out, state = by("triton")(*tensors, **request)
        exactly, exact = case.exactly(dtype)
        truth, last = by("reference")(*exactly, **exact)
        plain, plain_last = plainly(*tensors, **request)
        assert out.dtype == dtype
        found = [(out, plain, truth)]
        if state is not None:
            found.append((state.memory, plain_last.memory.float(), last.memory))
        for ours, theirs, wanted in found:
            assert_within(ours, theirs.detach(), wanted, error=typical)
        return
    mine = answers(by("triton"), tensors, request)
    simple = answers(plainly, tensors, request)
    truths = answers(by("reference"), *case.exactly(dtype))
    assert mine[0][0].dtype == dtype
    for ours, theirs, exact in zip(mine, simple, truths, strict=True):
        for a, b, truth in zip(ours, theirs, exact, strict=True):
            more = 4 if truth.numel() < 16 else 1  # as in test_linear
            assert_within(a, b.to(a.dtype), truth, error=typical, roundings=more)


def pieces() -> None:
    """A sequence cut within chunks is the whole, and so are its gradients."""
    for form in ("elu, gated", "channel delta"):
        case = Case(form, at(41, batch=1, heads=2, kv_heads=1, dim=4), FORMS[form], layout=short)
        tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
        cut = answers(
            lambda *t, **r: in_pieces(*t, ends=[0, 3, 19, 41], engine="triton", **r),
            tensors, request,
        )  # fmt: skip
        whole = answers(by("reference"), *case.exactly(torch.float32))
        for ours, truths in zip(cut, whole, strict=True):
            for mine, truth in zip(ours, truths, strict=True):
                torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def same_bits() -> None:
    """Again, and for each item of the batch alone."""
    case = Case("", at(20, batch=2, heads=1, kv_heads=1, dim=4), FORMS["gated delta"], layout=short)
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    first, again = (answers(by("triton"), tensors, request) for _ in range(2))
    for ours, repeated in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(ours, repeated)
    out = linear_attention(*tensors, **request, engine="triton")
    for b in (0, 1):
        part = slice(b, b + 1)
        own = {k: v[part] if isinstance(v, Tensor) else v for k, v in request.items()}
        alone = linear_attention(*(t[part] for t in tensors), **own, engine="triton")
        assert torch.equal(alone, out[part])


def bad_numbers() -> None:
    """A NaN shows in its row, or from its value's chunk on; strong gates overflow nothing."""
    rng = torch.Generator().manual_seed(0)
    query, key, value = (floats(rng, 1, 1, 40, 4) for _ in range(3))
    decay = gate(rng, 1, 1, 40, 4)
    query[0, 0, 7, 1] = torch.nan
    out = linear_attention(query, key, value, feature_map=None, decay=decay, engine="triton")
    assert out.isnan().any(-1)[0, 0].nonzero().tolist() == [[7]]
    decay, query[0, 0, 7, 1], value[0, 0, 20, 1] = -300 * torch.ones(1, 1, 40), 0, torch.nan
    out = linear_attention(query, key, value, feature_map=None, decay=decay, engine="triton")
    assert out[0, 0, 20:, 1].isnan().all()
    alone = (query * key).sum(-1, keepdim=True) * value  # all other tokens have decayed
    torch.testing.assert_close(out[0, 0, :16], alone[0, 0, :16], rtol=1e-5, atol=1e-6)


def auto() -> None:
    """`auto` takes the kernels where they can, torch where not; the ops are as they are described.

    Named, they refuse.
    """
    ran, forward = [], by_triton.forward
    by_triton.forward = lambda ready, flow: ran.append(flow) or forward(ready, flow)
    query = torch.randn(1, 2, 6, 4)
    try:
        linear_attention(query, query, query)
        assert len(ran) == 1
        linear_attention(query.double(), query.double(), query.double())
        linear_attention(query, query, query, causal=False)
        linear_attention(query[:, :, :3], query[:, :, :3], query[:, :, :3])  # decoding
        assert len(ran) == 1
        packed = Documents(torch.tensor([0, 0, 1, 1, 1, 2]))
        linear_attention(query, query, query, causal=False, mask=packed)
        assert len(ran) == 2
    finally:
        by_triton.forward = forward
    refused = ""
    try:
        linear_attention(query, query, query, causal=False, engine="triton")
    except NoEngine as error:
        refused = str(error)
    assert refused.endswith("causal is False: one sum over all keys has no chunks to walk")
    given = (query, query, query, None, torch.rand(1, 2, 6), torch.zeros(1, 2, 4, 4))
    torch.library.opcheck(
        torch.ops.regard.linear_triton.default, (*given, True, 1.0),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    grads = (torch.randn_like(query), torch.zeros(1, 2, 4, 4))
    torch.library.opcheck(
        torch.ops.regard.linear_triton_backward.default, (*given, *grads, True, 1.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def states() -> None:
    """The state is the twin's, document and length included."""
    query = torch.randn(2, 2, 20, 4)
    ids = torch.arange(20) // 8
    request = {"mask": Documents(ids), "return_state": True}
    _, ours = linear_attention(query, query, query, **request, engine="triton")
    _, truth = linear_attention(query, query, query, **request, engine="reference")
    assert isinstance(ours, LinearState)
    assert ours.length == truth.length == 20
    assert torch.equal(ours.document, truth.document)
    torch.testing.assert_close(ours.memory, truth.memory)
    torch.testing.assert_close(ours.normaliser, truth.normaliser)
