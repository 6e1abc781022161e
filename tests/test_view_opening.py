"""`regard view` answers with the page while it still opens the recordings."""

import threading

import pytest

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("httpx", reason='needs pip install "regard[dev]"')

import subprocess
import sys

from click.testing import CliRunner
from starlette.testclient import TestClient

from regard.capture.recording import INDEX
from regard.cli import main
from regard.report.view.opened import Opened
from regard.report.view.server import Site
from viewing import recording


def test_the_page_is_there_while_what_asks_for_the_recording_waits(tmp_path):
    recording(20).save(tmp_path / "one")
    site, may = Site(), threading.Event()

    def slowly():
        may.wait(60)
        return [Opened.load(tmp_path / "one")]

    site.pool.submit(site.load, slowly)
    with TestClient(site.app(), base_url="http://127.0.0.1") as client:
        assert client.get("/").status_code == 200
        assert client.get("/page/view.js").status_code == 200
        assert not site.loaded.done()
        threading.Timer(0.2, may.set).start()
        assert client.get("/api/about").json()["recordings"][0]["name"] == "one"
        assert client.get("/api/tiles?layer=0&head=0&zoom=0&at=0.0").status_code == 200
    site.pool.shutdown()


def test_a_recording_that_does_not_open_ends_the_command(tmp_path):
    recording(20).save(tmp_path / "one")
    (tmp_path / "one" / INDEX).write_text('{"format": 2, "whole": true, "layers": 7}')
    result = CliRunner().invoke(main, ["view", str(tmp_path / "one"), "--no-browser"])
    assert result.exit_code == 2
    assert "layers" in result.output.strip().splitlines()[-1]


def test_the_server_needs_no_torch_to_begin():
    source = "import sys, regard.report.view.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
