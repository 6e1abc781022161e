"""What a recording answers: segments, words, comparison, rollout; against the dense weights."""

import re

import pytest
import torch
from click.testing import CliRunner

import regard
from regard import Causal, Recording, RegardError
from regard.capture import segments
from regard.capture.compared import aligned
from regard.cli import main
from test_record import ids, tiny
from test_recording import LONG, computed, recorded

TEXT = "[A] one two [B] three four five [C] six"
TOKENS = re.findall(r" ?\[?\w+\]?", TEXT)
OFFSETS = [[m.start(), m.end()] for m in re.finditer(r" ?\[?\w+\]?", TEXT)]


def built(**about) -> tuple[Recording, torch.Tensor]:
    query, key, _ = LONG.tensors()
    query, key = query[:, :, :9], key[:, :, :9]
    call, lse, truth = computed(query, key, mask=Causal())
    about = {"text": TEXT, "tokens": TOKENS, "offsets": OFFSETS} | about
    return Recording([recorded((call, lse))], about), truth


@pytest.mark.parametrize("held", [2**23, 9 * 4], ids=["one block", "row by row"])
def test_shares_are_sums_of_weights(held, monkeypatch):
    monkeypatch.setattr(segments, "HELD", held)
    recording, truth = built()
    found = recording.segments([(0, 3), (3, 7), (5, 9), (4, 4)])
    assert found.ranges == [(0, 3), (3, 7), (5, 9), (4, 4)]
    for b in range(2):
        wanted = torch.stack([truth[b, :, :, a:z].sum(-1) for a, z in found.ranges], -1)
        shares = found.shares(0, batch=b)
        assert shares.shape == (4, 9, 4)
        torch.testing.assert_close(shares.double(), wanted, rtol=1e-5, atol=1e-6)
        one = found.shares(0, 2, rows=[8, -3], batch=b)
        torch.testing.assert_close(one.double(), wanted[2, [8, 6]], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found.shares(0, rows=slice(4, 8), batch=b).double(), wanted[:, 4:8], rtol=1e-5,
            atol=1e-6,
        )  # fmt: skip
    assert found.shares(0, 1, rows=[]).shape == (0, 4)


def test_a_pattern_begins_segments():
    recording, _ = built(generated=6)
    found = recording.segments(r"\[(\w)\]")
    assert found.names == ["A", "B", "C"]
    assert found.ranges == [(0, 3), (3, 7), (7, 9)]
    assert found.shares(0).shape == (4, 3, 3)  # the generated tokens' rows
    named = recording.segments({"all": (0, 9)})
    torch.testing.assert_close(named.shares(0), torch.ones(4, 3, 1))
    assert recording.segments(re.compile("three")).names == ["", "three"]


def test_every_token_of_a_pattern_is_in_one_segment():
    """A token begins with the space before its word, and so before the match."""
    recording, _ = built()
    ranges = recording.segments(r"\[\w\]").ranges
    assert [TOKENS[a].strip() for a, _ in ranges] == ["[A]", "[B]", "[C]"]
    assert [b for _, b in ranges] == [a for a, _ in ranges[1:]] + [9]


WRONG = {
    "no ranges": ([1, 2], "give ranges of tokens"),
    "backwards": ([(5, 2)], "segment '5:2' is 5 … 2"),
    "no match": ("zebra", "the pattern 'zebra' matches nothing in the text"),
    "no pattern": ("(", "the pattern .* is none"),
}


@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_what_names_no_segments_is_refused(given, said):
    with pytest.raises(RegardError, match=said):
        built()[0].segments(given)
    with pytest.raises(RegardError, match="a pattern needs the text"):
        Recording([], {}).segments("x")


def test_words_sum_what_is_read_and_average_what_reads():
    recording, truth = built(words=[[0, 1], [1, 4], [4, 5], [5, 9]])
    found = recording.to_words()
    assert found.words == ["[A]", "one two [B]", "three", "four five [C] six"]
    wanted = torch.stack([truth[1, :, :, a:z].sum(-1) for a, z in found.ranges], -1)
    wanted = torch.stack([wanted[:, a:z].mean(1) for a, z in found.ranges], 1)
    torch.testing.assert_close(found.weights(0, batch=1).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.weights(0, 3, rows=[3, 1], batch=1).double(), wanted[3, [3, 1]], rtol=1e-5, atol=1e-6
    )
    with pytest.raises(RegardError, match="the recording names no words"):
        built()[0].to_words()
    with pytest.raises(RegardError, match="words lie within 9 tokens"):
        built()[0].to_words([(0, 10)])


ALIGNED = {
    "the same": ("abc", "abc", [(0, 0), (1, 1), (2, 2)]),
    "one replaced": ("abcd", "abxd", [(0, 0), (1, 1), (2, 2), (3, 3)]),
    "one more": ("abcd", "abxcd", [(0, 0), (1, 1), (2, 3), (3, 4)]),
    "moved apart": ("abcd", "xxabyyd", [(0, 2), (1, 3), (3, 6)]),
    "nothing": ("abc", "", []),
}


@pytest.mark.parametrize("one, two, pairs", ALIGNED.values(), ids=ALIGNED)
def test_tokens_are_aligned(one, two, pairs):
    assert aligned(one, two) == pairs


def test_two_recordings_side_by_side():
    recording, truth = built()
    other = Recording(recording.layers, {"tokens": ["new", *TOKENS[1:]]})
    found = recording.compare(other)
    assert found.pairs.tolist() == [[n, n] for n in range(9)]
    assert not found.difference(0).any()
    shorter = Recording(recording.layers, {"tokens": [*TOKENS[:2], *TOKENS[3:], "x"]})
    both = recording.compare(shorter)
    one, two = both.weights(0, head=(1, 3), rows=[2, -1], batch=1)
    mine, theirs = both.pairs.T.tolist()
    w = truth[1].float()
    torch.testing.assert_close(one, w[1][[mine[2], mine[-1]]][:, mine])
    torch.testing.assert_close(two, w[3][[theirs[2], theirs[-1]]][:, theirs])
    torch.testing.assert_close(both.difference(0, (1, 3), [2, -1], 1), two - one)
    with pytest.raises(RegardError, match="names no tokens"):
        recording.compare(Recording([], {}))


@pytest.mark.parametrize("row", [0, 17, -1])
def test_rollout_of_one_row_is_that_of_all(row, tmp_path, monkeypatch):
    from regard.capture import rollout

    monkeypatch.setattr(rollout, "HELD", 4 * 40 * 7)
    model = tiny(num_hidden_layers=3)
    recording = regard.record(model, ids(40), tmp_path / "r")
    whole = torch.eye(40, dtype=torch.float64)
    for n in range(3):
        mean = recording.weights(n).double().mean(0)
        whole = (mean + torch.eye(40, dtype=torch.float64)) / 2 @ whole
    found = recording.rollout(row)
    torch.testing.assert_close(found.double(), whole[row], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))
    first = (recording.weights(1).mean(0) + torch.eye(40)) / 2
    torch.testing.assert_close(recording.rollout(row, layers=[1]), first[row])
    with pytest.raises(RegardError, match="row 40: the recording has 40 tokens in 3 layers"):
        recording.rollout(40)


def refused(*arguments) -> str:
    done = CliRunner().invoke(main, ["record", *map(str, arguments)])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_the_command(tmp_path):
    folder = tmp_path / "r"
    done = CliRunner().invoke(
        main, ["record", "all-MiniLM-L6-v2", "The trophy didn't fit.", str(folder), "--values"]
    )
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"recorded: {folder}, 6 layers, 9 tokens, ")
    recording = Recording.load(folder)
    assert recording.about["model"] == "all-MiniLM-L6-v2"
    words = recording.to_words().words
    assert words[1:4] == ["The", "trophy", "didn't"]
    assert recording.norm_weights(0).shape == (12, 9, 9)
    assert "holds a recording already" in refused("all-MiniLM-L6-v2", "a", folder)
    assert "give MODEL, TEXT and FOLDER" in refused("x", tmp_path / "y")
    assert "cannot read the file" in refused("x", "--file", tmp_path / "no", tmp_path / "y")
    assert "there is no model folder" in refused("./none", "a text", tmp_path / "y")
    assert not (tmp_path / "y").exists()
