"""regard.watch on real architectures: eager attention's weights, the unwatched outputs."""

import re
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import regard
import regard.huggingface
import zoo
from cases import assert_within
from regard.errors import RegardError
from zoo import FAMILIES, HYBRIDS, dense, eager_attentions

BY_NAME = {family.name: family for family in FAMILIES}
EVERY_KEY = regard.TopK(64)
EVERY_ROW = regard.Rows(range(64))
CROSS = ("EncDecAttention", "encoder_attn")

families = pytest.mark.parametrize("family", FAMILIES, ids=str)


def watched(model: nn.Module, inputs: dict[str, Tensor], **kwargs):
    with torch.no_grad(), regard.watch(model, observe=[EVERY_KEY, EVERY_ROW], **kwargs) as seen:
        output = model(**inputs)
    return output, seen


@torch.no_grad()
def unwatched(model: nn.Module, inputs: dict[str, Tensor]):
    return model(**inputs)


def assert_weights(ours: Tensor, eager: zoo.Eager) -> None:
    """Equal on the rows that see a key, 0 on the others."""
    torch.testing.assert_close(ours, eager.exact, rtol=0, atol=1e-5)


def assert_seen(seen, eager: dict[str, zoo.Eager]) -> None:
    """Exactly these layers, with these weights."""
    assert [layer.name for layer in seen] == list(eager)
    for layer in seen:
        assert_weights(dense(layer.seen[0], layer.k_len), eager[layer.name])


def assert_output(ours: Tensor, theirs: Tensor, rows: Tensor | None = None) -> None:
    """Equal within rounding; `rows` (batch, q) chooses those that can be compared."""
    if rows is not None:
        ours, theirs = ours[rows], theirs[rows]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@families
def test_weights_equal_eager(family):
    model, inputs = family.build(), family.inputs()
    eager = eager_attentions(model, inputs)
    _, seen = watched(model, inputs)
    assert_seen(seen, eager)
    for layer in seen:
        assert layer.kind == ("cross" if layer.name.endswith(CROSS) else "self")
        assert layer.pattern
        shape = eager[layer.name].weights.shape
        assert (layer.heads, layer.q_len, layer.k_len) == shape[1:]
        assert layer.kv_heads == getattr(model.config, "num_key_value_heads", layer.heads)
        assert_weights(layer.seen[1].weights, eager[layer.name])


@families
def test_outputs_equal_the_unwatched(family):
    model, inputs = family.build(), family.inputs()
    theirs, (ours, _) = unwatched(model, inputs)[0], watched(model, inputs)
    rows = None
    if model.config._attn_implementation == "eager":  # mixes all keys into rows that see none
        rows = list(eager_attentions(model, inputs).values())[-1].visible
    assert_output(ours[0], theirs, rows)


@families
def test_recorded_weights_equal_eager(family):
    model, inputs = family.build(), family.inputs()
    eager = eager_attentions(model, inputs)
    _, seen = watched(model, inputs, keep_qk=True)
    recording = seen.recording(model=family.name)
    for name, expected in eager.items():
        for batch in range(zoo.BATCH):
            part = zoo.Eager(expected.weights[batch, None], expected.visible[batch, None])
            assert_weights(recording.weights(name, batch=batch)[None], part)


DECODERS = ["Llama", "GPT-2", "Mistral", "Gemma 3", "gpt-oss"]
CACHES = {
    "dynamic": ({}, [*DECODERS, "T5", "BART"]),
    "static": ({"cache_implementation": "static"}, [*DECODERS, "T5", "BART"]),
    "chunked": ({"prefill_chunk_size": 4}, DECODERS),
}


@pytest.mark.sample(every=3)
@pytest.mark.parametrize(
    "name, settings",
    [
        pytest.param(name, settings, id=f"{name}-{cache}")
        for cache, (settings, names) in CACHES.items()
        for name in names
    ],
)
def test_generate_appends_a_row_a_token(name, settings):
    """As one eager forward over the final sequence; in a sliding cache too, keys are tokens."""
    family = BY_NAME[name]
    model = family.build()
    prompt = {key: x for key, x in family.inputs().items() if not key.startswith("decoder")}
    settings = dict(max_new_tokens=5, do_sample=False) | settings
    with regard.watch(model, observe=[EVERY_KEY], keep_qk=True) as seen:
        tokens = model.generate(**prompt, **settings)
    assert tokens.equal(model.generate(**prompt, **settings))
    eager = eager_attentions(model, whole(model, prompt, tokens))
    recording = seen.recording()
    assert [layer.name for layer in seen] == list(eager)
    for layer in seen:
        expected = eager[layer.name]
        assert layer.q_len == expected.weights.shape[2]
        assert_weights(dense(layer.seen[0], expected.weights.shape[3]), expected)
        kept = torch.stack([recording.weights(layer.name, batch=b) for b in range(zoo.BATCH)])
        width = expected.weights.shape[3]  # a static cache has room for more
        assert_weights(kept[..., :width], expected)


def whole(model: nn.Module, prompt: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """What one forward needs to compute all that `generate` did: the last token was never read."""
    tokens = tokens[:, :-1]
    if model.config.is_encoder_decoder:
        return prompt | {"decoder_input_ids": tokens}
    mask = F.pad(prompt["attention_mask"], (0, tokens.shape[1] - zoo.LENGTH), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize(
    "layers, chosen",
    [
        ([1], r"\.layers\.1\."),
        (["*.encoder_attn"], r"encoder_attn"),
        (["model.encoder.*", 0], r"encoder\.layers|\.0\."),
        ([], r"^$"),
        (1, r"\.layers\.1\."),
        ([-1], r"\.layers\.1\."),
        ("*.encoder_attn", r"encoder_attn"),
    ],
)
def test_only_some_layers(layers, chosen):
    model, inputs = BY_NAME["BART"].build(), BY_NAME["BART"].inputs()
    eager = eager_attentions(model, inputs)
    output, seen = watched(model, inputs, layers=layers)
    assert_seen(seen, {name: e for name, e in eager.items() if re.search(chosen, name)})
    assert_output(output[0], unwatched(model, inputs)[0])


@pytest.mark.parametrize("layers", [[0, 99], ["*foo"], "3", [-9], 7])
def test_layers_that_match_nothing_are_named(layers):
    """Rather than give an empty result; and the layers that there are."""
    model, inputs = BY_NAME["Llama"].build(), BY_NAME["Llama"].inputs()
    wrong = layers[-1] if isinstance(layers, list) else layers
    with pytest.raises(
        RegardError, match=rf"^layers: {re.escape(repr(wrong))} is none of the .*self_attn"
    ):
        watched(model, inputs, layers=layers)
    for unfit in ([1.5], [True], [None]):
        with pytest.raises(RegardError, match="layers takes numbers of layers, and names"):
            watched(model, inputs, layers=unfit)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_users_own(kind):
    """4-D masks reach attention as they are: True where visible, or added to the scores."""
    model, tokens = BY_NAME["Llama"].build(), zoo.ids()
    visible = zoo.random(zoo.BATCH, 1, zoo.LENGTH, zoo.LENGTH) > 0
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    eager = eager_attentions(model, {"input_ids": tokens, "attention_mask": added})
    mask = {"bool": visible, "float": added}[kind]
    _, seen = watched(model, {"input_ids": tokens, "attention_mask": mask})
    assert_seen(seen, eager)


@pytest.mark.parametrize("name", ["BERT", "Gemma 3", "gpt-oss", "T5"])
def test_gradients_equal_the_unwatched(name):
    model, inputs = BY_NAME[name].build(attn_implementation="eager"), BY_NAME[name].inputs()
    inputs = {key: x for key, x in inputs.items() if "attention_mask" not in key}
    gradients = []
    for watching in (False, True):
        with regard.watch(model, observe=[EVERY_KEY]) if watching else nullcontext():
            model(**inputs)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


def test_generation_whose_rows_cannot_be_appended_says_so():
    model, prompt = BY_NAME["Llama"].build(), {"input_ids": zoo.ids()[:1]}
    with (
        pytest.raises(RegardError, match=r"self_attn"),
        regard.watch(model, observe=[EVERY_KEY]),
    ):
        model.generate(**prompt, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)


def patched_state(model: nn.Module) -> list:
    """Everything that watching could leave changed."""
    state: list = [F.scaled_dot_product_attention, F.multi_head_attention_forward]
    state += [dict(AttentionInterface._global_mapping)]
    state += [dict(AttentionMaskInterface._global_mapping)]
    state += [torch.overrides._get_current_function_mode_stack()]
    state += [torch.backends.mha.get_fastpath_enabled()]
    for name, module in model.named_modules():
        state += [(name, sorted(vars(module))), len(module._forward_hooks)]
        state += [len(module._forward_pre_hooks)]
        for value in vars(module).values():
            if isinstance(value, hf.PreTrainedConfig):
                state += [id(value), value._attn_implementation]
    return state


@pytest.mark.parametrize("failing", ["nothing", "block", "model"])
@pytest.mark.parametrize("name", ["BERT", "Gemma 2", "T5", "plain torch"])
def test_nothing_stays_patched(name, failing):
    if name == "plain torch":
        model, inputs, wrong = zoo.plain(), {"x": zoo.random(2, 5, 32)}, {"x": zoo.random(2, 5, 3)}
    else:
        model, inputs = BY_NAME[name].build(), BY_NAME[name].inputs()
        wrong = inputs | {"input_ids": inputs["input_ids"] + zoo.VOCAB}
    before = patched_state(model)
    error = (KeyError, IndexError, RuntimeError)
    with (
        nullcontext() if failing == "nothing" else pytest.raises(error),
        regard.watch(model, observe=[EVERY_KEY], keep_qk=True),
    ):
        model(**inputs)
        if failing == "block":
            raise KeyError
        if failing == "model":
            model(**wrong)
    assert patched_state(model) == before


@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_two_models_of_one_config(name):
    family = BY_NAME[name]
    config = family.config()
    one, two, sibling = (zoo.seeded(lambda: family.model(config), seed) for seed in range(3))
    inputs = family.inputs()
    expected = [eager_attentions(model, inputs) for model in (one, two)]
    with (
        torch.no_grad(),
        regard.watch(one, observe=[EVERY_KEY]) as first,
        regard.watch(two, observe=[EVERY_KEY]) as second,
    ):
        two(**inputs)
        assert sibling.config is config
        assert config._attn_implementation == "sdpa"
        sibling(**inputs)
        one(**inputs)
    assert_seen(first, expected[0])
    assert_seen(second, expected[1])


@pytest.mark.parametrize("kind", ["Llama", "plain torch"])
def test_another_thread_is_computed_not_recorded(kind):
    if kind == "plain torch":
        model, mine, other = zoo.plain(), {"x": zoo.random(2, 5, 32)}, {"x": zoo.random(2, 9, 32)}
    else:
        model, mine = BY_NAME[kind].build(), BY_NAME[kind].inputs()
        other = {"input_ids": zoo.ids(17)}
    alone, outputs = output_tensor(unwatched(model, other)), []
    with torch.no_grad(), regard.watch(model, observe=[EVERY_KEY]) as seen:
        model(**mine)
        thread = threading.Thread(target=lambda: outputs.append(unwatched(model, other)))
        thread.start()
        thread.join()
    assert_output(output_tensor(outputs[0]), alone)
    assert len(seen) == 2
    assert all(layer.q_len == len(next(iter(mine.values()))[0]) for layer in seen)


def output_tensor(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("hybrid", HYBRIDS, ids=str)
def test_layers_without_softmax_have_no_pattern(hybrid):
    model, inputs = hybrid.build(), zoo.decoder()
    eager = eager_attentions(model, inputs)
    output, seen = watched(model, inputs)
    block, attention = seen
    assert (block.name, block.pattern, block.seen) == ("model.layers.0", False, ())
    assert hybrid.mixer in block.reason
    assert (attention.name, attention.pattern) == (hybrid.attention, True)
    assert_weights(dense(attention.seen[0], attention.k_len), eager[hybrid.attention])
    assert_output(output[0], unwatched(model, inputs)[0])


@pytest.mark.parametrize("family", zoo.UNUSUAL, ids=str)
def test_unusual_ways_to_attention(family):
    """Weights as near to float64's as eager's own in float32 are, by the usual rule."""
    model, inputs = family.build(), family.inputs()
    eager = family.build(attn_implementation="eager")
    theirs = unwatched(eager, inputs | {"output_attentions": True})
    exact = in_order(unwatched(eager.double(), as_double(inputs) | {"output_attentions": True}))
    output, seen = watched(model, inputs)
    assert_output(output[0], theirs[0])
    plain = in_order(theirs)
    assert len({layer.name for layer in seen}) == len(seen) == len(plain)
    for layer, weights, truth in zip(seen, plain, exact, strict=True):
        assert_within(dense(layer.seen[0], layer.k_len), weights, truth)


def in_order(output) -> list[Tensor]:
    """The weights that a model gives, in the order in which its layers compute them."""
    if "attentions" in output:
        return list(output["attentions"])
    pairs = zip(output["decoder_attentions"], output["cross_attentions"], strict=True)
    return [*output["encoder_attentions"], *(w for pair in pairs for w in pair)]


def as_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def test_layers_that_compute_by_themselves_are_named():
    model, inputs = zoo.PARTLY.build(), zoo.PARTLY.inputs()
    _, seen = watched(model, inputs)
    missing = [layer for layer in seen if not layer.pattern]
    assert [layer.name for layer in missing] == ["encoder.layers.0", "encoder.layers.1"]
    assert all("InformerProbSparseAttention" in layer.reason for layer in missing)
    assert [layer.kind for layer in seen if layer.pattern] == ["cross", "cross"]


@pytest.mark.parametrize(
    "build, name",
    [
        (zoo.mamba, "MambaForCausalLM"),
        (zoo.nystromformer, "NystromformerModel"),
        (zoo.linear, "Linear"),
    ],
)
def test_a_model_that_cannot_be_watched_raises_on_entry(build, name):
    model, entered = build(), False
    before = patched_state(model)
    with pytest.raises(RegardError, match=name), regard.watch(model, observe=[EVERY_KEY]):
        entered = True
    assert not entered
    assert patched_state(model) == before


# Whatever the model's dtype: their eager attention gives no float64 truth
SOFTMAX_IN_FLOAT32 = ("Llama", "Mistral", "Qwen3", "Gemma 2", "Gemma 3", "gpt-oss")


@pytest.mark.sample(every=3)
@families
@pytest.mark.parametrize("how", ["from_config", "set_attn_implementation"])
def test_attn_implementation_regard(family, how):
    inputs = family.inputs()
    if how == "from_config":
        model = family.build(attn_implementation="regard")
    else:
        model = family.build()
        model.set_attn_implementation("regard")
    eager = eager_attentions(model, inputs)
    rows = list(eager.values())[-1].visible
    theirs = unwatched(family.build(attn_implementation="eager"), inputs)[0]
    assert_output(unwatched(model, inputs)[0], theirs, rows)
    output = unwatched(model, inputs | {"output_attentions": True})
    exact = None
    if str(family) not in SOFTMAX_IN_FLOAT32:
        exact = eager_attentions(family.build().double(), as_double(inputs))
    for group in {layer.group for layer in eager.values()}:
        expected = [layer for layer in eager.values() if layer.group == group]
        if exact is None:
            for ours, layer in zip(output[group], expected, strict=True):
                assert_weights(ours, layer)
            continue
        truth = [layer.exact for layer in exact.values() if layer.group == group]
        for ours, layer, right in zip(output[group], expected, truth, strict=True):
            assert_within(ours, layer.exact, right)


def test_packaged_minilm():
    minilm = pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")
    folder = minilm.folder
    model = hf.AutoModel.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "The trophy didn't fit in the suitcase because it was too big.",
        "The cat sat on the mat because it was tired",
        "The animal didn't cross the road because it was tired",
    ]
    inputs = dict(tokenizer(sentences, return_tensors="pt", padding=True))
    output, seen = watched(model, inputs)
    assert_seen(seen, eager_attentions(model, inputs))
    assert_output(output[0], unwatched(model, inputs)[0])
    for batch, layer, head, word, weight in [
        (0, 3, 1, "trophy", 0.58), (1, 5, 11, "cat", 0.68), (2, 5, 11, "animal", 0.65),
    ]:  # fmt: skip
        tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][batch])
        reads = seen[layer].seen[1].weights[batch, head, tokens.index("it"), tokens.index(word)]
        assert reads.item() == pytest.approx(weight, abs=0.005)


def test_minimind(shared):
    folder = shared / "models" / "minimind2-small"
    if not folder.is_dir():
        pytest.skip("no shared/models/minimind2-small")
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    inputs = dict(tokenizer(prompt, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    with regard.watch(model, observe=[EVERY_KEY]) as seen:
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert_seen(seen, eager_attentions(model, {"input_ids": tokens[:, :-1]}))
