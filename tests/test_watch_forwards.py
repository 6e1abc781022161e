"""`watch(…, keep="all")`: what each forward gave stays: steps of a diffusion, turns of a chat."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import regard
import regard.huggingface
import zoo
from regard import Received, RegardError, Rows, TopK

BY_NAME = {family.name: family for family in zoo.FAMILIES}
OBSERVE = [TopK(64), Received()]


class Attend(nn.Module):
    """Attention of one head, as torch computes it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        q = self.mix(x)[:, None]
        return F.scaled_dot_product_attention(q, q, x[:, None])[:, 0]


class Denoiser(nn.Module):
    """A step of a diffusion: attention over a noisy image, in step 1 by the first block alone."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, x, step):
        for block in self.blocks[: 1 if step == 1 else 2]:
            x = x + block(x)
        return x


def denoiser():
    torch.manual_seed(0)
    return Denoiser().eval()


@torch.no_grad()
def test_steps_of_a_diffusion():
    """Each step's weights; a block that a step leaves out is not there."""
    module, x = denoiser(), torch.randn(2, 5, 8)
    with regard.watch(module, observe=[Rows(range(5))], keep="all") as seen:
        noisy = [x]
        for step in range(3):
            noisy.append(module(noisy[-1], step))
    assert [[layer.name for layer in f] for f in seen.forwards] == [
        ["blocks.0", "blocks.1"], ["blocks.0"], ["blocks.0", "blocks.1"],
    ]  # fmt: skip
    for given, forward in zip(noisy, seen.forwards, strict=False):
        with regard.watch(module, observe=[Rows(range(5))]) as alone:
            module(given, 1)
        weights = forward["blocks.0"].seen[0].weights
        assert torch.equal(weights, alone["blocks.0"].seen[0].weights)
    # What is not asked of `forwards` is the last, as ever
    assert seen["blocks.0"] is seen.forwards[2][0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["Llama", "BART"])
def test_turns_of_a_chat(name):
    """Each `generate()` is one, with its steps; the encoder's layers go with the decoder's."""
    model = BY_NAME[name].build()
    texts = [zoo.ids()[:, :n] for n in (3, 7, 5)]
    settings = dict(max_new_tokens=4, do_sample=False)
    with regard.watch(model, observe=OBSERVE, keep="all", keep_qk=True) as seen:
        for ids in texts:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert len(seen.forwards) == 3
    for ids, forward in zip(texts, seen.forwards, strict=True):
        with regard.watch(model, observe=OBSERVE, keep_qk=True) as alone:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert [layer.name for layer in forward] == [layer.name for layer in alone]
        for ours, right in zip(forward, alone, strict=True):
            assert torch.equal(ours.seen[0].weights, right.seen[0].weights)
            assert torch.equal(ours.seen[1].sum, right.seen[1].sum)
            weights = forward.recording().weights(ours.name)
            assert torch.equal(weights, alone.recording().weights(ours.name))


@torch.no_grad()
def test_a_turn_that_goes_on_from_a_cache_is_the_same_sequence():
    """Its rows are appended."""
    llama, ids = BY_NAME["Llama"].build(), zoo.ids()
    with regard.watch(llama, observe=OBSERVE, keep="all") as seen:
        cache = llama(ids[:, :6], use_cache=True).past_key_values
        llama(ids[:, 6:], past_key_values=cache)
    assert len(seen.forwards) == 1
    assert [layer.q_len for layer in seen] == [ids.shape[1]] * 2


@torch.no_grad()
def test_the_last_alone_by_default():
    module, x = denoiser(), torch.randn(2, 5, 8)
    with regard.watch(module, observe=[Received()]) as seen:
        for _ in range(3):
            module(x, 0)
    (last,) = seen.forwards
    assert [layer.name for layer in last] == [layer.name for layer in seen]
    assert len(last) == 2
    assert last[0] is seen[0]


def test_layers_that_are_asked_for():
    model, inputs = BY_NAME["BART"].build(), BY_NAME["BART"].inputs()
    with torch.no_grad(), regard.watch(model, layers=["*encoder_attn"], keep="all") as seen:
        model(**inputs)
        model(**inputs)
    names = [[layer.name for layer in forward] for forward in seen.forwards]
    assert names == [[layer.name for layer in seen]] * 2
    assert all(name.endswith("encoder_attn") for name in names[0])


def test_wrong_keep():
    with (
        pytest.raises(RegardError, match="'last' or 'all'"),
        regard.watch(denoiser(), keep="every"),
    ):
        pass
