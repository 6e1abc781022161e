"""Beam search, recorded: each row's history, in the files, is that of the beam it stands for."""

import pytest
import torch

import regard
import zoo
from regard import Recording, RegardError
from regard.capture import stored_layer
from regard.capture.pyramid import Results
from regard.capture.stored_layer import StoredLayer, open_layer, part_of
from test_stored import rewritten
from test_watch_beams import BY_NAME, prompts
from test_watch_models import assert_weights

BEAMS = 3


def recorded(name, folder):
    """A search that reorders its beams, and its recording, written every two steps."""
    model, prompt = BY_NAME[name].build(), prompts(name)
    outs = []

    def search():
        outs.append(
            model.generate(
                **prompt, max_new_tokens=7, do_sample=False, num_beams=BEAMS, early_stopping=False,
                num_return_sequences=BEAMS, return_dict_in_generate=True, output_scores=True,
            )
        )  # fmt: skip

    recording = regard.record(model, search, folder, dtype=None, values=True)
    orders = outs[0].beam_indices
    assert not torch.equal(orders, orders[:, :1].expand_as(orders))
    return model, prompt, outs[0], recording


def check(model, prompt, out, recording):
    """Against one eager forward over each sequence that was returned."""
    repeated = {key: t.repeat_interleave(BEAMS, 0) for key, t in prompt.items()}
    whole = out.sequences[:, :-1]
    if model.config.is_encoder_decoder:
        inputs = repeated | {"decoder_input_ids": whole}
    else:
        more = whole.shape[1] - repeated["attention_mask"].shape[1]
        keep = torch.nn.functional.pad(repeated["attention_mask"], (0, more), value=1)
        at = (keep.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": whole, "attention_mask": keep, "position_ids": at}
    eager = zoo.eager_attentions(model, inputs)
    assert [layer.name for layer in recording.layers] == list(eager)
    rows, checked = out.beam_indices[:, -1].tolist(), 0
    for layer in recording.layers:
        if "encoder.block" in layer.name or ".encoder.layers" in layer.name:
            continue  # it reads the prompts once
        expected = eager[layer.name]
        width = expected.weights.shape[3]
        kept = torch.stack([recording.weights(layer.name, batch=b) for b in rows])
        assert_weights(kept[..., :width], expected)
        check_beside(layer)
        checked += 1
    assert checked


def check_beside(layer):
    """What was read while recording is what the kept numbers give, after all the reordering."""
    held, bare = Recording([layer]), Recording([layer.__class__(
        layer.name, layer.index, layer.kind, chunks=layer.chunks, pieces=layer.pieces
    )])  # fmt: skip
    assert layer.results
    for b in range(layer.batch):
        for one, other in (
            (held.entropy(0, batch=b), bare.entropy(0, batch=b)),
            (held.received(0, batch=b).sum, bare.received(0, batch=b).sum),
            (held.top(0, batch=b, k=2).weights, bare.top(0, batch=b, k=2).weights),
            (held.distances(0, batch=b).past, bare.distances(0, batch=b).past),
        ):
            # Both are ours, read at two times: to float64 each is held in test_record
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert layer.norm.shape[0] == layer.value.shape[0] == layer.batch


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["Llama", "BART"])
@pytest.mark.parametrize("left", ["finished", "stopped"])
def test_rows_follow_the_beams(name, left, tmp_path, monkeypatch):
    """Also in the files that a run leaves which is stopped before it makes them one."""
    monkeypatch.setattr(stored_layer, "STEPS", 2)
    if left == "stopped":
        monkeypatch.setattr(StoredLayer, "close", StoredLayer.flush)
    model, prompt, out, recording = recorded(name, tmp_path / "r")
    assert bool(list((tmp_path / "r").glob("layer-*.0*.safetensors"))) == (left == "stopped")
    assert not recording.damaged
    check(model, prompt, out, recording)


@pytest.mark.parametrize("picked", [[0, 9], [], [-1], ["x"]])
def test_rows_of_no_beam_are_refused(picked, tmp_path, monkeypatch):
    """A file says whose its rows go on from: anybody may have written it."""
    monkeypatch.setattr(stored_layer, "STEPS", 2)
    monkeypatch.setattr(StoredLayer, "close", StoredLayer.flush)
    recorded("Llama", tmp_path / "r")
    first = tmp_path / "r" / "layer-000.safetensors"
    later = next(
        path for n in range(1, 9)
        if (path := part_of(first, n)).exists()
        and "picked" in stored_layer.StoredTensors(path).said
    )  # fmt: skip
    monkeypatch.setattr("test_stored.FILE", later.name)
    rewritten(later.parent, None, lambda said: said.update(picked=picked))
    with pytest.raises(RegardError, match=rf"{later.name} is not whole: .*picked"):
        open_layer([first, *(part_of(first, n) for n in range(1, int(later.name[10:15]) + 1))])


def test_results_of_nothing_are_picked():
    assert not Results().pick([0, 0])
