"""Beam search under `watch`: each row's history is that of the beam it stands for."""

import pytest
import torch

import regard
import regard.huggingface
import zoo
from regard import TopK
from regard.cache import H2O, KVCache
from regard.call.checked import Call
from regard.capture.beams import Trail, _same
from regard.huggingface import generation_cache
from test_watch_models import assert_weights

BY_NAME = {family.name: family for family in zoo.FAMILIES}
EVERY = [TopK(64), regard.Entropy(), regard.Received()]


def searched(model, prompt, beams=3, **settings):
    """Beam search, watched: what was generated, and what was seen."""
    settings = dict(max_new_tokens=7, do_sample=False, num_beams=beams) | settings
    with regard.watch(model, observe=EVERY, keep_qk=True) as seen:
        out = model.generate(
            **prompt, **settings, num_return_sequences=beams, early_stopping=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    return out, seen


def check(model, prompt, out, seen, beams=3):
    """Each returned sequence's rows are those that one eager forward over it gives."""
    rows = out.beam_indices[:, -1].tolist()  # where its last token was chosen from
    assert len(set(map(tuple, out.sequences.tolist()))) > beams // 2
    repeated = {key: t.repeat_interleave(beams, 0) for key, t in prompt.items()}
    whole = out.sequences[:, :-1]
    if model.config.is_encoder_decoder:
        inputs = repeated | {"decoder_input_ids": whole}
    else:
        keep = torch.nn.functional.pad(
            repeated["attention_mask"], (0, whole.shape[1] - repeated["attention_mask"].shape[1]),
            value=1,
        )  # fmt: skip
        at = (keep.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": whole, "attention_mask": keep, "position_ids": at}
    eager = zoo.eager_attentions(model, inputs)
    recording = seen.recording()
    assert [layer.name for layer in seen] == list(eager)
    for layer in seen:
        expected = eager[layer.name]
        if "encoder.block" in layer.name or ".encoder.layers" in layer.name:
            continue  # it reads the prompts once
        top, entropy, received = layer.seen
        width = expected.weights.shape[3]
        weights = zoo.dense(top, max(width, layer.k_len))[rows][..., :width]
        assert_weights(weights, expected)
        real = torch.ones(weights.shape[::2]).bool()
        if not model.config.is_encoder_decoder:
            real = inputs["attention_mask"].bool()
        sums = (expected.exact * real[:, None, :, None]).sum(2)
        torch.testing.assert_close(received.sum[rows][..., :width], sums, rtol=0, atol=1e-4)
        exact = torch.special.entr(expected.exact).sum(-1)
        torch.testing.assert_close(entropy.values[rows], exact, rtol=0, atol=1e-4)
        kept = torch.stack([recording.weights(layer.name, batch=b) for b in rows])
        assert_weights(kept[..., :width], expected)


def prompts(name):
    return {k: x for k, x in BY_NAME[name].inputs().items() if not k.startswith("decoder")}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mistral", "BART", "T5"])
def test_rows_follow_the_beams(name, cache):
    model, prompt = BY_NAME[name].build(), prompts(name)
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    if cache == "static" and name == "Mistral":
        pytest.skip("as Llama")
    out, seen = searched(model, prompt, **settings)
    orders = out.beam_indices
    assert not torch.equal(orders, orders[:, :1].expand_as(orders))  # the search did reorder
    check(model, prompt, out, seen)


def test_only_cross_layers():
    """They follow the self-attention beside them, which is not kept."""
    model, prompt = BY_NAME["BART"].build(), prompts("BART")
    _, both = searched(model, prompt)
    with regard.watch(model, observe=EVERY, layers=["*encoder_attn"]) as seen:
        model.generate(**prompt, max_new_tokens=7, do_sample=False, num_beams=3)
    assert [layer.name.rsplit(".", 1)[1] for layer in seen] == ["encoder_attn"] * 2
    for layer in seen:
        right = both[layer.name].seen
        assert torch.equal(layer.seen[0].weights, right[0].weights)
        assert torch.equal(layer.seen[2].sum, right[2].sum)


def test_by_a_cache_that_evicts():
    model, prompt = BY_NAME["Llama"].build(attn_implementation="regard"), prompts("Llama")
    cache = generation_cache(lambda: KVCache(evict=H2O(100)))  # room for all: it forgets nothing
    out, seen = searched(model, prompt, past_key_values=cache)
    check(model, prompt, out, seen)


def step(rows, dim=4, width=1):
    """A layer's call of one token each: query, key and place."""
    key = torch.stack([torch.cat([torch.full((1, width, dim), float(t)) for t in r], 1)
                       for r in rows])  # fmt: skip
    return Call.checked(key[:, :, -1:], key, None)


def test_rows_that_end_alike_are_told_by_what_came_before():
    """In a first layer a key says no more than its token."""
    first = Call.checked(*[torch.ones(4, 1, 2, 4)] * 2, None)
    trail = Trail(first)
    assert trail.items == [0, 0, 0, 0]
    one = step([[1, 1, 5], [1, 1, 6], [1, 1, 5], [1, 1, 7]])
    assert trail.order(one) is None
    trail.extend(one, None)
    two = step([[1, 1, 5, 9], [1, 1, 6, 9], [1, 1, 7, 9], [1, 1, 7, 8]])
    order = trail.order(two)
    assert order == [0, 1, 3, 3]
    trail.extend(two, order)
    # Three rows end with 9: the swap of the first two is seen by their 5 and 6
    swapped = step([[1, 1, 6, 9, 2], [1, 1, 5, 9, 2], [1, 1, 7, 8, 2], [1, 1, 7, 9, 2]])
    assert trail.order(swapped) == [1, 0, 3, 2]


def test_items_that_go_on_alike_are_told_by_their_prompts():
    """Two items whose rows end with the same tokens: beams move within their own."""
    prompts = torch.tensor([[1, 2], [1, 2], [3, 2], [3, 2]]).float()
    key = prompts[:, None, :, None].expand(4, 1, 2, 4)
    trail = Trail(Call.checked(key, key, None))
    assert trail.items == [0, 0, 2, 2]
    one = step([[1, 2, 5], [1, 2, 6], [3, 2, 5], [3, 2, 6]])
    trail.extend(one, trail.order(one))
    assert trail.order(step([[1, 2, 6, 0], [1, 2, 6, 0], [3, 2, 6, 0], [3, 2, 5, 0]])) == [
        1,
        1,
        3,
        2,
    ]


def test_a_row_that_is_nobodys_is_refused():
    first = Call.checked(*[torch.ones(2, 1, 2, 4)] * 2, None)
    trail = Trail(first)
    with pytest.raises(regard.RegardError, match="whose row is whose"):
        trail.order(step([[1, 1, 5], [1, 3, 5]]))


def test_equal_rows():
    key = torch.tensor([1.0, 2, 1, 1, 2])[:, None, None, None].expand(5, 1, 3, 2)
    assert _same(key, torch.zeros(5, 1, 1, dtype=torch.int64)) == [0, 1, 0, 0, 1]
