"""Engine cpu on drawn calls: against float64, its gradients and observers; and its promise of bits.

Hypothesis draws shapes, layouts, dtypes, masks of the whole algebra, biases, placements and the
size of the numbers, denormal to huge; and where one number is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from cases import (
    Case,
    Sizes,
    bools,
    floats,
    ids,
    mapped,
    plain,
    shared_by_the_batch,
    sliced,
    transposed,
)
from observer_truths import Bar, assert_seen, parts, watchers
from regard import (
    ALiBi,
    Causal,
    Dense,
    Distances,
    Documents,
    Dropout,
    Edges,
    Entropy,
    First,
    Full,
    Heads,
    Map,
    Mask,
    Padding,
    Predicate,
    Received,
    RelativeBias,
    TopK,
    Window,
    attention,
)  # fmt: skip
from regard.call.checked import Call
from regard.engines import reference
from regard.engines.cpu import engine as cpu
from regard.engines.cpu import native
from regard.sparse import BlockSparse, Chunks, Dilated, Fixed, Strided
from test_gradients import by, gradients, typical

pytestmark = pytest.mark.skipif(not native.AVAILABLE, reason="built without the compiled kernels")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": transposed,
    "sliced": sliced,
    "expanded": shared_by_the_batch,
    "inside": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1), value=torch.nan)[
        ..., 3 : t.shape[2] + 3, 1 : t.shape[3] + 1
    ],
}


@dataclass(frozen=True)
class Drawn:
    """A case (cases.Case) in numbers that hypothesis can show and shrink."""

    sizes: Sizes
    mask: tuple
    biases: tuple[tuple, ...]
    options: dict[str, Any]
    layout: str
    magnitude: float  # of the queries
    denormal: bool  # the values: their mix has no normal number

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        query, key, value = Case("", self.sizes, magnitude=self.magnitude).tensors()
        if self.denormal:
            value = value * torch.finfo(dtype).tiny
        return [LAYOUTS[self.layout](t.to(dtype)) for t in (query, key, value)]

    def request(self, dtype: torch.dtype) -> dict[str, Any]:
        """Mask, biases and the rest, as `attention` takes them."""
        s, rng, given = self.sizes, torch.Generator().manual_seed(1), dict(self.options)
        first = given.get("key_start", 0)
        start = given.get("query_start", first + s.k_len - s.q_len), first
        given["mask"] = mask_of(self.mask, s, rng, start)
        if given.pop("sinks", False):
            given["sinks"] = floats(rng, s.heads)
        if self.biases:
            given["bias"] = [bias_of(b, s, rng) for b in self.biases]
        return mapped(given, lambda t: t.to(dtype))

    def exactly(self, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        """Tensors and request as rounded to dtype, in float64: what the truth is computed from."""
        tensors = [t.double() for t in self.tensors(dtype)]
        return tensors, mapped(self.request(dtype), lambda t: t.double())


def mask_of(tree: tuple, s: Sizes, rng: Generator, start: tuple[int, int]) -> Mask:
    """A tree of masks, such as ("&", ("causal",), ("window", 3, 0))."""
    kind, *rest = tree
    if kind in ("&", "|"):
        left, right = (mask_of(t, s, rng, start) for t in rest)
        return left & right if kind == "&" else left | right
    if kind == "~":
        return ~mask_of(rest[0], s, rng, start)
    offset = torch.tensor(start)
    leaves = {
        "full": lambda: Full(),
        "causal": lambda: Causal(),
        "window": lambda n, ahead: Window(n, ahead),
        "first": lambda n: First(n),
        "dilated": lambda n, step: Dilated(n, step),
        "strided": lambda n: Strided(n),
        "fixed": lambda n: Fixed(n, 1),
        "chunks": lambda n: Chunks(n),
        "documents": lambda shared: Documents(
            ids(rng, *(() if shared else (s.batch,)), s.q_len),
            ids(rng, *(() if shared else (s.batch,)), s.k_len),
        ),
        "padding": lambda shared: Padding(bools(rng, *(() if shared else (s.batch,)), s.k_len)),
        "edges": lambda n: Edges(torch.randint(-3, 200, (n, 2), generator=rng) + offset),
        "heads": lambda bits: Heads([h for h in range(s.heads) if bits >> h & 1]),
        "dense": lambda *one: Dense(bools(rng, *_sizes(s, one))),
        "blocks": lambda n: BlockSparse(
            bools(rng, 1, s.heads, _blocks(start[0], s.q_len, n), _blocks(start[1], s.k_len, n)), n
        ),
        "predicate": lambda n: Predicate(lambda b, h, q, k: (q * 3 + k * k + h) % n < n - 1),
    }  # fmt: skip
    return leaves[kind](*rest)


def _sizes(s: Sizes, one: tuple[bool, ...]) -> list[int]:
    sizes = (s.batch, s.heads, s.q_len, s.k_len)
    return [1 if single else size for single, size in zip(one, sizes, strict=True)]


def _blocks(start: int, length: int, size: int) -> int:
    return (start + length - 1) // size - start // size + 1 if length else 0


def bias_of(kind: tuple, s: Sizes, rng: Generator) -> Any:
    name, *rest = kind
    if name == "alibi":
        return ALiBi()
    if name == "relative":
        return RelativeBias(floats(rng, rest[0], s.heads), bidirectional=rest[1])
    bias = floats(rng, *_sizes(s, tuple(rest[1:])))
    return bias.masked_fill(bools(rng, *bias.shape, share=0.2), -torch.inf) if rest[0] else bias


ANY = st.booleans()
LEAVES = st.one_of(
    st.sampled_from([("full",), ("causal",), ("causal",)]),
    st.tuples(st.just("window"), st.integers(1, 200), st.integers(0, 9)),
    st.tuples(st.just("first"), st.integers(0, 200)),
    st.tuples(st.just("dilated"), st.integers(1, 20), st.integers(1, 9)),
    st.tuples(st.sampled_from(["strided", "fixed"]), st.integers(2, 40)),
    st.tuples(st.just("chunks"), st.integers(1, 100)),
    st.tuples(st.sampled_from(["documents", "padding"]), ANY),
    st.tuples(st.just("edges"), st.integers(0, 20)),
    st.tuples(st.just("heads"), st.integers(0, 255)),
    st.tuples(st.just("dense"), ANY, ANY, ANY, ANY),
    st.tuples(st.just("blocks"), st.integers(1, 80)),
    st.tuples(st.just("predicate"), st.integers(2, 9)),
)
MASKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("&|"), inner, inner), st.tuples(st.just("~"), inner)
    ),
    max_leaves=4,
)
BIASES = st.one_of(
    st.just(("alibi",)),
    st.tuples(st.just("relative"), st.sampled_from([8, 32]), ANY),
    st.tuples(st.just("dense"), ANY, ANY, ANY, ANY, ANY),
)


OPTIONS = {
    "scale": st.sampled_from([0.1, 1.0]),
    "softcap": st.sampled_from([0.7, 20.0]),
    "sinks": st.just(True),
    "dropout": st.builds(Dropout, st.sampled_from([0.1, 0.6]), st.integers(-(2**40), 2**40)),
    "query_start": st.integers(-50, 500),
    "key_start": st.integers(0, 300),
}


@st.composite
def drawn(draw: Any, most: int = 300) -> Drawn:
    """A call; most: its longest side, but for few queries of many keys."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    if draw(st.integers(0, 4)) == 0:
        q_len, k_len = draw(st.integers(1, 17)), draw(st.integers(0, 5 * most))
    else:
        q_len, k_len = draw(st.integers(0, most // 2)), draw(st.integers(0, most))
    dim = draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 40, 64, 80, 96, 128, 200, 256])))
    v_dim = draw(st.one_of(st.just(dim), st.integers(1, 40)))
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, max_size=3))
    return Drawn(
        Sizes(draw(st.integers(1, 3)), kv_heads * group, kv_heads, q_len, k_len, dim, v_dim),
        draw(MASKS),
        tuple(draw(st.lists(BIASES, max_size=2))),
        {name: draw(OPTIONS[name]) for name in chosen},
        draw(st.sampled_from(sorted(LAYOUTS))),
        draw(st.sampled_from([1.0, 1.0, 1.0, 1e-4, 1e-38, 100.0, 1000.0])),
        draw(st.sampled_from([False, False, False, True])),
    )


def run(tensors: list[Tensor], request: dict[str, Any], **more: Any) -> Any:
    return attention(*tensors, **request, engine="cpu", return_lse=True, **more)


def off_by_a_rounding(tensors: list[Tensor]) -> list[Tensor]:
    """Queries and keys with every number a rounding of float32 away, up or down."""
    rng = torch.Generator().manual_seed(0)
    finest = torch.finfo(torch.float32).eps
    moved = [
        t * (1 + finest * (torch.randint(0, 2, t.shape, generator=rng) * 2 - 1))
        for t in tensors[:2]
    ]
    return [*moved, tensors[2]]


def references(tensors: list[Tensor], request: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(out, lse) in float64, then what float32 can be asked for.

    That is the truth for queries and keys that are a rounding off, and plain torch, its dims
    and keys summed in several orders: one order may be lucky where a case has few numbers.
    """
    doubles, doubly = [t.double() for t in tensors], mapped(request, lambda t: t.double())
    singles, singly = [t.float() for t in tensors], mapped(request, lambda t: t.float())
    answers = [
        attention(*t, **doubly, engine="reference", return_lse=True)
        for t in (doubles, off_by_a_rounding(doubles))
    ]
    for seed in range(4):
        rng = torch.Generator().manual_seed(seed)
        dims, keys = (torch.randperm(n, generator=rng) for n in tensors[1].shape[:1:-1])
        query, key = (t[..., dims] for t in singles[:2])
        answers.append(plain(query, key, singles[2], order=keys, **singly))
    return answers


def assert_near(
    ours: Tensor,
    exact: Tensor,
    others: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    error: Any = torch.amax,
    more: float = 0,
) -> None:
    """Error ≤ 2 × (the largest of the others' + rounding + more), and a few of the least number."""
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite])
    if not finite.any():
        return
    exact, info = exact[finite], torch.finfo(dtype or ours.dtype)
    mine, *theirs = (float(error((t[finite].double() - exact).abs())) for t in (ours, *others))
    rounding = info.eps * float(exact.abs().max())
    bar = 2 * (max(theirs) + rounding + more) + 4 * info.tiny * info.eps
    assert mine <= bar, f"error {mine:.3e}, bar {bar:.3e} of {theirs}"


@settings(max_examples=60)
@given(drawn(), DTYPES)
def test_matches_float64(given, dtype):
    assert_matches_float64(given, dtype)


@pytest.mark.slow
@settings(max_examples=190)
@given(drawn(), DTYPES)
def test_matches_float64_on_others(given, dtype):
    assert_matches_float64(given, dtype)


def assert_matches_float64(given: Drawn, dtype: torch.dtype) -> None:
    tensors, request = given.tensors(dtype), given.request(dtype)
    out, lse = run(tensors, request)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for mine, truth, *others in zip((out, lse), *references(tensors, request), strict=True):
        assert_near(mine, truth, others)


@settings(max_examples=80)
@given(drawn(most=160), DTYPES)
def test_gradients_match_float64(given, dtype):
    """Of queries, keys, values, biases and sinks, through out and lse; root mean squares."""
    tensors, request = given.tensors(dtype), given.request(dtype)
    doubles, doubly = given.exactly(dtype)
    singles, singly = [t.float() for t in tensors], mapped(request, lambda t: t.float())
    ours = gradients(tensors, request, by("cpu"))
    exact = gradients(doubles, doubly, by("reference"))
    others = (
        gradients(off_by_a_rounding(doubles), doubly, by("reference")),
        gradients(singles, singly, plain),
    )
    assert all(t.dtype == dtype for t in ours)
    # All of a call's gradients at once, each as a share of its largest: some are one number
    least = torch.finfo(dtype).tiny
    most = [max(float(t.abs().max()), least) if t.numel() else least for t in exact]
    shares = [
        torch.cat([(t.double() / m).flatten() for t, m in zip(each, most, strict=True)])
        for each in (ours, exact, *others)
    ]
    # With few keys, what a weight's slope is the difference of is larger than it by far
    more = torch.finfo(torch.float32).eps * given.sizes.v_dim
    assert_near(shares[0], shares[1], shares[2:], dtype, typical, more)


@settings(max_examples=100)
@given(drawn(most=200), DTYPES, st.data())
def test_observers_are_exact(given, dtype, data):
    """And observing leaves the bits."""
    tensors, request = given.tensors(dtype), given.request(dtype)
    bar = Bar(given, dtype)
    kinds = watchers(bar.exact.place.query_start)
    asked = [kinds[i] for i in data.draw(st.lists(st.integers(0, len(kinds) - 1), max_size=5))]
    *answer, seen = run(tensors, request, observe=asked)
    assert_equal(answer, run(tensors, request))
    for observer, result in zip(asked, seen, strict=True):
        assert_seen(observer, result, bar, roundings=bar.of_lse)


@pytest.mark.slow
@settings(max_examples=100)
@given(drawn(most=200), DTYPES)
def test_same_bits(given, dtype):
    """Whatever the threads, the run, or the neighbours in the batch; gradients and results, too."""
    tensors, request = given.tensors(dtype), given.request(dtype)
    asked = [TopK(3), Received(), Entropy(), Map(8, 8), Distances()]

    def everything() -> list[Tensor]:
        *answer, seen = run(tensors, request, observe=asked)
        return [*answer, *(t for s in seen for t in parts(s).values()),
                *gradients(tensors, request, by("cpu"))]  # fmt: skip

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = everything()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_equal(first, everything())
    finally:
        torch.set_num_threads(before)
    if "dropout" in request:  # the item's number enters the counter
        return
    call = Call.checked(*tensors, **request)
    for b in range(given.sizes.batch):
        assert_equal([t[b] for t in first[:2]], [t[0] for t in cpu.forward(call.item(b))])


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


BAD = st.sampled_from([torch.nan, torch.inf, -torch.inf])


def spoilt(tensor: Tensor, bad: float, data: Any) -> tuple[Tensor, tuple[int, ...]]:
    """A copy with one bad number somewhere, and where."""
    assume(tensor.numel())
    where = tuple(data.draw(st.integers(0, n - 1)) for n in tensor.shape)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor[where] = bad
    return tensor, where


@settings(max_examples=60)
@given(drawn(most=160), DTYPES, BAD, st.data())
def test_a_bad_value_surfaces(given, dtype, bad, data):
    """In its column of every row that sees it; elsewhere all bits stay.

    Where products are AMX's, they stay but for rounding: the tile is computed without.
    """
    query, key, value = given.tensors(dtype)
    request = given.request(dtype)
    value, (b, kv, j, d) = spoilt(value, bad, data)
    out, lse = run([query, key, value], request)
    value[b, kv, j, d] = 0
    clean, clean_lse = run([query, key, value], request)
    group = given.sizes.heads // given.sizes.kv_heads
    column = b, slice(kv * group, (kv + 1) * group), slice(None), d
    doubles = (t.double() for t in (query, key, value))
    scores = reference.scores(
        Call.checked(*doubles, **mapped(request, lambda t: t.double()))
    )  # fmt: skip
    seen = scores[*column[:3], j] > -torch.inf
    assert not out[column][seen].isfinite().any()
    # A hidden value of the same tile may show: 0 times it is NaN in all of torch
    out[column] = out[column].where(out[column].isfinite(), clean[column])
    if native.LEVELS[native.LEVEL] in ("avx512bf16", "amx", "neonbf16"):
        close = {"rtol": 1e-5, "atol": max(1e-5, 4 * torch.finfo(dtype).eps)}
        torch.testing.assert_close([out, lse], [clean, clean_lse], **close)
    else:
        assert_equal([out, lse], [clean, clean_lse])


@settings(max_examples=100)
@given(drawn(most=160), DTYPES, BAD, st.sampled_from([0, 1]), st.data())
def test_a_bad_query_or_key_surfaces(given, dtype, bad, which, data):
    """In the rows in which it does in float64, and in no other."""
    tensors, request = given.tensors(dtype), given.request(dtype)
    tensors[which], _ = spoilt(tensors[which], bad, data)
    ours = run(tensors, request)
    exact, *others = references(tensors, request)
    fine = exact[1] < torch.inf  # neither NaN nor infinite: −inf is a row that sees nothing
    assert torch.equal(ours[1] < torch.inf, fine)
    assert not ours[0][~fine].isfinite().any()
    for mine, truth, *near in zip(ours, exact, *others, strict=True):
        assert_near(mine[fine], truth[fine], [n[fine] for n in near])
