"""The server of `regard view`: what it answers, and whom it refuses."""

import hashlib
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from importlib.resources import files
from urllib.parse import urlsplit

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("httpx", reason='needs pip install "regard[dev]"')

from click.testing import CliRunner
from starlette.testclient import TestClient

from cases import assert_within
from recorded_truths import kept
from regard.capture.recording import Recording
from regard.cli import main
from regard.report.view.opened import Opened
from regard.report.view.page_facts import SIDE
from regard.report.view.pieces import displayed
from regard.report.view.server import Site, listen
from viewing import HOSTILE, recording, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("view") / "small"
    recording().save(where)
    return where


@pytest.fixture(scope="module")
def known(folder):
    return Recording.load(folder)


@pytest.fixture
def client(folder):
    site = Site([Opened.load(folder)])
    with TestClient(site.app(), base_url="http://127.0.0.1:8000") as client:
        yield client
    site.pool.shutdown()


def answer(client, path, **parameters):
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def values(response):
    return torch.frombuffer(bytearray(response.content), dtype=torch.float32).view(-1, SIDE, SIDE)


# What it answers


def test_tiles_are_the_recordings_own(client, known):
    places = [(0, 0), (1, 0), (1, 1), (0, 1)]
    at = ",".join(f"{row}.{col}" for row, col in places)
    for reduce in ("sum", "max"):
        asked = {"layer": 1, "head": 2, "zoom": 1, "reduce": reduce, "at": at}
        tiles = values(client.get("/api/tiles", params=asked))
        expected = known.tiles(1, [(2, 1, row, col) for row, col in places], reduce)
        assert torch.equal(tiles, expected)


def test_tiles_without_sinks_hold_the_rest(client, known):
    def pooled(weights, size):
        rest = weights.clone()
        rest[:, 0] = 0
        padded = torch.nn.functional.pad(rest, (0, 512 - 300, 0, 512 - 300))
        return padded.view(512 // size, size, -1, size).sum((1, 3))[:SIDE, :SIDE]

    both = [of.weights[0, 2] for of in reversed(kept(known.layer(1)))]
    for zoom in (0, 2):
        near, exact = (pooled(weights, 1 << zoom) for weights in both)
        asked = {"layer": 1, "head": 2, "zoom": zoom, "at": "0.0", "sinks": 0}
        (tile,) = values(client.get("/api/tiles", params=asked))
        assert_within(tile[: len(exact), : len(exact)], near, exact)
    (tile,) = values(client.get("/api/tiles", params=asked | {"reduce": "max"}))
    assert tile[:75, 0].isinf().all()
    assert not tile[:, 1:].isinf().any()


def test_one_weight_is_exact(client, known):
    for row, col in ((299, 298), (17, 3), (3, 17)):
        found = answer(client, "weight", layer=0, head=1, row=row, col=col)
        assert found == float(known.weights(0, 1, [row], [col]))


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_fan_lists_the_strongest_and_says_the_whole(client, known, way):
    found = answer(client, "fan", layer=0, head=0, index=120, way=way)
    near, exact = (
        of.weights[0, 0, 120] if way == "out" else of.weights[0, 0, :, 120]
        for of in reversed(kept(known.layer(0)))
    )
    named = [i for i, _ in found["items"]]
    weights = torch.tensor([weight for _, weight in found["items"]])
    assert_within(weights, *(line.topk(len(named)).values for line in (near, exact)))
    assert_within(weights, near[named], exact[named])
    # One number, a sum of hundreds: a chance of its own
    assert_within(torch.tensor(found["total"]), near.sum(), exact.sum(), roundings=4)
    assert found["count"] == 300
    assert_within(torch.tensor(sum(found["bins"])), near.sum(), exact.sum(), roundings=4)


def test_the_overview_is_the_mean_over_its_tokens(client, known):
    found = answer(client, "overview", layer=1)
    rows = [(i + 1) * 300 // 64 - 1 for i in range(64)]
    weights = kept(known.layer(1))[0].weights[0, :, rows]
    digits = {"rel": 1e-6, "abs": 1e-5}  # the answer has five digits behind the point
    assert found["sink"] == pytest.approx(weights[:, :, 0].mean(1).tolist(), **digits)
    assert found["largest"] == pytest.approx(weights.amax(-1).mean(1).tolist(), **digits)
    before = weights[:, range(64), [row - 1 for row in rows]].mean(1)
    assert found["before"] == pytest.approx(before.tolist(), **digits)
    entropy = torch.special.entr(weights).sum(-1).mean(1)
    assert found["entropy"] == pytest.approx(entropy.tolist(), **digits)
    far = (torch.tensor(rows)[:, None] - torch.arange(300)).abs()
    assert found["distance"] == pytest.approx((weights * far).sum(-1).mean(1).tolist(), **digits)


def test_heads_are_ranked_by_who_reads_a_word(client, known):
    found = answer(client, "reads", source="word40", target="word39")
    assert (found["sources"], found["targets"]) == ([40], [39])
    for layer in range(2):
        near, exact = (of.weights[0, :, 40, 39] for of in reversed(kept(known.layer(layer))))
        assert_within(torch.tensor(found["values"][layer]), near, exact)
    response = client.get("/api/reads", params={"source": "word40", "target": "nowhere"})
    assert response.status_code == 422
    assert "no token of the text holds 'nowhere'" in response.json()["error"]


def test_words_are_found_whole_in_part_and_across_tokens(client):
    assert answer(client, "matching", text="word7") == [7]
    assert len(answer(client, "matching", text="ord7")) == 11
    assert answer(client, "matching", text="word7 word8") == [7]
    assert answer(client, "matching", text="absent") == []


def test_tokens_come_in_pages(client):
    about = answer(client, "about")
    assert about["recordings"][0]["sides"] == {"text": 300, "decoder": 0}
    assert answer(client, "tokens", page=0)["pieces"][:2] == ["word0", " word1"]
    assert answer(client, "tokens", page=1)["pieces"] == []


@pytest.mark.parametrize(
    "about, pieces",
    [
        ({"tokens": ["[CLS]", "un", "##fit", "[SEP]"]}, ["[CLS]", "un", "fit", "[SEP]"]),
        ({"tokens": ["\u0120a", "\u2581b", "\u010a"]}, [" a", " b", "\n"]),
        (
            {"tokens": ["<s>", "A", "b"], "text": "A -b", "offsets": [(0, 0), (0, 1), (3, 4)]},
            ["<s>", "A", (" -", "b")],
        ),
        ({"tokens": ["a"], "text": "a", "offsets": [("x", None)]}, ["a"]),
        ({"tokens": ["\u00f0", "\u0141"], "text": "\u00e9", "offsets": [(0, 1), (0, 1)]},
         ["\u00e9", ""]),
        ({"tokens": None}, []),
        ({}, []),
    ],
)  # fmt: skip
def test_tokens_are_shown_as_the_text_has_them(about, pieces):
    assert displayed(about) == pieces


# Whom it refuses


@pytest.mark.parametrize("path", ["/", "/api/about", "/page/view.js", "/api/tiles"])
def test_only_its_own_page_is_answered(client, path):
    own = client.get("/api/about", headers={"origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200
    for headers in (
        {"host": "evil.example"},
        {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8001"},
    ):
        assert client.get(path, headers=headers).status_code in (400, 403), headers
    across = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert client.get(path, headers=across).status_code == 403
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get(path, headers=followed).status_code == (200 if path == "/" else 403)
    assert client.post(path, headers={}).status_code == 405


def test_every_answer_forbids_foreign_scripts(client):
    for path in ("/", "/page/view.js", "/api/about", "/api/tiles", "/absent"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "../server.py", "..%2fserver.py", "%2e%2e/%2e%2e/server.py", "../../../../etc/passwd",
        "/etc/passwd", "view.py", "..\\server.py", "vendor", "", "vendor/leaflet/LICENSE",
        "vendor//leaflet/leaflet.js", "view.js%00", "x" * 300 + ".js",
    ],
)  # fmt: skip
def test_nothing_beside_the_page_is_read(client, path):
    assert client.get(f"/page/{path}").status_code in (404, 307)


@pytest.mark.parametrize(
    "path, said",
    [
        ("fan?layer=9&head=0&index=0", "no layer 9"),
        ("fan?layer=0&head=4&index=0", "no head 4: layer 0 has heads 0 to 3"),
        ("fan?layer=0&head=0&index=300", "no query 300"),
        ("fan?layer=0&head=0&index=300&way=in", "no key 300"),
        ("fan?layer=0&head=0&index=0&way=up", "one of out, in"),
        ("fan?layer=0&head=0", "index: a whole number"),
        ("fan?layer=-1&head=0&index=0", "layer: a whole number"),
        ("fan?layer=0&head=0&index=0&batch=1", "no batch item 1"),
        ("weight?layer=0&head=0&row=0&col=300", "no weight at"),
        ("tokens?side=else", "one of text, decoder"),
        ("overview?layer=2", "no layer 2"),
        ("about?r=1", "no recording 1"),
        ("tiles?layer=0&head=0&zoom=0&at=0", "places"),
        ("tiles?layer=0&head=0&zoom=0&at=-1.0", "places"),
        ("tiles?layer=0&head=0&zoom=0&at=" + ",".join(["0.0"] * 65), "at most 64"),
        ("tiles?layer=0&head=0&zoom=40&at=0.0", "zoom 40"),
        ("tiles?layer=0&head=0&zoom=0&at=0.0&reduce=mean", "one of sum, max"),
    ],
)
def test_a_wrong_question_gets_one_sentence(client, path, said):
    response = client.get(f"/api/{path}")
    assert response.status_code == 422
    assert said in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_recording_that_is_gone_is_said_to_be(tmp_path):
    recording(20).save(tmp_path / "gone")
    with TestClient(Site([Opened.load(tmp_path / "gone")]).app(), base_url="http://127.0.0.1") as c:
        assert c.get("/api/about").status_code == 200
        shutil.rmtree(tmp_path / "gone")
        for path in ("about", "fan?layer=0&head=0&index=0", "tiles?layer=0&head=0&zoom=0&at=0.0"):
            response = c.get(f"/api/{path}")
            assert response.status_code == 422
            assert "no longer where it was opened" in response.json()["error"]


def test_nan_and_infinity_are_no_broken_json(tmp_path):
    made = recording(20)
    made.layers[0].chunks[0].query[0, 0, 5] = torch.nan
    made.save(tmp_path / "nan")
    with TestClient(Site([Opened.load(tmp_path / "nan")]).app(), base_url="http://127.0.0.1") as c:
        overview = answer(c, "overview", layer=0)
        assert None in overview["largest"]
        assert all(value is not None for value in answer(c, "overview", layer=1)["largest"])
        response = c.get("/api/fan?layer=0&head=0&index=5")
        assert response.status_code == 422
        assert "not a number" in response.json()["error"]


# The tiles left behind


def test_tiles_of_a_request_left_behind_are_not_computed(folder, monkeypatch):
    plain, may = Opened.tile, threading.Semaphore(1)

    def tile(*arguments):
        may.acquire(timeout=60)
        return plain(*arguments)

    monkeypatch.setattr(Opened, "tile", tile)
    with served(folder) as (address, site):

        def asked(path: str, size: int | None = None) -> bytes:
            """The answer, or its first bytes, after which the connection is closed."""
            connection = http.client.HTTPConnection(urlsplit(address).netloc)
            connection.request("GET", path)
            with connection.getresponse() as response:
                read = response.read(size)
            connection.close()
            return read

        path = "/api/tiles?layer=0&head=0&zoom=0&at=" + ",".join(["0.0"] * 60)
        asked(path, 4 * SIDE * SIDE)  # and leaves while the second waits
        for _ in range(3):
            asked("/api/about")  # the server has seen since that it was left
        may.release(500)
        assert len(asked(path)) == 60 * 4 * SIDE * SIDE
        # One that had begun ends, and one may have begun as it was cancelled
        assert 61 <= site.computed <= 63


# The command


def said(*arguments):
    result = CliRunner().invoke(main, ["view", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_port_that_is_taken(folder):
    sock = listen(0)
    code, output = said(folder, "--no-browser", "--port", sock.getsockname()[1])
    assert code == 2
    assert "leave --port out" in output
    sock.close()


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder):
    command = [sys.executable, "-m", "regard.cli", "view", str(folder), "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        line = run.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http"))
        assert urlsplit(address).hostname == "127.0.0.1"
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        connection.request("GET", "/api/about")
        assert json.load(connection.getresponse())["recordings"][0]["name"] == "small"
        connection.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 0
        assert run.stderr.read() == ""


def test_vendored_files_are_those_that_were_fetched():
    vendor = files("regard.report.view") / "page" / "vendor"
    listed = dict(
        reversed(line.split("  ")) for line in (vendor / "SHA256SUMS").read_text().splitlines()
    )
    assert sum(name.endswith("LICENSE") for name in listed) == 3
    for name, digest in listed.items():
        data = vendor.joinpath(*name.split("/")).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest, name


def test_hostile_tokens_are_data(tmp_path):
    recording(len(HOSTILE), words=HOSTILE).save(tmp_path / "hostile")
    site = Site([Opened.load(tmp_path / "hostile")])
    with TestClient(site.app(), base_url="http://127.0.0.1") as client:
        response = client.get("/api/tokens")
        assert response.headers["content-type"] == "application/json"
        assert all(ord(char) < 128 for char in response.text)
        pieces = response.json()["pieces"]
        shown = [piece if isinstance(piece, str) else "".join(piece) for piece in pieces]
        assert "".join(shown) == " ".join(HOSTILE)
