"""Every engine on every case and dtype against float64, and what `attention` promises besides."""

from functools import cache

import pytest
import torch
from torch import Tensor

import regard.engines.second_pass.strips
from cases import CASES, DTYPES, FEW, ON_CUDA, ON_THE_CPU, Case, assert_within, at, mapped, plain
from regard import (
    ALiBi,
    Causal,
    Dropout,
    Edges,
    Entropy,
    First,
    NoEngine,
    Padding,
    Received,
    RelativeBias,
    TopK,
    Window,
    attention,
    explain,
    observe,
)
from regard.call.biases import relative_bucket
from regard.call.checked import Call
from regard.engines import ENGINES, preference, refusals, select

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_engine = pytest.mark.parametrize("engine", ON_THE_CPU)


def call_of(case: Case, dtype: torch.dtype = torch.float64) -> Call:
    return Call.checked(*case.tensors(dtype=dtype), **case.request(dtype))


@cache
def exact(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tensors, request = case.exactly(dtype)
    return attention(*tensors, **request, engine="reference", return_lse=True)


@cache
def plainly(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return plain(*case.tensors(dtype=dtype), **case.request(dtype))


@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_engine
@every_case
def test_matches_float64(case, engine, dtype):
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    reasons = explain(*tensors, **request, return_lse=True)[engine]
    if reasons:
        with pytest.raises(NoEngine) as error:
            attention(*tensors, **request, engine=engine, return_lse=True)
        assert engine in str(error.value)
        assert all(reason in str(error.value) for reason in reasons)
        return
    out, lse = attention(*tensors, **request, engine=engine, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    at_dtype = torch.float32 if dtype == torch.float64 else dtype
    for ours, theirs, truth in zip(
        (out, lse), plainly(case, at_dtype), exact(case, dtype), strict=True
    ):
        assert_within(ours, theirs, truth, dtype)


@pytest.mark.parametrize("engine", ON_CUDA)
def test_an_engine_for_cuda_says_so(engine):
    tensors = FEW[0].tensors(dtype=torch.float32)
    with pytest.raises(NoEngine, match=f"{engine}: query is on cpu; this engine runs on cuda"):
        attention(*tensors, engine=engine)


@every_case
def test_reference_is_plain_torch(case):
    """The specification against a second, independent writing of it."""
    for ours, theirs in zip(exact(case, torch.float64), plainly(case, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.sizes.q_len > 16], ids=str)
def test_tiled_in_small_strips(case, monkeypatch):
    """With a small budget the small cases, too, take many strips and parts."""
    monkeypatch.setattr(regard.engines.second_pass.strips, "BUDGET", 2**11)
    tensors, request = case.tensors(), case.request()
    ours = attention(*tensors, **request, engine="tiled", return_lse=True)
    for mine, theirs, truth in zip(
        ours, plainly(case, torch.float32), exact(case, torch.float64), strict=True
    ):
        assert_within(mine, theirs, truth, torch.float64)


@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_case
def test_auto_is_the_first_that_can(case, dtype):
    call = call_of(case, dtype)
    able = [name for name, reasons in refusals(call).items() if not reasons]
    first = next(e.name for e in preference(call) if e.name in able)
    assert select(call).name == first == able[0]
    tensors, request = case.tensors(dtype=dtype), case.request(dtype)
    chosen = attention(*tensors, **request)
    torch.testing.assert_close(chosen, attention(*tensors, **request, engine=first), rtol=0, atol=0)


def test_explain():
    query, key, value = Case("", at(5, 7, v_dim=24)).tensors()
    said = explain(query, key, value, softcap=2.0, sinks=torch.zeros(4), return_lse=True)
    assert list(said) == ["cpu", "sdpa", "decode", "tiled", "flex", "reference"]
    assert said["tiled"] == said["reference"] == []
    assert said["cpu"] == ["query is float64; it computes in float32"]
    assert [r.split()[0] for r in said["sdpa"]] == ["v_dim", "softcap", "sinks"]
    alike = [t.float() for t in (query, key, value[..., :16])]
    said = explain(*alike)
    assert said.pop("flex") == ["query is on cpu; this engine runs on cuda"]
    assert said.pop("decode")[0] == "query is on cpu; this engine runs on cuda"
    assert not any(said.values())


@pytest.mark.sample(1)
@every_engine
@pytest.mark.parametrize("case", FEW, ids=str)
def test_observing_leaves_the_bits(case, engine):
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    if explain(*tensors, **request)[engine]:
        return
    watchers = [TopK(3), Received(), Entropy()]
    seen_out, seen = attention(*tensors, **request, engine=engine, observe=watchers)
    assert torch.equal(seen_out, attention(*tensors, **request, engine=engine))
    assert len(seen) == 3


@pytest.fixture(params=[1, 4], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


OURS = ["cpu", "tiled"]


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_same_bits_again_and_alone(case, engine, threads):
    """Same input, same bits: over runs, whatever the threads or the neighbours in the batch."""
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    first = with_one_thread(case, engine)
    again = attention(*tensors, **request, engine=engine, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if "dropout" in request:  # the item's number enters the counter
        return
    for b in range(case.sizes.batch):
        alone = ENGINES[engine].forward(call_of(case, torch.float32).item(b))
        assert all(torch.equal(a[b], c[0]) for a, c in zip(first, alone, strict=True))


@cache
def with_one_thread(case: Case, engine: str) -> tuple[Tensor, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    answer = attention(
        *case.tensors(dtype=torch.float32), **case.request(torch.float32), engine=engine,
        return_lse=True,
    )  # fmt: skip
    torch.set_num_threads(before)
    return answer


@pytest.mark.parametrize("dim", [8, 33])
@pytest.mark.parametrize("n", [7, 130])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("engine", OURS)
def test_same_bits_in_a_larger_batch(engine, kv_heads, n, dim, threads):
    """The strips of 1 and of 7 items differ in size; an item's bits do not."""
    sizes = at(n, batch=7, heads=2 * kv_heads, kv_heads=kv_heads, dim=dim)
    tensors = Case("", sizes).tensors(dtype=torch.float32)
    whole = attention(*tensors, mask=Causal(), engine=engine, return_lse=True)
    for b in (0, 6):
        item = (t[b : b + 1] for t in tensors)
        alone = attention(*item, mask=Causal(), engine=engine, return_lse=True)
        assert all(torch.equal(w[b], a[0]) for w, a in zip(whole, alone, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@every_engine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_nan_and_inf_surface(engine, where, value, dtype):
    """One bad number shows in each row that sees it, and in ours in none that does not."""
    if engine == "cpu" and dtype == torch.float64:
        dtype = torch.float16
    tensors = dict(zip(("query", "key", "value"), Case("", at(40, 60)).tensors(dtype=dtype)))  # noqa: B905
    bad = tensors[where].clone()
    bad[1, 1, 30, 5] = value
    mask = Causal() & Window(8)
    out = attention(**tensors | {where: bad}, mask=mask, engine=engine)
    shown = ~out.isfinite().all(-1)
    rows = torch.zeros_like(shown)
    if where == "query":
        rows[1, 1, 30] = True
    else:
        rows[1, 2:, 10:18] = True  # key 30 of 60, seen by the queries at 30 … 37 of 20 … 59
    if where == "key" and abs(value) == torch.inf:
        # A key of ±inf scores +inf in some rows, which surfaces, and −inf in the others: weight 0
        scores = tensors["query"][1, 2:, 10:18, 5].double() * value
        rows[1, 2:, 10:18] = scores == torch.inf
    assert shown[rows].all()
    # A hidden value times 0 is NaN in all of torch; its own kernel adds −inf to a hidden score
    if where == "query" or (where == "key" and engine != "sdpa"):
        assert torch.equal(shown, rows)


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", OURS)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_no_buffer_is_read_unwritten(case, engine):
    """Every torch.empty is filled with NaN; the answers are the same bits."""
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]

    def run() -> list[Tensor]:
        watchers = [TopK(3), Received(), Entropy()]
        out, lse, seen = attention(
            *leaves, **request, engine=engine, return_lse=True, observe=watchers
        )
        grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves)
        return [out, lse, *grads, *vars(seen[0]).values(), seen[1].sum, seen[2].values]

    clean = run()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


COMPILED = {
    "window": lambda: {"mask": Causal() & Window(9)},
    "tensors": lambda: {"mask": Causal() & Padding(torch.arange(60) % 4 > 0) & ~Edges([(30, 3)])},
    "bias": lambda: {"bias": [ALiBi(), torch.ones(40, 60)], "mask": Causal()},
    "the rest": lambda: {"softcap": 2.0, "sinks": torch.zeros(4), "dropout": Dropout(0.3, 1)},
}


@pytest.mark.sample(0)
@pytest.mark.parametrize(
    "engine, named", [*((engine, name) for engine in OURS for name in COMPILED), ("sdpa", "window")]
)
def test_compiles_whole(engine, named):
    """torch.compile keeps the call in one graph, forward and backward, observers too."""
    request = COMPILED[named]()

    def loss(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, (top, received) = attention(
            query * 2, key, value, **request, engine=engine, observe=[TopK(3), Received()]
        )
        return (out * out).sum(), top.weights, received.mean

    tensors = Case("", at(40, 60)).tensors(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    answers = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value, *seen = function(*leaves)
        value.backward()
        answers.append([value, *seen, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(answers[1], answers[0])


def test_alibi_is_the_papers():
    """−slope · distance; slopes from the paper: powers of 2^(−8/n), every other of the next."""
    assert_scores_moved(ALiBi(), 8, lambda h, d: -(2.0 ** -(h + 1)) * abs(d))
    slopes = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert_scores_moved(ALiBi(), 6, lambda h, d: -slopes[h] * abs(d))
    slopes = [2 ** (-h / 2) for h in range(1, 17)] + [2 ** (-h / 4) for h in range(1, 17, 2)]
    assert_scores_moved(ALiBi(), 20, lambda h, d: -slopes[h] * abs(d))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, longest", [(32, 128), (16, 40)])
def test_relative_buckets_are_t5s(bidirectional, buckets, longest):
    attention_of_t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    offset = torch.arange(-400, 401)
    theirs = attention_of_t5._relative_position_bucket(offset, bidirectional, buckets, longest)
    assert torch.equal(relative_bucket(offset, bidirectional, buckets, longest), theirs)
    table = torch.randn(buckets, 3, dtype=torch.float64)
    bias = RelativeBias(table, bidirectional, longest)
    assert_scores_moved(bias, 3, lambda h, d: float(table[theirs[d + 400], h]))


def assert_scores_moved(bias, heads: int, expected) -> None:
    """Zero queries: the weights are the softmax of the bias alone, expected(head, key − query)."""
    zeros = torch.zeros(1, heads, 9, 4, dtype=torch.float64)
    eye = torch.eye(150, dtype=torch.float64).expand(1, heads, -1, -1)
    for engine in ("reference", "tiled"):
        out = attention(zeros, zeros[:, :, :1].expand(-1, -1, 150, -1), eye, bias=bias,
                        query_start=60, engine=engine)  # fmt: skip
        scores = [
            [[expected(h, k - q) for k in range(150)] for q in range(60, 69)] for h in range(heads)
        ]
        wanted = torch.tensor(scores, dtype=torch.float64).softmax(-1)
        torch.testing.assert_close(out[0], wanted, rtol=1e-12, atol=1e-15)


def test_what_comes_back():
    """out | (out, lse) | (out, seen) | (out, lse, seen)."""
    tensors = Case("", at(5, 7)).tensors()
    out, lse = attention(*tensors, return_lse=True)
    assert torch.equal(attention(*tensors), out)
    two = attention(*tensors, observe=[Entropy()])
    assert torch.equal(two[0], out)
    three = attention(*tensors, return_lse=True, observe=[Entropy(), TopK(1)])
    assert torch.equal(three[1], lse)
    assert [type(s).__name__ for s in three[2]] == ["EntropySeen", "TopKSeen"]
    assert attention(*tensors, observe=[])[1] == ()
    (entropy,) = observe(*tensors[:2], observe=[Entropy()])
    torch.testing.assert_close(entropy.values, two[1][0].values)


def test_a_hidden_row_is_zero():
    """Out 0, lse −inf, weights 0, in every engine that takes the mask."""
    tensors = Case("", at(6, 9)).tensors(dtype=torch.float32)
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0] = False
    said = explain(*tensors, mask=Padding(keep) & First(5))
    for engine in ENGINES:
        if said[engine]:
            assert engine not in ON_THE_CPU
            continue
        out, lse, (top,) = attention(
            *tensors,
            mask=Padding(keep) & First(5),
            engine=engine,
            return_lse=True,
            observe=[TopK(2)],
        )
        assert not out[0].any()
        assert (lse[0] == -torch.inf).all()
        assert not top.weights[0].any()
        assert (top.indices[0] == -1).all()
        assert out[1].isfinite().all()


def test_positions_move_together():
    """Both starts moved by as much: the same answer, under masks and biases of distance."""
    tensors = Case("", at(20, 30)).tensors()
    request = {"mask": Causal() & Window(9), "bias": ALiBi(), "engine": "tiled"}
    here = attention(*tensors, **request)
    there = attention(*tensors, **request, query_start=1010, key_start=1000)
    torch.testing.assert_close(here, there, rtol=0, atol=0)
    chunks = [
        attention(q, *tensors[1:], **request, query_start=10 + 5 * n)
        for n, q in enumerate(tensors[0].split(5, 2))
    ]
    torch.testing.assert_close(torch.cat(chunks, 2), here)


def test_mapped_reaches_every_tensor():
    """The cases' own helper: a request in bfloat16 holds no other floats."""
    for case in CASES:
        found: list[Tensor] = []
        mapped(case.request(torch.bfloat16), lambda t: found.append(t) or t)  # noqa: B023
        assert all(t.dtype == torch.bfloat16 for t in found)
