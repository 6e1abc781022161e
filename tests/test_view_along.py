"""What `regard view` answers of a line along the text, of what keys add, and of files cut off."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("httpx", reason='needs pip install "regard[dev]"')

from starlette.testclient import TestClient

from regard.errors import RegardError
from regard.report.view import along
from regard.report.view.opened import Opened
from regard.report.view.page_facts import SIDE
from regard.report.view.server import Site
from viewing import recording, streamed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return streamed(tmp_path_factory.mktemp("along") / "one", tokens=3000, layers=1, heads=2)


@pytest.fixture
def client(folder):
    site = Site([Opened.load(folder)])
    with TestClient(site.app(), base_url="http://127.0.0.1:8000") as client:
        yield client
    site.pool.shutdown()


@pytest.mark.parametrize("what", along.LINES)
def test_a_line_is_of_means_and_of_the_largest(client, folder, what):
    found = client.get("/api/along", params={"layer": 0, "head": 1, "what": what}).json()
    weights = Opened.load(folder).recording.weights(0, 1).double()
    line = torch.special.entr(weights).sum(1) if what == "entropy" else weights.sum(0)
    assert found["size"] == 3
    assert found["values"] == pytest.approx(line.view(-1, 3).mean(1).tolist(), abs=1e-3)
    assert found["most"] == pytest.approx(line.view(-1, 3).amax(1).tolist(), abs=1e-3)


def test_the_last_point_is_the_mean_of_the_tokens_that_are_left():
    found = along._binned(torch.ones(2050))
    assert (found["size"], len(found["values"])) == (3, 684)
    assert found["values"][-1] == 1
    with pytest.raises(RegardError, match="not a number"):
        along._binned(torch.tensor([torch.nan]))


def test_a_line_that_was_not_recorded_is_read_where_that_is_little(monkeypatch):
    opened = Opened.of(recording(50))
    assert len(opened.along(0, 0, 0, "received")["values"]) == 50
    monkeypatch.setattr(along, "_MOST", 50)
    with pytest.raises(RegardError, match="record it without --bare"):
        opened.along(0, 1, 0, "entropy")


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("by", ["tokens", "words"])
def test_what_keys_add_is_weight_times_length(client, folder, way, by):
    asked = {"layer": 0, "head": 1, "index": 1500, "way": way, "by": by, "measure": "value"}
    found = client.get("/api/fan", params=asked).json()
    added = Opened.load(folder).recording.norm_weights(0, 1)
    if by == "words":  # two tokens each: means over those that read, sums over those read
        added = added.view(1500, 2, 1500, 2).mean(1).sum(-1)
    step = 1 if by == "tokens" else 2
    line = added[1500 // step] if way == "out" else added[:, 1500 // step]
    assert dict(found["items"]) == pytest.approx(
        {i: float(line[i // step]) for i, _ in found["items"]}, rel=1e-3, abs=1e-5
    )
    assert found["total"] == pytest.approx(float(line.sum()), rel=1e-3)


def test_tiles_of_what_keys_add(client, folder):
    asked = {"layer": 0, "head": 1, "zoom": 0, "at": "3.3", "measure": "value"}
    response = client.get("/api/tiles", params=asked)
    tile = torch.frombuffer(bytearray(response.content), dtype=torch.float32).view(SIDE, SIDE)
    rows = range(3 * SIDE, 4 * SIDE)
    expected = Opened.load(folder).recording.norm_weights(0, 1, rows, rows)
    torch.testing.assert_close(tile, expected, rtol=1e-4, atol=1e-6)


def test_tiles_end_where_one_cannot_be_read(client, monkeypatch):
    whole = Opened.tile

    def tile(self, number, tile, *others):
        if tile[3] == 1:
            raise RegardError("cut off")
        return whole(self, number, tile, *others)

    monkeypatch.setattr(Opened, "tile", tile)
    response = client.get("/api/tiles?layer=0&head=0&zoom=0&at=1.0,1.1,2.0")
    assert (response.status_code, len(response.content)) == (200, 4 * SIDE * SIDE)
    response = client.get("/api/tiles?layer=0&head=0&zoom=0&at=1.1,2.0")
    assert (response.status_code, response.json()) == (422, {"error": "cut off"})


def test_a_recording_made_anew_is_said_to_be(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    opened = Opened.load(tmp_path / "one")
    opened.check()
    (tmp_path / "other").write_bytes((tmp_path / "one" / "layer-000.safetensors").read_bytes())
    (tmp_path / "other").rename(tmp_path / "one" / "layer-000.safetensors")
    with pytest.raises(RegardError, match="recorded anew"):
        opened.check()
    (tmp_path / "one" / "layer-000.safetensors").unlink()
    with pytest.raises(RegardError, match="is gone since"):
        opened.check()


@pytest.mark.slow
def test_a_file_cut_off_while_it_is_open_does_not_end_the_server(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "one")
    command = [sys.executable, "-m", "regard.cli", "view", str(tmp_path / "one"), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        line = run.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http"))

        def asked(path):
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

        tile = "/api/tiles?layer=0&head=0&zoom=0&at=20.3"
        assert asked(tile)[0] == 200
        path = tmp_path / "one" / "layer-000.safetensors"
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(4096)
        for question in (tile, "/api/fan?layer=0&head=0&index=7", "/api/overview?layer=0"):
            status, said = asked(question)
            assert status == 422
            assert "cut off since it was opened" in json.loads(said)["error"]
        assert asked("/")[0] == 200
        path.write_bytes(whole)
        assert asked(tile)[0] == 200
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 0
