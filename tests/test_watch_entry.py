"""What `watch` is given is checked on entry, as `attention` checks it; and copies made inside."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
import regard.huggingface
import zoo
from regard import Cut, Entropy, Heads, RegardError, Rows, TopK, attention
from test_watch_models import BY_NAME, EVERY_KEY, patched_state

# what is given, what is said
WRONG = {
    "an observer alone": (dict(observe=TopK(3)), "observe is TopK(k=3) alone; give a list"),
    "a class alone": (dict(observe=TopK), "alone; give a list, such as [TopK(8)]"),
    "a class": (dict(observe=[Entropy]), "observe holds <class"),
    "a word": (dict(observe="entropy"), "observe is 'entropy'; give a list"),
    "a number": (dict(observe=3), "observe is 3; give a list"),
    "a word among observers": (dict(observe=[TopK(3), "x"]), "observe holds 'x'; give observers"),
    "a cut alone": (dict(cut=Cut(0, Heads([1]))), "alone; give a list, such as [Cut(3, Heads"),
    "a mask for a cut": (dict(cut=Heads([1])), "alone; give a list, such as [Cut(3, Heads"),
    "a mask in cuts": (dict(cut=[Heads([1])]), "cut holds Heads([1]); give cuts"),
    "a pair": (dict(cut=[(0, Heads([1]))]), "give cuts, such as Cut(3, Heads([1]))"),
    "a number of a head": (dict(cut=[Cut(0, 1)]), "Cut(0, …): mask is a int; give a regard mask"),
    "half a layer's cut": (dict(cut=[Cut(0.5, Heads([1]))]), "Cut: layer takes numbers of layers"),
    "half a layer": (dict(layers=[0.5]), "layers takes numbers of layers"),
    "half a layer alone": (dict(layers=0.5), "layers takes numbers of layers"),
    "truth for a layer": (dict(layers=True), "layers takes numbers of layers"),
}  # fmt: skip


@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("build", [zoo.plain, BY_NAME["Llama"].build], ids=["torch", "hugging"])
def test_what_does_not_fit_is_refused_on_entry(build, given, said):
    model = build()
    before = patched_state(model)
    with pytest.raises(RegardError) as error, regard.watch(model, **given):
        pytest.fail("entered")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert patched_state(model) == before
    with regard.watch(model):  # and it is not taken for a watched one
        pass


@pytest.mark.parametrize("wrong", [TopK(3), TopK, [Entropy], "entropy", 3, [TopK(3), "x"]], ids=str)
def test_observers_are_refused_in_the_words_of_attention(wrong):
    x = zoo.random(1, 1, 4, 8)
    with pytest.raises(RegardError) as theirs:
        attention(x, x, x, observe=wrong)
    with pytest.raises(RegardError) as ours, regard.watch(zoo.plain(), observe=wrong):
        pass
    assert str(ours.value) == str(theirs.value)


def test_a_k_that_is_not_meant():
    """As `attention` says it, where the call's lengths are known."""
    model = zoo.plain()
    with (
        pytest.raises(RegardError, match="k is 1000000000, and the call has 5 keys; give fewer"),
        regard.watch(model, observe=[TopK(10**9)]),
    ):
        model(zoo.random(2, 5, 32))


@pytest.mark.parametrize("which", [1, np.int64(1), torch.tensor(1), (1,), {1}, range(1, 2), None])
def test_layers_of_any_whole_number(which):
    model = zoo.plain()
    with regard.watch(model, observe=None, layers=which, cut=None) as seen:
        model(zoo.random(2, 5, 32))
    assert [x.name for x in seen] == ["blocks.0", "blocks.1"][0 if which is None else 1 :]


@pytest.mark.parametrize("what", [None, 3, "gpt2", zoo.Plain, {"model": 1}], ids=str)
def test_what_is_no_module(what):
    with pytest.raises(RegardError, match="watch takes a torch module, not a"), regard.watch(what):
        pass


@pytest.mark.parametrize("build", [zoo.plain, BY_NAME["Llama"].build], ids=["torch", "hugging"])
def test_one_watch_is_entered_again(build):
    """One after the other it watches anew; inside itself it says so, and the first goes on."""
    model = build()
    given = {"x": zoo.random(2, 5, 32)} if build is zoo.plain else {"input_ids": zoo.ids()}
    before, block = patched_state(model), regard.watch(model, observe=[TopK(2)])
    with block as first:
        with pytest.raises(RegardError, match="is being watched already"), block:
            pass
        model(**given)
    assert patched_state(model) == before
    with block as second:
        model(**given)
    assert patched_state(model) == before
    assert second is not first
    assert len(first) == len(second) == 2
    assert torch.equal(first[1].seen[0].weights, second[1].seen[0].weights)


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    written = pickle.dumps(model)
    assert b"regard" not in written.replace(b"regard_", b"")  # it loads where regard is not
    return pickle.loads(written)


def by_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2).eval()


BUILT = {
    "torch": (encoder, {"src": zoo.random(2, 5, 32)}),
    "eager": (lambda: BY_NAME["Llama"].build(attn_implementation="eager"), zoo.decoder()),
    "sdpa": (lambda: BY_NAME["Llama"].build(attn_implementation="sdpa"), zoo.decoder()),
    "two towers": (lambda: BY_NAME["T5"].build(), zoo.seq2seq()),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("build, inputs", BUILT.values(), ids=BUILT)
def test_a_copy_made_inside_is_an_ordinary_model(build, inputs, copied):
    model = build()
    plain = [copied(model), model]
    with torch.no_grad():
        alone = first(model(**inputs))
        with regard.watch(model, observe=[EVERY_KEY]) as seen:
            other = copied(model)
            inside = first(other(**inputs))
            assert len(seen) == 0  # not recorded, and counted by nobody
            model(**inputs)
        after = first(other(**inputs))
        with regard.watch(other, observe=[EVERY_KEY]) as its:
            first(other(**inputs))
    torch.testing.assert_close(inside, alone)
    torch.testing.assert_close(after, alone, rtol=0, atol=0)
    assert [x.name for x in its] == [x.name for x in seen]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in other.modules())
    assert hooks == 0 or copied is not by_deepcopy
    for mine, theirs in zip(other.modules(), plain[0].modules(), strict=True):
        for name, value in vars(theirs).items():
            if hasattr(value, "_attn_implementation"):
                ours = vars(mine)[name]
                assert ours._attn_implementation == value._attn_implementation != "regard"
                assert hash(ours._attn_implementation) == hash(value._attn_implementation)


def first(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_a_copy_made_inside_is_watched_inside():
    """While the first still is: each fills its own."""
    model, inputs = BUILT["sdpa"][0](), BUILT["sdpa"][1]
    with torch.no_grad(), regard.watch(model, observe=[EVERY_KEY]) as seen:
        other = copy.deepcopy(model)
        with regard.watch(other, observe=[EVERY_KEY]) as its:
            other(**inputs)
        assert (len(its), len(seen)) == (2, 0)
        model(**inputs)
    assert torch.equal(its[0].seen[0].weights, seen[0].seen[0].weights)


class NoHeads(nn.Module):
    """Pruned of every head."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("sizes", [(2, 0, 5, 8), (0, 4, 5, 8), (2, 4, 0, 8)], ids=str)
def test_no_heads_no_batch_no_tokens(sizes):
    model, x = NoHeads(), torch.zeros(sizes)
    alone = model(x)
    with regard.watch(model, observe=[TopK(2), Rows([0])], keep_qk=True) as seen:
        watched = model(x)
    assert torch.equal(watched, alone)
    if not sizes[1]:  # pruned of every head: it runs, and there are no weights
        assert len(seen) == 0
        return
    (layer,) = seen
    assert (layer.heads, layer.kv_heads, layer.q_len) == (sizes[1], sizes[1], sizes[2])
    assert layer.seen[0].weights.shape == (*sizes[:3], 2)
