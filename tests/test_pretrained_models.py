"""Models of others' formats: against a naive reading of the file, and by what they do."""

from __future__ import annotations

import base64
import itertools
import json
import struct

import numpy as np
import pytest
import torch

from regard import RegardError
from regard.models import LanguageModel, ModelConfig, generate, load_sorter, load_stories
from regard.nn.models.saved import load_model, save_model

DIM, HIDDEN, DEPTH, HEADS, KV_HEADS, VOCAB, LENGTH = SIZES = (8, 12, 2, 4, 2, 262, 16)
PIECES = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % n for n in range(256)), b" ", b"a", b" a"]
# Llama's greedy story in stories260K, as llama2.c's own test has it
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do."
)


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def softmax(x):
    made = np.exp(x - x.max())
    return made / made.sum()


def turned(x, position):
    """Pairs (2i, 2i + 1) by position · 10000^(−2i/size)."""
    size = x.shape[-1]
    angle = position / 10000 ** (np.arange(0, size, 2) / size)
    even, odd = x[..., ::2], x[..., 1::2]
    made = np.empty_like(x)
    made[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
    made[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
    return made


def naive(w, tokens):
    """The logits behind each token, one token and one head after another."""
    size, logits, past = DIM // HEADS, [], [([], []) for _ in range(DEPTH)]
    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for n in range(DEPTH):
            y = rms(x, w["rms_att"][n])
            q = turned((w["wq"][n] @ y).reshape(HEADS, size), position)
            past[n][0].append(turned((w["wk"][n] @ y).reshape(KV_HEADS, size), position))
            past[n][1].append((w["wv"][n] @ y).reshape(KV_HEADS, size))
            keys, values = map(np.stack, past[n])
            read = []
            for head in range(HEADS):
                of = head // (HEADS // KV_HEADS)
                weights = softmax(keys[:, of] @ q[head] / np.sqrt(size))
                read.append(weights @ values[:, of])
            x = x + w["wo"][n] @ np.concatenate(read)
            y = rms(x, w["rms_ffn"][n])
            gate = w["w1"][n] @ y
            x = x + w["w2"][n] @ (gate / (1 + np.exp(-gate)) * (w["w3"][n] @ y))
        logits.append(w.get("head", w["embedding"]) @ rms(x, w["rms"]))
    return np.stack(logits)


def write_stories(folder, *, own_head):
    """A small model with drawn weights; returns them in float64."""
    kv_dim, rng = DIM * KV_HEADS // HEADS, np.random.default_rng(0)
    shapes = {
        "embedding": (VOCAB, DIM), "rms_att": (DEPTH, DIM), "wq": (DEPTH, DIM, DIM),
        "wk": (DEPTH, kv_dim, DIM), "wv": (DEPTH, kv_dim, DIM), "wo": (DEPTH, DIM, DIM),
        "rms_ffn": (DEPTH, DIM), "w1": (DEPTH, HIDDEN, DIM), "w2": (DEPTH, DIM, HIDDEN),
        "w3": (DEPTH, HIDDEN, DIM), "rms": (DIM,), "angles": (LENGTH, DIM // HEADS),
    }  # fmt: skip
    if own_head:
        shapes["head"] = (VOCAB, DIM)
    held = {name: rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", *SIZES[:5], -VOCAB if own_head else VOCAB, LENGTH)
    data = header + b"".join(one.tobytes() for one in held.values())
    (folder / "stories.bin").write_bytes(data)
    parts = [struct.pack("<fi", float(n), len(p)) + p for n, p in enumerate(PIECES)]
    (folder / "tok.bin").write_bytes(struct.pack("<i", 6) + b"".join(parts))
    return {name: one.astype(np.float64) for name, one in held.items()}


@pytest.mark.parametrize("own_head", [False, True])
def test_a_llama_is_what_its_file_says(tmp_path, own_head):
    held = write_stories(tmp_path, own_head=own_head)
    model, _ = load_stories(tmp_path)
    tokens = [1, 261, 77, 3, 200, 259, 5]
    with torch.no_grad():
        logits = model.double()(torch.tensor([tokens]))[0]
    # √dim is no float32: weights are rounded once more when they are loaded
    torch.testing.assert_close(logits, torch.from_numpy(naive(held, tokens)), rtol=1e-5, atol=1e-5)


def test_its_tokenizer_joins_by_score_and_falls_back_to_bytes(tmp_path):
    write_stories(tmp_path, own_head=False)
    _, tokenizer = load_stories(tmp_path)
    assert tokenizer.encode("a a") == [1, 261, 261]
    assert tokenizer.encode("é") == [1, 259, 3 + 0xC3, 3 + 0xA9]
    for text in ("", "a a", "héllo 猫", " two  spaces "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, 261, 1, 260]) == "a"


def test_a_loaded_llama_saves_as_ours(tmp_path):
    write_stories(tmp_path, own_head=False)
    model, _ = load_stories(tmp_path)
    save_model(model, tmp_path / "ours")
    tokens = torch.tensor([[1, 261, 77]])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "ours")(tokens), model(tokens))


def cut(folder):
    path = folder / "stories.bin"
    path.write_bytes(path.read_bytes()[:-4])


def empty(folder):
    (folder / "stories.bin").write_bytes(b"")


def shorter_tokenizer(folder):
    path = folder / "tok.bin"
    path.write_bytes(path.read_bytes()[:-12])


def no_tokenizer(folder):
    (folder / "tok.bin").unlink()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (cut, "its header does not fit its size"),
        (empty, "it has 0 bytes"),
        (shorter_tokenizer, "no tokenizer of llama2.c of 262 tokens"),
        (no_tokenizer, r"needs a stories\*.bin, a tok\*.bin"),
    ],
)
def test_what_is_no_llama_is_said(tmp_path, spoil, said):
    write_stories(tmp_path, own_head=False)
    spoil(tmp_path)
    with pytest.raises(RegardError, match=said):
        load_stories(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "{}", '{"config": {"n_layer": 1}}', "[]"])
def test_what_is_no_sorter_is_said(tmp_path, text):
    if text is not None:
        (tmp_path / "gpt-nano-sort-model.json").write_text(text)
    with pytest.raises(RegardError, match=r"no gpt-nano-sort-model\.json to read"):
        load_sorter(tmp_path)


def test_a_sorter_is_what_its_file_says(tmp_path):
    """Every weight finds its place: written by minGPT's names from a model of ours."""
    torch.manual_seed(0)
    config = ModelConfig(vocab=3, dim=8, heads=2, depth=2, length=11, positions="learned",
                         norm="layer", bias=True, activation="gelu-tanh", tie=False)  # fmt: skip
    ours = LanguageModel(config).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 3, "block_size": 11}
    held = {
        "transformer.wte.weight": ours.embedding.weight * 8**0.5,
        "transformer.wpe.weight": ours.stack.positions.weight,
        "lm_head.weight": ours.head.weight,
    }
    for kind in ("weight", "bias"):
        held[f"transformer.ln_f.{kind}"] = getattr(ours.stack.norm, kind)
        for n, block in enumerate(ours.stack.blocks):
            at, attend, ff = f"transformer.h.{n}", block.mixer.attention, block.feed_forward
            qkv = [getattr(p, kind) for p in (attend.q_proj, attend.k_proj, attend.v_proj)]
            held[f"{at}.attn.c_attn.{kind}"] = torch.cat(qkv)
            for name, module in {
                "attn.c_proj": attend.out_proj, "ln_1": block.mixer_norm,
                "ln_2": block.feed_forward_norm, "mlp.c_fc": ff.up, "mlp.c_proj": ff.down,
            }.items():  # fmt: skip
                held[f"{at}.{name}.{kind}"] = getattr(module, kind)
    said = {"config": sizes}
    for name, tensor in held.items():
        data = base64.b64encode(tensor.detach().numpy().astype("<f4").tobytes()).decode()
        said[name] = {"shape": list(tensor.shape), "dtype": "torch.float32", "data": data}
    (tmp_path / "gpt-nano-sort-model.json").write_text(json.dumps(said))
    tokens = torch.tensor([[2, 0, 1, 1, 0, 2, 0]])
    with torch.no_grad():
        torch.testing.assert_close(load_sorter(tmp_path)(tokens), ours(tokens))


@pytest.mark.slow
def test_stories_tells_its_story(shared):
    model, tokenizer = load_stories(shared / "models" / "stories260K")
    said = generate(model, torch.tensor([tokenizer.encode("")]), 120)
    assert tokenizer.decode(said[0].tolist()).startswith(STORY)
    prompt = torch.tensor([tokenizer.encode("The dog was sad")])
    cached, anew = (generate(model, prompt, 60, cache=cache) for cache in (True, False))
    assert torch.equal(cached, anew)


@pytest.mark.slow
def test_the_sorter_sorts_all(shared):
    model = load_sorter(shared / "models" / "gpt-nano-sort")
    letters = torch.tensor(list(itertools.product(range(3), repeat=6)))
    found = generate(model, letters, 6)[:, 6:]
    assert int((found == letters.sort(-1).values).all(-1).sum()) == 3**6 == 729
