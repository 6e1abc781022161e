"""What of the engines for CUDA can be checked without a GPU: refusals, shapes, flex uncompiled."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from cases import FEW, Case, assert_within, plain
from regard import ALiBi, Causal, Edges, Full, NoEngine, Window, attention
from regard.call.checked import Call
from regard.engines import flex, sdpa_cuda

HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as a few lines of torch, which materialise the scores."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return torch_flex.flex_attention


def reasons_of(case: Case, why: list[str]) -> None:
    """A refusal is one of those that are expected of the shared cases."""
    request = case.request()
    expected = [
        f"{what} is given; its kernel takes none"
        for what in ("sinks", "dropout")
        if request.get(what) is not None
    ]
    sizes = case.sizes
    if not sizes.batch or not sizes.q_len or not sizes.k_len:
        expected.append("the call is empty; its kernel needs at least one of everything")
    if min(sizes.dim, sizes.v_dim) < 16:
        expected.append(f"dim, v_dim are [{sizes.dim}, {sizes.v_dim}]; its kernel takes 16 to 256")
    if any(name in case.name for name in ("edges", "longformer", "placed patterns")):
        expected.append("the mask lists edges; its kernel takes only functions of a single pair")
    assert sorted(why) == sorted(expected)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_flex_matches_float64(case, uncompiled):
    tensors, request = case.tensors(dtype=torch.float32), case.request(torch.float32)
    call = Call.checked(*tensors, **request)
    if flex.refuses(call):
        reasons_of(case, flex.refuses(call))
        return
    exactly, same = case.exactly(torch.float32)
    truth = attention(*exactly, **same, engine="reference", return_lse=True)
    found = flex.attend(call, uncompiled)
    for ours, theirs, exact in zip(found, plain(*tensors, **request), truth, strict=True):
        assert_within(ours, theirs, exact)


def test_flex_skips_the_tiles_that_a_mask_empties():
    query = torch.zeros(1, 2, 700, 16)
    program = Call.checked(query, query, None, mask=Causal() & Window(300)).program
    blocks = flex._blocks(program)
    assert blocks.kv_num_blocks.tolist() == [[[1, 1, 2, 3, 3, 3]]]
    assert blocks.full_kv_num_blocks.tolist() == [[[0, 1, 1, 1, 1, 1]]]
    assert blocks.full_kv_indices[0, 0, 3, 0] == 2
    assert blocks.kv_indices[0, 0, 3, :3].tolist() == [0, 1, 3]


def test_flex_compiles_more_forms_than_eight(monkeypatch):
    """Each mask is a form to compile, and torch gives up at the ninth of one function."""
    asked = []

    def compile(function, **options):
        return lambda *_: asked.append((options, torch._dynamo.config.recompile_limit))

    monkeypatch.setattr(torch, "compile", compile)
    before = torch._dynamo.config.recompile_limit
    flex._compiled.__wrapped__()()
    assert asked == [({"fullgraph": True}, flex.MOST_FORMS)]
    assert torch._dynamo.config.recompile_limit == before < flex.MOST_FORMS


def test_flex_by_name_is_for_cuda():
    query = torch.zeros(1, 1, 4, 16)
    with pytest.raises(NoEngine, match="flex: query is on cpu; this engine runs on cuda"):
        attention(query, query, query, engine="flex")
    call = Call.checked(query, query, query, bias=torch.zeros(4, 4, requires_grad=True))
    assert flex.refuses(call) == ["a bias needs gradients; this engine gives none"]
    needed = [query.clone().requires_grad_(), query, query]
    assert flex.refuses(Call.checked(*needed, return_lse=True)) == [
        "return_lse needs gradients; this engine gives none through lse"
    ]
    assert not flex.refuses(Call.checked(*needed))


def call_of(dtype=torch.bfloat16, *, dim=64, v_dim=None, k_len=48, kv_heads=4, **request) -> Call:
    """A call on tensors without numbers."""
    query = torch.empty(2, 4, 48, dim, dtype=dtype, device="meta")
    key = torch.empty(2, kv_heads, k_len, dim, dtype=dtype, device="meta")
    value = torch.empty(
        2, kv_heads, k_len, dim if v_dim is None else v_dim, dtype=dtype, device="meta"
    )
    return Call.checked(query, key, value, **request)


def first(call: Call, capability: tuple[int, int]) -> str:
    return next(k.name for k in sdpa_cuda.preference(capability) if not k.why_not(call, capability))


def test_sdpa_chooses_a_kernel():
    half, single = call_of(mask=Causal()), call_of(torch.float32)
    assert [first(half, c) for c in (HOPPER, AMPERE)] == ["cudnn", "flash"]
    assert first(call_of(torch.float16), TURING) == "efficient"
    assert first(single, HOPPER) == "efficient"
    assert first(call_of(dim=256), HOPPER) == "flash"
    assert first(call_of(kv_heads=2), HOPPER) == "flash"
    assert first(call_of(v_dim=32), HOPPER) == "efficient"
    assert first(call_of(mask=Window(5)), HOPPER) == "efficient"
    assert first(call_of(mask=Causal(), k_len=50), HOPPER) == "efficient"
    assert not sdpa_cuda.why_not(half, HOPPER)


def test_a_successor_of_flash_attention_2_comes_first(monkeypatch):
    half = call_of(mask=Causal())
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert [first(half, c) for c in (HOPPER, AMPERE)] == ["flash", "flash"]


def test_sdpa_says_why_no_kernel_can():
    said = sdpa_cuda.why_not(call_of(torch.float32, dim=30, mask=Window(5)), AMPERE)
    assert said == [
        "flash: query is float32; it takes float16 and bfloat16, dim is 30; it takes multiples of "
        "8 up to 256, it takes no bias, and no mask but a square causal one",
        "efficient: dim, v_dim are (30, 30); it takes multiples of 4",
    ]
    assert "bfloat16 needs 8.0" in " ".join(sdpa_cuda.why_not(call_of(), TURING))
    query = torch.empty(1, 1, 9000, 64, dtype=torch.bfloat16, device="meta")
    wide = Call.checked(query, query, query, mask=Window(5))
    assert "efficient: the mask would be materialised: 9000 × 9000" in " ".join(
        sdpa_cuda.why_not(wide, HOPPER)
    )


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal() & Window(5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sdpa_calls_torch_as_it_wants_to_be(mask, dtype, kv_heads):
    """PyTorch's own rules of shapes take what each kernel is given, and answer what we expect."""
    call = call_of(dtype, mask=mask, kv_heads=kv_heads)
    able = [k for k in sdpa_cuda.preference(HOPPER) if not k.why_not(call, HOPPER)]
    assert sdpa_cuda.EFFICIENT in able
    for kernel in able:
        out, lse = kernel.forward(call, kernel.mask(call))
        assert (out.shape, out.dtype) == (call.query.shape, dtype)
        assert (lse.shape, lse.dtype) == (call.query.shape[:3], torch.float32)


def test_an_edge_is_refused_by_flex_alone():
    call = call_of(torch.float32, mask=Edges([(1, 1)]))
    assert flex.refuses(call) == [
        "the mask lists edges; its kernel takes only functions of a single pair"
    ]
    assert first(call, HOPPER) == "efficient"


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_flex_chooses_tiles_that_fit(dtype, dim):
    """Only where functions read tensors at each pair; the block mask's blocks are theirs."""
    limit = 232448  # of an H200
    wide = {"q_len": 200, "dim": dim}
    assert flex.options(sized(dtype, mask=Causal(), **wide), limit) == {}
    assert flex.options(sized(dtype, bias=ALiBi(), dim=dim, q_len=1), limit) == {}
    for biases in (1, 2):
        call = sized(dtype, mask=Causal(), bias=[ALiBi()] * biases, **wide)
        chosen = flex.options(call, limit)
        assert chosen["num_stages"] == 2
        assert not flex.BLOCK % chosen["BLOCK_M"]
        assert not flex.BLOCK % chosen["BLOCK_N"]
        pairs = chosen["BLOCK_M"] * chosen["BLOCK_N"]
        held = (chosen["BLOCK_M"] + 4 * chosen["BLOCK_N"]) * dim * call.query.element_size()
        assert held + 4 * biases * pairs < limit
    assert flex.options(sized(dtype, bias=ALiBi(), **wide), 2**14) is None


def sized(dtype, *, q_len, dim, **request) -> Call:
    query = torch.zeros(1, 4, q_len, dim, dtype=dtype)
    return Call.checked(query, query, query, **request)
