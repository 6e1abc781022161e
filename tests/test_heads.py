"""`regard heads`: heads whose weights are known score as they are made; files of CoNLL-U."""

import json
import math

import pytest
import torch

import regard
from cases import assert_within
from regard import Causal, Full, LogSumExp, Recording, RegardError, Window
from regard.analysis import head_scores, relations
from regard.analysis.head_scores import SCORES
from regard.analysis.relations import HalvedTally, RelationTally, read_conllu
from regard.call.checked import Call
from regard.capture.recorded_layer import RecordedLayer

TOKENS = ["[CLS]", "a", "b", "c", ",", "a", "b", "d", "a", "c", ".", "[SEP]"]
SPECIAL = [True, *[False] * 10, True]
N = len(TOKENS)
READERS = range(1, N - 1)


def recording(query, key, mask=None, tokens=TOKENS, special=SPECIAL, kind="self") -> Recording:
    """A recording of one layer of these queries and keys (1, heads, tokens, dim)."""
    mask = Full() if mask is None else mask
    call = Call.checked(query, key, key, mask=mask)
    lse = regard.observe(query, key, observe=[LogSumExp()], mask=mask)[0].values
    layer = RecordedLayer("layer", 0, kind)
    layer.add(call, lse)
    return Recording([layer], {"model": "made", "tokens": tokens, "special": special})


def reading(*targets) -> Recording:
    """Heads that read, from each token, exactly the tokens that each function names, alike."""
    n = N
    query = torch.full((1, len(targets), n, n), -60.0 * math.sqrt(n))
    for head, target in enumerate(targets):
        for row in range(n):
            query[0, head, row, target(row)] = 0.0
    return recording(query, torch.eye(n).expand(1, len(targets), n, n).contiguous())


def copies(row):
    return [j for j in range(row) if TOKENS[j] == TOKENS[row]]


KNOWN = {
    "previous": lambda row: [max(row - 1, 0)],
    "next": lambda row: [min(row + 1, N - 1)],
    "first": lambda row: [0],
    "self": lambda row: [row],
    "duplicate": lambda row: copies(row) or [0],
    "induction": lambda row: [j + 1 for j in copies(row)] or [0],
    "separator": lambda row: [N - 1],
    "punctuation": lambda row: [4, 10],
}


def assert_score(found, plain, exact):
    """error ≤ 2 × (plain torch's in float32 + rounding): one number, whose own error is chance."""
    plain, exact = torch.tensor(float(plain)), torch.tensor(exact, dtype=torch.float64)
    assert_within(torch.tensor(found), plain, exact, roundings=4)


def test_heads_score_what_they_were_made_for():
    scores = regard.heads(reading(*KNOWN.values()))
    for head, name in enumerate(KNOWN):
        found = scores[0, head]
        assert_score(found.scores[name], 1, 1)
        assert found.behaviour == name or name == "induction"
        assert scores.ranked(name)[0].head == head
    assert_score(scores[0, 0].scores["entropy"], 0, 0)
    assert_score(scores[0, 7].scores["entropy"], math.log(2), math.log(2))
    assert_score(scores[0, 0].scores["distance"], 1, 1)
    assert scores[0, 0].scores["induction_random"] is None
    assert "1 layers, 8 heads, 12 tokens" in repr(scores)


def naive(weights, seen, name):
    """A score by its definition, one token after another; None where nothing is asked."""
    found = []
    for i in READERS:
        keys = {
            "previous": [i - 1] if not SPECIAL[i - 1] else [],
            "next": [i + 1] if not SPECIAL[i + 1] else [],
            "first": [0],
            "self": [i],
            "duplicate": copies(i),
            "induction": [j + 1 for j in copies(i) if j + 1 < i],
            "separator": [N - 1],
            "punctuation": [4, 10],
        }.get(name)
        p = weights[i]
        if keys is not None:
            if any(seen[i][j] for j in keys):
                found.append(sum(float(p[j]) for j in keys))
            continue
        entropy = -sum(float(x) * math.log(float(x)) for x in p if x > 0)
        many = int(seen[i].sum())
        if name == "entropy":
            found.append(entropy)
        elif name == "distance":
            found.append(sum(float(p[j]) * abs(i - j) for j in range(N)))
        elif many > 1:
            found.append(entropy / math.log(many))
    return sum(found) / len(found) if found else None


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal() & Window(3)], ids=str)
def test_scores_are_their_definitions(mask, monkeypatch):
    """Of any weights, and in strips of one row."""
    monkeypatch.setattr(head_scores, "_HELD", 1)
    drawn = torch.Generator().manual_seed(3)
    query, key = (2 * torch.randn(1, 2, N, 8, generator=drawn) for _ in range(2))
    scores = regard.heads(recording(query, key, mask))
    i, j = torch.arange(N)[:, None], torch.arange(N)
    seen = torch.ones(N, N, dtype=torch.bool) if str(mask) == "Full()" else i >= j
    seen = seen & (i - j < 3) if "Window" in str(mask) else seen
    plain, exact = (
        (query.to(dtype) @ key.to(dtype).mT / math.sqrt(8))
        .masked_fill(~seen, -math.inf)
        .softmax(-1)
        for dtype in (torch.float32, torch.float64)
    )
    for name in SCORES:
        for head in range(2):
            expected = None
            if name != "induction_random":
                expected = naive(exact[0, head], seen, name)
            if expected is None:
                assert scores[0, head].scores[name] is None, name
            else:
                near = naive(plain[0, head], seen, name)
                assert_score(scores[0, head].scores[name], near, expected)
    assert (scores[0, 0].scores["next"] is None) == ("Causal" in str(mask))


def test_without_tokens_positions_are_scored_alone():
    made = reading(KNOWN["previous"])
    made.about = {}
    scores = regard.heads(made)[0, 0].scores
    assert_score(scores["previous"], 1, 1)
    assert scores["duplicate"] is None
    assert scores["separator"] is None


def test_a_cross_layer_has_no_neighbours():
    drawn = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 2, n, 8, generator=drawn) for n in (5, N))
    made = recording(query, key, kind="cross")
    made.about = {"decoder": {"tokens": list("vwxyz")}} | made.about
    scores = regard.heads(made)[0, 1].scores
    assert scores["previous"] is None
    assert scores["distance"] is None
    near, exact = (
        float((q @ k.mT / math.sqrt(8)).softmax(-1)[0, 1, :, 0].mean())
        for q, k in ((query, key), (query.double(), key.double()))
    )
    assert_score(scores["first"], near, exact)


def test_a_table_a_picture_and_a_plot():
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib").use("Agg")
    scores = regard.heads(reading(*KNOWN.values()))
    table = scores.to_pandas()
    assert table.loc[(0, 0), "previous"] == scores[0, 0].scores["previous"]
    assert list(table.index.names) == ["layer", "head"]
    assert "<svg" in scores._repr_html_()
    assert scores.plot("entropy").has_data()
    with pytest.raises(RegardError, match="no score 'nope'; there are previous"):
        scores.plot("nope")


CONLLU = """# text = Don't stop the old dog.
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\t_\t_\t3\tadvmod\t_\t_
3\tstop\tstop\tVERB\t_\t_\t0\troot\t_\t_
4\tthe\tthe\tDET\t_\t_\t6\tdet:of\t_\t_
5\told\told\tADJ\t_\t_\t6\tamod\t_\t_
6\tdog\tdog\tNOUN\t_\t_\t3\tobj\t_\tSpaceAfter=No
7\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_
"""


@pytest.fixture
def conllu(tmp_path):
    path = tmp_path / "one.conllu"
    path.write_text(CONLLU + "\n" + CONLLU)
    return path


def test_sentences_of_conllu(conllu):
    first, second = read_conllu(conllu)
    assert first == second
    words = [first.text[a:b] for a, b in first.spans]
    assert words == ["Don't", "Don't", "stop", "the", "old", "dog", "."]
    assert (3, 5, "det") in first.edges
    assert {name for _, _, name in first.edges} == {"aux", "advmod", "det", "amod", "obj"}


@pytest.mark.parametrize("held", [1, 2**20])
def test_the_relation_that_a_head_follows(conllu, monkeypatch, held):
    """A word of two tokens: what it reads is summed, whichever strip its tokens are in."""
    monkeypatch.setattr(head_scores, "_HELD", held)
    tokens = ["[CLS]", "don't", "stop", "the", "o", "ld", "dog", "."]
    offsets = [(0, 0), (0, 5), (6, 10), (11, 14), (15, 16), (16, 18), (19, 22), (22, 23)]
    n = len(tokens)
    det = {3: 6, 1: 2}  # the → dog
    weights = torch.full((2, n, n), 1e-4)
    for row in range(n):
        weights[0, row, det.get(row, 0)] = 1.0
    # "dog" reads "stop" (0.4) less than both pieces of "old" together (0.3 + 0.2), itself apart
    weights[1, 6, [2, 4, 5, 6]] = torch.tensor([0.4, 0.3, 0.2, 0.9])
    # "o" reads "the" much, "ld" reads "dog" more: the sum decides
    weights[1, 4, 3], weights[1, 5, 6] = 0.3, 0.5
    query = weights.log()[None] * math.sqrt(n)
    made = recording(query, torch.eye(n).expand(1, 2, n, n).contiguous(), None, tokens,
                     [True, *[False] * 7])  # fmt: skip
    made.about |= {"offsets": offsets}
    found = RelationTally()
    for sentence in read_conllu(conllu):
        found.add(sentence, made)
    assert found.sentences == 2
    # "the → dog" is 2 words on, as no other is: so the offset reaches it as well
    assert found.hits["det", "head"][0].tolist() == [2, 0]
    # (head 0: of what it reads alike, the word of two pieces is read most)
    assert found.hits["amod", "dependent"][0].tolist() == [2, 2]
    assert found.hits["obj", "head"][0].tolist() == [0, 0]
    assert found.hits["amod", "head"][0].tolist() == [0, 2]
    assert found.pairs["det", "head"] == 2
    halves = HalvedTally()
    for sentence in read_conllu(conllu):
        halves.add(sentence, made)
    assert [half.sentences for half in halves.halves] == [1, 1]
    best = halves.best(0, 0, least=1)
    assert (best.share, best.baseline, best.chosen) == (1.0, 1.0, 1.0)
    assert halves.best(0, 0) is None


def test_a_word_that_reads_nothing_follows_nothing(conllu):
    """The first word of a causal head sees no other: none of it counts as read."""
    made = recording(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), Causal(), ["a", "b", "c"],
                     [False] * 3)  # fmt: skip
    top = relations._most_read(made.layers[0], [0, 1, 2], 3)
    assert top.tolist() == [[-1, 0, 0]]


WRONG = {
    "no conllu": ("one two\n", "columns; CoNLL-U has 10"),
    "empty": ("# text = a\n", "has no sentence"),
    "a head outside": (CONLLU.replace("\t6\tamod", "\t9\tamod"), "is no word of its sentence"),
}


@pytest.mark.parametrize("text, said", WRONG.values(), ids=WRONG)
def test_what_is_no_conllu_is_said(tmp_path, text, said):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(RegardError, match=said):
        list(read_conllu(path))
    with pytest.raises(RegardError, match="cannot read the file"):
        list(read_conllu(tmp_path / "none"))


def run(*arguments):
    from click.testing import CliRunner

    from regard.cli import main

    return CliRunner().invoke(main, ["heads", *map(str, arguments)])


def test_the_command_of_a_recording(tmp_path):
    pytest.importorskip("click")
    made = reading(*KNOWN.values())
    made.about |= {"text": "a <b>\x1b[1m", "model": "<i>made</i>"}
    made.save(tmp_path / "saved")
    done = run(tmp_path / "saved")
    assert done.exit_code == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "previous           0.0 1.00" in done.stdout
    assert "\x1b" not in done.stdout
    found = json.loads(run(tmp_path / "saved", "--json").stdout)
    assert found["heads"][3]["behaviour"] == "self"
    assert set(found["definitions"]) == set(SCORES)
    assert run(tmp_path / "saved", "--html", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;i&gt;made" in page
    assert "<b>\x1b" not in page
    assert page.count("<tr>") == 1 + 8 + len(SCORES)


def test_the_packaged_model_has_its_previous_token_head(conllu):
    pytest.importorskip("regard_minilm", reason="needs packages/regard-minilm")
    scores = regard.heads(conllu=conllu, sentences=1)
    assert scores.ranked("previous")[0].layer == 0
    assert scores[0, 2].behaviour == "previous"
    assert scores[0, 2].scores["induction_random"] is not None
    assert scores.sentences == 1
