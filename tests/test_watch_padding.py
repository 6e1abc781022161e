"""What keys receive in a padded batch leaves out the queries that are padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
from regard import Causal, Distances, Map, Padding, Received, Rows, TopK

hf = pytest.importorskip("transformers")
N, PADS = 9, 3
# One that sums stands before and one after those that do not: results stay in their order
OBSERVE = [TopK(2), Received(), Rows(range(N)), Map(N, N), Distances(4), Received(heads="mean")]
LENGTHS = {"right": torch.arange(N)[None] < torch.tensor([[N], [N - PADS]]),
           "left": torch.arange(N)[None] >= torch.tensor([[0], [PADS]])}  # fmt: skip
SIZES = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64,
)  # fmt: skip
SEQ2SEQ = dict(
    vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0,
    forced_eos_token_id=None,
)  # fmt: skip


class Own(nn.Module):
    """A module around one attention function, its input the queries, keys and values."""

    def __init__(self, attend):
        super().__init__()
        self.attend, self.part = attend, nn.Identity()

    def forward(self, x):
        x = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return self.attend(x, x, x)


def ids():
    torch.manual_seed(0)
    return torch.randint(3, 64, (2, N))


def bert(keep, implementation):
    model = hf.BertModel._from_config(hf.BertConfig(**SIZES), attn_implementation=implementation)
    return model, dict(input_ids=ids(), attention_mask=keep.long())


def llama(keep):
    return hf.LlamaModel(hf.LlamaConfig(**SIZES)), dict(input_ids=ids(), attention_mask=keep.long())


def bart(keep):
    model, mask = hf.BartModel(hf.BartConfig(**SEQ2SEQ)), keep.long()
    return model, dict(
        input_ids=ids(), attention_mask=mask, decoder_input_ids=ids(), decoder_attention_mask=mask
    )


def torchs_encoder(keep):
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(block, 1, enable_nested_tensor=False), dict(
        src=torch.randn(2, N, 16), src_key_padding_mask=~keep
    )


def torchs_module(keep):
    x = torch.randn(2, N, 16)
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    return module, dict(query=x, key=x, value=x, key_padding_mask=~keep)


def by_torchs_function(keep, mask):
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask(keep))  # noqa: E731
    return Own(attend), dict(x=torch.randn(2, N, 16))


def by_regard(keep):
    attend = lambda q, k, v: regard.attention(q, k, v, mask=Causal() & Padding(keep))  # noqa: E731
    return Own(attend), dict(x=torch.randn(2, N, 16))


SQUARE = torch.ones(N, N, dtype=torch.bool).tril()
KINDS = {
    "BERT, sdpa": lambda keep: bert(keep, "sdpa"),
    "BERT, eager": lambda keep: bert(keep, "eager"),
    "Llama": llama,
    "BART": bart,
    "TransformerEncoder": torchs_encoder,
    "MultiheadAttention": torchs_module,
    "a row of bools": lambda keep: by_torchs_function(keep, lambda k: k[:, None, None]),
    "a row of -inf": lambda keep: by_torchs_function(
        keep, lambda k: torch.zeros(2, 1, 1, N).masked_fill(~k[:, None, None], -torch.inf)
    ),
    "a square of bools": lambda keep: by_torchs_function(
        keep, lambda k: SQUARE & k[:, None, None]
    ),
    "regard.attention": by_regard,
}  # fmt: skip


def watched(model, inputs, **settings):
    torch.manual_seed(0)
    with torch.no_grad(), regard.watch(model.eval(), observe=OBSERVE, **settings) as seen:
        model(**inputs)
    assert len(seen)
    return seen


def check(layer, real):
    """Sums are those of the rows of real (batch, q_len) queries."""
    top, received, rows, whole, distances, pooled = layer.seen
    weights = rows.weights.nan_to_num(0)
    kept = weights * real[:, None, :, None]
    torch.testing.assert_close(received.sum, kept.sum(2), rtol=0, atol=1e-5)
    count = (kept > 0).sum(2, dtype=torch.int32)
    at = count > 0  # a key that is hidden by −inf is not masked, and counts
    assert torch.equal(received.count[at], count[at])
    torch.testing.assert_close(pooled.sum, kept.sum(2).mean(1, True), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.weights[..., :N, :N], kept, rtol=0, atol=1e-5)
    mass = (distances.past + distances.future).sum(-1)
    torch.testing.assert_close(mass, kept.sum((2, 3)), rtol=0, atol=1e-5)
    # Rows are the model's, padding's too
    torch.testing.assert_close(top.weights.sum(-1) + top.rest, weights.sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_leave_out_queries_that_are_padding(kind, side):
    torch.manual_seed(0)
    keep = LENGTHS[side]
    if kind == "TransformerEncoder" and side == "left":
        pytest.skip("as on the right")
    model, inputs = KINDS[kind](keep)
    for layer in watched(model, inputs):
        check(layer, keep)
    for layer in watched(model, inputs, count_padding=True):
        check(layer, torch.ones_like(keep))


def test_each_token_that_a_batch_generates_counts():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SIZES, eos_token_id=None, pad_token_id=0)
    model, keep = hf.LlamaForCausalLM(config).eval(), LENGTHS["left"][:, :6]
    with regard.watch(model, observe=OBSERVE) as seen:
        model.generate(
            input_ids=ids()[:, :6], attention_mask=keep.long(), max_new_tokens=4, do_sample=False
        )
    check(seen[0], torch.cat([keep, keep.new_ones(2, 3)], 1))


def test_a_token_that_nobody_sees_is_real_where_none_sees_itself():
    """Strictly causal: the last key is hidden from all."""
    before = torch.ones(N, N, dtype=torch.bool).tril(-1)
    model, inputs = by_torchs_function(LENGTHS["left"], lambda _: before)
    for layer in watched(model, inputs):
        check(layer, torch.ones(2, N, dtype=torch.bool))


def test_learned_queries_are_no_padding():
    """Cross-attention of its own, over padded keys."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    inputs = dict(query=torch.randn(2, N, 16), key=torch.randn(2, N, 16))
    inputs |= dict(value=inputs["key"], key_padding_mask=~LENGTHS["right"])
    for layer in watched(module, inputs):
        check(layer, torch.ones(2, N, dtype=torch.bool))
