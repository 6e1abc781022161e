"""What `regard view` answers from a recording's files before torch is imported."""

import json
import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("httpx", reason='needs pip install "regard[dev]"')

from starlette.testclient import TestClient

from regard.capture.recording import INDEX
from regard.report.view.first_answers import first_answers
from regard.report.view.opened import Opened
from regard.report.view.page_facts import SIDE
from regard.report.view.server import Site
from viewing import recording, streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return streamed(tmp_path_factory.mktemp("first") / "one", silent=True)


def test_they_are_what_the_opened_recording_says(folder):
    (first,), opened = first_answers([folder]), Opened.load(folder)
    assert first.about == opened.about()
    assert first.sides == {"text": opened.pieces("text"), "decoder": []}


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize(
    "layer, tile", [(0, (3, 3, 0, 0)), (1, (1, 6, 0, 0)), (1, (2, 6, 0, 1)), (1, (0, 9, 0, 0))]
)
def test_a_coarse_tile_is_the_recordings_own(folder, layer, tile, reduce):
    (first,), opened = first_answers([folder]), Opened.load(folder)
    data = first.tile(layer, tile, reduce, 0)
    if tile[1] < 6:  # finer than what was pooled while recording
        assert data is None
        return
    found = torch.frombuffer(bytearray(data), dtype=torch.float32).view(SIDE, SIDE)
    exact = torch.nn.functional.pad(opened.recording.weights(layer, tile[0]), (0, 24, 0, 24))
    size = 1 << tile[1]
    cells = -(-1000 // size)
    exact = torch.nn.functional.pad(exact, (0, cells * size - 1024, 0, cells * size - 1024))
    pooled = exact.view(cells, size, cells, size)
    pooled = pooled.sum((1, 3)) if reduce == "sum" else pooled.amax((1, 3))
    expected = torch.zeros(SIDE, SIDE)
    if tile[3] == 0:
        expected[:cells, :cells] = pooled
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _cut(folder):
    path = folder / "layer-001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _header(folder):
    path = folder / "layer-001.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _stopped(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"whole": False}))


def _left(folder):
    (folder / "layer-001.00001.safetensors").write_bytes(b"")


def _gone(folder):
    (folder / "layer-000.safetensors").unlink()


def _outside(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace("layer-000", "../layer-000"))


def _nonsense(folder):
    (folder / INDEX).write_text('{"format": 2, "whole": true, "about": 7, "layers": [3]}')


@pytest.mark.parametrize("spoil", [_cut, _header, _stopped, _left, _gone, _outside, _nonsense])
def test_what_is_not_as_it_was_recorded_is_left_to_the_recording(tmp_path, spoil):
    folder = streamed(tmp_path / "one", tokens=40)
    assert first_answers([folder]) is not None
    spoil(folder)
    assert first_answers([folder]) is None


def test_what_save_wrote_has_no_map_that_was_pooled(tmp_path):
    recording(20).save(tmp_path / "one")
    (first,) = first_answers([tmp_path / "one"])
    assert first.about == Opened.load(tmp_path / "one").about()
    assert first.tile(0, (0, 0, 0, 0), "sum", 0) is None


def test_the_first_view_is_answered_before_the_recording_is_opened(folder):
    site, may = Site(first=first_answers([folder])), threading.Event()

    def slowly():
        may.wait(60)
        return [Opened.load(folder)]

    site.begun.set()
    site.pool.submit(site.load, slowly)
    paths = ["about", "tokens?page=0", "tiles?layer=1&head=0&zoom=6&at=0.0"]
    with TestClient(site.app(), base_url="http://127.0.0.1") as client:
        early = [client.get(f"/api/{path}") for path in paths]
        assert not site.loaded.done()
        assert [answer.status_code for answer in early] == [200, 200, 200]
        may.set()
        assert client.get("/api/overview?layer=0").status_code == 200
        later = [client.get(f"/api/{path}") for path in paths]
    assert [a.json() for a in early[:2]] == [a.json() for a in later[:2]]
    site.pool.shutdown()


def test_they_need_no_torch():
    source = "import sys, regard.report.view.first_answers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
