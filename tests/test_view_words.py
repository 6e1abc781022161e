"""Words and segments on the page of `regard view`: what the server says is the recording's own."""

import pytest
import torch

pytest.importorskip("starlette", reason='needs pip install "regard[view]"')
pytest.importorskip("httpx", reason='needs pip install "regard[dev]"')

from starlette.testclient import TestClient

from regard.capture.recording import Recording
from regard.report.view.opened import Opened
from regard.report.view.server import Site
from regard.report.view.units import Units
from viewing import recording

NAMES = ["Document", "1", ":", "lob", "ster", "Document", "2", ":", "cra", "bs", "Answer", "no"]
WORDS = [[0, 1], [1, 2], [3, 5], [5, 6], [6, 7], [8, 10], [10, 11], [11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("view") / "words"
    made = recording(len(NAMES), words=NAMES)
    made.about |= {"words": WORDS, "generated": 10}
    made.save(where)
    return where


@pytest.fixture(scope="module")
def client(folder):
    site = Site([Opened.load(folder)])
    with TestClient(site.app(), base_url="http://127.0.0.1:8000") as client:
        yield client
    site.pool.shutdown()


def answer(client, path, **parameters):
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_word_reads_words_as_the_recording_says(client, folder):
    words = Recording.load(folder).to_words()
    expected = words.weights(1, 2)
    starts = [first for first, _ in WORDS]
    for word, (first, last) in enumerate(WORDS):
        for token in range(first, last):
            fan = answer(client, "fan", layer=1, head=2, index=token, by="words")
            assert fan["index"] == first
            got = dict(fan["items"])
            row = [got.get(start, 0) for start in starts]
            torch.testing.assert_close(torch.tensor(row), expected[word], rtol=1e-5, atol=1e-7)
            assert fan["total"] == pytest.approx(1, abs=1e-5)


def test_a_word_is_read_by_words_as_the_recording_says(client, folder):
    expected = Recording.load(folder).to_words().weights(0, 1)
    for word, (first, last) in enumerate(WORDS):
        fan = answer(client, "fan", layer=0, head=1, index=last - 1, by="words", way="in")
        assert fan["index"] == first
        got = dict(fan["items"])
        column = torch.tensor([got.get(start, 0) for start, _ in WORDS])
        torch.testing.assert_close(column, expected[:, word], rtol=1e-5, atol=1e-7)


def test_pieces_of_words_join_and_others_stand_alone(client):
    assert answer(client, "about")["recordings"][0]["words"]
    pieces = answer(client, "tokens", side="words")["pieces"]
    assert pieces[2:6] == [" :", " lob ster", 0, " Document"]


def test_words_that_do_not_fit_are_left_out():
    units = Units([[0, 2], [1, 3], "no", [4, 99], [-1, 2], [3, 4], [None, 2]], 6)
    assert units.starts == [0, 2, 3, 4, 5]
    assert units.of.tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("given", [r"Document \d", "0-5, 5-10, 10-12"])
def test_shares_of_segments_are_the_recordings_own(client, folder, given):
    ranges = [(0, 5), (5, 12)] if given[0] == "D" else [(0, 5), (5, 10), (10, 12)]
    weights = Recording.load(folder).weights(1)
    for asked, rows in (({}, [10, 11]), ({"index": 9}, [9]), ({"index": 9, "by": "words"}, [8, 9])):
        found = answer(client, "segments", layer=1, given=given, **asked)
        assert [tuple(pair) for pair in found["ranges"]] == ranges
        for segment, (first, last) in enumerate(ranges):
            expected = weights[:, rows, first:last].sum(-1).mean(-1)
            got = torch.tensor([head[segment] for head in found["shares"]])
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert answer(client, "segments", layer=1, given=given)["kind"] == "generated"


@pytest.mark.parametrize(
    "given, said",
    [
        ("", "give a pattern"), ("(", "is none"), ("nowhere", "nowhere matches"),
        ("5-2", "the first smaller"), (r"\w" * 500, "nowhere matches"),
    ],
)  # fmt: skip
def test_what_is_no_segment_is_refused(client, given, said):
    response = client.get("/api/segments", params={"layer": 0, "given": given})
    assert response.status_code == 422
    assert said in response.json()["error"]
