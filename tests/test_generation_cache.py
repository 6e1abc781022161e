"""Our caches in Hugging Face models: the same tokens, and what eviction leaves at its positions."""

from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import Tensor

import regard
import regard.huggingface
import zoo
from regard import Cut, Dense, Received, RegardError, TopK
from regard.cache import H2O, TOVA, KVCache, PagedCache, SnapKV, WindowCache
from regard.huggingface import generation_cache
from zoo import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
DECODERS = ["GPT-2", "Llama", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "gpt-oss"]
SEQ2SEQ = ["T5", "BART", "Marian"]
NEW = 12
# What forgets nothing within the few tokens of these tests
WHOLE = {
    "KVCache": KVCache,
    "PagedCache": lambda: PagedCache(4),
    "WindowCache": lambda: WindowCache(100, first=2),
    "H2O": lambda: KVCache(evict=H2O(100)),
    "SnapKV": lambda: KVCache(evict=SnapKV(100)),
    "TOVA": lambda: KVCache(evict=TOVA(100)),
}
FORGETS = {
    "WindowCache": lambda: WindowCache(6, first=2),
    "H2O": lambda: KVCache(evict=H2O(8)),
    "SnapKV": lambda: KVCache(evict=SnapKV(8, window=3)),
    "TOVA": lambda: KVCache(evict=TOVA(8)),
}
forgets = pytest.mark.parametrize("make", FORGETS.values(), ids=FORGETS)


def generated(model, inputs, **more) -> Tensor:
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder_")}
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **more)


def given_to(model, make):
    """(what generate takes, the cache of ours in it)."""
    cache = generation_cache(make)
    if model.config.is_encoder_decoder:
        return hf.EncoderDecoderCache(cache, hf.DynamicCache()), cache
    return cache, cache


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("family", [*DECODERS, *SEQ2SEQ])
def test_greedy_tokens_are_those_of_their_cache(family, make):
    model, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    theirs = generated(model, inputs)
    model.set_attn_implementation("regard")
    given, cache = given_to(model, make)
    assert torch.equal(generated(model, inputs, past_key_values=given), theirs)
    length = theirs.shape[1] - 1
    assert [c.length for c in cache.caches] == [length] * 2
    assert cache.nbytes > 0


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", [KVCache, PagedCache])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "GPT-2", "BART"])
def test_what_never_forgets_needs_no_attention_of_ours(family, implementation, make):
    model, inputs = BY_NAME[family].build(), BY_NAME[family].inputs()
    model.set_attn_implementation(implementation)
    theirs = generated(model, inputs)
    given, _ = given_to(model, make)
    assert torch.equal(generated(model, inputs, past_key_values=given), theirs)


@pytest.mark.sample(1)
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("hybrid", zoo.HYBRIDS, ids=str)
def test_layers_that_are_not_attention_keep_their_own(hybrid, make):
    model, inputs = hybrid.build(), zoo.decoder()
    theirs = generated(model, inputs)
    model.set_attn_implementation("regard")
    cache = generation_cache(make, model.config)
    assert torch.equal(generated(model, inputs, past_key_values=cache), theirs)
    assert len(cache.caches) == 1


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_beam_search(make):
    model, inputs = BY_NAME["Llama"].build(), zoo.decoder()
    theirs = generated(model, inputs, num_beams=3)
    model.set_attn_implementation("regard")
    ours = generated(model, inputs, num_beams=3, past_key_values=generation_cache(make))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("make", [KVCache, PagedCache])
def test_assisted_generation_crops(make):
    model, inputs = BY_NAME["Llama"].build(), {"input_ids": zoo.ids()[:1].repeat(1, 3)}
    theirs = generated(model, inputs)
    cache = generation_cache(make)
    ours = generated(model, inputs, prompt_lookup_num_tokens=3, past_key_values=cache)
    assert torch.equal(ours, theirs)


# What is computed after an eviction


def fed(model, cache, ids: Tensor, keep: Tensor, sizes) -> SimpleNamespace:
    """Feed a model in pieces: its logits, and for each layer what its queries could see.

    visible: bool (batch, heads, length, length) a layer, from the positions held before each call.
    """
    heads, length = model.config.num_attention_heads, ids.shape[1]
    positions = (keep.cumsum(-1) - 1).clamp(min=0)
    layers = model.config.num_hidden_layers
    visible = [torch.ones(len(ids), heads, length, length).bool().tril() for _ in range(layers)]
    logits, at = [], 0
    for n in sizes:
        new = slice(at, at + n)
        for shown, held in zip(visible, cache.caches, strict=False):
            before = torch.zeros(len(ids), held.key.shape[1], at).bool()
            before.scatter_(-1, held.positions.long(), True)
            before = before.repeat_interleave(heads // before.shape[1], 1)
            shown[:, :, new, :at] = before[:, :, None]
            if isinstance(held, WindowCache):
                shown[:, :, new, : at + n] &= inside(held, keep, at, n)
        out = model(
            ids[:, new], attention_mask=keep[:, : at + n], position_ids=positions[:, new],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits.append(out.logits)
        at += n
    # The first call found no layers to ask: there all is visible, but for a window
    for shown, held in zip(visible, cache.caches, strict=True):
        if isinstance(held, WindowCache):
            shown[:, :, : sizes[0], : sizes[0]] &= inside(held, keep, 0, sizes[0])
    return SimpleNamespace(logits=torch.cat(logits, 1), visible=visible, positions=positions)


def inside(held: WindowCache, keep: Tensor, at: int, n: int) -> Tensor:
    """What a window shows n queries from `at` on: (batch, 1, n, at + n)."""
    back = torch.arange(at, at + n)[:, None] - torch.arange(at + n)
    first = keep.bool() & (keep.cumsum(1) <= held.first)  # the first that are not padding
    return ((back < held.window) | first[:, None, : at + n])[:, None]


def cuts(visible: list[Tensor]) -> list[Cut]:
    return [Cut(number, Dense(~shown)) for number, shown in enumerate(visible)]


def random_ids(length: int) -> tuple[Tensor, Tensor]:
    keep = torch.ones(2, length).long()
    keep[1, :3] = 0
    return zoo.ids(length), keep


SIZES = (14, 1, 1, 1, 4, *(1,) * 9)


@pytest.mark.sample(1)
@torch.no_grad()
@forgets
@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_those_of_the_whole_with_the_evicted_cut(family, make):
    """Positions go on from the true length, and masks hide nothing but what was evicted."""
    model = BY_NAME[family].build(attn_implementation="regard")
    ids, keep = random_ids(sum(SIZES))
    cache = generation_cache(make)
    ours = fed(model, cache, ids, keep, SIZES)
    assert any(not torch.equal(v, torch.ones_like(v).tril()) for v in ours.visible)
    with regard.watch(model, cut=cuts(ours.visible)):
        exact = model(ids, attention_mask=keep, position_ids=ours.positions, use_cache=False).logits
    real = keep.bool()
    scale = float(exact[real].abs().max())
    torch.testing.assert_close(ours.logits[real], exact[real], rtol=0, atol=2e-5 * scale)
    assert cache.get_seq_length() == sum(SIZES)
    assert all(c.key.shape[2] <= 8 + 16 * isinstance(make(), KVCache) for c in cache.caches)


@torch.no_grad()
@forgets
def test_watching_what_a_cache_holds(make):
    """Observers see positions of the text, merged over the steps; a recording gives them again."""
    model = BY_NAME["Llama"].build(attn_implementation="regard")
    ids, keep = random_ids(sum(SIZES))
    asked = [TopK(64), Received()]
    with regard.watch(model, observe=asked, keep_qk=True) as seen:
        ours = fed(model, generation_cache(make), ids, keep, SIZES)
    with regard.watch(model, observe=asked, cut=cuts(ours.visible)) as exact:
        model(ids, attention_mask=keep, position_ids=ours.positions, use_cache=False)
    recording = seen.recording()
    for layer, truth in zip(seen, exact, strict=True):
        assert layer.q_len == truth.q_len == sum(SIZES)
        weights = zoo.dense(truth.seen[0], sum(SIZES))
        mine = zoo.dense(layer.seen[0], sum(SIZES))
        torch.testing.assert_close(mine, weights, rtol=0, atol=1e-5)
        torch.testing.assert_close(layer.seen[1].sum, truth.seen[1].sum, rtol=0, atol=1e-4)
        again = recording.weights(layer.name, batch=1)
        torch.testing.assert_close(again, weights[1], rtol=0, atol=1e-5)


@torch.no_grad()
@forgets
def test_output_attentions_are_by_position(make):
    model = BY_NAME["Llama"].build(attn_implementation="regard")
    cache, ids = generation_cache(make), zoo.ids(20)
    model(ids, past_key_values=cache)
    held = [c.positions for c in cache.caches]
    out = model(ids[:, :1], past_key_values=cache, output_attentions=True)
    for weights, positions in zip(out.attentions, held, strict=True):
        assert weights.shape == (2, 4, 1, 21)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1))
        old = torch.zeros(2, 2, 21).scatter(-1, positions.long(), 1.0).repeat_interleave(2, 1)
        old[..., 20] = 1
        assert torch.all((weights[:, :, 0] > 0) <= (old > 0))


@forgets
def test_the_memory_saved(make):
    model, ids = BY_NAME["Llama"].build(attn_implementation="regard"), zoo.ids(40)
    full, cache = generation_cache(), generation_cache(make)
    with torch.no_grad():
        for each in (full, cache):
            model(ids, past_key_values=each)
            for n in range(9):
                model(ids[:, n : n + 1], past_key_values=each)
    held = 2 * sum(c.key.numel() for c in cache.caches) * 4
    assert full.nbytes >= 2 * 2 * (2 * 2 * 49 * 8) * 4
    assert held <= cache.nbytes
    # Room to grow, and 12 bytes a key about it
    assert cache.nbytes <= 1.5 * held + 2 * 2 * 2 * 25 * (2 * 8 * 4 + 12)
    assert cache.nbytes < full.nbytes


# What cannot be


@pytest.mark.parametrize(
    "make", [m for n, m in WHOLE.items() if n not in ("KVCache", "PagedCache")]
)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_what_forgets_needs_our_attention(implementation, make):
    model, inputs = BY_NAME["Llama"].build(attn_implementation=implementation), zoo.decoder()
    cache = generation_cache(make)
    with pytest.raises(RegardError) as error:
        generated(model, inputs, past_key_values=cache)
    assert str(error.value) == (
        f"{make()!r} evicts by what is attended to, and the model's attention does not say it: "
        'call model.set_attn_implementation("regard") first'
    )


@forgets
def test_a_bias_that_the_model_computes_for_slots(make):
    model, inputs = BY_NAME["T5"].build(attn_implementation="regard"), BY_NAME["T5"].inputs()
    if "SnapKV" in repr(make()):  # it evicts prompts, and T5's decoder has none
        return
    given, _ = given_to(model, make)
    with pytest.raises(RegardError, match=r"T5Attention computed a position bias for \d keys of"):
        generated(model, inputs, past_key_values=given)


def test_dropout():
    model = BY_NAME["Llama"].build(attn_implementation="regard").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with torch.no_grad(), pytest.raises(RegardError, match=r"no dropout; use model.eval\(\)"):
        model(zoo.ids(), past_key_values=generation_cache(FORGETS["H2O"]))


def test_gradients():
    model = BY_NAME["Llama"].build()
    with pytest.raises(RegardError, match="keeps no graph"):
        model(zoo.ids(), past_key_values=generation_cache())


@torch.no_grad()
def test_what_transformers_asks_of_a_cache():
    model, ids = BY_NAME["Llama"].build(), zoo.ids(9)
    cache = generation_cache(lambda: PagedCache(4))
    assert (cache.get_seq_length(), cache.caches, cache.nbytes, len(cache)) == (0, [], 0, 0)
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 9
    assert cache.get_mask_sizes(3, 0) == (12, 0)
    assert cache.get_max_length() == -1
    assert cache.is_croppable
    assert not cache.is_compileable
    assert cache.layers[0].keys.shape == cache.layers[1].values.shape == (2, 2, 9, 8)
    cache.crop(-4)
    cache.crop(0)
    assert cache.get_seq_length() == 5
    with pytest.raises(RegardError, match="give how many tokens to remove, negative"):
        cache.crop(4)
    cache.batch_repeat_interleave(3)
    assert cache.caches[0].lengths.tolist() == [5] * 6
    cache.batch_select_indices(torch.tensor([5, 0]))
    repeated = model(ids[[1, 0], 5:], past_key_values=cache).logits
    exact = model(ids[[1, 0]]).logits[:, 5:]
    torch.testing.assert_close(repeated, exact, rtol=0, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is None
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_an_evicting_cache_cannot_be_cropped():
    model, ids = BY_NAME["Llama"].build(attn_implementation="regard"), zoo.ids(9)
    cache = generation_cache(FORGETS["TOVA"])
    model(ids, past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(RegardError, match="what it evicted cannot come back"):
        cache.crop(-1)


@pytest.mark.sample(every=2)
@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_minimind(shared, make):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no shared/models/minimind2-small")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    inputs = {"input_ids": tokenizer(prompt, return_tensors="pt")["input_ids"]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    theirs = generated(model, inputs)
    model.set_attn_implementation("regard")
    cache = generation_cache(make)
    assert torch.equal(generated(model, inputs, past_key_values=cache), theirs)
