"""What is read of an opened recording: no more than is asked for, and never what is not there."""

import os

import pytest
import torch

import regard
from regard import Causal, LogSumExp, Recording, RegardError, TopK
from regard.call.checked import Call
from regard.capture.index_file import entry_of, layer_file, write_index
from regard.capture.pyramid import Results, observers
from regard.capture.recorded_layer import RecordedLayer
from regard.capture.stored_layer import write_layer
from regard.report.view.answers import Answers
from regard.report.view.opened import Opened

N = 300


def layer() -> tuple[RecordedLayer, Results]:
    drawn = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, N, 16, generator=drawn) for heads in (4, 2))
    asked = [LogSumExp(), *observers(8)]
    _, (lse, *seen) = regard.attention(query, key, key, mask=Causal(), observe=asked)
    made = RecordedLayer("attention", 0, "self")
    made.add(Call.checked(query, key, key, mask=Causal()), lse.values)
    made.norms = [(0, torch.rand(2, 4, N, generator=drawn))]
    made.values = [(0, key)]
    return made, Results(*seen)


@pytest.fixture
def file(tmp_path):
    made, seen = layer()
    file = layer_file(tmp_path, 0)
    write_layer(file, made, seen, 0)
    write_index(tmp_path, {"model": "x"}, [entry_of(made, file)], whole=True)
    return file


READ = {
    "tile": lambda r: r.tile(0, 1, 0, 1, 0, batch=1),
    "coarse tile": lambda r: r.tile(0, 1, 2, 0, 0),
    "tiles of several heads": lambda r: r.tiles(0, [(3, 0, 2, 1), (0, 1, 0, 0)], "max"),
    "tile by value": lambda r: r.tile(0, 2, 1, 0, 0, by="value"),
    "weights": lambda r: r.weights(0, 2, [5, 250], batch=1),
    "norm_weights": lambda r: r.norm_weights(0, 2, [5], [3, 4]),
    "top": lambda r: r.top(0, 1, [9, 200]).weights,
    "top, more than kept": lambda r: r.top(0, 1, [9, 200], k=20).weights,
    "received": lambda r: r.received(0, 3, 1).sum,
    "entropy": lambda r: r.entropy(0, 3),
    "distances": lambda r: r.distances(0, 3).past,
    "distances, other bins": lambda r: r.distances(0, 3, bins=4).past,
    "rollout": lambda r: r.rollout(-1),
    "observed": lambda r: r.layer(0).observed(TopK(2), 1).weights,
    "segments": lambda r: r.segments([(0, 100), (100, 300)]).shares(0, 1, rows=[250]),
}


@pytest.mark.parametrize("ask", READ.values(), ids=READ)
def test_what_is_read_is_what_was_kept(ask, file):
    """Buffers are poisoned with NaN: whatever touches more than was read shows it."""
    made, seen = layer()
    made.results = seen
    found = ask(Recording.load(file.parent))
    torch.testing.assert_close(found, ask(Recording([made])), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ask", READ.values(), ids=READ)
def test_a_file_cut_off_while_it_is_read_is_one_error(ask, file, monkeypatch):
    """In the very moment: after everything that could be looked at before the read."""
    recording, before = Recording.load(file.parent), os.preadv

    def cut_off(*given):
        os.truncate(file, 4000)
        return before(*given)

    monkeypatch.setattr(os, "preadv", cut_off)
    with pytest.raises(RegardError, match="is cut off since it was opened: it has 4,000 of") as e:
        ask(recording)
    assert str(e.value).startswith(str(file))


def test_a_copy_of_a_file_cut_off_is_not_begun(file, tmp_path):
    recording = Recording.load(file.parent)
    os.truncate(file, 4000)
    with pytest.raises(RegardError, match="cut off since it was opened"):
        recording.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_page_says_so_and_goes_on(file, monkeypatch):
    """Its own look at the sizes comes before: the file is cut after that."""
    answers, before = Answers([Opened.load(file.parent)]), os.preadv
    asked = {"layer": "0", "head": "0", "zoom": "0", "at": "0.0"}
    whole = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *given: os.truncate(file, 4000) or before(*given))
        with pytest.raises(RegardError, match="cut off since it was opened"):
            next(answers.tiles(asked))
    with file.open("r+b") as again:
        again.write(whole)
    assert len(next(answers.tiles(asked))) == 128 * 128 * 4


def test_what_was_opened_is_read_though_another_stands_in_its_place(file, tmp_path):
    recording = Recording.load(file.parent)
    known = recording.weights(0, 0, [7])
    file.unlink()
    file.write_bytes(b"another")
    assert torch.equal(recording.weights(0, 0, [7]), known)
