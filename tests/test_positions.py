"""Positions against the papers' formulas in float64, and against Hugging Face's functions."""

import math

import pytest
import torch
from torch import Tensor, nn

from cases import DTYPES, assert_within
from regard import RegardError, RelativeBias, attention
from regard.nn import (
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    RelativePositions,
    Rotary,
    SinusoidalPositions,
    YaRNScaling,
)

BATCH, HEADS, LENGTH, DIM = 2, 3, 11, 8


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng).to(dtype)


# Sinusoidal and learned


@pytest.mark.parametrize("dim", [1, 2, 7, 16])
@pytest.mark.parametrize("start", [0, 5, 100_000])
def test_sinusoids_are_the_papers(dim, start):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = cos of the same."""
    x = drawn(BATCH, LENGTH, dim)
    added = SinusoidalPositions(dim)(x, start) - x
    for row in range(LENGTH):
        for i in range(dim):
            angle = (start + row) / 10000 ** (2 * (i // 2) / dim)
            wave = math.cos(angle) if i % 2 else math.sin(angle)
            assert abs(float(added[1, row, i]) - wave) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinusoids_keep_the_dtype_and_their_precision(dtype):
    """At position 10⁶, too: only the result is rounded."""
    x = torch.zeros(1, 4, 16, dtype=dtype)
    ours = SinusoidalPositions(16)(x, 10**6)
    exact = SinusoidalPositions(16)(x.double(), 10**6)
    assert ours.dtype == dtype
    assert float((ours.double() - exact).abs().max()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [SinusoidalPositions, lambda d: LearnedPositions(40, d)])
def test_positions_as_a_tensor(make):
    """(length,) for all, (batch, length) for each; an integer is where they begin."""
    module = make(6).double()
    x = drawn(BATCH, LENGTH, 6)
    torch.testing.assert_close(module(x, torch.arange(3, 3 + LENGTH)), module(x, 3))
    each = torch.stack([torch.arange(LENGTH) + 7, torch.arange(LENGTH).flip(0)])
    ours = module(x, each)
    torch.testing.assert_close(ours[0], module(x, 7)[0])
    torch.testing.assert_close(ours[1].flip(0) - x[1].flip(0), (module(x, 0) - x)[0])


def test_learned_positions_are_rows_of_their_weight():
    module = LearnedPositions(20, 6).double()
    x = drawn(BATCH, LENGTH, 6)
    out = module(x, 4)
    torch.testing.assert_close(out, x + module.weight[4 : 4 + LENGTH])
    out.sum().backward()
    assert module.weight.grad.tolist() == [[2.0 * (4 <= n < 15)] * 6 for n in range(20)]


def test_learned_positions_end():
    module = LearnedPositions(12, 6)
    module(drawn(1, LENGTH, 6), 1)
    with pytest.raises(RegardError, match=r"positions 2 … 12 of \(1, 11, 6\) leave the 12 learned"):
        module(drawn(1, LENGTH, 6), 2)
    with pytest.raises(RegardError, match="positions -1 … 9"):
        module(drawn(1, LENGTH, 6), -1)
    with pytest.raises(IndexError):
        module(drawn(1, 2, 6), torch.tensor([11, 12]))


# Rotary


def plainly(rotary: Rotary, x: Tensor, at: Tensor) -> Tensor:
    """Rotary by complex numbers, in x's dtype (float32 or float64) throughout: the twin.

    at (batch, length). Pair p of a row at position n is multiplied by e^(i n angle_p).
    """
    part, rest = x[..., : rotary.dim], x[..., rotary.dim :]
    if rotary.interleaved:
        pairs = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
    else:
        pairs = torch.complex(*part.contiguous().chunk(2, -1))
    angles = at[:, None, :, None].to(x.dtype) * rotary.angles(int(at.max()) + 1).to(x.dtype)
    by = 1.0 if rotary.scaling is None else rotary.scaling.magnitude
    turned = pairs * torch.polar(torch.full_like(angles, by), angles)
    if rotary.interleaved:
        turned = torch.view_as_real(turned).flatten(-2)
    else:
        turned = torch.cat([turned.real, turned.imag], -1)
    return torch.cat([turned, rest], -1)


ROTARIES = {
    "half": Rotary(DIM),
    "interleaved": Rotary(DIM, interleaved=True),
    "part": Rotary(4),
    "part interleaved": Rotary(6, interleaved=True),
    "base": Rotary(DIM, base=500_000.0),
    "linear": Rotary(DIM, scaling=LinearScaling(4.0)),
    "ntk": Rotary(DIM, scaling=NTKScaling(4.0)),
    "dynamic": Rotary(DIM, scaling=NTKScaling(2.0, trained_length=5)),
    "yarn": Rotary(DIM, scaling=YaRNScaling(8.0, 64)),
    "yarn interleaved": Rotary(DIM, interleaved=True, scaling=YaRNScaling(8.0, 64, truncate=False)),
}
every_rotary = pytest.mark.parametrize("rotary", ROTARIES.values(), ids=ROTARIES)


@every_rotary
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_is_its_twin(rotary, dtype):
    x = drawn(BATCH, HEADS, LENGTH, DIM, dtype=dtype)
    at = torch.stack([torch.arange(LENGTH) + 3, torch.randperm(50)[:LENGTH]])
    ours = rotary(x, at)
    assert ours.dtype == dtype
    exact = plainly(rotary, x.double(), at)
    plain = plainly(rotary, x.float(), at).to(torch.float32 if dtype == torch.float64 else dtype)
    assert_within(ours, plain, exact, dtype)


@every_rotary
def test_rotary_gradients_are_its_twins(rotary):
    at = torch.arange(LENGTH).expand(BATCH, -1)
    leaves = [drawn(BATCH, HEADS, LENGTH, DIM).requires_grad_() for _ in range(2)]
    weight = drawn(BATCH, HEADS, LENGTH, DIM, seed=1)
    (rotary(leaves[0]) * weight).sum().backward()
    (plainly(rotary, leaves[1], at) * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-12, atol=1e-12)


@every_rotary
def test_scores_depend_on_distances_alone(rotary):
    """Also far out, where angles in float32 would be off; but for the dynamic one."""
    if isinstance(rotary.scaling, NTKScaling) and rotary.scaling.trained_length:
        return
    query, key = drawn(1, 1, LENGTH, DIM), drawn(1, 1, LENGTH, DIM, seed=1)
    near = rotary(query, 3) @ rotary(key, 0).mT
    far = rotary(query, 3 + 10**6) @ rotary(key, 10**6).mT
    torch.testing.assert_close(far, near, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(rotary(query, 4) @ rotary(key, 0).mT, near)


def test_rotary_turns_far_positions_exactly():
    """In float32 the angles are still float64: the error is that of rounding once."""
    rotary, x = Rotary(64), drawn(1, 1, 4, 64)
    exact = plainly(rotary, x, torch.arange(4)[None] + 2_000_000)
    ours = rotary(x.float(), 2_000_000)
    assert float((ours - exact).abs().max()) < 1e-6


SHORT, LONG = [1 + n / 20 for n in range(16)], [1 + n**1.5 for n in range(16)]
LLAMAS = {
    "default": ({}, None),
    "linear": ({"factor": 4.0}, LinearScaling(4.0)),
    "dynamic": ({"factor": 2.0}, NTKScaling(2.0, trained_length=64)),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 64},
        YaRNScaling(4.0, 64),
    ),
    "yarn of other ends": (
        {
            "factor": 16.0, "original_max_position_embeddings": 512, "beta_fast": 20.0,
            "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False,
        },
        YaRNScaling(16.0, 512, beta_fast=20, beta_slow=2, attention_factor=0.7, truncate=False),
    ),
    "llama3": (
        {
            "factor": 8.0, "original_max_position_embeddings": 512, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        Llama3Scaling(8.0, 512),
    ),
    "llama3 of other ends": (
        {
            "factor": 3.0, "original_max_position_embeddings": 100, "low_freq_factor": 0.5,
            "high_freq_factor": 6.0,
        },
        Llama3Scaling(3.0, 100, low=0.5, high=6.0),
    ),
    "longrope": (
        {
            "original_max_position_embeddings": 48, "short_factor": SHORT, "long_factor": LONG,
            "factor": 4.0,
        },
        LongRoPEScaling(SHORT, LONG, 48, 4.0),
    ),
    "longrope of another magnitude": (
        {
            "original_max_position_embeddings": 48, "short_factor": SHORT, "long_factor": LONG,
            "factor": 4.0, "attention_factor": 1.3,
        },
        LongRoPEScaling(SHORT, LONG, 48, 4.0, attention_factor=1.3),
    ),
}  # fmt: skip


KINDS = {
    type(None): "default", LinearScaling: "linear", NTKScaling: "dynamic", YaRNScaling: "yarn",
    Llama3Scaling: "llama3", LongRoPEScaling: "longrope",
}  # fmt: skip


@pytest.mark.parametrize("length", [40, 100])
@pytest.mark.parametrize("given, scaling", LLAMAS.values(), ids=LLAMAS)
def test_rotary_is_hugging_faces(given, scaling, length):
    """Frequencies, factor, and queries turned by Llama's module; beyond the trained length too."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    kind = KINDS[type(scaling)]
    config = LlamaConfig(
        hidden_size=96, num_attention_heads=3, head_dim=32, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **given},
    )  # fmt: skip
    theirs = llama.LlamaRotaryEmbedding(config)
    rotary = Rotary(32, scaling=scaling)
    query, key = drawn(BATCH, 3, length, 32), drawn(BATCH, 1, length, 32, seed=1)
    cos, sin = theirs(query.float(), torch.arange(length)[None])
    torch.testing.assert_close(
        rotary.angles(length).float(), theirs.inv_freq, rtol=1e-6, atol=0, check_dtype=False
    )
    assert (scaling.magnitude if scaling else 1.0) == pytest.approx(theirs.attention_scaling)
    turned = llama.apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
    for ours, wanted in zip((rotary(query), rotary(key)), turned, strict=True):
        torch.testing.assert_close(ours.float(), wanted, rtol=1e-4, atol=1e-4)


def test_the_bands_of_llama_3_exactly():
    """Against the definition in float64, for the numbers of Llama 3.1."""
    angles = 5e5 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    turns = 8192 * angles / (2 * torch.pi)
    blend = ((turns - 1) / 3).clamp(0, 1)
    given = Rotary(128, base=5e5, scaling=Llama3Scaling(8.0, 8192)).angles()
    torch.testing.assert_close(given, angles * blend + angles / 8 * (1 - blend), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Llama3Scaling(8.0, 64, low=4, high=1), "low < high"),
        (
            lambda: Rotary(8, scaling=LongRoPEScaling([1, 2], [1, 2], 64, 2)).angles(),
            "one a pair, 4",
        ),
    ],
)
def test_scalings_that_do_not_fit(make, said):
    with pytest.raises(RegardError, match=said):
        make()


def test_interleaved_is_gpt_js():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rotary, x = Rotary(16, interleaved=True), drawn(BATCH, HEADS, LENGTH, 16)
    sin, cos = gptj.create_sinusoidal_positions(LENGTH, 16).chunk(2, -1)
    turned = gptj.apply_rotary_pos_emb(x.float().transpose(1, 2), sin[None], cos[None])
    torch.testing.assert_close(rotary(x).float(), turned.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_the_two_layouts_are_one_by_another_order():
    x = drawn(BATCH, HEADS, LENGTH, DIM)
    apart = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    ours, other = Rotary(DIM, interleaved=True)(x, 5), Rotary(DIM)(apart, 5)
    torch.testing.assert_close(torch.cat([ours[..., ::2], ours[..., 1::2]], -1), other)


def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest():
    plain, ours = Rotary(DIM).angles(), Rotary(DIM, scaling=NTKScaling(4.0)).angles()
    torch.testing.assert_close(
        plain / ours, torch.tensor([1, 4 ** (1 / 3), 4 ** (2 / 3), 4.0]).double()
    )


def test_dynamic_ntk_begins_beyond_the_trained_length():
    rotary = Rotary(DIM, scaling=NTKScaling(2.0, trained_length=20))
    x = drawn(1, 1, LENGTH, DIM)
    assert torch.equal(rotary(x, 9), Rotary(DIM)(x, 9))
    grown = Rotary(DIM, scaling=NTKScaling(2.0 * 31 / 20 - 1))
    torch.testing.assert_close(rotary(x, 20), grown(x, 20))
    torch.testing.assert_close(rotary(x, torch.arange(20, 31)), grown(x, 20))
    assert rotary(x[:, :, :0], torch.zeros(0, dtype=torch.int64)).shape == (1, 1, 0, DIM)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    plain, ours = Rotary(64).angles(), Rotary(64, scaling=YaRNScaling(4.0, 4096)).angles()
    turns = plain * 4096 / (2 * math.pi)
    shrunk = plain / ours
    assert (turns > 64).any()
    assert (shrunk[turns > 64] == 1).all()
    torch.testing.assert_close(shrunk[turns < 0.5], torch.full_like(shrunk[turns < 0.5], 4.0))
    assert (shrunk.diff() >= 0).all()
    assert YaRNScaling(4.0, 4096).magnitude == pytest.approx(0.1 * math.log(4) + 1)
    assert YaRNScaling(1.0, 4096).magnitude == 1


def test_rotary_has_nothing_to_save():
    """Layers share one; halving a model does not touch its angles."""
    rotary = Rotary(DIM)
    assert not list(rotary.parameters()) + list(rotary.buffers())
    assert not rotary.state_dict()
    x = drawn(1, 1, LENGTH, DIM, dtype=torch.float32)
    before = rotary(x)
    assert torch.equal(rotary.to(torch.bfloat16)(x), before)


WRONG = {
    "odd": (lambda: Rotary(5), "Rotary(5): give an even dim"),
    "none": (lambda: Rotary(0), "Rotary(0): give an even dim"),
    "ntk of one pair": (lambda: Rotary(2, scaling=NTKScaling(2.0)), "needs dim ≥ 4"),
    "narrow head": (
        lambda: Rotary(16)(drawn(1, 2, 3, 8)),
        "turns the first 16 numbers of (batch, heads, length, head_dim), not (1, 2, 3, 8)",
    ),
    "three dimensions": (lambda: Rotary(8)(drawn(2, 3, 8)), "not (2, 3, 8)"),
    "positions": (
        lambda: Rotary(8)(drawn(1, 2, 3, 8), torch.arange(4)),
        "positions is (4,) for 3 rows of (1, 2, 3, 8); give the first one's position, or a tensor "
        "(3,) or (batch, 3)",
    ),
    "sinusoidal": (
        lambda: SinusoidalPositions(6)(drawn(1, 2, 8)),
        "SinusoidalPositions(6) takes (batch, length, 6), not (1, 2, 8)",
    ),
    "learned": (lambda: LearnedPositions(9, 6)(drawn(2, 6)), "LearnedPositions(6) takes"),
}


@pytest.mark.parametrize("call, said", WRONG.values(), ids=WRONG)
def test_errors_show_shapes(call, said):
    with pytest.raises(RegardError) as error:
        call()
    assert said in str(error.value)


# T5's table


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_positions_are_t5s(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    from transformers import T5Config

    config = T5Config(
        d_model=12, d_kv=4, num_heads=3, relative_attention_num_buckets=16,
        relative_attention_max_distance=30, is_decoder=not bidirectional,
    )  # fmt: skip
    theirs = t5.T5Attention(config, has_relative_attention_bias=True)
    ours = RelativePositions(3, buckets=16, max_distance=30, bidirectional=bidirectional)
    ours.load_state_dict(theirs.relative_attention_bias.state_dict())
    added = theirs.compute_bias(50, 50)
    # Zero queries: the weights are the softmax of the bias
    nothing, eye = torch.zeros(1, 3, 50, 4), torch.eye(50).expand(1, 3, -1, -1)
    out = attention(nothing, nothing, eye, bias=ours(), engine="tiled")
    torch.testing.assert_close(out, added.softmax(-1))
    out.square().sum().backward()
    assert ours.weight.grad.abs().sum() > 0


def test_relative_positions_start_at_nothing():
    module = RelativePositions(3)
    assert isinstance(module, nn.Module)
    assert isinstance(module(), RelativeBias)
    assert module().table is module.weight
    assert module.weight.shape == (32, 3)
    assert not module.weight.any()
