"""Local attention of a model's own, mapped to its keys; what cannot be read is refused clearly."""

import pytest
import torch
from torch import Tensor, nn

import regard
import tiny
import zoo
from regard import NormTopK, RegardError, Rows, TopK
from test_softmaxes import EVERY_ROW, assert_bits, handwritten, unwatched, watched


def longformer_weights(output, tokens: Tensor, where: Tensor, window: int) -> list[Tensor]:
    """The whole matrices, from Longformer's two outputs, as its documentation describes them."""
    length, wholes = tokens.shape[1], []
    found = output.global_attentions or [None] * len(output.attentions)
    for local, everywhere in zip(output.attentions, found, strict=True):
        most = int(where.sum(1).max())
        whole = torch.zeros(*local.shape[:3], length + 2 * window)
        for row in range(length):
            whole[:, :, row, row : row + 2 * window + 1] = local[:, :, row, most:]
        whole = whole[..., window:-window].contiguous()
        for item, at in enumerate(where):
            for n, key in enumerate(at.nonzero()[:, 0].tolist()):
                whole[item, :, :, key] += local[item, :, :, n]
                whole[item, :, key] = everywhere[item, :, :length, n]
        wholes.append(whole)
    return wholes


@pytest.mark.parametrize("length", [16, 14])
@pytest.mark.parametrize("globally", [[], [0, 9], [3]])
def test_longformer(globally, length):
    model = tiny.build("longformer")
    ids, keep = (t[:, :length] for t in tiny.inputs(model, padded=True).values())
    where = torch.zeros_like(ids)
    where[:, globally] = 1
    where[1, globally[1:]] = 0  # another number of global tokens in each item
    given = {"input_ids": ids, "attention_mask": keep, "global_attention_mask": where}
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    output = unwatched(model, given | {"output_attentions": True})
    for layer, exact in zip(seen, longformer_weights(output, ids, where, 2), strict=True):
        weights = layer.seen[0].weights
        assert (layer.q_len, layer.k_len) == (length, length)
        torch.testing.assert_close(weights, exact, **zoo.AS_MODELS)
        torch.testing.assert_close(weights.sum(-1)[keep.bool()[:, None].expand(-1, 4, -1)].mean(),
                                   torch.tensor(1.0))  # fmt: skip


def test_many_rows_are_read_block_by_block(monkeypatch):
    model = tiny.build("longformer")
    given = tiny.inputs(model)
    observe = [EVERY_ROW, TopK(3), regard.Received(), regard.Map(8, 8)]
    _, _, seen = watched(model, given, observe)
    monkeypatch.setattr("regard.capture.layouts.ROWS", 5)
    _, _, again = watched(model, given, observe)
    for one, other in zip(seen, again, strict=True):
        for a, b in zip(one.seen, other.seen, strict=True):
            fields = [n for n, t in vars(a).items() if isinstance(t, Tensor)]
            for field in fields:
                torch.testing.assert_close(getattr(a, field), getattr(b, field))


def test_led():
    model = tiny.build("led")
    given = tiny.inputs(model, padded=True)
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    output = unwatched(model, given | {"output_attentions": True})
    for layer, local in zip(list(seen)[:2], output.encoder_attentions, strict=True):
        weights = layer.seen[0].weights
        for row in range(16):
            first, last = max(row - 2, 0), min(row + 3, 16)
            there = local[:, :, row, first - row + 2 : last - row + 2]
            torch.testing.assert_close(weights[:, :, row, first:last], there, **zoo.AS_MODELS)
        torch.testing.assert_close(weights.sum(-1), local.sum(-1))


@pytest.mark.parametrize("length", [16, 13])
@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_longt5(kind, length):
    model = zoo.seeded(lambda: type(tiny.build("longt5"))(longt5_config(kind)))
    given = tiny.inputs(model, padded=True)
    given |= {n: given[n][:, :length] for n in ("input_ids", "attention_mask")}
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    output = unwatched(model, given | {"output_attentions": True})
    for layer, blocks in zip(list(seen)[:2], output.encoder_attentions, strict=True):
        weights = layer.seen[0].weights
        extra = blocks.shape[-1] - 12
        assert layer.k_len == length + extra
        for row in range(length):
            if not given["attention_mask"][:, row].all():
                continue  # padding's rows see nothing
            n, inside = divmod(row, 4)
            for item in range(2):
                exact = torch.zeros(4, length + extra)
                for col in range(12):
                    key = (n - 1) * 4 + col
                    if 0 <= key < length:
                        exact[:, key] = blocks[item, n, :, inside, col]
                exact[:, length:] = blocks[item, n, :, inside, 12:]
                torch.testing.assert_close(weights[item, :, row], exact, **zoo.AS_MODELS)


def longt5_config(kind: str):
    config = tiny.build("longt5").config
    config.encoder_attention_type, config.global_block_size = kind, 4
    return config


def test_pegasus_x():
    """Blocks of 4, in every other layer shifted by 2, with 3 global tokens as keys 16 to 18."""
    model = tiny.build("pegasus_x")
    given = tiny.inputs(model)
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    own = unwatched(model, given | {"output_attentions": True}).encoder_attentions
    for n, (name, pair) in enumerate(zip(("0", "1"), own, strict=True)):
        layer = seen[f"model.encoder.layers.{name}.self_attn"]
        globally = seen[f"model.encoder.layers.{name}.self_attn~2"]
        shift, local = 2 * n, pair["local"]
        for row in range(16):
            block, inside = divmod(row + shift, 4)
            exact = torch.zeros(2, 4, 19)
            exact[..., 16:] = local[:, :, block, inside, :3]
            for col in range(4):
                key = block * 4 + col - shift
                if 0 <= key < 16:
                    exact[..., key] = local[:, :, block, inside, 3 + col]
            torch.testing.assert_close(layer.seen[0].weights[:, :, row], exact, **zoo.AS_MODELS)
        order = [*range(3 + shift, 19 + shift), 0, 1, 2]
        exact = pair["global"][..., order]
        torch.testing.assert_close(globally.seen[0].weights, exact, **zoo.AS_MODELS)


@pytest.mark.parametrize("kind", ["big_bird", "bigbird_pegasus"])
def test_big_bird(kind):
    """Its own matrix leaves out what a block weighs that stands twice among a row's keys."""
    model = tiny.build(kind)
    given = tiny.inputs(model, padded=True)
    alone, ours, seen = watched(model, given)
    assert_bits(ours, alone)
    output = unwatched(model, given | {"output_attentions": True})
    own = output.encoder_attentions if kind == "bigbird_pegasus" else output.attentions
    assert any(float(w.sum(-1).min()) < 0.99 for w in own)
    for layer, weights in zip(list(seen)[: len(own)], own, strict=True):
        rows = layer.seen[0].weights
        missing = 1 - weights.sum(-1)
        torch.testing.assert_close(rows[..., 2:], weights[..., 2:], **zoo.AS_MODELS)
        first = weights[..., :2].sum(-1) + missing  # the first block, which the random one repeats
        torch.testing.assert_close(rows[..., :2].sum(-1), first, **zoo.AS_MODELS)


def test_windows():
    """Hiera: each window of its mask units is an item of the batch."""
    model = tiny.build("hiera")
    _, _, seen = watched(model, tiny.inputs(model))
    own = unwatched(model, tiny.inputs(model) | {"output_attentions": True}).attentions
    for layer, weights in zip(seen, own, strict=True):
        right = weights.transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(layer.seen[0].weights, right, **zoo.AS_MODELS)


# What cannot be read


@pytest.mark.parametrize("kind", ["nystromformer", "mra", "yoso", "fnet", "mobilevitv2", "rwkv"])
def test_models_without_a_softmax_over_keys(kind):
    model = tiny.build(kind)
    with pytest.raises(RegardError, match=r"cannot be watched: .*takes a softmax over keys"):
        regard.watch(model, observe=[TopK(2)]).__enter__()


@pytest.mark.parametrize("settings", [{"observe": [NormTopK(2)]}, {"keep_qk": True}])
def test_values_are_not_known(settings):
    model = handwritten()
    with (
        pytest.raises(RegardError, match=r"attn computes attention by itself: .*no queries, keys"),
        regard.watch(model, **settings),
    ):
        model(zoo.random(1, 3, 32))


@pytest.mark.parametrize("settings", [{"cut": [regard.Cut("*", regard.Edges([(3, 2)]))]},
                                      {"observe": [regard.Effect(2)]}])  # fmt: skip
def test_local_attention_is_neither_cut_nor_differentiated(settings):
    model = tiny.build("longformer")
    with pytest.raises(RegardError, match=r"attends in blocks"), regard.watch(model, **settings):
        model(**tiny.inputs(model))


@pytest.mark.parametrize("kind", ["gptj", "fsmt"])
def test_beam_search_says_so(kind):
    model = tiny.build(kind)
    prompt = {n: t[:1] for n, t in tiny.inputs(model).items() if not n.startswith("decoder_")}
    with pytest.raises(RegardError, match="num_beams=1"), regard.watch(model, observe=[TopK(2)]):
        model.generate(**prompt, num_beams=3, max_new_tokens=8, min_new_tokens=8)


def test_a_softmax_that_is_changed_before_its_values_are_mixed():
    """DeBERTa's talking heads mix the weights of all heads: as read they are not what is used."""
    model = tiny.build("deberta")
    for layer in model.encoder.layer:
        own = layer.attention.self
        own.head_logits_proj, own.head_weights_proj = (nn.Linear(4, 4, False) for _ in range(2))
    given = tiny.inputs(model)
    with (
        torch.no_grad(),
        pytest.raises(RegardError, match=r"attention\.self: the weights as read are not those"),
        regard.watch(model, observe=[TopK(2)], verify=True),
    ):
        model(**given)
    with torch.no_grad(), regard.watch(model, observe=[EVERY_ROW], verify=False) as seen:
        model(**given)
    assert len(seen) == 2


def test_a_module_put_in_place_while_the_model_runs():
    """BigBird replaces its sparse attention by full attention at its first short text."""
    model = tiny.build("big_bird")
    short = {n: t[:, :6] for n, t in tiny.inputs(model).items()}
    with (
        torch.no_grad(),
        pytest.raises(RegardError, match=r"was replaced .*run the model once"),
        regard.watch(model, observe=[TopK(2)]),
    ):
        model(**short)
    _, _, seen = watched(model, short)
    assert [layer.q_len for layer in seen] == [6, 6]


def test_only_some_layers_and_nothing_stays():
    model = tiny.build("gptj")
    given = tiny.inputs(model)
    _, _, seen = watched(model, given, [Rows([3])], layers=[-1])
    assert [layer.name for layer in seen] == ["transformer.h.1.attn"]
    assert not torch.overrides._get_current_function_mode_stack()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
