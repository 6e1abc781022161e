"""`record`: what is streamed to files while a model runs is what the model computed, and opens."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import regard
from cases import FEW, assert_within
from recorded_truths import kept
from regard import Recording, RegardError
from regard.call.op_schema import pack
from regard.capture import stored_layer
from regard.capture.chunk_json import from_json, to_json
from regard.capture.recorded_layer import Chunk
from regard.capture.saved_files import Fields
from test_recording import computed
from test_tiles import assert_tiles

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
NAME = "model.layers.0.self_attn"


def tiny(kind=LlamaForCausalLM, **more) -> torch.nn.Module:
    config = {LlamaForCausalLM: LlamaConfig, MistralForCausalLM: MistralConfig}[kind]
    torch.manual_seed(0)
    return kind(config(**SIZES | more)).eval()


def ids(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(2, 64, (batch, tokens), generator=torch.Generator().manual_seed(1))


def watched(model, run, **about) -> Recording:
    with torch.no_grad(), regard.watch(model, keep_qk=True) as seen:
        run()
    return seen.recording(**about)


def test_what_is_written_is_what_was_computed(tmp_path):
    """In the model's own dtype: the same numbers as a watch keeps, to the bit."""
    model, given = tiny(), ids(300, 2)
    recording = regard.record(model, given, tmp_path / "r", dtype=None)
    other = watched(model, lambda: model(given))
    assert recording.whole
    assert not recording.damaged
    for layer, held in zip(recording.layers, other.layers, strict=True):
        assert (layer.name, layer.index, layer.kind) == (held.name, held.index, held.kind)
        assert torch.equal(layer.key, held.key)
        assert torch.equal(layer.chunks[0].query, held.chunks[0].query)
        exact, plain = kept(held)
        assert_within(layer.chunks[0].lse, plain.lse, exact.lse)
        assert_within(held.chunks[0].lse, plain.lse, exact.lse)
    exact, plain = kept(recording.layers[0])
    assert_tiles(recording, exact.weights, plain.weights)


def test_the_models_output_is_its_own(tmp_path):
    model, given, outs = tiny(), ids(40), []
    regard.record(model, lambda: outs.append(model(given).logits), tmp_path / "r")
    with torch.no_grad():
        assert torch.equal(outs[0], model(given).logits)


def test_lse_and_what_is_read_beside_belong_to_the_rounded_numbers(tmp_path):
    """Rows sum to 1 from lse alone; top, received, … are those of the numbers in the files."""
    model, given = tiny(), ids(300)
    recording = regard.record(model, given, tmp_path / "r")
    layer = recording.layer(0)
    assert layer.key.dtype == layer.chunks[0].query.dtype == torch.bfloat16
    assert layer.chunks[0].lse.dtype == torch.float32
    bare = Recording([stored_layer.RecordedLayer(NAME, 0, "self", chunks=layer.chunks,
                                                 pieces=layer.pieces)])  # fmt: skip
    truth, plain = (of.weights[0] for of in kept(bare.layers[0]))

    def within(ours, *reads) -> None:
        """As the first reads the weights; plain torch may sum as any of them does."""
        assert_within(ours, (read(plain) for read in reads), reads[0](truth))

    within(bare.weights(0), lambda of: of)
    rows = bare.tiles(0, [(h, 0, 0, c) for h in range(4) for c in range(3)])
    sums = rows.reshape(4, 3, 128, 128).sum((1, 3))
    within(sums, lambda of: of[:, :128].sum(-1))
    assert_tiles(recording, truth[None], plain[None])
    assert recording.layers[0].results
    for of, own in ((recording, True), (bare, False)):
        assert bool(of.layer(0).results) is own
        top = of.top(0, 2, rows=[250, 9], k=4)
        within(top.weights, lambda w: w[2, [250, 9]].topk(4).values)
        within(top.rest, lambda w: 1 - w[2, [250, 9]].topk(4).values.sum(1))
        within(top.weights, lambda w: w[2][[[250], [9]], top.indices])  # noqa: B023
        # 300 rows, one after another
        within(of.received(0).sum, lambda w: w.sum(1), lambda w: sum(w.unbind(1)))
        within(of.entropy(0), lambda w: torch.special.entr(w).sum(-1))
        past = of.distances(0).past
        within(past.sum(1), lambda w: w.sum((1, 2)))
        within(past[:, 0], lambda w: w.diagonal(dim1=1, dim2=2).sum(1))
    assert recording.layer(0).results.tile((0, 0), (0, 1, 0, 0), "sum", 0) is None


def test_coarse_tiles_come_from_the_stored_maps(tmp_path):
    """64 tokens and more a cell: by the stored map alone, as exact as computed again."""
    model, given = tiny(num_hidden_layers=1), ids(16300, 1)[:, :9000]
    model.config.max_position_embeddings = 16384
    recording = regard.record(model, given, tmp_path / "r")
    layer = recording.layer(0)
    assert recording.zooms(0) == 8
    bare = Recording([stored_layer.RecordedLayer(NAME, 0, "self", chunks=layer.chunks,
                                                 pieces=layer.pieces)])  # fmt: skip
    for reduce in ("sum", "max"):
        for where in ((1, 6, 1, 0), (2, 7, 0, 0), (3, 6, 1, 1), (0, 6, 0, 1)):
            held = layer.results.tile((0, 0), where, reduce, 0)
            assert torch.equal(recording.tile(0, *where, reduce), held)
            # Both are ours, of the same numbers: float64's map would take 2.6 GB
            torch.testing.assert_close(held, bare.tile(0, *where, reduce), rtol=1e-4, atol=1e-5)


RUNS = {
    "prefill and steps": [20, *range(21, 150)],
    "chunks": [100, 200, 290, 300],
    "chunks and steps": [100, 170, 171, 172, 173],
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("kind", [LlamaForCausalLM, MistralForCausalLM])
@pytest.mark.parametrize("ends", RUNS.values(), ids=RUNS)
def test_calls_that_continue_append(kind, ends, tmp_path):
    """A cache filled in chunks and by steps: one file a layer, whose weights are those of one run.

    Mistral's keys move on: its window is 32.
    """
    model = tiny(kind, **({"sliding_window": 32} if kind is MistralForCausalLM else {}))
    given = ids(ends[-1])

    def run():
        cache = None
        for start, end in zip([0, *ends], ends, strict=False):
            cache = model(given[:, start:end], past_key_values=cache).past_key_values

    recording = regard.record(model, run, tmp_path / "r", dtype=None)
    other = watched(model, lambda: model(given, use_cache=False))
    layer = recording.layer(0)
    assert (layer.q_len, layer.k_len) == (ends[-1], ends[-1])
    # A prefill within the window is causal alone, and so another call than the steps
    assert len(layer.chunks) <= (2 if kind is MistralForCausalLM else 1)
    files = sorted(path.name for path in (tmp_path / "r").iterdir())
    assert files == ["layer-000.safetensors", "layer-001.safetensors", "recording.json"]
    # The other forward sums in another order from the first layer on: its own rounding, not ours
    torch.testing.assert_close(recording.weights(1), other.weights(1), rtol=1e-3, atol=1e-5)
    exact, plain = (of.weights for of in kept(recording.layer(1)))
    assert_within(recording.weights(1), plain[0], exact[0])
    assert_tiles(recording, exact, plain, layer=1)
    assert_within(recording.received(1).sum, plain[0].sum(1), exact[0].sum(1))
    top = recording.top(1, rows=[-1])
    assert_within(top.weights, *(of[0, :, -1:].topk(8).values for of in (plain, exact)))
    torch.testing.assert_close(
        layer.results.sums.weights[0].sum((1, 2)), torch.full((4,), float(ends[-1]))
    )


def test_steps_of_generate_with_padding(tmp_path):
    """Masks with a tensor of each step's own: the calls stay apart, and are all there."""
    model, given = tiny(), ids(12, 2)
    keep = torch.ones(2, 12, dtype=torch.int64)
    keep[1, :5] = 0

    def run():
        model.generate(given, attention_mask=keep, max_new_tokens=6, do_sample=False)

    recording = regard.record(model, run, tmp_path / "r", dtype=None)
    other = watched(model, run)
    for b in range(2):
        torch.testing.assert_close(recording.weights(1, batch=b), other.weights(1, batch=b))
    assert not recording.weights(0, batch=1)[:, 6:, :5].any()


def test_a_new_sequence_replaces_the_last(tmp_path):
    model = tiny()
    recording = regard.record(model, lambda: (model(ids(90)), model(ids(33))), tmp_path / "r")
    assert {layer.q_len for layer in recording.layers} == {33}
    assert len(list((tmp_path / "r").iterdir())) == 3


def test_cross_attention(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    ).eval()
    given = {"input_ids": ids(30), "decoder_input_ids": ids(9)}
    recording = regard.record(model, given, tmp_path / "r", dtype=None)
    other = watched(model, lambda: model(**given))
    assert [x.kind for x in recording.layers] == [x.kind for x in other.layers]
    for n in range(len(recording.layers)):
        torch.testing.assert_close(recording.weights(n), other.weights(n))
        exact, plain = (of.weights for of in kept(recording.layers[n]))
        assert_tiles(recording, exact, plain, layer=n)


def test_values_give_norm_weights(tmp_path):
    model, given = tiny(), ids(50)
    recording = regard.record(model, given, tmp_path / "r", dtype=None, values=True)
    layer = recording.layer(1)
    wide = layer.value.repeat_interleave(2, 1)
    out = model.model.layers[1].self_attn.o_proj.weight.unflatten(1, (4, 8))
    norms, near = (
        torch.einsum("bhnd,mhd->bhnm", wide.to(dtype), out.detach().to(dtype)).norm(dim=-1)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within(layer.norm, near, norms)
    exact, plain = (of.weights[0, 2, [7, 30]] for of in kept(layer))
    by_value = recording.norm_weights(1, 2, rows=[7, 30])
    assert_within(by_value, plain * near[0, 2], exact * norms[0, 2])
    assert torch.equal(recording.norm_weights(1, cols=slice(5)), recording.norm_weights(1)[..., :5])
    bare = regard.record(model, given, tmp_path / "bare")
    with pytest.raises(RegardError, match="keeps no values; record with values=True"):
        bare.norm_weights(1)


def test_tokens_and_what_is_known(tmp_path):
    class Names:
        is_fast = True

        def convert_ids_to_tokens(self, given):
            return [None if i == 5 else f"t{i}" for i in given]

        def __call__(self, text, **asked):
            return {"input_ids": [3, 5, 7], "offset_mapping": [(0, 1), (1, 2), (2, 4)],
                    "special_tokens_mask": [1, 0, 0]}  # fmt: skip

    model, given = tiny(), torch.tensor([[3, 5, 7]])
    recording = regard.record(
        model, {"input_ids": given}, tmp_path / "r", tokenizer=Names(), text="abcd",
        about={"note": "naïve 日本"},
    )  # fmt: skip
    about = recording.about
    assert about["tokens"] == ["t3", "<5>", "t7"]
    assert about["offsets"] == [[0, 1], [1, 2], [2, 4]]
    assert about["special"] == [True, False, False]
    assert about["note"] == "naïve 日本"
    assert about["versions"]["torch"] == torch.__version__
    named = regard.record(model, given, tmp_path / "n", tokens=["a", "b", "c"], layers=[1])
    assert named.about["tokens"] == ["a", "b", "c"]
    assert [layer.index for layer in named.layers] == [1]
    with pytest.raises(RegardError, match="give what JSON can say"):
        regard.record(model, given, tmp_path / "x", about={"x": float("nan")})
    assert not (tmp_path / "x").exists()


def test_files_are_safetensors(tmp_path):
    recording = regard.record(tiny(), ids(70), tmp_path / "r")
    with safe_open(tmp_path / "r" / "layer-000.safetensors", "pt") as file:
        assert {"key", "0.query", "0.lse", "top.indices", "sums.weights"} < set(file.keys())
        assert torch.equal(file.get_tensor("key"), recording.layer(0).key)
        assert torch.equal(file.get_tensor("sums.weights"), recording.layer(0).results.sums.weights)
    recording.verify()


def test_a_folder_that_is_not_free(tmp_path):
    model = tiny()
    regard.record(model, ids(9), tmp_path / "r")
    with pytest.raises(RegardError, match=r"holds a recording already; .* give overwrite=True"):
        regard.record(model, ids(9), tmp_path / "r")

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # nothing was written: the old one stays
        regard.record(model, fails, tmp_path / "r", overwrite=True)
    assert Recording.load(tmp_path / "r").layer(0).q_len == 9
    with pytest.raises(RegardError, match="inputs is a int; give token ids"):
        regard.record(model, 3, tmp_path / "r", overwrite=True)
    assert regard.record(model, ids(11), tmp_path / "r", overwrite=True).layer(0).q_len == 11
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_what_is_interrupted_leaves_whole_layers(tmp_path):
    model = tiny(num_hidden_layers=3)

    def stop(module, args):
        raise KeyboardInterrupt

    model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        regard.record(model, ids(40), tmp_path / "r")
    recording = Recording.load(tmp_path / "r")
    assert not recording.whole
    assert [layer.index for layer in recording.layers] == [0, 1]
    exact, plain = (of.weights[0] for of in kept(recording.layer(1)))
    assert_within(recording.weights(1), plain, exact)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import regard, test_record
model = test_record.tiny(num_hidden_layers=3)
given = test_record.ids(90)
def run():
    cache = model(given[:, :80]).past_key_values
    model.model.layers[{layer}].register_forward_pre_hook(
        lambda module, args: os.kill(os.getpid(), signal.SIGKILL)
    )
    if {layer}:
        model(given)
    model(given[:, 80:], past_key_values=cache)
regard.record(model, run, {folder!r})
"""


@pytest.mark.slow  # the default run kills a process in test_recording.py
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("layer", [0, 2], ids=["between forwards", "within"])
def test_a_killed_run_leaves_whole_layers(layer, tmp_path):
    folder = tmp_path / "r"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), layer=layer)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    recording = Recording.load(folder)
    assert not recording.whole
    assert [x.q_len for x in recording.layers] == ([80, 80, 80] if layer == 0 else [90, 90, 80])
    model = tiny(num_hidden_layers=3)
    other = watched(model, lambda: model(ids(90)[:, :80]))
    torch.testing.assert_close(
        recording.weights(2), other.weights(2), rtol=0.05, atol=5e-3
    )  # bf16 as kept
    recording.verify()


def test_files_left_of_before_they_were_made_one(tmp_path):
    """Killed after a layer's files became one, before the others were removed."""
    model, given, folder = tiny(), ids(200), tmp_path / "r"

    def run():
        cache = model(given[:, :100]).past_key_values
        left.extend(folder.glob("*.safetensors"))
        model(given[:, 100:], past_key_values=cache)
        part = folder / "layer-000.00001.safetensors"
        left.append((part, part.read_bytes()))

    left: list = []
    recording = regard.record(model, run, folder)
    wanted = recording.weights(0)
    path, content = left[-1]
    path.write_bytes(content)
    again = Recording.load(folder)
    assert again.layer(0).q_len == 200
    assert torch.equal(again.weights(0), wanted)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kind_of_call_comes_back_from_json(case):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, _ = computed(query, key, **request)
    packed = tuple(list(a) if isinstance(a, tuple) else a for a in pack(call))
    place = call.place
    chunk = Chunk(query, lse, packed, (place.key_start, place.key_start + place.k_len))
    tensors = {"key": key}
    said = json.loads(json.dumps(to_json(chunk, 0, tensors)))
    back = from_json(Fields(said, "it"), 0, tensors)
    assert list(back.packed[4]) == list(packed[4])
    assert back.keys == chunk.keys


def test_opening_reads_headers_alone(tmp_path):
    """Of 16 GB of numbers that nobody wrote (a sparse file): nothing is read to open it."""
    wanted = regard.record(tiny(), ids(70), tmp_path / "r").weights(0)
    path = tmp_path / "r" / "layer-000.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    rows = 2**31
    header["more"] = {"dtype": "F64", "shape": [rows], "data_offsets": [end, end + 8 * rows]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    os.truncate(path, 8 + len(text) + end + 8 * rows)
    again = Recording.load(tmp_path / "r")
    assert torch.equal(again.weights(0), wanted)
