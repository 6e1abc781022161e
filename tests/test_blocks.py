"""Blocks and stacks against torch's and Hugging Face's; cached, watched and observed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import (
    ALiBi,
    Causal,
    Padding,
    TopK,
    Window,
    attention,
)
from regard.nn import (
    Decoder,
    Encoder,
    FeedForward,
    LearnedPositions,
    MultiHeadAttention,
    RelativePositions,
    Rotary,
    SinusoidalPositions,
    Transformer,
)
from test_nn import drawn, seeded, tokens

DIM, HEADS = 16, 4


# Blocks against plain torch


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu-tanh", "swiglu", "geglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_is_the_papers(activation, bias):
    module = seeded(lambda: FeedForward(6, 10, activation=activation, bias=bias), torch.float64)
    x = drawn(2, 3, 6, dtype=torch.float64)

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight.mT + (layer.bias if bias else 0)

    act = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * torch.special.ndtr(x),
        "gelu-tanh": lambda x: x / (1 + (-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)).exp()),
        "swiglu": lambda x: x / (1 + (-x).exp()),
        "geglu": lambda x: x * torch.special.ndtr(x),
    }[activation]
    if activation in ("relu", "gelu", "gelu-tanh"):
        assert module.gate is None
        hidden = act(linear(module.up, x))
    else:
        hidden = act(linear(module.gate, x)) * linear(module.up, x)
    torch.testing.assert_close(module(x), linear(module.down, hidden))


def test_feed_forward_sizes():
    """A gated one has about as many parameters as one without."""
    plain, gated = FeedForward(96), FeedForward(96, activation="swiglu")
    assert plain.up.out_features == 384
    assert gated.up.out_features == 256
    assert FeedForward(10, activation="geglu").up.out_features == 32
    sizes = [sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (plain, gated)]
    assert sizes[0] == sizes[1]


def taken(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """A state dict with parts of its names replaced."""
    out = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        out[name] = tensor
    return out


ENCODER = {
    "self_attn.": "attention.", "linear1.": "feed_forward.up.", "linear2.": "feed_forward.down.",
    "norm1.": "attention_norm.", "norm2.": "feed_forward_norm.",
}  # fmt: skip
DECODER = ENCODER | {
    "multihead_attn.": "cross_attention.", "norm2.": "cross_norm.", "norm3.": "feed_forward_norm.",
}  # fmt: skip


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_encoder_is_torchs(pre_norm, activation, bias):
    """Two layers with padding: outputs, and the gradients of everything."""
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 24, 0.0, activation, batch_first=True, norm_first=pre_norm, bias=bias
    )
    norm = nn.LayerNorm(DIM, bias=bias) if pre_norm else None
    theirs = seeded(
        lambda: nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False), torch.float64
    )
    ours = Encoder(
        2, DIM, HEADS, hidden=24, activation=activation, pre_norm=pre_norm, bias=bias
    ).double()
    ours.load_state_dict(taken(theirs.state_dict(), ENCODER))
    x = drawn(2, 7, DIM, dtype=torch.float64)
    keep = torch.arange(7) < torch.tensor([[7], [4]])
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    wanted = theirs(leaves[0], src_key_padding_mask=~keep)
    out = ours(leaves[1], mask=Padding(keep))
    torch.testing.assert_close(out, wanted)
    weight = drawn(*out.shape, dtype=torch.float64, seed=2)
    for result in (out, wanted):
        (result * weight).sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    joint = {n: p.grad for n, p in ours.named_parameters()}
    for n in range(2):
        here = f"layers.{n}.attention"
        parts = [joint[f"{here}.{p}_proj.weight"] for p in "qkv"]
        torch.testing.assert_close(torch.cat(parts), grads[f"layers.{n}.self_attn.in_proj_weight"])
        up = joint[f"layers.{n}.feed_forward.up.weight"]
        torch.testing.assert_close(up, grads[f"layers.{n}.linear1.weight"])


@pytest.mark.parametrize("pre_norm", [True, False])
def test_a_decoder_with_memory_is_torchs(pre_norm):
    layer = nn.TransformerDecoderLayer(DIM, HEADS, 24, 0.0, batch_first=True, norm_first=pre_norm)
    norm = nn.LayerNorm(DIM) if pre_norm else None
    theirs = seeded(lambda: nn.TransformerDecoder(layer, 2, norm), torch.float64)
    ours = Decoder(
        2, DIM, HEADS, hidden=24, activation="relu", pre_norm=pre_norm, cross=True
    ).double()
    ours.load_state_dict(taken(theirs.state_dict(), DECODER))
    x, memory = (drawn(2, n, DIM, dtype=torch.float64, seed=n) for n in (7, 9))
    keep = torch.arange(9) < torch.tensor([[9], [4]])
    causal = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    wanted = theirs(x, memory, tgt_mask=causal, memory_key_padding_mask=~keep)
    out = ours(x, memory, memory_mask=Padding(keep))
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(ours(x, ours.remember(memory), memory_mask=Padding(keep)), out)


def test_memory_of_another_size():
    decoder = seeded(lambda: Decoder(1, DIM, HEADS, cross=True, memory_dim=10))
    assert decoder(drawn(2, 3, DIM), drawn(2, 5, 10)).shape == (2, 3, DIM)


# Whole models against Hugging Face's

LLAMA = {
    "model.embed_tokens.": "embed.", "model.layers.": "decoder.layers.",
    "model.norm.": "decoder.norm.", "self_attn.o_proj.": "attention.out_proj.",
    "self_attn.": "attention.", "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "feed_forward_norm.", "lm_head.": "head.",
    "mlp.gate_proj.": "feed_forward.gate.", "mlp.up_proj.": "feed_forward.up.",
    "mlp.down_proj.": "feed_forward.down.",
}  # fmt: skip


def as_transformer(model: nn.Module, **more: Any) -> Transformer:
    """Our model with a Llama-shaped model's weights."""
    c = model.config
    ours = Transformer(
        vocab=c.vocab_size, dim=c.hidden_size, heads=c.num_attention_heads,
        decoder=c.num_hidden_layers, kv_heads=c.num_key_value_heads, head_dim=c.head_dim,
        hidden=c.intermediate_size, activation="swiglu", norm="rms", norm_eps=c.rms_norm_eps,
        positions=Rotary(c.head_dim, base=c.rope_parameters["rope_theta"]), bias=False,
        tie=c.tie_word_embeddings, **more,
    )  # fmt: skip
    ours.load_state_dict(taken(model.state_dict(), LLAMA))
    return ours.eval()


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_decoder_is_llamas(family):
    """Grouped heads, rotary, RMS norms, SwiGLU; Qwen3's queries and keys are normed besides."""
    hf = pytest.importorskip("transformers")
    config = getattr(hf, f"{family}Config")(
        vocab_size=11, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, intermediate_size=24, max_position_embeddings=64,
        attention_bias=False, tie_word_embeddings=family == "Llama",
    )  # fmt: skip
    model = seeded(lambda: getattr(hf, f"{family}ForCausalLM")(config)).eval()
    ours = as_transformer(model, qk_norm=family == "Qwen3")
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens(20)), model(tokens(20)).logits, rtol=1e-4, atol=1e-4)


def test_a_real_model(shared):
    """MiniMind2-small in our modules: its logits; and in bfloat16 about the same words."""
    hf = pytest.importorskip("transformers")
    folder = shared / "models" / "minimind2-small"
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = hf.AutoTokenizer.from_pretrained(folder)("The cat sat on the mat because it was tired.")
    given = torch.tensor([words["input_ids"]])
    ours = as_transformer(model)
    with torch.no_grad():
        wanted = model(given).logits
        out = ours(given)
        torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
        caches = [regard.cache.KVCache() for _ in ours.decoder.layers]
        steps = [ours(given[:, n : n + 1], caches=caches) for n in range(given.shape[1])]
        torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-3, atol=1e-3)
        half = ours.bfloat16()(given).float()
        assert float((half.softmax(-1) - wanted.softmax(-1)).abs().max()) < 0.05


# Positions in a stack


def plain_stack(stack: Encoder, x: Tensor, mask: regard.Mask, bias: Any = None) -> Tensor:
    """A pre-norm stack's blocks one by one, from their parts, attention by the reference."""
    for layer in stack.layers:
        h, own = layer.attention_norm(x), layer.attention
        q = own.q_proj(h).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (own.k_proj, own.v_proj))
        if own.rotary is not None:
            q, k = own.rotary(q), own.rotary(k)
        mixed = attention(q, k, v, mask=mask, bias=bias, engine="reference")
        x = x + own.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + layer.feed_forward(layer.feed_forward_norm(x))
    return stack.norm(x)


POSITIONS = {
    "none": lambda: None,
    "sinusoidal": lambda: SinusoidalPositions(DIM),
    "learned": lambda: LearnedPositions(30, DIM),
    "rotary": lambda: Rotary(DIM // HEADS),
    "relative": lambda: RelativePositions(HEADS, buckets=8, max_distance=6),
    "alibi": ALiBi,
}


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@pytest.mark.parametrize("make", POSITIONS.values(), ids=POSITIONS)
def test_positions_of_a_stack(make, kind):
    stack = seeded(lambda: kind(2, DIM, HEADS, positions=make()), torch.float64)
    x = drawn(2, 9, DIM, dtype=torch.float64)
    mask = Causal() & Window(6) if kind is Decoder else Window(6, ahead=2)
    out = stack(x, mask=Window(6) if kind is Decoder else mask)
    module = stack.positions
    bias = module() if isinstance(module, RelativePositions) else module
    bias = bias if isinstance(bias, regard.ALiBi | regard.RelativeBias) else None
    start = module(x) if isinstance(module, SinusoidalPositions | LearnedPositions) else x
    torch.testing.assert_close(out, plain_stack(stack, start, mask, bias))
    out.square().sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    more = drawn(2, 1, 9, 9, dtype=torch.float64)
    both = [b for b in (bias, more) if b is not None]
    for given in (more, [more]):
        out = stack(x, mask=Window(6) if kind is Decoder else mask, bias=given)
        torch.testing.assert_close(out, plain_stack(stack, start, mask, both))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary", "relative", "alibi", None])
@pytest.mark.parametrize("encoder, decoder", [(0, 2), (2, 0), (1, 2)])
def test_a_transformer_of_each_kind(encoder, decoder, kind):
    """Logits, a gradient for every parameter; a decoder sees no future, an encoder does."""
    model = seeded(
        lambda: Transformer(
            vocab=11,
            dim=DIM,
            heads=HEADS,
            encoder=encoder,
            decoder=decoder,
            positions=kind,
            length=20,
            source_vocab=5 if encoder and decoder else None,
        )
    )
    given = [tokens()]
    if encoder and decoder:
        given.append(tokens(9, vocab=5))
    logits = model(*given)
    assert logits.shape == (2, 7, 11)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    other = given[0].clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    changed = (model(other, *given[1:]) != logits).any(-1)
    assert torch.equal(changed.any(0), torch.arange(7) >= (4 if decoder else 0))
    if encoder and decoder:
        assert (model(given[0], tokens(9, seed=1, vocab=5)) != logits).any()
    assert model.head.weight is model.embed.weight
    assert Transformer(vocab=5, dim=4, heads=1, decoder=1, tie=False).head.weight.shape == (5, 4)


def test_padding_changes_nothing():
    model = seeded(lambda: Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=2, decoder=2))
    target, source = tokens(), tokens(9, seed=1)
    alone = model(target, source[:, :6])
    keep = torch.arange(9)[None] < 6
    torch.testing.assert_close(model(target, source, source_mask=Padding(keep)), alone)
    longer = torch.cat([target, target], 1)
    keep = torch.arange(14)[None] < 7
    out = model(longer, source[:, :6], mask=Padding(keep))
    torch.testing.assert_close(out[:, :7], alone)


def test_sinusoidal_embeddings_are_scaled():
    """Vaswani et al. 2017, section 3.4."""
    model = Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=1, positions="sinusoidal")
    assert model.scale == DIM**0.5
    x = model.embed(tokens()) * 4
    out = model.encoder(x)
    torch.testing.assert_close(model(tokens()), out @ model.embed.weight.mT)


def test_dropout_is_of_training():
    model = seeded(
        lambda: Transformer(vocab=11, dim=DIM, heads=HEADS, encoder=1, decoder=1, dropout=0.3)
    )
    first, second = (model(tokens(), tokens()) for _ in range(2))
    assert not torch.allclose(first, second)
    model.eval()
    assert torch.equal(model(tokens(), tokens()), model(tokens(), tokens()))


# Caches

CACHES = {
    "full": regard.cache.KVCache,
    "window": lambda: regard.cache.WindowCache(40, first=2),
    "paged": regard.cache.PagedCache,
}


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative", "alibi"])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_decoding_step_by_step_is_one_forward(make, positions):
    """A prompt, a chunk, then tokens one by one: with an encoder's memory projected once."""
    model = seeded(
        lambda: Transformer(
            vocab=11,
            dim=DIM,
            heads=HEADS,
            encoder=1,
            decoder=2,
            kv_heads=2,
            positions=positions,
            length=40,
        )
    ).eval()
    target, source = tokens(15), tokens(9, seed=1)
    with torch.no_grad():
        whole = model(target, source)
        caches = [make() for _ in model.decoder.layers]
        memory = model.remember(model.encode(source))
        steps = [
            model.decode(target[:, a:b], memory, caches=caches)
            for a, b in ((0, 6), (6, 10), *((n, n + 1) for n in range(10, 15)))
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert [c.length for c in caches] == [15, 15]


def test_a_window_cache_is_a_window_mask():
    model = seeded(lambda: Transformer(vocab=11, dim=DIM, heads=HEADS, decoder=2)).eval()
    given = tokens(20)
    with torch.no_grad():
        whole = model(given, mask=Window(5) | regard.First(2))
        caches = [regard.cache.WindowCache(5, first=2) for _ in range(2)]
        steps = [model(given[:, n : n + 1], caches=caches) for n in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)


def test_observing_a_cached_step():
    module = seeded(lambda: MultiHeadAttention(DIM, HEADS, rotary=Rotary(4))).eval()
    x = drawn(2, 9, DIM)
    with torch.no_grad():
        _, (whole,) = module(x, mask=Causal(), observe=[TopK(3)])
        cache = regard.cache.KVCache()
        module(x[:, :8], mask=Causal(), cache=cache)
        out, (top,) = module(x[:, 8:], mask=Causal(), cache=cache, observe=[TopK(3)])
    assert out.shape == (2, 1, DIM)
    torch.testing.assert_close(top.weights, whole.weights[:, :, 8:])
