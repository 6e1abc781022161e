"""Files of a recording that are cut off, corrupt or hostile: one error that names the file."""

import json
import shutil
import struct

import pytest
import torch

import regard
from regard import Recording, RegardError
from regard.capture.stored import StoredTensors, write
from test_record import ids, tiny

FILE = "layer-000.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "r"
    regard.record(tiny(), ids(70), folder)
    return folder


def rewritten(folder, change, meta=None) -> None:
    """The file's header, changed; `meta` changes what it says of the layer, with its sum."""
    import zlib

    path = folder / FILE
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    if change:
        change(header)
    if meta:
        said = json.loads(header["__metadata__"]["regard"])
        meta(said)
        text = json.dumps(said)
        header["__metadata__"] = {"regard": text, "sum": f"{zlib.crc32(text.encode()):08x}"}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def header(change):
    return lambda folder: rewritten(folder, change)


def said(change):
    return lambda folder: rewritten(folder, None, change)


def tensor(name: str, **fields):
    return header(lambda h: h[name].update(fields))


def chunk(**fields):
    return said(lambda s: s["chunks"][0].update(fields))


def write_bytes(data: bytes):
    def made(folder):
        (folder / FILE).unlink()
        (folder / FILE).write_bytes(data)

    return made


def cut_off(share: float):
    def made(folder):
        data = (folder / FILE).read_bytes()
        write_bytes(data[: int(len(data) * share)])(folder)

    return made


def linked(folder):
    path = folder / FILE
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


BROKEN = {
    "no bytes": (write_bytes(b""), "a header of 0 bytes in a file of 0"),
    "cut off": (cut_off(0.7), "cut off, or damaged"),
    "cut in its header": (cut_off(0.001), "a header of .* bytes in a file of"),
    "gone": (lambda folder: (folder / FILE).unlink(), "it is not there|No such file"),
    "a link": (linked, "is a link; it may lead outside the recording"),
    "a huge header": (write_bytes(struct.pack("<Q", 2**62) + b"{}"), "a header of 46"),
    "no JSON": (write_bytes(struct.pack("<Q", 8) + b"nonsense"), "is not whole"),
    "deep JSON": (write_bytes(struct.pack("<Q", 2**20) + b"[" * 2**20), "is not whole"),
    "a list": (write_bytes(struct.pack("<Q", 2) + b"[]"), "its header is a list"),
    "no metadata": (header(lambda h: h.pop("__metadata__")), "has no __metadata__"),
    "its words changed": (
        header(lambda h: h["__metadata__"].update(regard=h["__metadata__"]["regard"] + " ")),
        "its header is damaged",
    ),
    "a dtype": (tensor("key", dtype="F8"), "key is F8"),
    "a shape": (tensor("key", shape=[1, 2, 70, 9]), "key should be bytes"),
    "a negative shape": (tensor("key", shape=[-1, -2, 70, 8]), "key is BF16"),
    "a huge shape": (tensor("key", shape=[2**40, 2**40, 2, 8]), "key should be bytes"),
    "a shape of words": (tensor("key", shape=["x"]), "whole numbers"),
    "offsets": (tensor("key", data_offsets=[10**12, 10**12 + 2240]), "key should be bytes"),
    "offsets back": (tensor("key", data_offsets=[2240, 0]), "key should be bytes"),
    "keys of another shape": (tensor("key", shape=[2, 1, 70, 8]), "queries of shape"),
    "keys of three dimensions": (tensor("key", shape=[2, 70, 8]), "do not fit together"),
    "a query of another shape": (tensor("0.query", shape=[1, 2, 140, 8]), "do not fit together"),
    "received elsewhere": (said(lambda s: s["results"].update(key_start=3)), "received counts"),
    "cells of no size": (said(lambda s: s["results"].update(rows=[0, 2, 0])), "cells of no size"),
    "other cells": (said(lambda s: s["results"].update(rows=[0, 9, 64])), "sums.weights is"),
    "a scale of NaN": (chunk(scale=float("nan")), "a number that is not finite"),
    "a scale of infinity": (chunk(scale=float("inf")), "a number that is not finite"),
    "a scale as a word": (chunk(scale="1"), "chunk 0: scale is a str; it must be float or int"),
    "no scale": (chunk(scale=None), "chunk 0: scale is a NoneType"),
    "a position": (chunk(query_start=0.5), "query_start is a float; it must be int"),
    "tensors": (chunk(mask_tensors=10**12), "no tensor 0.mask_tensors.0"),
    "a code of words": (chunk(mask_code=[1, "x"]), "mask_code must be a list of whole numbers"),
    "one key": (chunk(keys=[0]), "chunk 0: keys must be a list of whole numbers"),
    "keys back": (chunk(keys=[9, 3]), "do not fit together"),
    "a chunk": (said(lambda s: s.update(chunks=[3])), "chunk 0 is a int, not an object"),
    "chunks": (said(lambda s: s.update(chunks={"0": 1})), "chunks is a dict; it must be list"),
    "a start": (said(lambda s: s["starts"].update(key=-1)), "starts: key is -1; it counts from 0"),
    "keys beyond": (chunk(keys=[0, 99]), "a call reads keys that are not there"),
    "keys elsewhere": (chunk(key_start=5), "a call places its keys elsewhere"),
    "no such op": (chunk(mask_code=[77]), "77 is not a valid Op"),
    "an op without operands": (chunk(mask_code=[2, 5]), "a mask's WINDOW lacks operands"),
    "AND of nothing": (chunk(mask_code=[1, 16]), "a mask's AND has nothing to combine"),
    "two answers": (chunk(mask_code=[1, 1]), "a mask's program leaves 2 answers"),
    "no answer": (chunk(mask_code=[]), "a mask's program leaves 0 answers"),
    "a tensor that is not there": (chunk(mask_code=[5, 0]), "names a tensor that is not there"),
    "a step of 0": (chunk(mask_code=[10, 0]), "a mask's STEP has a size of 0"),
    "padding of another tensor": (
        said(lambda s: s["chunks"][0].update(mask_code=[5, 0], mask_tensors=1)), "no tensor",
    ),
    "a bias that is not there": (chunk(bias_code=[0, 0, 0]), "biases have no tensor"),
    "missing rows": (said(lambda s: s.update(first_row=9)), "the rows from 0 on are missing"),
    "no calls": (said(lambda s: s.update(chunks=[])), "it has no calls"),
    "a name of no text": (said(lambda s: s.update(name=3)), "name is a int"),
}  # fmt: skip


@pytest.mark.parametrize("breaks, wanted", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_not_whole_is_named(breaks, wanted, whole, tmp_path):
    """And the other layer can be read."""
    folder = tmp_path / "r"
    shutil.copytree(whole, folder)
    breaks(folder)
    recording = Recording.load(folder)
    (damage,) = recording.damaged
    assert FILE in damage
    with pytest.raises(RegardError, match=wanted) as error:
        recording.weights(0)
    assert str(folder / FILE) in str(error.value)
    torch.testing.assert_close(recording.weights(1).sum(-1), torch.ones(4, 70), rtol=0, atol=1e-5)
    if not (folder / FILE).is_symlink():
        (folder / "layer-001.safetensors").unlink()
        with pytest.raises(RegardError, match=FILE):
            Recording.load(folder)


INDEX = {
    "a file outside": (lambda i: i["layers"][0].update(file="../x"), "lies outside the recording"),
    "an absolute file": (lambda i: i["layers"][0].update(file="/etc/passwd"), "lies outside"),
    "layers of words": (lambda i: i.update(layers="ab"), "layers is a str"),
    "no whole": (lambda i: i.pop("whole"), "has no whole"),
}


@pytest.mark.parametrize("change, wanted", INDEX.values(), ids=INDEX)
def test_an_index_that_is_not_ours_is_refused(change, wanted, whole, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(whole, folder)
    index = json.loads((folder / "recording.json").read_text())
    change(index)
    (folder / "recording.json").write_text(json.dumps(index))
    with pytest.raises(RegardError, match=wanted) as error:
        Recording.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["key", "0.lse", "sums.weights", "top.indices"])
def test_verify_names_changed_numbers(name, whole, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(whole, folder)
    path = folder / FILE
    data = bytearray(path.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    start = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + start + 3] ^= 4
    path.write_bytes(data)
    recording = Recording.load(folder)
    with pytest.raises(RegardError, match=rf"{FILE} is not whole: {name} not as written"):
        recording.verify()
    Recording.load(whole).verify()


def test_tensors_come_back(tmp_path):
    tensors = {
        "a": torch.arange(6, dtype=torch.int16).reshape(2, 3), "b": torch.tensor(2.5),
        "c": torch.zeros(0, 4), "d": torch.randn(3, 5, dtype=torch.float64).mT,
        "e": torch.tensor([True, False, True]), "f": torch.randn(7).bfloat16(),
    }  # fmt: skip
    write(tmp_path / "x.safetensors", tensors, {"more": [1, "é"]})
    found = StoredTensors(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert found.said["more"] == [1, "é"]
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert found.damaged() == []
