"""Recordings: what is saved and loaded gives the reference's weights; what is broken is refused."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import regard
import regard.capture.recording
from cases import FEW, Case, assert_within, at, mapped
from regard import ALiBi, Causal, Full, Padding, Recording, RegardError, Window
from regard.call.checked import Call
from regard.capture.recording import RecordedLayer
from regard.engines import reference

ABOUT = {
    "model": "m",
    "text": "naïve 日本 🙂\n",
    "tokens": ["na", "ïve"],
    "offsets": [[0, 2], [2, 5]],
}
LONG = Case("", at(40, batch=2))


def computed(query, key, **request) -> tuple[Call, Tensor, Tensor]:
    """A call, its lse and its weights, by the reference."""
    call = Call.checked(query, key, None, **request)
    scores = reference.scores(call)
    lse = reference.log_sum_exp(scores, call.sinks)
    blind = (lse == -torch.inf)[..., None]
    return call, lse, torch.exp(scores - lse[..., None].masked_fill(blind, 0))


def plainly(query, key, **request) -> Tensor:
    """The weights as plain torch has them in float32."""
    return computed(query.float(), key.float(), **mapped(request, Tensor.float))[2]


def recorded(*calls: tuple[Call, Tensor], kind: str = "self", name: str = "layer") -> RecordedLayer:
    layer = RecordedLayer(name, 0, kind)
    for call, lse in calls:
        layer.add(call, lse)
    return layer


def through_a_file(folder, *layers: RecordedLayer) -> Recording:
    Recording(list(layers), ABOUT).save(folder)
    return Recording.load(folder)


def assert_weights(recording: Recording, truth: Tensor, plain: Tensor) -> None:
    """Those of the first layer: error ≤ 2 × (that of `plain` + rounding)."""
    for b, wanted in enumerate(truth):
        ours = recording.weights(0, batch=b)
        assert ours.dtype == torch.float32
        assert_within(ours, plain[b], wanted)


@pytest.mark.sample(every=3)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_kind_of_call_comes_back(case, tmp_path):
    (query, key, _), request = case.tensors(), case.request()
    call, lse, truth = computed(query, key, **request)
    plain = plainly(query, key, **request)
    layer = recorded((call, lse))
    loaded = through_a_file(tmp_path / "r", layer)
    for recording in (Recording([layer]), loaded):
        assert_weights(recording, truth, plain)
        (found,) = recording.layers
        sizes = (found.batch, found.heads, found.kv_heads, found.q_len, found.k_len)
        s = case.sizes
        assert sizes == (s.batch, s.heads, s.kv_heads, s.q_len, s.k_len)
    if s.batch and s.q_len > 4:
        last = loaded.weights(0, s.heads - 1, rows=[-1, 1], cols=slice(0, 5), batch=s.batch - 1)
        assert_within(last, plain[-1, -1, [-1, 1], :5], truth[-1, -1, [-1, 1], :5])


def steps(ends: list[int], window: int | None = None, **request):
    """The calls of a cache that grows to each end in turn; with a window, of a sliding one."""
    query, key, _ = LONG.tensors()
    for start, end in zip([0, *ends], ends, strict=False):
        first = max(0, start - window + 1) if window else 0
        call, lse, _ = computed(
            query[:, :, start:end], key[:, :, first:end], key_start=first, query_start=start,
            **request,
        )  # fmt: skip
        yield call, lse


@pytest.mark.parametrize("ends", [[40], [20, 21, 22, 40], [1, *range(2, 41)]], ids=len)
@pytest.mark.parametrize("window", [None, 7])
def test_decode_steps_append(ends, window, tmp_path):
    mask = Causal() & Window(7) if window else Causal()
    request = {"mask": mask, "bias": ALiBi(), "sinks": torch.arange(4.0)}
    loaded = through_a_file(tmp_path, recorded(*steps(ends, window, **request)))
    query, key, _ = LONG.tensors()
    truth, plain = computed(query, key, **request)[2], plainly(query, key, **request)
    assert_weights(loaded, truth, plain)
    assert (loaded.layers[0].q_len, loaded.layers[0].k_len) == (40, 40)
    assert_within(
        loaded.weights(0, 2, rows=slice(15, 30), cols=[3, 20, -1], batch=1),
        *(of[1, 2, 15:30][:, [3, 20, -1]] for of in (plain, truth)),
    )


def test_each_step_has_its_own_mask(tmp_path):
    """Left padding as a step sees it: a tensor of that step's size."""
    query, key, _ = LONG.tensors()
    keep = torch.arange(40) >= torch.tensor([[0], [6]])
    calls = []
    for start, end in ((0, 30), (30, 31), (31, 40)):
        mask = Padding(keep[:, :end]) & Causal()
        call, lse, _ = computed(query[:, :, start:end], key[:, :, :end], mask=mask)
        calls.append((call, lse))
    whole = {"mask": Padding(keep) & Causal()}
    truth, plain = computed(query, key, **whole)[2], plainly(query, key, **whole)
    assert_weights(through_a_file(tmp_path, recorded(*calls)), truth, plain)


def test_cross_attention_keeps_its_keys_once(tmp_path):
    query, key, _ = Case("", at(12, 30)).tensors()
    calls = [
        computed(part, key, mask=Full(), query_start=4 * n)[:2]
        for n, part in enumerate(query.split(4, 2))
    ]
    layer = recorded(*calls, kind="cross")
    assert len(layer.pieces) == 1
    assert_weights(through_a_file(tmp_path, layer), computed(query, key)[2], plainly(query, key))


def test_a_cache_filled_in_place_is_copied():
    """A static cache is one buffer, overwritten by the next step."""
    query, key, _ = LONG.tensors()
    truth, plain = computed(query, key, mask=Causal())[2], plainly(query, key, mask=Causal())
    call, lse, _ = computed(query.clone(), key.clone(), mask=Causal())
    layer = recorded((call, lse))
    for tensor in (call.query, call.key, lse):
        tensor.fill_(torch.nan)
    assert_weights(Recording([layer]), truth, plain)


def build(*names: str) -> Recording:
    query, key, _ = LONG.tensors(dtype=torch.bfloat16)
    layers = [recorded(computed(query, key, mask=Causal())[:2], name=n) for n in names]
    return Recording([*layers, RecordedLayer("mamba", 9, "self", False, "no softmax")], ABOUT)


def test_what_is_known_of_the_input_comes_back(tmp_path):
    build("encoder.0", "encoder.1").save(tmp_path / "new" / "folder")
    loaded = Recording.load(str(tmp_path / "new" / "folder"))
    assert loaded.about == ABOUT
    said = [(x.name, x.index, x.kind, x.pattern, x.reason) for x in loaded.layers]
    assert said == [
        ("encoder.0", 0, "self", True, ""),
        ("encoder.1", 0, "self", True, ""),
        ("mamba", 9, "self", False, "no softmax"),
    ]
    assert torch.equal(loaded.weights("encoder.1"), loaded.weights(1))
    assert loaded.layers[0].chunks[0].query.dtype == torch.bfloat16


def test_files_are_safetensors_and_one_json(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    monkeypatch.setattr(torch, "save", never)
    monkeypatch.setattr(torch, "load", never)
    build("a", "b").save(tmp_path)
    Recording.load(tmp_path).weights(0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["layer-000.safetensors", "layer-001.safetensors", "recording.json"]
    with safe_open(tmp_path / names[0], "pt") as file:
        assert {"key", "0.query", "0.lse"} == set(file.keys())


def test_saving_again_replaces_where_told(tmp_path):
    build("a", "b", "c").save(tmp_path)
    with pytest.raises(RegardError, match=r"holds a recording already; .* give overwrite=True"):
        build("d").save(tmp_path)
    assert len(Recording.load(tmp_path).layers) == 4
    build("d").save(tmp_path, overwrite=True)
    assert [layer.name for layer in Recording.load(tmp_path).layers] == ["d", "mamba"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("before", [[], ["x", "y"]], ids=["new", "over an older one"])
def test_what_is_interrupted_leaves_what_was(before, tmp_path, monkeypatch):
    """Interrupted in its second layer: no half a recording, no mixture of two, nothing beside."""
    folder = tmp_path / "r"
    if before:
        build(*before).save(folder)
    write_whole, written = regard.capture.recording.write_whole, []

    def interrupted(path, layer):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_whole(path, layer)

    monkeypatch.setattr(regard.capture.recording, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build("a", "b").save(folder, overwrite=True)
    assert list(tmp_path.iterdir()) == ([folder] if before else [])
    if before:
        assert [layer.name for layer in Recording.load(folder).layers] == [*before, "mamba"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import regard.capture.recording, test_recording
write_whole = regard.capture.recording.write_whole
def killed(path, layer):
    write_whole(path, layer)
    os.kill(os.getpid(), signal.SIGKILL)
regard.capture.recording.write_whole = killed
test_recording.build("a", "b").save({folder!r}, overwrite=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_a_killed_process_leaves_is_removed_by_the_next(tmp_path):
    folder = tmp_path / "r"
    build("x").save(folder)
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [layer.name for layer in Recording.load(folder).layers] == ["x", "mamba"]
    left = [path for path in tmp_path.iterdir() if path != folder]
    assert [path.name.startswith(".r.part-") for path in left] == [True]
    running = tmp_path / f".r.part-{os.getppid()}"  # of another process, which goes on
    running.mkdir()
    build("d").save(folder, overwrite=True)
    assert sorted(tmp_path.iterdir()) == [running, folder]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build("a").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(Recording.load(tmp_path / "real").layers) == 2


def test_other_things_are_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RegardError, match="holds other files; name a new folder"):
        build("a").save(tmp_path)
    with pytest.raises(RegardError, match="is a file; name a folder"):
        build("a").save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str, at: float):
    def half(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * at)])

    return half


def edit(change):
    def edited(folder):
        index = json.loads((folder / "recording.json").read_text())
        change(index, index["layers"][0])
        (folder / "recording.json").write_text(json.dumps(index))

    return edited


def edit_text(before: str, after: str):
    def edited(folder):
        text = (folder / "recording.json").read_text()
        assert before in text
        (folder / "recording.json").write_text(text.replace(before, after))

    return edited


def silent(**fields):
    """The layer without a pattern, of which the index alone says what it is."""
    return edit(lambda index, entry: index["layers"][1].update(fields))


BROKEN = {
    "no index": (drop("recording.json"), "is not a whole recording"),
    "no layer": (drop("layer-000.safetensors"), "is not whole"),
    "half an index": (cut("recording.json", 0.5), "is not a whole recording"),
    "half a layer": (cut("layer-000.safetensors", 0.5), "is not whole"),
    "no bytes": (cut("layer-000.safetensors", 0), "is not whole"),
    "another JSON": (
        lambda folder: (folder / "recording.json").write_text("[1, 2]"),
        "is not a whole recording",
    ),
    "another format": (
        edit(lambda i, x: i.update(format=99)),
        "format 99; this version reads 2: record it again",
    ),
    "an older format": (
        edit(lambda i, x: i.update(format=1)), "format 1; this version reads 2: record it again",
    ),
    "a field less": (edit(lambda i, x: i["layers"][1].pop("kind")), "layer 1 has no kind"),
    "a file outside": (
        edit(lambda i, x: x.update(file="../layer-000.safetensors")), "lies outside the recording",
    ),
    "an absolute file": (
        edit(lambda i, x: x.update(file="/etc/passwd")), "lies outside the recording",
    ),
    "a file of no name": (edit(lambda i, x: x.update(file=7)), "is not a whole recording"),
    "layers as a word": (edit(lambda i, x: i.update(layers="ab")), "layers is a str; it must be l"),
    "a layer as a word": (edit(lambda i, x: i["layers"].append("b")), "layer 2 is a str"),
    "about as a list": (edit(lambda i, x: i.update(about=[])), "about is a list; it must be dict"),
    "a name": (silent(name=3), "layer 1: name is a int; it must be str"),
    "an index": (silent(index=True), "layer 1: index is a bool; it must be int"),
    "a reason": (silent(reason=None), "layer 1: reason is a NoneType; it must be str"),
    "deep": (
        lambda folder: (folder / "recording.json").write_text("[" * 200_000), "not a whole",
    ),
    "deep in about": (
        edit_text('"about": {', '"about": {"x": ' + "[" * 200_000 + "]" * 200_000 + ","),
        "not a whole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("breaks, said", BROKEN.values(), ids=BROKEN)
def test_what_is_not_whole_is_refused(breaks, said, tmp_path):
    folder = tmp_path / "recording"
    build("a").save(folder)
    shutil.copy(folder / "layer-000.safetensors", tmp_path)
    breaks(folder)
    with pytest.raises(RegardError, match=said) as error:
        Recording.load(folder)
    assert str(folder) in str(error.value)


def test_what_was_opened_is_saved_again_as_it_is(tmp_path):
    """Values, and what was read beside the recording, go with it; its files are the same."""
    from test_record import ids, tiny

    opened = regard.record(tiny(), ids(70), tmp_path / "one", values=True)
    opened.save(tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RegardError, match="is not a whole recording"):
        Recording.load(tmp_path / "nowhere")


ASKED = {
    "layer 5": ((5,), {}, "no layer 5 in the recording; it has a, mamba"),
    "layer −1": ((-1,), {}, "no layer -1 in the recording"),
    "layer b": (("b",), {}, "no layer 'b' in the recording; it has a, mamba"),
    "no pattern": (("mamba",), {}, "layer mamba has no pattern: no softmax"),
    "head": ((0, 4), {}, "head 4 of layer a: it has 4"),
    "negative head": ((0, -1), {}, "head -1 of layer a: it has 4"),
    "batch": ((0,), {"batch": 2}, "batch 2: the recording has 2"),
    "rows": ((0,), {"rows": [3, 40]}, r"rows \[3, 40\]: layer a has 40 queries"),
    "steps": ((0,), {"rows": slice(0, 9, 2)}, "give a slice of step 1, or a list"),
    "cols": ((0,), {"cols": [3, 40]}, r"cols \[3, 40\]: layer a has 40 keys"),
}


@pytest.mark.parametrize("which, more, said", ASKED.values(), ids=ASKED)
def test_what_is_not_recorded_is_said(which, more, said):
    with pytest.raises(RegardError, match=said):
        build("a").weights(*which, **more)


def test_rows_and_cols():
    recording = build("a")
    whole = recording.weights(0)
    assert whole.shape == (4, 40, 40)
    assert torch.equal(recording.weights(0, 2), whole[2])
    assert torch.equal(recording.weights(0, rows=slice(30, 99)), whole[:, 30:])
    assert torch.equal(recording.weights(0, rows=slice(-3, None), cols=slice(9)), whole[:, -3:, :9])
    torch.testing.assert_close(recording.weights(0, 1, [7, -40, 7]), whole[1, [7, 0, 7]])
    assert recording.weights(0, 1, rows=[], cols=[]).shape == (0, 0)
